//! TCP connections that the proxy opens: marked, from the right address, in bounded time.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::timeout;
use zspire_model::{HBONE_PORT, Workload};
use zspire_sys::netns::Visit;
use zspire_sys::socket;

use crate::config::{Config, Keepalive, OriginalSource};
use crate::flow::Failure;
use crate::metrics::Flag;

/// How far a connection reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reach {
    /// A program in the pod: the kernel that serves both tells of its end.
    Pod,
    /// A pod of the same machine, which may vanish with its network. Listeners for tunnels have this too: who comes is known later,
    /// and what has once been paced keeps the timers of it.
    Host,
    /// Another host, which may vanish without a word.
    Network,
}

impl Reach {
    /// From a workload to another one, or to what the mesh does not know.
    pub(crate) fn between(own: &Workload, other: Option<&Workload>) -> Self {
        match other {
            Some(other) if !own.node.is_empty() && other.node == own.node && other.cluster_id == own.cluster_id => {
                Self::Host
            }
            _ => Self::Network,
        }
    }
}

/// Makes the sockets of a pod.
#[derive(Debug, Clone)]
pub(crate) struct Sockets {
    /// The network namespace of the pod; none: that of this process.
    place: Option<Arc<Visit>>,
    /// How many listeners of this proxy share each port.
    sharing: usize,
    mark: Option<u32>,
    original_source: OriginalSource,
    /// Whether the kernel lets us take any source address.
    transparent: bool,
    /// The congestion control that connections have where nothing else is chosen for them, if it paces.
    pacing: Option<Arc<[u8]>>,
    keepalive: Option<Keepalive>,
    timeout: Duration,
}

impl Sockets {
    /// Settings, and what the kernel allows.
    pub(crate) fn new(
        config: &Config,
        original_source: OriginalSource,
        place: Option<Visit>,
        sharing: usize,
    ) -> io::Result<Self> {
        let place = place.map(Arc::new);
        let (transparent, pacing) =
            within(place.as_deref(), || (socket::can_be_transparent(), socket::pacing_control().ok().flatten()))?;
        Ok(Self {
            place,
            sharing,
            mark: config.packet_mark,
            original_source,
            transparent: original_source != OriginalSource::Off && transparent,
            pacing: pacing.map(Arc::from),
            keepalive: config.keepalive,
            timeout: config.handshake_timeout,
        })
    }

    /// Does something in the pod's network namespace; nothing that waits.
    pub(crate) fn inside<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        within(self.place.as_deref(), f)
    }

    /// How many listeners of this proxy share each port.
    pub(crate) fn sharing(&self) -> usize {
        self.sharing
    }

    /// `SO_MARK` of every socket.
    pub(crate) fn mark(&self) -> Option<u32> {
        self.mark
    }

    /// Opens a connection, from `source` if the settings and the kernel allow that.
    pub(crate) async fn connect(&self, to: SocketAddr, source: IpAddr, reach: Reach) -> Result<TcpStream, Error> {
        let socket = self.make(to, source, reach, false)?;
        self.open(socket, to, reach).await
    }

    /// The same, after `note` has been told the port that it comes from; with what that returns. None is known where ports are short.
    pub(crate) async fn connect_noted<T>(
        &self,
        to: SocketAddr,
        source: IpAddr,
        reach: Reach,
        note: impl FnOnce(u16) -> T,
    ) -> Result<(TcpStream, Option<T>), Error> {
        let socket = self.make(to, source, reach, true).or_else(|_| self.make(to, source, reach, false))?;
        let port = socket.local_addr().ok().and_then(|local| local.as_socket()).map(|local| local.port());
        let noted = port.filter(|port| *port != 0).map(note);
        Ok((self.open(socket, to, reach).await?, noted))
    }

    fn make(&self, to: SocketAddr, source: IpAddr, reach: Reach, early_port: bool) -> Result<Socket, Error> {
        let failed = |cause| Error::Failed { to, cause };
        let source = self.source(to, source).map_err(failed)?;
        let transparent = source.is_some_and(|source| !source.is_loopback());
        let options = socket::Connect { source, mark: self.mark, transparent, early_port };
        // It stays in the namespace that it is made in; connecting needs no more visit.
        let socket = self.inside(|| socket::stream(to, &options)).and_then(|made| made).map_err(failed)?;
        // Before the handshake: a peer that goes away in it is noticed as well.
        self.tune(&SockRef::from(&socket), reach);
        Ok(socket)
    }

    async fn open(&self, socket: Socket, to: SocketAddr, reach: Reach) -> Result<TcpStream, Error> {
        let failed = |cause| Error::Failed { to, cause };
        let stream = match begin(&socket, to, reach).map_err(failed)? {
            Begun::Connected => return TcpStream::from_std(socket.into()).map_err(failed),
            Begun::Waiting => TcpStream::from_std(socket.into()).map_err(failed)?,
        };
        match timeout(self.timeout, connected(&stream)).await {
            Ok(connected) => connected.map(|()| stream).map_err(failed),
            Err(_) => Err(Error::TimedOut { to, after: self.timeout }),
        }
    }

    /// The source address to take: none leaves the choice to the kernel.
    fn source(&self, to: SocketAddr, source: IpAddr) -> io::Result<Option<IpAddr>> {
        let (source, to) = (source.to_canonical(), to.ip().to_canonical());
        // What came over loopback stays there, and nothing else can reach it.
        let usable = source.is_ipv4() == to.is_ipv4() && source.is_loopback() == to.is_loopback();
        let allowed = self.transparent || source.is_loopback();
        match self.original_source {
            OriginalSource::Off => Ok(None),
            OriginalSource::WhenAllowed => Ok((usable && allowed).then_some(source)),
            OriginalSource::Required if usable && !allowed => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "ENABLE_ORIG_SRC=true, but the kernel does not allow this process foreign source addresses (CAP_NET_ADMIN)",
            )),
            OriginalSource::Required => Ok(usable.then_some(source)),
        }
    }

    /// Gives a connection that turns out to be with another machine the congestion control that it would have had.
    pub(crate) fn pace(&self, socket: &impl AsFd) {
        if let Some(pacing) = &self.pacing {
            let _ = socket::set_congestion_control(socket, pacing);
        }
    }

    /// Sets what every connection has: on one that is opened, or on a listener, whose connections inherit it.
    pub(crate) fn tune(&self, socket: &SockRef<'_>, reach: Reach) {
        // A socket that refuses an option has just been closed by its peer, which the next read tells.
        let _ = socket.set_tcp_nodelay(true);
        if reach != Reach::Network && self.pacing.is_some() {
            let _ = socket::set_congestion_control(&**socket, socket::UNPACED);
        }
        let Some(keepalive) = self.keepalive.filter(|_| reach != Reach::Pod) else { return };
        let probes = TcpKeepalive::new()
            .with_time(keepalive.time)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.retries);
        let _ = socket.set_tcp_keepalive(&probes);
        if keepalive.user_timeout {
            let _ = socket.set_tcp_user_timeout(Some(keepalive.time + keepalive.interval * keepalive.retries));
        }
    }
}

/// How far a socket that connects has come.
enum Begun {
    Connected,
    Waiting,
}

/// Has a socket connect. Within one machine the kernel mostly makes the whole handshake before the call returns, though it says that it is
/// in progress: asking at once spares a round of the event loop.
fn begin(socket: &Socket, to: SocketAddr, reach: Reach) -> io::Result<Begun> {
    let to = to.into();
    let mut result = socket.connect(&to);
    if reach != Reach::Network && result.as_ref().is_err_and(is_under_way) {
        result = socket.connect(&to);
    }
    match result {
        Ok(()) => Ok(Begun::Connected),
        Err(error) if is_under_way(&error) => Ok(Begun::Waiting),
        Err(error) => Err(error),
    }
}

fn is_under_way(error: &io::Error) -> bool {
    // EINPROGRESS, EALREADY
    matches!(error.raw_os_error(), Some(115 | 114))
}

async fn connected(socket: &TcpStream) -> io::Result<()> {
    socket.writable().await?;
    socket.take_error()?.map_or(Ok(()), Err)
}

fn within<T>(place: Option<&Visit>, f: impl FnOnce() -> T) -> io::Result<T> {
    match place {
        Some(place) => place.run(f),
        None => Ok(f()),
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot connect to {to}: {cause}")]
    Failed { to: SocketAddr, cause: io::Error },
    #[error("no answer from {to} in {after:?}{}", if to.port() == HBONE_PORT { HINT } else { "" })]
    TimedOut { to: SocketAddr, after: Duration },
}

const HINT: &str = "; maybe a network policy blocks port 15008, which mesh traffic needs";

impl Error {
    /// What the application is told over SOCKS.
    pub(crate) fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Failed { cause, .. } => cause.kind(),
            Self::TimedOut { .. } => io::ErrorKind::TimedOut,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let flag = match error {
            Error::TimedOut { to, .. } if to.port() == HBONE_PORT => Flag::NetworkPolicy,
            _ => Flag::Connect,
        };
        Self { kind: error.kind(), ..Self::new(flag, error) }.on_this_way()
    }
}

/// Closes a socket by a reset: what it was opened for did not come about.
pub(crate) fn refuse(socket: TcpStream) {
    // Without it the close is orderly, which is the worse message but no leak.
    let _ = socket.set_zero_linger();
}

/// The same address without the IPv6 form of an IPv4 one.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_accepted_inherits_the_options_of_its_listener() {
        let keepalive = Keepalive {
            time: Duration::from_secs(77),
            interval: Duration::from_secs(7),
            retries: 5,
            user_timeout: true,
        };
        let config = Config { keepalive: Some(keepalive), ..Config::default() };
        let sockets = Sockets::new(&config, OriginalSource::Off, None, 1).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        sockets.tune(&SockRef::from(&listener), Reach::Network);
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let view = SockRef::from(&accepted);
        assert!(view.tcp_nodelay().unwrap() && view.keepalive().unwrap());
        assert_eq!(view.tcp_keepalive_time().unwrap(), keepalive.time);
        assert_eq!(view.tcp_keepalive_interval().unwrap(), keepalive.interval);
        assert_eq!(view.tcp_keepalive_retries().unwrap(), keepalive.retries);
        assert_eq!(view.tcp_user_timeout().unwrap(), Some(Duration::from_secs(77 + 35)));

        let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let own = SockRef::from(&own);
        sockets.tune(&own, Reach::Pod);
        assert!(own.tcp_nodelay().unwrap() && !own.keepalive().unwrap(), "who is here cannot vanish");
    }

    #[test]
    fn what_stays_on_the_machine_is_known_by_its_node() {
        let at = |node: &str, cluster: &str| Workload {
            node: node.into(),
            cluster_id: cluster.into(),
            ..Workload::default()
        };
        let own = at("n1", "c1");
        assert_eq!(Reach::between(&own, Some(&at("n1", "c1"))), Reach::Host);
        assert_eq!(Reach::between(&own, Some(&at("n2", "c1"))), Reach::Network);
        assert_eq!(Reach::between(&own, Some(&at("n1", "c2"))), Reach::Network, "nodes are named within a cluster");
        assert_eq!(Reach::between(&own, None), Reach::Network);
        assert_eq!(Reach::between(&at("", "c1"), Some(&at("", "c1"))), Reach::Network, "two that have no node");
    }

    #[test]
    fn connection_within_the_machine_is_made_at_once_or_fails_at_once() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let socket = || socket::stream(to, &socket::Connect::default()).unwrap();
        // A kernel that is busy may leave the handshake for later, but not each time.
        let settled =
            || (0..50).map(|_| begin(&socket(), to, Reach::Pod)).find(|begun| !matches!(begun, Ok(Begun::Waiting)));
        assert!(matches!(settled(), Some(Ok(Begun::Connected))));
        drop(listener);
        assert!(matches!(settled(), Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused));
    }
}
