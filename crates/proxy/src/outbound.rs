//! Connections that the pod opens: routed, then carried in a tunnel or as they are.
//!
//! `Accepted → Routed → Tunnelled | Direct`: the route is a value, decided from one snapshot; this file carries it out.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use zspire_hbone::headers::{Baggage, Forwarded, Headers, Kind, TraceParent};
use zspire_hbone::{End, Request, Stream, Target as HboneTarget, copy};
use zspire_identity::{Credentials, ExpectedPeers};
use zspire_model::route::{self, Authority, Destination, Path, Reject, RouteRequest, Target, Tunnel, Upstream};
use zspire_model::{Service, Snapshot, Str, Workload};
use zspire_sys::socket;

use crate::accept::Accepted;
use crate::connect::{self, canonical};
use crate::flow::{self, About, Direction, Failure, Flow, Transport};
use crate::live::Place;
use crate::metrics::Flag;
use crate::pod::{Local, Pod};
use crate::tunnels::{self, Key};

/// Serves one redirected connection.
pub(crate) async fn serve(pod: Pod, accepted: Accepted) {
    // A connection that was not redirected was made to this port itself, which routing refuses.
    let original = socket::original_destination(&accepted.socket).map_or(accepted.local, canonical);
    let wanted = Wanted { source: accepted.source, destination: Asked::Address(original) };
    match wanted.establish(&pod).await {
        // A task of its own: while the connection lives, only the relay's state is held.
        Ok(established) => pod.connections().spawn(established.relay(accepted.socket)),
        Err(_) => accepted.refuse(),
    }
}

/// What a connection asks for.
#[derive(Debug, Clone)]
pub(crate) enum Asked {
    Address(SocketAddr),
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
    wanted: Wanted,
    local: Arc<Local>,
    connect: SocketAddr,
    upstream: Upstream,
    service: Option<Arc<Service>>,
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

impl Wanted {
    /// Routes and connects. A failure has been logged and counted.
    pub(crate) async fn establish(self, pod: &Pod) -> Result<Established, Failure> {
        let (source, original) = (self.source, self.original());
        let routed = match self.route(pod).await {
            Ok(routed) => routed,
            Err(failure) => {
                let metrics = &pod.shared().metrics;
                flow::deny_early(metrics, Direction::Outbound, source, original, failure.flag.as_str(), &failure);
                return Err(failure);
            }
        };
        let flow = pod.open(routed.about());
        match routed.carry_out(pod).await {
            Ok(way) => Ok(Established { flow, way }),
            Err(failure) => {
                flow.finish(false, Err(failure.clone()));
                Err(failure)
            }
        }
    }

    fn original(&self) -> Option<SocketAddr> {
        match self.destination {
            Asked::Address(address) => Some(address),
            Asked::Hostname(..) => None,
        }
    }

    async fn route(mut self, pod: &Pod) -> Result<Routed, Failure> {
        let local = pod.local().await.map_err(|error| Failure::new(Flag::Connect, error))?;
        let mut route = self.discover(pod, &local).await?;
        if let (Err(Reject::UnknownHostname(_)), Asked::Hostname(name, port)) = (&route.decision, &self.destination) {
            let like = Some(self.source.ip()).filter(|ip| !ip.is_loopback());
            let ip = connect::resolve(name, like, pod.shared().config.workload_timeout).await?;
            self.destination = Asked::Address((ip, *port).into());
            route = self.discover(pod, &local).await?;
        }
        let refused = |reject: Reject| Failure { kind: kind(&reject), ..Failure::new(Flag::Connect, reject) };
        let upstream = route.decision.map_err(refused)?;
        let upstream = match &upstream.connect {
            Target::Address(_) => upstream,
            Target::Resolve { hostname, .. } => {
                let like = self.original().map(|address| address.ip());
                let ip = connect::resolve(hostname, like, pod.shared().config.workload_timeout).await?;
                upstream.resolved(ip)
            }
        };
        let Target::Address(connect) = upstream.connect else {
            return Err(Failure::new(Flag::Connect, "the route has no address"));
        };
        Ok(Routed { wanted: self, local, connect, upstream, service: route.service })
    }

    /// Routes; where resources are discovered on demand, what the route depends on is asked for first. What nobody answers
    /// for is refused: only what the mesh certainly does not know passes through.
    async fn discover(&self, pod: &Pod, local: &Local) -> Result<route::Route, Failure> {
        let Some(on_demand) = &pod.shared().on_demand else { return Ok(self.ask(pod, local)) };
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
                let failed = |why| Failure::new(Flag::Connect, format_args!("cannot discover {key}: {why}"));
                let answer = timeout(limit, on_demand.get(key.clone())).await;
                answer.unwrap_or_else(|_| Err(format!("no answer in {limit:?}"))).map_err(failed)?;
            }
            let route = self.ask(pod, local);
            match &route.decision {
                Err(Reject::NoWaypoint(gateway) | Reject::NoNetworkGateway { gateway, .. }) => {
                    wanted = Some(gateway.destination.to_string());
                }
                _ => return Ok(route),
            }
        }
        Ok(self.ask(pod, local))
    }

    fn ask(&self, pod: &Pod, local: &Local) -> route::Route {
        let request = RouteRequest {
            source: &local.workload,
            source_address: self.source.ip(),
            destination: match &self.destination {
                Asked::Address(address) => Destination::Address(*address),
                Asked::Hostname(name, port) => Destination::Hostname(name, *port),
            },
            excluded: &[],
            settings: &pod.shared().config.routing,
        };
        let route = pod.mesh(|snapshot| route::route(snapshot, &request, &mut rand::rng()));
        tracing::debug!(source = %self.source, destination = ?self.destination, why = %Steps(&route.why), "routed");
        route
    }
}

/// What SOCKS has words for.
fn kind(reject: &Reject) -> std::io::ErrorKind {
    use std::io::ErrorKind;
    match reject {
        Reject::OwnPort(_) => ErrorKind::PermissionDenied,
        Reject::UnknownHostname(_) => ErrorKind::NotFound,
        _ => ErrorKind::HostUnreachable,
    }
}

impl Routed {
    fn about(&self) -> About {
        let (transport, hbone_address, expected) = match &self.upstream.path {
            Path::Tcp => (Transport::Tcp, None, None),
            Path::Hbone(tunnel) => (Transport::Hbone, Some(&tunnel.authority), tunnel.expected.first()),
            Path::DoubleHbone { inner, .. } => (Transport::DoubleHbone, Some(&inner.authority), inner.expected.first()),
        };
        About {
            direction: Direction::Outbound,
            transport,
            source_address: self.wanted.source,
            source: Some(self.local.workload.clone()),
            // An identity that was not shown to anybody is not reported.
            source_identity: expected.and(self.local.workload.identity()),
            destination_address: self.connect,
            next_hop: self.connect,
            hbone_address: hbone_address.map(|authority| authority.to_string().into()),
            original_destination: self.wanted.original(),
            destination: self.upstream.workload.clone(),
            destination_identity: expected.cloned(),
            service: self.service.clone(),
        }
    }

    async fn carry_out(&self, pod: &Pod) -> Result<Way, Failure> {
        let source = self.wanted.source.ip();
        match &self.upstream.path {
            Path::Tcp => {
                let socket = pod.sockets().connect(self.connect, source).await?;
                Ok(Way::Direct(socket, pod.live().enter(None, false)))
            }
            Path::Hbone(tunnel) => {
                let credentials = pod.credentials(&self.local).await?;
                let stream = self.tunnel(pod, tunnel, &credentials).await?;
                Ok(Way::Tunnelled(Box::new(stream), pod.live().enter(None, true)))
            }
            Path::DoubleHbone { outer, inner } => {
                let credentials = pod.credentials(&self.local).await?;
                let outer = self.tunnel(pod, outer, &credentials).await?;
                let stream = Box::pin(self.tunnel_in_tunnel(pod, outer, inner, &credentials)).await?;
                Ok(Way::Tunnelled(Box::new(stream), pod.live().enter(None, true)))
            }
        }
    }

    async fn tunnel(&self, pod: &Pod, tunnel: &Tunnel, credentials: &Arc<Credentials>) -> Result<Stream, Failure> {
        let key = Key {
            source: credentials.id().clone(),
            source_address: self.wanted.source.ip(),
            destination: self.connect,
            expected: tunnel.expected.iter().cloned().collect(),
        };
        let (stream, _) = pod.tunnels().open(&key, credentials, &self.request(tunnel, None)).await?;
        Ok(stream)
    }

    /// The inner tunnel is for this connection alone: what is behind the gateway differs from one to the next.
    async fn tunnel_in_tunnel(
        &self,
        pod: &Pod,
        outer: Stream,
        inner: &Tunnel,
        credentials: &Credentials,
    ) -> Result<Stream, Failure> {
        let expected: ExpectedPeers = inner.expected.iter().cloned().collect();
        let (tunnel, driver, _) = tunnels::over(pod.shared(), outer.into_io(), credentials, &expected).await?;
        pod.connections().spawn(async move {
            driver.await;
        });
        let network = Some(self.local.workload.network.clone()).filter(|network| !network.is_empty());
        let request = self.request(inner, network);
        let (stream, _) = tunnel.open(&request).await.map_err(|error| tunnels::open_failure(error, &expected))?;
        Ok(stream)
    }

    fn request(&self, tunnel: &Tunnel, network: Option<Str>) -> Request {
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
                    source: self.wanted.source,
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

/// How a relayed connection is reported.
pub(crate) fn outcome(end: End, place: &Place) -> Result<(), Failure> {
    match end {
        End::Complete => Ok(()),
        End::Cut => Err(place.why().unwrap_or_else(|| Failure::new(Flag::None, End::Cut))),
        other => Err(Failure::new(Flag::None, other)),
    }
}

/// What is said of a workload to the other end.
pub(crate) fn baggage(workload: &Workload) -> Baggage {
    let text = |text: &Str| (!text.is_empty()).then(|| (**text).into());
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
