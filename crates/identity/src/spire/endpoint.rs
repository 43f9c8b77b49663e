//! Where an agent listens: a Unix socket or a TCP address (SPIFFE Workload Endpoint §4).

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// How long an agent may be silent before it is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(15);

/// The address of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// `unix:///absolute/path`
    Unix(PathBuf),
    /// `tcp://IP:port`
    Tcp(SocketAddr),
}

/// An address that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address:?} is not an endpoint: {why}; expected unix:///absolute/path or tcp://IP:port")]
pub struct EndpointError {
    address: String,
    why: &'static str,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(address: &str) -> Result<Self, EndpointError> {
        let wrong = |why| EndpointError { address: address.to_owned(), why };
        if let Some(path) = address.strip_prefix("unix://").or_else(|| address.strip_prefix("unix:")) {
            return match path.strip_prefix('/') {
                Some("") => Err(wrong("there is no path")),
                Some(_) => Ok(Self::Unix(path.into())),
                // `unix://tmp/agent.sock` names a host `tmp`.
                None => Err(wrong("the path is not absolute (a slash is missing)")),
            };
        }
        if let Some(at) = address.strip_prefix("tcp://") {
            return at.parse().map(Self::Tcp).map_err(|_| wrong("it is not an IP address with a port"));
        }
        if address.starts_with('/') {
            return Ok(Self::Unix(address.into()));
        }
        Err(wrong("it has no scheme"))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

impl Endpoint {
    /// Connects; the error says what to look at.
    pub(super) async fn connect(&self) -> io::Result<Io> {
        let connected = match self {
            Self::Unix(path) => UnixStream::connect(path).await.map(Io::Unix),
            Self::Tcp(address) => TcpStream::connect(address).await.and_then(watched).map(Io::Tcp),
        };
        connected.map_err(|cause| {
            let hint = match cause.kind() {
                io::ErrorKind::NotFound => ": is the SPIRE agent running, and is its socket mounted here?",
                io::ErrorKind::PermissionDenied => ": this user may not use the socket",
                io::ErrorKind::ConnectionRefused => ": the agent does not run, or has not replaced its old socket yet",
                _ => "",
            };
            io::Error::new(cause.kind(), format!("cannot connect to {self}: {cause}{hint}"))
        })
    }
}

/// An agent on another host may vanish without a word. The kernel asks, since to gRPC's own pings SPIRE's server objects.
fn watched(socket: TcpStream) -> io::Result<TcpStream> {
    let probes = TcpKeepalive::new().with_time(SILENCE).with_interval(SILENCE / 3).with_retries(3);
    SockRef::from(&socket).set_tcp_keepalive(&probes)?;
    Ok(socket)
}

/// A connection to an agent.
#[derive(Debug)]
pub(super) enum Io {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(io) => Pin::new(io).poll_read(cx, out),
            Self::Tcp(io) => Pin::new(io).poll_read(cx, out),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(io) => Pin::new(io).poll_write(cx, bytes),
            Self::Tcp(io) => Pin::new(io).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(io) => Pin::new(io).poll_flush(cx),
            Self::Tcp(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tcp(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let parse = |text: &str| text.parse::<Endpoint>().map(|endpoint| endpoint.to_string()).map_err(|e| e.why);
        assert_eq!(parse("unix:///run/agent.sock").as_deref(), Ok("unix:///run/agent.sock"));
        assert_eq!(parse("unix:/run/agent.sock").as_deref(), Ok("unix:///run/agent.sock"));
        assert_eq!(parse("/run/agent.sock").as_deref(), Ok("unix:///run/agent.sock"));
        assert_eq!(parse("tcp://127.0.0.1:8081").as_deref(), Ok("tcp://127.0.0.1:8081"));
        assert_eq!(parse("unix://run/agent.sock"), Err("the path is not absolute (a slash is missing)"));
        assert_eq!(parse("unix:///"), Err("there is no path"));
        assert_eq!(parse("tcp://localhost:8081"), Err("it is not an IP address with a port"));
        assert_eq!(parse("run/agent.sock"), Err("it has no scheme"));
    }
}
