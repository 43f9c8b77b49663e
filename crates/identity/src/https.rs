//! Fetching one small document over HTTP or HTTPS, with limits. For key sets of token issuers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::clock::SystemClock;
use crate::grpc::{AddressError, ConnectError, Remembered, Roots, Target, Tls, tcp};
use crate::tls::Policy;

/// Fetches `url`. The answer must be 200 and at most `limit` bytes long, and all of it must be there within `deadline`.
pub async fn get(url: &str, roots: Roots, limit: usize, deadline: Duration) -> Result<Bytes, Error> {
    let fetching = async {
        let target = Target::parse(url, None)?;
        let stream = tcp(&target.host, target.port, None).await?;
        let Some(name) = target.tls else { return exchange(stream, url, limit).await };
        let clock = Arc::new(SystemClock);
        let tls = Tls {
            policy: Policy::default(),
            clock,
            roots: Arc::new(Remembered::new(roots)),
            name,
            client: None,
            alpn: b"http/1.1",
        };
        exchange(tls.handshake(stream).await?, url, limit).await
    };
    tokio::time::timeout(deadline, fetching).await.map_err(|_| Error::Timeout(deadline))?
}

async fn exchange<IO>(io: IO, url: &str, limit: usize) -> Result<Bytes, Error>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let protocol = |e: hyper::Error| Error::Protocol(e.to_string());
    let uri: http::Uri = url.parse().map_err(|_| Error::Protocol("not a URL".into()))?;
    let host = uri.authority().map(ToString::to_string).unwrap_or_default();
    let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let request = Request::get(path).header(header::HOST, host).header(header::ACCEPT, "application/json");
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| Error::Protocol(e.to_string()))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(protocol)?;
    // The connection is driven here and ends with this function.
    let answer = async {
        let response = sender.send_request(request).await.map_err(protocol)?;
        if response.status() != http::StatusCode::OK {
            return Err(Error::Status(response.status().as_u16()));
        }
        let body = Limited::new(response.into_body(), limit).collect().await;
        Ok(body.map_err(|e| Error::Protocol(e.to_string()))?.to_bytes())
    };
    tokio::select! {
        answer = answer => answer,
        Err(e) = connection => Err(protocol(e)),
    }
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Another status than 200.
    #[error("the server answered with status {0}, not with 200: check the URL")]
    Status(u16),
    /// Broken or too long.
    #[error("the answer cannot be used: {0}")]
    Protocol(String),
    /// Too slow.
    #[error("no whole answer within {} s: check that the server is the right one, and its load", .0.as_secs())]
    Timeout(Duration),
}
