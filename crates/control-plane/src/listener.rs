//! The serving port: accepts, makes TLS, and hands connections to gRPC. Bounded in number and in time, and never ended by
//! one connection that fails.
//!
//! One task for each handshake; they end with [`accept`]'s stop token.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use zspire_identity::tls::ServerTls;

use crate::auth::Connection;
use crate::metrics::{Metrics, Open};
use crate::serving::Serving;
use crate::shortage::Shortage;

/// Connections at the same time, those in their handshake included; more wait in the kernel's queue.
const CONNECTIONS: usize = 8192;
/// Connections in their handshake from one address; more are closed. A machine that opens many and says nothing is in nobody's way.
const HANDSHAKES: usize = 128;
/// How long one may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 1024;

/// Binds a port; one of IPv6 takes IPv4 too.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// A connection through its handshake.
#[derive(Debug)]
pub(crate) struct Accepted {
    stream: ServerTls<TcpStream>,
    connection: Connection,
    _open: Open,
    _slot: OwnedSemaphorePermit,
}

/// Accepts until `stop`.
pub(crate) async fn accept(
    listener: TcpListener,
    serving: Arc<Serving>,
    metrics: Arc<Metrics>,
    to: mpsc::Sender<io::Result<Accepted>>,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let handshakes = Handshakes::default();
    let tasks = TaskTracker::new();
    let mut shortage = Shortage::new("certificates and discovery");
    loop {
        let next = async {
            let slot = slots.clone().acquire_owned().await.expect("it is never closed");
            (listener.accept().await, slot)
        };
        let (accepted, slot) = tokio::select! {
            () = stop.cancelled() => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, remote)) => {
                let Some(handshake) = handshakes.begin(remote.ip()) else {
                    metrics.handshake_errors.inc();
                    continue;
                };
                let hand = Handshake { serving: serving.clone(), metrics: metrics.clone(), remote, slot };
                let (to, stop) = (to.clone(), stop.clone());
                tasks.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        accepted = hand.make(stream) => if let Some(accepted) = accepted {
                            drop(to.send(Ok(accepted)).await);
                        },
                    }
                    drop(handshake);
                });
            }
            Err(error) => tokio::select! {
                () = stop.cancelled() => break,
                () = shortage.rest(&error) => {}
            },
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// How many handshakes are under way, by address.
#[derive(Debug, Clone, Default)]
struct Handshakes(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Handshakes {
    /// Counts one until what comes back is dropped; `None` if there are too many.
    fn begin(&self, address: IpAddr) -> Option<Begun> {
        let mut counts = self.0.lock().expect("nothing panics while holding it");
        let count = counts.entry(address).or_default();
        if *count >= HANDSHAKES {
            return None;
        }
        *count += 1;
        Some(Begun { of: self.clone(), address })
    }
}

#[derive(Debug)]
struct Begun {
    of: Handshakes,
    address: IpAddr,
}

impl Drop for Begun {
    fn drop(&mut self) {
        let mut counts = self.of.0.lock().expect("nothing panics while holding it");
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

struct Handshake {
    serving: Arc<Serving>,
    metrics: Arc<Metrics>,
    remote: SocketAddr,
    slot: OwnedSemaphorePermit,
}

impl Handshake {
    async fn make(self, stream: TcpStream) -> Option<Accepted> {
        let open = Open::new(&self.metrics);
        drop(stream.set_nodelay(true));
        let why = match tokio::time::timeout(HANDSHAKE_TIME, self.serving.acceptor().accept(stream)).await {
            Ok(Ok((stream, peer))) => {
                let connection = Connection { remote: self.remote, peer };
                return Some(Accepted { stream, connection, _open: open, _slot: self.slot });
            }
            Ok(Err(error)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                format!("{error}: {cause}")
            }
            Err(_) => format!("the handshake took longer than {} s", HANDSHAKE_TIME.as_secs()),
        };
        self.metrics.handshake_errors.inc();
        tracing::debug!(remote = %self.remote, reason = why, "a connection did not get through TLS");
        None
    }
}

impl Connected for Accepted {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
