//! The applications of the demo: an HTTP server that answers with what it was sent, and a client. Neither knows of the mesh.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Subcommand;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::exit;

/// Longest body either of them takes.
const MAX_BODY: usize = 1 << 20;
/// How long a request may take.
const TIME: Duration = Duration::from_secs(10);

/// The applications.
#[derive(Debug, Subcommand)]
pub(crate) enum App {
    /// Serve HTTP: answers a request with its body
    #[command(hide = true)]
    Serve {
        /// Where to listen
        address: SocketAddr,
    },
    /// Send one HTTP request and print the answer
    #[command(hide = true)]
    Request {
        /// Where to
        address: SocketAddr,
        /// Body of the request
        #[arg(long, default_value = "hello")]
        body: String,
        /// Ask a SOCKS5 proxy for the connection
        #[arg(long, value_name = "ADDRESS")]
        socks5: Option<SocketAddr>,
    },
    /// Do nothing until ended: keeps a pod's namespaces alive
    #[command(hide = true)]
    Pause,
}

/// Runs one of them.
pub(super) fn run(app: App) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::complain(format_args!("cannot start: {error}"), exit::finding()),
    };
    let done = runtime.block_on(async {
        match app {
            App::Serve { address } => serve(address).await,
            App::Request { address, body, socks5 } => {
                let answer = tokio::time::timeout(TIME, request(address, body, socks5)).await;
                let answer = answer.with_context(|| format!("no answer from {address} in {TIME:?}"))??;
                exit::print(&format!("{answer}\n"));
                Ok(())
            }
            App::Pause => std::future::pending().await,
        }
    });
    match done {
        Ok(()) => exit::OK,
        Err(error) => exit::complain(error, exit::cannot_reach()),
    }
}

async fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    loop {
        let Ok((socket, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, peer));
            // A client that goes away concerns nobody else.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(socket), service)
                .await;
        });
    }
}

/// The first line says where the request came from, as the server sees it.
async fn answer(request: Request<Incoming>, peer: SocketAddr) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => Bytes::from_static(b"(too long)"),
    };
    let mut text = format!("from {}\n", peer.ip().to_canonical()).into_bytes();
    text.extend_from_slice(&body);
    Ok(Response::new(Full::new(text.into())))
}

async fn request(address: SocketAddr, body: String, socks5: Option<SocketAddr>) -> anyhow::Result<String> {
    let socket = match socks5 {
        None => TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?,
        Some(proxy) => connect_by_socks(proxy, address).await?,
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    let connection = tokio::spawn(connection);
    let request =
        Request::post("/").header(hyper::header::HOST, address.to_string()).body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await.with_context(|| format!("no answer from {address}"))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(|error| anyhow::anyhow!(error))?;
    connection.abort();
    anyhow::ensure!(status.is_success(), "{address} answered {status}");
    Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
}

async fn connect_by_socks(proxy: SocketAddr, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let SocketAddr::V4(to) = to else { anyhow::bail!("the demo asks for IPv4 addresses only") };
    let mut socket = TcpStream::connect(proxy).await.with_context(|| format!("cannot connect to {proxy}"))?;
    socket.write_all(&[5, 1, 0]).await?;
    let mut method = [0; 2];
    socket.read_exact(&mut method).await?;
    let mut ask = vec![5, 1, 0, 1];
    ask.extend_from_slice(&to.ip().octets());
    ask.extend_from_slice(&to.port().to_be_bytes());
    socket.write_all(&ask).await?;
    let mut reply = [0; 10];
    socket.read_exact(&mut reply).await.with_context(|| format!("{proxy} did not answer as SOCKS5"))?;
    anyhow::ensure!(reply[1] == 0, "the proxy at {proxy} refused the connection to {to} (SOCKS5 reply {})", reply[1]);
    Ok(socket)
}
