//! The small HTTP/1 server under admin, metrics and readiness: bounded, and never ended by one bad accept.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections served at the same time; more wait in the kernel's queue.
const CONNECTIONS: usize = 64;
/// How long a client may take to send its request head.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// How long one connection may live.
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// Pause after an accept failed, e.g. for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A port that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {what}")]
pub struct BindError {
    what: &'static str,
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// Binds `address` for `what` (a word for messages). IPv6 sockets take IPv6 only.
pub fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    let listen = || -> std::io::Result<TcpListener> {
        let socket = if address.is_ipv6() {
            let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
            socket.set_only_v6(false)?;
            socket
        } else {
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?
        };
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(128)?;
        TcpListener::from_std(socket.into())
    };
    listen().map_err(|source| BindError { what, address, source })
}

/// Serves `app` on `listener` until `stop`, then closes.
pub async fn serve(listener: TcpListener, app: Router, stop: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (app, stop) = (app.clone(), stop.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = serve_connection(stream, app) => {}
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an admin connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

async fn serve_connection(stream: TcpStream, app: Router) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    // A client that goes away or stalls concerns nobody else.
    let _ = tokio::time::timeout(CONNECTION_TIME, connection).await;
}
