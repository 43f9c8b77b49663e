//! One GET to an admin port.

use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

const TIME: Duration = Duration::from_secs(30);
/// A dump of 100,000 workloads has about 60 MB.
const MAX_BODY: usize = 1 << 30;

/// The body of `http://{address}{path}`, or why there is none and what to do.
pub(crate) fn get(address: &str, path: &str) -> Result<String, String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| format!("cannot start: {e}"))?;
    runtime.block_on(async {
        tokio::time::timeout(TIME, request(address, path))
            .await
            .unwrap_or_else(|_| Err(format!("no answer from {address} within {TIME:?}")))
    })
}

async fn request(address: &str, path: &str) -> Result<String, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        format!("{what} {address}: {error}; is a proxy running there? (--admin HOST:PORT names another)")
    };
    let stream = TcpStream::connect(address).await.map_err(|e| failed("cannot connect to", &e))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed("cannot speak HTTP with", &e))?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path)
        .header(hyper::header::HOST, "localhost")
        .body(Empty::<Bytes>::new())
        .map_err(|e| failed("cannot ask", &e))?;
    let response = sender.send_request(request).await.map_err(|e| failed("no answer from", &e))?;
    let status = response.status();
    let body =
        Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(|e| failed("broken answer from", &e))?;
    connection.abort();
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    if status.is_success() { Ok(text) } else { Err(format!("{address}{path} answered {status}: {}", text.trim())) }
}
