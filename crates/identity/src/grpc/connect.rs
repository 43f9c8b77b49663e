//! Opening one connection to a control server: resolve, connect, TLS. Everything inside one time limit.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};

use super::client_identity::ClientIdentity;
use super::roots::{self, Remembered};
use crate::clock::{Clock, TlsTime};
use crate::tls::{self, Policy, Stream};

/// TCP, TLS and all, like ztunnel.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Called with each socket before it connects, for options such as `SO_MARK`.
pub type ConnectHook = Arc<dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync>;

/// What is needed to open a TLS connection to a named server.
pub(crate) struct Tls {
    pub(crate) policy: Policy,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) roots: Arc<Remembered>,
    pub(crate) name: ServerName<'static>,
    pub(crate) client: Option<Arc<ClientIdentity>>,
    pub(crate) alpn: &'static [u8],
}

impl Tls {
    /// Reads the roots and makes the handshake.
    pub(crate) async fn handshake(self, tcp: TcpStream) -> Result<Stream<TcpStream>, Error> {
        let Self { policy, clock, roots, name, client, alpn } = self;
        let builder = ClientConfig::builder_with_details(policy.provider.clone(), Arc::new(TlsTime(clock)))
            .with_protocol_versions(policy.versions)
            .map_err(|e| Error::Tls(tls::Error::Own(Arc::new(e))))?
            .dangerous()
            .with_custom_certificate_verifier(roots.verifier(&policy.provider)?);
        let mut config = match client {
            Some(identity) => builder.with_client_cert_resolver(identity.resolver()),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        // The client certificate is to be checked on every connection.
        config.resumption = rustls::client::Resumption::disabled();
        Stream::connect(tcp, Arc::new(config), name).await.map_err(|e| Error::Tls(tls::Error::from_io(e)))
    }
}

/// Connects to the first address of `host` that answers, each with its share of the time.
pub(crate) async fn tcp(host: &str, port: u16, hook: Option<&ConnectHook>) -> Result<TcpStream, Error> {
    let target = || format!("{host}:{port}");
    let resolve = |source| Error::Resolve { host: host.to_owned(), source };
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await.map_err(resolve)?.collect();
    let share = CONNECT_TIMEOUT / u32::try_from(addresses.len().max(1)).unwrap_or(1);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no address");
    for address in addresses {
        match tokio::time::timeout(share, connect(address, hook)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(Error::Connect { target: target(), source: last })
}

async fn connect(address: SocketAddr, hook: Option<&ConnectHook>) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(hook) = hook {
        hook(socket.as_fd())?;
    }
    socket.set_nodelay(true)?;
    socket.connect(address).await
}

/// Why there is no connection to a control server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name does not resolve.
    #[error("cannot resolve {host}: check the address and the DNS of this machine")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// Nobody answers.
    #[error("cannot connect to {target}: check that the control plane runs and that nothing blocks the port")]
    Connect {
        /// Host and port.
        target: String,
        /// The last error.
        #[source]
        source: io::Error,
    },
    /// Too slow.
    #[error("connecting to {target} took longer than {} s: check the address, and that no firewall drops what is sent there", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// Host and port.
        target: String,
    },
    /// No roots to check the server against.
    #[error(transparent)]
    Roots(#[from] roots::Error),
    /// The client certificate cannot be used.
    #[error("cannot use the client certificate in {}", .path.display())]
    Client {
        /// The file.
        path: PathBuf,
    },
    /// The handshake failed.
    #[error(
        "TLS with the control plane failed: check that its roots (CA_ROOT_CA, XDS_ROOT_CA) are those of its CA, and its name"
    )]
    Tls(#[source] tls::Error),
}
