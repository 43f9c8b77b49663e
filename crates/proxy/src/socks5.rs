//! SOCKS5 (RFC 1928) on loopback: applications that ask for a connection by name instead of being redirected.
//!
//! No authentication, CONNECT only. Unlike redirected connections, the answer says whether the connection came about.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::accept::Accepted;
use crate::flow::{self, Direction};
use crate::outbound::{Asked, Wanted};
use crate::pod::Pod;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NONE_ACCEPTABLE: u8 = 0xff;
const CONNECT: u8 = 1;

/// The answers of RFC 1928 §6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    Succeeded = 0,
    GeneralFailure = 1,
    NotAllowed = 2,
    HostUnreachable = 4,
    Refused = 5,
    CommandNotSupported = 7,
    AddressTypeNotSupported = 8,
}

/// Serves one connection of an application.
pub(crate) async fn serve(pod: Pod, mut accepted: Accepted) {
    let limit = pod.shared().config.handshake_timeout;
    let asked = match timeout(limit, negotiate(&mut accepted.socket)).await {
        Ok(Ok(asked)) => asked,
        Ok(Err(error)) => return tracing::debug!(source = %accepted.source, %error, "not SOCKS5"),
        Err(_) => return tracing::debug!(source = %accepted.source, "SOCKS5 request not finished in time"),
    };
    // The application came over loopback, and its connection leaves from the pod's address.
    let source = match pod.local().await {
        Ok(local) => local.workload.addresses.first().map(|ip| SocketAddr::new(*ip, accepted.source.port())),
        Err(error) => {
            let metrics = &pod.shared().metrics;
            flow::deny_early(metrics, Direction::Outbound, accepted.source, None, error.label(), &error);
            // An application that does not take the answer is refused all the same.
            let _ = answer(&mut accepted.socket, Reply::GeneralFailure, (Ipv4Addr::UNSPECIFIED, 0).into()).await;
            return;
        }
    };
    let source = source.unwrap_or(accepted.source);
    let established = Wanted { source, destination: asked }.establish(&pod).await;
    let (reply, bound) = match &established {
        Ok(established) => (Reply::Succeeded, established.local_address()),
        Err(failure) => (Reply::of(failure.kind), (Ipv4Addr::UNSPECIFIED, 0).into()),
    };
    let answered = answer(&mut accepted.socket, reply, bound).await;
    if let (Ok(established), Ok(())) = (established, answered) {
        pod.connections().spawn(established.relay(accepted.socket));
    }
}

/// Reads what is asked for. Every step has a fixed size or one byte of length.
pub async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S) -> io::Result<Asked> {
    let [version, methods] = read(socket).await?;
    if version != VERSION {
        return Err(io::Error::new(ErrorKind::InvalidData, "not SOCKS version 5"));
    }
    let mut offered = vec![0; methods.into()];
    socket.read_exact(&mut offered).await?;
    if !offered.contains(&NO_AUTHENTICATION) {
        socket.write_all(&[VERSION, NONE_ACCEPTABLE]).await?;
        return Err(io::Error::new(ErrorKind::InvalidData, "the client insists on authentication"));
    }
    socket.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let [version, command, _, kind] = read(socket).await?;
    let refusal = match (version, command, kind) {
        (VERSION, CONNECT, 1 | 3 | 4) => None,
        (VERSION, CONNECT, _) => Some(Reply::AddressTypeNotSupported),
        (VERSION, ..) => Some(Reply::CommandNotSupported),
        _ => Some(Reply::GeneralFailure),
    };
    if let Some(reply) = refusal {
        answer(socket, reply, (Ipv4Addr::UNSPECIFIED, 0).into()).await?;
        return Err(io::Error::new(ErrorKind::InvalidData, format!("refused: {reply:?}")));
    }
    Ok(match kind {
        1 => Asked::Address(SocketAddr::new(Ipv4Addr::from(read::<4>(socket).await?).into(), port(socket).await?)),
        4 => {
            let ip = IpAddr::from(Ipv6Addr::from(read::<16>(socket).await?)).to_canonical();
            Asked::Address(SocketAddr::new(ip, port(socket).await?))
        }
        _ => {
            let [length] = read(socket).await?;
            let mut name = vec![0; length.into()];
            socket.read_exact(&mut name).await?;
            let name = String::from_utf8(name).map_err(|_| io::Error::new(ErrorKind::InvalidData, "hostname"))?;
            let port = port(socket).await?;
            match name.parse::<IpAddr>() {
                Ok(ip) => Asked::Address(SocketAddr::new(ip, port)),
                Err(_) => Asked::Hostname(name.to_ascii_lowercase().into(), port),
            }
        }
    })
}

async fn read<const N: usize>(socket: &mut (impl AsyncRead + Unpin)) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn port(socket: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
    Ok(u16::from_be_bytes(read(socket).await?))
}

async fn answer(socket: &mut (impl AsyncWrite + Unpin), reply: Reply, bound: SocketAddr) -> io::Result<()> {
    let mut bytes = vec![VERSION, reply as u8, 0];
    match bound.ip() {
        IpAddr::V4(ip) => {
            bytes.push(1);
            bytes.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes.push(4);
            bytes.extend_from_slice(&ip.octets());
        }
    }
    bytes.extend_from_slice(&bound.port().to_be_bytes());
    socket.write_all(&bytes).await
}

impl Reply {
    fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::PermissionDenied => Self::NotAllowed,
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::NotFound | ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
                Self::HostUnreachable
            }
            _ => Self::GeneralFailure,
        }
    }
}
