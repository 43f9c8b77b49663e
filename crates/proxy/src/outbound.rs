//! Connections that the pod opens: routed, then carried in a tunnel or as they are.
//!
//! `Accepted → Routed → Tunnelled | Direct`: the route is a value, decided from one snapshot; this file carries it out.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use smallvec::SmallVec;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use zspire_hbone::headers::{Baggage, Forwarded, Headers, Kind, TraceParent};
use zspire_hbone::{End, Request, Stream, Target as HboneTarget, copy};
use zspire_identity::{Credentials, ExpectedPeers};
use zspire_model::route::{self, Authority, Destination, Path, Reject, RouteRequest, Target, Tunnel, Upstream};
use zspire_model::{Service, Snapshot, Str, Workload};

use crate::accept::Accepted;
use crate::connect::Reach;
use crate::flow::{self, About, Direction, Failure, Flow, Transport};
use crate::live::Place;
use crate::metrics::{Flag, Reporter};
use crate::pod::{Local, Pod};
use crate::resolve;
use crate::tunnels::{self, Key, Opened};

/// Serves one redirected connection.
pub(crate) async fn serve(pod: Pod, accepted: Accepted) {
    // A connection that was not redirected was made to this port itself, which routing refuses.
    let Ok(original) = accepted.destination() else { return accepted.refuse() };
    let wanted = Wanted { source: accepted.source, destination: Asked::Address(original) };
    match wanted.establish(&pod).await {
        // A task of its own: while the connection lives, only the relay's state is held.
        Ok(established) => pod.connections().spawn(established.relay(accepted.socket)),
        Err(_) => accepted.refuse(),
    }
}

/// What a connection asks for.
#[derive(Debug, Clone)]
pub enum Asked {
    /// An address.
    Address(SocketAddr),
    /// A name and a port.
    Hostname(Str, u16),
}

/// A connection that the pod wants.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) source: SocketAddr,
    pub(crate) destination: Asked,
}

/// A connection whose route is decided and whose addresses are known.
struct Routed {
    local: Arc<Local>,
    /// The address that it leaves by.
    source: IpAddr,
    connect: SocketAddr,
    upstream: Upstream,
    service: Option<Arc<Service>>,
    /// Among how many the endpoint was chosen.
    choices: usize,
}

/// A connection that is carried from here on.
pub(crate) struct Established {
    flow: Flow,
    way: Way,
}

enum Way {
    Tunnelled(Box<Stream>, Place),
    Direct(TcpStream, Place),
}

/// How often a connection is tried on another endpoint when one cannot be reached. Nothing of the application's has been
/// read until one is.
const RETRIES: usize = 2;
/// An endpoint that has not answered by then is given up if there is another.
const PATIENCE: Duration = Duration::from_secs(4);
/// No other endpoint is tried after this time.
const RETRY_TIME: Duration = Duration::from_secs(10);

/// A connection that goes nowhere, and what metrics call the reason.
struct Refused {
    reason: &'static str,
    failure: Failure,
}

impl Refused {
    fn new(reason: &'static str, failure: Failure) -> Self {
        Self { reason, failure }
    }
}

/// Endpoints that have failed.
type Failed = SmallVec<[Str; RETRIES]>;

impl Wanted {
    /// Routes and connects; an endpoint that cannot be reached is replaced by another. A failure has been logged and counted.
    pub(crate) async fn establish(mut self, pod: &Pod) -> Result<Established, Failure> {
        let (started, mut failed) = (Instant::now(), Failed::new());
        let mut routed = match self.route(pod, &failed).await {
            Ok(routed) => routed,
            Err(Refused { reason, failure }) => {
                let metrics = &pod.shared().metrics;
                flow::deny_early(metrics, Direction::Outbound, self.source, self.original(), reason, &failure);
                return Err(failure);
            }
        };
        let mut flow = pod.open(routed.about(&self));
        loop {
            let others = failed.len() < RETRIES && routed.choices > failed.len() + 1;
            let failure = match self.attempt(pod, &routed, others).await {
                Ok(way) => {
                    flow.opened();
                    return Ok(Established { flow, way });
                }
                Err(failure) => failure,
            };
            let another = match &routed.upstream.workload {
                Some(workload) if others && failure.another_way && started.elapsed() < RETRY_TIME => {
                    failed.push(workload.uid.clone());
                    // Without another one, what has failed is what is told.
                    self.route(pod, &failed).await.ok()
                }
                _ => None,
            };
            let Some(another) = another else {
                flow.finish(false, Err(failure.clone()));
                return Err(failure);
            };
            pod.shared().metrics.retried(failure.flag);
            tracing::info!(
                source = %self.source,
                endpoint = %routed.connect,
                error = %failure,
                next = %another.connect,
                "an endpoint cannot be reached, another one is tried"
            );
            flow = flow.by_another_way(another.about(&self));
            routed = another;
        }
    }

    async fn attempt(&self, pod: &Pod, routed: &Routed, others: bool) -> Result<Way, Failure> {
        let own = match &routed.upstream.path {
            Path::Tcp => None,
            Path::Hbone(_) | Path::DoubleHbone { .. } => routed.local.workload.identity(),
        };
        // From now on, what becomes of the pod's identity concerns it.
        let place = pod.live().enter_opened(own);
        // And what had become of it while discovery or a resolver was asked.
        let known = pod.known();
        let same = |now: &Arc<Local>| now.workload.identity() == routed.local.workload.identity();
        if !known.here().is_some_and(same) {
            let why = "the pod is no longer the workload that the connection was routed for";
            return Err(Failure::new(Flag::IdentityError, why));
        }
        // Not a matter of the endpoint, nor of its time.
        let credentials = match &routed.upstream.path {
            Path::Tcp => None,
            _ => Some(place.unless_cut(pod.credentials(&routed.local)).await?),
        };
        let carrying = routed.carry_out(self, pod, place, credentials);
        if !others {
            return carrying.await;
        }
        timeout(PATIENCE, carrying).await.unwrap_or_else(|_| {
            let why = format_args!("{} has not answered in {PATIENCE:?}", routed.connect);
            Err(Failure { kind: ErrorKind::TimedOut, ..Failure::new(Flag::Connect, why) }.on_this_way())
        })
    }

    fn original(&self) -> Option<SocketAddr> {
        match self.destination {
            Asked::Address(address) => Some(address),
            Asked::Hostname(..) => None,
        }
    }

    async fn route(&mut self, pod: &Pod, failed: &[Str]) -> Result<Routed, Refused> {
        let local = pod.local().await;
        let local = local.map_err(|error| Refused::new(error.label(), Failure::new(Flag::Connect, error)))?;
        let source = self.leave_by(&local)?;
        let mut route = self.discover(pod, &local, failed).await?;
        if let (Err(Reject::UnknownHostname(_)), Asked::Hostname(name, port)) = (&route.decision, &self.destination) {
            let (name, port) = (name.clone(), *port);
            let like = Some(self.source.ip()).filter(|ip| !ip.is_loopback());
            self.destination = Asked::Address((resolve(pod, &name, like).await?, port).into());
            route = self.discover(pod, &local, failed).await?;
        }
        let refused = |reject: Reject| {
            let label = label(&reject);
            Refused::new(label, Failure { kind: kind(&reject), ..Failure::new(Flag::Connect, reject) })
        };
        let upstream = route.decision.map_err(refused)?;
        let upstream = match &upstream.connect {
            Target::Address(_) => upstream,
            Target::Resolve { hostname, .. } => {
                let like = self.original().map(|address| address.ip());
                pod.shared().metrics.looked_up(&local.workload, hostname);
                let ip = resolve(pod, hostname, like).await?;
                upstream.resolved(ip)
            }
        };
        let Target::Address(connect) = upstream.connect else {
            return Err(Refused::new("no_address", Failure::new(Flag::Connect, "the route has no address")));
        };
        Ok(Routed { local, source, connect, upstream, service: route.service, choices: route.choices })
    }

    /// The other end may ask policies about the address that a connection leaves by: it is the one that it came from only if
    /// that is the workload's.
    fn leave_by(&self, local: &Local) -> Result<IpAddr, Refused> {
        let (source, workload) = (self.source.ip(), &local.workload);
        leave_by(source, &workload.addresses).ok_or_else(|| {
            let why = format_args!("{source} is not an address of workload {}, and it has none like it", workload.uid);
            let failure = Failure { kind: ErrorKind::PermissionDenied, ..Failure::new(Flag::Deny, why) };
            Refused::new("foreign_source", failure)
        })
    }

    /// Routes; where resources are discovered on demand, what the route depends on is asked for first. What nobody answers
    /// for is refused: only what the mesh certainly does not know passes through.
    async fn discover(&self, pod: &Pod, local: &Local, failed: &[Str]) -> Result<route::Route, Refused> {
        let Some(on_demand) = &pod.shared().on_demand else { return Ok(self.ask(pod, local, failed)) };
        let network = &local.workload.network;
        let mut wanted = self.original().map(|address| address.ip()).and_then(|ip| {
            let known = |snapshot: &Snapshot| {
                !snapshot.services_at(network, ip).is_empty() || snapshot.workload_at(network, ip).is_some()
            };
            (!pod.mesh(known)).then(|| format!("{network}/{ip}"))
        });
        let limit = pod.shared().config.workload_timeout;
        // A service, its waypoint and the gateway of its network: no route depends on more.
        for _ in 0..3 {
            if let Some(key) = wanted.take() {
                let failed = |why| {
                    let why = format_args!("cannot discover {key}: {why}");
                    Refused::new("no_discovery", Failure::new(Flag::Connect, why))
                };
                let answer = timeout(limit, on_demand.get(key.clone())).await;
                answer.unwrap_or_else(|_| Err(format!("no answer in {limit:?}"))).map_err(failed)?;
            }
            let route = self.ask(pod, local, failed);
            match &route.decision {
                // What has failed is known, and asking for it changes nothing.
                Err(Reject::NoWaypoint(gateway) | Reject::NoNetworkGateway { gateway, .. }) if failed.is_empty() => {
                    wanted = Some(gateway.destination.to_string());
                }
                _ => return Ok(route),
            }
        }
        Ok(self.ask(pod, local, failed))
    }

    fn ask(&self, pod: &Pod, local: &Local, failed: &[Str]) -> route::Route {
        let request = RouteRequest {
            source: &local.workload,
            source_address: self.source.ip(),
            destination: match &self.destination {
                Asked::Address(address) => Destination::Address(*address),
                Asked::Hostname(name, port) => Destination::Hostname(name, *port),
            },
            excluded: failed,
            settings: &pod.shared().config.routing,
        };
        let route = pod.mesh(|snapshot| route::route(snapshot, &request, &mut rand::rng()));
        tracing::debug!(source = %self.source, destination = ?self.destination, why = %Steps(&route.why), "routed");
        route
    }
}

/// The address by which a connection of a workload with these addresses leaves. One that comes from elsewhere, such as a virtual
/// machine behind the pod or an address that somebody has given it, leaves by the workload's. What came over loopback leaves by
/// none of its own.
fn leave_by(source: IpAddr, workload: &[IpAddr]) -> Option<IpAddr> {
    let source = source.to_canonical();
    if source.is_loopback() || workload.is_empty() || workload.contains(&source) {
        return Some(source);
    }
    workload.iter().copied().find(|address| address.is_ipv4() == source.is_ipv4())
}

/// Resolves a hostname to an address, of the family of `like` if there is one.
async fn resolve(pod: &Pod, hostname: &Str, like: Option<IpAddr>) -> Result<IpAddr, Refused> {
    let shared = pod.shared();
    let deadline = Instant::now() + shared.config.workload_timeout;
    let found = match shared.resolver.resolve(hostname, deadline).await {
        Ok(addresses) => resolve::pick(&addresses, like, &mut rand::rng()).ok_or("no address".to_owned()),
        Err(failed) => Err(failed.to_string()),
    };
    found.map_err(|why| {
        let failure = Failure::new(Flag::Connect, format_args!("cannot resolve {hostname}: {why}"));
        Refused::new("unresolved", Failure { kind: ErrorKind::NotFound, ..failure })
    })
}

/// What metrics call it.
fn label(reject: &Reject) -> &'static str {
    match reject {
        Reject::OwnPort(_) => "own_port",
        Reject::UnknownHostname(_) => "unknown_hostname",
        Reject::UnknownPort { .. } => "unknown_port",
        Reject::NoHealthyUpstream { .. } => "no_healthy_upstream",
        Reject::NoWaypoint(_) => "no_waypoint",
        Reject::NoNetworkGateway { .. } => "no_network_gateway",
        Reject::NotAddressable(_) => "not_addressable",
        Reject::NoAddress(_) => "no_address",
        Reject::NoIdentity(_) => "no_identity",
    }
}

/// What SOCKS has words for.
fn kind(reject: &Reject) -> ErrorKind {
    match reject {
        Reject::OwnPort(_) => ErrorKind::PermissionDenied,
        Reject::UnknownHostname(_) => ErrorKind::NotFound,
        _ => ErrorKind::HostUnreachable,
    }
}

impl Routed {
    fn about(&self, wanted: &Wanted) -> About {
        let (transport, hbone_address, expected) = match &self.upstream.path {
            Path::Tcp => (Transport::Tcp, None, None),
            Path::Hbone(tunnel) => (Transport::Hbone, Some(&tunnel.authority), tunnel.expected.first()),
            Path::DoubleHbone { inner, .. } => (Transport::DoubleHbone, Some(&inner.authority), inner.expected.first()),
        };
        About {
            direction: Direction::Outbound,
            transport,
            source_address: wanted.source,
            source: Some(self.local.workload.clone()),
            // An identity that was not shown to anybody is not reported.
            source_identity: expected.and(self.local.workload.identity()),
            destination_address: self.connect,
            next_hop: self.connect,
            hbone_address: hbone_address.map(|authority| authority.to_string().into()),
            original_destination: wanted.original(),
            destination: self.upstream.workload.clone(),
            destination_identity: expected.cloned(),
            service: self.service.clone(),
        }
    }

    async fn carry_out(
        &self,
        wanted: &Wanted,
        pod: &Pod,
        place: Place,
        credentials: Option<Arc<Credentials>>,
    ) -> Result<Way, Failure> {
        let stream = match (&self.upstream.path, credentials) {
            (Path::Hbone(tunnel), Some(credentials)) => {
                let opening = self.tunnel(wanted, pod, tunnel, &credentials);
                let Opened { stream, proof } = place.unless_cut(opening).await?;
                place.rests_on(&proof);
                stream
            }
            (Path::DoubleHbone { outer, inner }, Some(credentials)) => {
                let opening = Box::pin(async {
                    let Opened { stream, proof } = self.tunnel(wanted, pod, outer, &credentials).await?;
                    place.rests_on(&proof);
                    self.tunnel_in_tunnel(wanted, pod, stream, inner, &credentials).await
                });
                let Opened { stream, proof } = place.unless_cut(opening).await?;
                place.rests_on(&proof);
                stream
            }
            (Path::Tcp, _) => {
                let connecting = async { Ok(pod.sockets().connect(self.connect, self.source, self.reach()).await?) };
                let socket = place.unless_cut(connecting).await?;
                return Ok(Way::Direct(socket, place));
            }
            (_, None) => return Err(Failure::new(Flag::IdentityError, "a tunnel without credentials")),
        };
        Ok(Way::Tunnelled(Box::new(stream), place))
    }

    fn reach(&self) -> Reach {
        Reach::between(&self.local.workload, self.upstream.workload.as_deref())
    }

    async fn tunnel(
        &self,
        wanted: &Wanted,
        pod: &Pod,
        tunnel: &Tunnel,
        credentials: &Arc<Credentials>,
    ) -> Result<Opened, Failure> {
        let key = Key {
            source: credentials.id().clone(),
            source_address: self.source,
            destination: self.connect,
            expected: tunnel.expected.iter().cloned().collect(),
            reach: self.reach(),
        };
        pod.tunnels().open(&key, credentials, &self.request(wanted, tunnel, None)).await
    }

    /// The inner tunnel is for this connection alone: what is behind the gateway differs from one to the next.
    async fn tunnel_in_tunnel(
        &self,
        wanted: &Wanted,
        pod: &Pod,
        outer: Stream,
        inner: &Tunnel,
        credentials: &Credentials,
    ) -> Result<Opened, Failure> {
        let expected: ExpectedPeers = inner.expected.iter().cloned().collect();
        let begun = tunnels::over(pod.shared(), outer.into_io(), credentials, &expected).await?;
        // Where the peer is, nobody here knows: only the way to it.
        let to = self.connect;
        let proved = pod.live().prove(Reporter::Source, credentials.id().clone(), begun.peer, to.ip());
        let (proof, driver, metrics) = (proved.proof().clone(), begun.driver, pod.shared().metrics.clone());
        pod.connections().spawn(async move {
            let ended = driver.await;
            tunnels::tell_end(&metrics, proved.proof(), to, &ended);
        });
        let network = Some(self.local.workload.network.clone()).filter(|network| !network.is_empty());
        let request = self.request(wanted, inner, network);
        let (stream, _) = begun.tunnel.open(&request).await.map_err(|error| tunnels::open_failure(error, &expected))?;
        Ok(Opened { stream, proof })
    }

    fn request(&self, wanted: &Wanted, tunnel: &Tunnel, network: Option<Str>) -> Request {
        let target = match &tunnel.authority {
            Authority::Address(address) => HboneTarget::Address(*address),
            Authority::Host(name, port) => HboneTarget::Host { name: (**name).into(), port: *port },
            // `route` has put the address in when it resolved the name.
            Authority::Resolved(port) => HboneTarget::Address((self.connect.ip(), *port).into()),
        };
        let mut rng = rand::rng();
        Request {
            target,
            headers: Headers {
                baggage: Some(baggage(&self.local.workload)),
                forwarded: Some(Forwarded {
                    source: (self.source, wanted.source.port()).into(),
                    host: self.service.as_ref().map(|service| (*service.hostname).into()),
                }),
                traceparent: Some(TraceParent::new(rng.random(), rng.random())),
                network: network.map(|network| (*network).into()),
            },
        }
    }
}

impl Established {
    /// Carries the connection to its end.
    pub(crate) fn relay(self, app: TcpStream) -> impl Future<Output = ()> + 'static {
        let Self { flow, way } = self;
        async move {
            let outcome = match way {
                Way::Tunnelled(stream, place) => {
                    let end = stream.relay(app, &flow.live().bytes, place.cut()).await;
                    outcome(end, &place)
                }
                Way::Direct(socket, place) => {
                    // Boxed: a way without a tunnel must not cost a way with one anything.
                    let end = Box::pin(copy(app, socket, &flow.live().bytes, place.cut())).await;
                    outcome(end, &place)
                }
            };
            flow.finish(true, outcome);
        }
    }

    /// Where the other end of the connection is, as this end sees it.
    pub(crate) fn local_address(&self) -> SocketAddr {
        match &self.way {
            Way::Direct(socket, _) => socket.local_addr().ok(),
            Way::Tunnelled(..) => None,
        }
        .unwrap_or_else(|| (IpAddr::from([0, 0, 0, 0]), 0).into())
    }
}

/// How a relayed connection is reported. Whoever was cut may have met the end of its tunnel first.
pub(crate) fn outcome(end: End, place: &Place) -> Result<(), Failure> {
    match (end, place.why()) {
        (End::Complete | End::Closed, _) => Ok(()),
        (_, Some(why)) => Err(why),
        (other, None) => Err(Failure::new(Flag::None, other)),
    }
}

/// What is said of a workload to the other end.
pub(crate) fn baggage(workload: &Workload) -> Baggage {
    let text = |text: &Str| (!text.is_empty()).then(|| text.clone());
    Baggage {
        cluster: text(&workload.cluster_id),
        namespace: text(&workload.namespace),
        kind: Kind::of(workload.workload_type.as_str()),
        workload: text(&workload.workload_name),
        service: text(&workload.canonical_name),
        revision: text(&workload.canonical_revision),
        region: text(&workload.locality.region),
        zone: text(&workload.locality.zone),
    }
}

/// The steps of a decision, put into words when they are logged.
struct Steps<'a>(&'a [route::Step]);

impl std::fmt::Display for Steps<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, step) in self.0.iter().enumerate() {
            write!(f, "{}{step}", if n == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_by_addresses_of_the_workload_alone() {
        let ips = |text: &str| text.split_whitespace().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>();
        let by =
            |source: &str, workload: &str| leave_by(source.parse().unwrap(), &ips(workload)).map(|ip| ip.to_string());
        for (source, workload, expected) in [
            ("10.0.0.1", "10.0.0.1 fd00::1", Some("10.0.0.1")),
            ("::ffff:10.0.0.1", "10.0.0.1", Some("10.0.0.1")),
            ("fd00::1", "10.0.0.1 fd00::1", Some("fd00::1")),
            ("10.99.0.1", "10.0.0.1 fd00::1", Some("10.0.0.1")),
            ("fd99::1", "10.0.0.1 fd00::1", Some("fd00::1")),
            ("fd99::1", "10.0.0.1", None),
            ("127.0.0.1", "10.0.0.1", Some("127.0.0.1")),
            ("10.99.0.1", "", Some("10.99.0.1")),
        ] {
            assert_eq!(by(source, workload).as_deref(), expected, "{source} of {workload}");
        }
    }
}
