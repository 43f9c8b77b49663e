//! The proxy of one pod, as the control side holds it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use zspire_model::Reader;
use zspire_sys::socket::{self, Listen};

use crate::accept::{Accepted, accept};
use crate::config::{Config, Listeners, OriginalSource};
use crate::connect::{Reach, Sockets};
use crate::flow::Table;
use crate::live::{Reason, Verdict};
use crate::metrics::Metrics;
use crate::pod::{Pod, PodSpec};
use crate::resolve::Resolver;
use crate::spread::{Begun, Spread};
use crate::watch::Newest;
use crate::workers::Workers;
use crate::{dns, outbound, plaintext, socks5};

/// Connections that wait to be accepted; the kernel may allow fewer.
pub(crate) const BACKLOG: i32 = 4096;

/// How long resets may take to be written when connections are cut; a peer that does not read is not waited for.
const RESETS: Duration = Duration::from_millis(500);

/// What all pods of the process share.
#[derive(Debug)]
pub struct Shared {
    pub config: Config,
    pub mesh: Reader,
    pub metrics: Metrics,
    pub connections: Table,
    /// Tunnels that the process is opening to pods of its machine, which may be its own.
    pub begun: Begun,
    /// Changes whenever a connection that was allowed may be denied now.
    pub authorization: watch::Receiver<u64>,
    /// Whether the mesh has been told as a whole, workloads and policies; never false again once it is true.
    pub discovered: watch::Receiver<bool>,
    /// Changes whenever a peer that was trusted may not be any more, besides with the pods' own credentials.
    pub trust: watch::Receiver<u64>,
    /// Looks up names of workloads that have no address.
    pub resolver: Resolver,
    /// Asks for what the mesh does not show; none if it shows all that there is.
    pub on_demand: Option<Arc<dyn OnDemand>>,
}

/// Asks discovery for single resources, where not all of them are followed.
pub trait OnDemand: fmt::Debug + Send + Sync + 'static {
    /// Completes when the mesh shows what the key leads to, or shows that it leads nowhere. The key is `network/address`
    /// or `namespace/hostname`. An error means that nobody knows, however long it is waited for: bound the time.
    fn get(&self, key: String) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;
}

/// A running proxy of one pod. Dropping it cuts its connections.
#[derive(Debug)]
pub struct Proxy {
    drain: CancellationToken,
    workers: TaskTracker,
    listeners: Listeners,
    cut: DropGuard,
}

/// Why a proxy does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port cannot be had.
    #[error("cannot listen on {address} ({what}){}", hint(.cause))]
    Listen {
        /// The listener.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        #[source]
        cause: io::Error,
    },
    /// The pod's network namespace cannot be had.
    #[error("cannot enter the pod's network namespace (CAP_SYS_ADMIN)")]
    Enter(#[source] io::Error),
}

fn hint(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::AddrInUse => ": another proxy serves this namespace already, or a program has taken the port",
        io::ErrorKind::PermissionDenied => ": the process may not use the port or PACKET_MARK (CAP_NET_ADMIN)",
        _ => "",
    }
}

/// The listening sockets of one worker.
struct Sockets4 {
    outbound: Option<std::net::TcpListener>,
    inbound: std::net::TcpListener,
    plaintext: Option<std::net::TcpListener>,
    socks5: Option<std::net::TcpListener>,
    dns: Vec<dns::Sockets>,
}

impl Proxy {
    /// Serves a pod on every worker; it listens when this returns. Blocks for a few system calls.
    pub fn start(workers: &Workers, shared: &Arc<Shared>, mut spec: PodSpec) -> Result<Self, StartError> {
        // Within one host nothing would bring the answers to a foreign address back to this process.
        let original_source = if spec.only.is_some() { OriginalSource::Off } else { shared.config.original_source };
        let sockets = Sockets::new(&shared.config, original_source, spec.place.take(), workers.count());
        let sockets = sockets.map_err(StartError::Enter)?;
        let share = Share { sockets: &sockets, workers: workers.count(), overlap: spec.overlap };
        let sets = sockets.inside(|| share.listen_all(&mut spec.listeners)).map_err(StartError::Enter)??;
        let (drain, cut, tracker) = (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
        let newest = Newest::default();
        for (number, ((worker, set), spread)) in workers.iter().zip(sets).zip(Spread::over(workers.count())).enumerate()
        {
            let (shared, spec, sockets, newest) = (shared.clone(), spec.clone(), sockets.clone(), newest.clone());
            let (drain, cut, running) = (drain.clone(), cut.clone(), tracker.token());
            worker.spawn(move || {
                serve(Pod::new(shared, &spec, number, sockets, newest, drain), set, spread, cut, running)
            });
        }
        tracker.close();
        Ok(Self { drain, workers: tracker, listeners: spec.listeners, cut: cut.drop_guard() })
    }

    /// Where it listens, with the ports that the kernel chose.
    pub fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    /// Takes no new connections: what waits to be accepted still is, then listeners are closed, and peers are told not to open
    /// streams. Live connections go on.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Waits until a draining proxy has no connection left. Safe to cancel.
    pub async fn drained(&self) {
        self.workers.wait().await;
    }

    /// Cuts the connections that are left, at once; the future completes when their peers have been told.
    pub fn cut(self) -> impl Future<Output = ()> {
        let Self { workers, cut, .. } = self;
        drop(cut);
        async move { workers.wait().await }
    }
}

/// How the listening sockets of the workers share a port.
struct Share<'a> {
    sockets: &'a Sockets,
    workers: usize,
    overlap: bool,
}

impl Share<'_> {
    /// The sockets of all workers.
    fn listen_all(&self, listeners: &mut Listeners) -> Result<Vec<Sockets4>, StartError> {
        let Listeners { outbound, inbound, plaintext, socks5, dns } = listeners;
        let mut set = |first| {
            Ok(Sockets4 {
                outbound: outbound.as_mut().map(|at| self.listen("outbound", at, Reach::Pod, first)).transpose()?,
                inbound: self.listen("inbound", inbound, Reach::Host, first)?,
                plaintext: plaintext
                    .as_mut()
                    .map(|at| self.listen("plaintext inbound", at, Reach::Network, first))
                    .transpose()?,
                socks5: socks5.as_mut().map(|at| self.listen("SOCKS5", at, Reach::Pod, first)).transpose()?,
                dns: self.listen_dns(dns, first)?,
            })
        };
        (0..self.workers).map(|worker| set(worker == 0)).collect()
    }

    /// Listens for queries. Not every pod has IPv6 on loopback, and one without goes on without.
    fn listen_dns(&self, at: &mut dns::Listen, first: bool) -> Result<Vec<dns::Sockets>, StartError> {
        let mut sockets = Vec::new();
        if let Some(address) = &mut at.first {
            sockets.push(self.listen_dns_at(address, first)?);
        }
        if let Some(mut address) = at.second {
            match self.listen_dns_at(&mut address, first) {
                Ok(listening) => {
                    at.second = Some(address);
                    sockets.push(listening);
                }
                Err(error) => {
                    tracing::info!(%error, "DNS queries of a pod are taken over IPv4 only");
                    at.second = None;
                }
            }
        }
        Ok(sockets)
    }

    fn listen_dns_at(&self, address: &mut SocketAddr, first: bool) -> Result<dns::Sockets, StartError> {
        // The port that the kernel chose for one is the port of both.
        let tcp = self.listen("DNS over TCP", address, Reach::Pod, first)?;
        let failed = |cause| StartError::Listen { what: "DNS", address: *address, cause };
        let udp = dns::datagrams(*address, self.sockets.mark(), self.workers > 1 || self.overlap).map_err(failed)?;
        Ok(dns::Sockets { udp, tcp })
    }

    /// Listens, and notes the port that the kernel chose for the other workers.
    fn listen(
        &self,
        what: &'static str,
        address: &mut SocketAddr,
        reach: Reach,
        first: bool,
    ) -> Result<std::net::TcpListener, StartError> {
        let failed = |cause| StartError::Listen { what, address: *address, cause };
        let listen = |reuse_port| {
            socket::listen(&Listen {
                address: *address,
                mark: self.sockets.mark(),
                reuse_port,
                transparent: false,
                v6_only: false,
                backlog: BACKLOG,
            })
        };
        let shared = self.workers > 1 || self.overlap;
        if shared && first && address.port() != 0 && !self.overlap {
            // A port that is shared can be joined by anybody of this user: first see that nobody has it.
            drop(listen(false).map_err(failed)?);
        }
        let listener = listen(shared).map_err(failed)?;
        // What is accepted inherits it: nothing has to be set for each connection.
        self.sockets.tune(&SockRef::from(&listener), reach);
        address.set_port(listener.local_addr().map_err(failed)?.port());
        Ok(listener)
    }
}

/// Serves a pod on this worker until it has drained or is cut.
async fn serve(pod: Pod, sockets: Sockets4, spread: Spread, cut: CancellationToken, _running: TaskTrackerToken) {
    let placing = spread.placing();
    let served = async {
        tokio::join!(
            accept_any(sockets.outbound, &pod, outbound::serve),
            accept(sockets.inbound, &pod, |pod, accepted| placing(pod, accepted).serve()),
            spread.take_over(&pod),
            accept_any(sockets.plaintext, &pod, plaintext::serve),
            accept_any(sockets.socks5, &pod, socks5::serve),
            dns::serve(&pod, &pod.shared().config.dns, sockets.dns),
        );
        pod.drain().cancelled().await;
        pod.tunnels().close();
        pod.connections().finished().await;
    };
    let watched = async {
        pod.keep_watch().await;
        std::future::pending().await
    };
    tokio::select! {
        () = served => {}
        () = watched => {}
        () = cut.cancelled() => {
            pod.tunnels().close();
            cut_off(&pod).await;
        }
    }
}

/// Accepts until the pod drains, where there is something to listen at.
async fn accept_any<F: Future<Output = ()> + 'static>(
    listener: Option<std::net::TcpListener>,
    pod: &Pod,
    serve: fn(Pod, Accepted) -> F,
) {
    match listener {
        Some(listener) => accept(listener, pod, serve).await,
        None => pod.drain().cancelled().await,
    }
}

/// Ends what is left. Both ends of a connection are told by a reset: a task that is merely dropped would close its sockets in good
/// order, and an application would take what it has for all there is.
async fn cut_off(pod: &Pod) {
    pod.live().cut_all(&Verdict::new(Reason::Shutdown, "the proxy is shutting down"));
    let _ = tokio::time::timeout(RESETS, pod.connections().finished()).await;
    pod.connections().abort();
    pod.connections().finished().await;
}
