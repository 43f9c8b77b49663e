//! Where a connection of a workload goes, and why: a function of the snapshot, the request and a random source.
//!
//! [`route`] decides in this order, which is ztunnel's with one difference (see 2):
//! 1. the proxy's own ports are refused;
//! 2. a service has exactly this virtual address → its waypoint, or one of its endpoints. A workload with this address comes
//!    before a service whose *range* holds it: a wide range must not turn a known workload into a plain-text destination;
//! 3. an endpoint in another network → through that network's gateway, one tunnel in another;
//! 4. the workload's own waypoint, unless a service was asked for or the client is that waypoint;
//! 5. HBONE if the workload takes it, else TCP; what the mesh does not know passes through as it came.
//!
//! Nothing here falls back to plain text because something failed: a gateway or an identity that is missing is an error.

mod gateway;
mod why;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand_core::RngCore;
use smallvec::SmallVec;

use crate::service::Mode;
use crate::store::Snapshot;
use crate::{Gateway, HBONE_PORT, NamespacedHostname, Protocol, Service, SpiffeId, Str, Workload};

pub use why::{Found, Step, Why};

/// What a route depends on besides the mesh; the same for all connections of a proxy.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The namespace that wins when several services share an address and nothing else decides.
    pub preferred_service_namespace: Option<Str>,
    /// The proxy's own ports.
    pub own_ports: Vec<u16>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { preferred_service_namespace: None, own_ports: vec![15001, 15006, HBONE_PORT, 15053, 15080] }
    }
}

/// A connection that a local workload wants.
#[derive(Debug, Clone, Copy)]
pub struct RouteRequest<'a> {
    /// The workload that opens it.
    pub source: &'a Workload,
    /// The address that it comes from.
    pub source_address: IpAddr,
    /// What it asks for.
    pub destination: Destination<'a>,
    /// UIDs of endpoints, waypoints and gateways that have just failed: they are not chosen again.
    pub excluded: &'a [Str],
    /// The proxy's settings.
    pub settings: &'a Settings,
}

/// What a connection asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination<'a> {
    /// An address: the original destination of a redirected connection.
    Address(SocketAddr),
    /// A hostname and a port (SOCKS5).
    Hostname(&'a str, u16),
}

impl Destination<'_> {
    fn port(self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Hostname(_, port) => port,
        }
    }

    fn is_v6(self) -> Option<bool> {
        match self {
            Self::Address(address) => Some(address.ip().to_canonical().is_ipv6()),
            Self::Hostname(..) => None,
        }
    }
}

/// Where the connection goes, and why.
#[derive(Debug, Clone)]
pub struct Route {
    /// How to get there, or why not to.
    pub decision: Result<Upstream, Reject>,
    /// The service that was asked for.
    pub service: Option<Arc<Service>>,
    /// The steps of the decision.
    pub why: Why,
    /// Among how many workloads the one at the other end was chosen: with more than one, another may be tried.
    pub choices: usize,
}

/// How to get there.
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    /// Where to open the TCP connection.
    pub connect: Target,
    /// What to speak on it.
    pub path: Path,
    /// The workload at the other end of the connection: an endpoint, a waypoint or a gateway; none if the mesh does not know it.
    pub workload: Option<Arc<Workload>>,
}

/// Where to open the TCP connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// At an address.
    Address(SocketAddr),
    /// At an address that a hostname resolves to; [`Upstream::resolved`] puts it in.
    Resolve {
        /// What to resolve.
        hostname: Str,
        /// The port.
        port: u16,
    },
}

/// What to speak on the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// The application's bytes as they are.
    Tcp,
    /// A tunnel.
    Hbone(Tunnel),
    /// A tunnel to a network gateway, and another one in it to the endpoint behind it. Both ask for the same authority.
    DoubleHbone {
        /// To the gateway.
        outer: Tunnel,
        /// To the endpoint.
        inner: Tunnel,
    },
}

/// One tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnel {
    /// What to ask it for.
    pub authority: Authority,
    /// Who may stand at its end; never empty.
    pub expected: Identities,
}

/// The identities of which a peer must prove one.
pub type Identities = SmallVec<[SpiffeId; 1]>;

/// What a CONNECT asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address.
    Address(SocketAddr),
    /// The address that [`Target::Resolve`] resolves to, with this port.
    Resolved(u16),
    /// A service, by its hostname.
    Host(Str, u16),
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Resolved(port) => write!(f, "<resolved>:{port}"),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Resolve { hostname, port } => write!(f, "{hostname}:{port}"),
        }
    }
}

impl Upstream {
    /// The same with the address that the hostname of [`Target::Resolve`] resolved to.
    pub fn resolved(mut self, address: IpAddr) -> Self {
        if let Target::Resolve { port, .. } = self.connect {
            self.connect = Target::Address((address, port).into());
        }
        if let Path::Hbone(Tunnel { authority, .. }) = &mut self.path
            && let Authority::Resolved(port) = *authority
        {
            *authority = Authority::Address((address, port).into());
        }
        self
    }
}

/// Why a connection goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// A workload called the proxy itself.
    #[error("port {0} belongs to the proxy itself")]
    OwnPort(u16),
    /// The mesh has nothing of this name; the caller may resolve it and ask again with an address.
    #[error("no service or workload has the hostname {0}")]
    UnknownHostname(Str),
    /// The service has no such port.
    #[error("service {service} has no port {port}")]
    UnknownPort {
        /// The service.
        service: NamespacedHostname,
        /// The port asked for.
        port: u16,
    },
    /// The service has no endpoint that may be chosen.
    #[error("no healthy upstream: service {service} has no endpoint for port {port}")]
    NoHealthyUpstream {
        /// The service.
        service: NamespacedHostname,
        /// The port asked for.
        port: u16,
    },
    /// A waypoint is demanded, and it is not known or has no endpoint.
    #[error("waypoint {0} is unknown or has no healthy endpoint")]
    NoWaypoint(Gateway),
    /// The endpoint is in another network whose gateway is not known or has no endpoint.
    #[error("gateway {gateway} of network {network:?} is unknown or has no healthy endpoint")]
    NoNetworkGateway {
        /// The gateway.
        gateway: Gateway,
        /// The network behind it.
        network: Str,
    },
    /// The workload behind a gateway can only be asked for by the name of a service.
    #[error("workload {0} is in another network and was not asked for through a service")]
    NotAddressable(Str),
    /// The workload has neither an address of the wanted family nor a hostname.
    #[error("workload {0} has no address that could be used")]
    NoAddress(Str),
    /// The workload takes tunnels and has no identity that could be expected of it.
    #[error("workload {0} has no identity, so that nobody could prove to be it")]
    NoIdentity(Str),
}

/// Decides where a connection goes.
pub fn route(snapshot: &Snapshot, request: &RouteRequest<'_>, rng: &mut impl RngCore) -> Route {
    let mut router = Router { snapshot, request, rng, service: None, why: Why::new(), choices: 1 };
    let decision = router.decide();
    Route { decision, service: router.service, why: router.why, choices: router.choices }
}

/// One decision under way.
struct Router<'a, R> {
    snapshot: &'a Snapshot,
    request: &'a RouteRequest<'a>,
    rng: &'a mut R,
    service: Option<Arc<Service>>,
    why: Why,
    choices: usize,
}

/// An endpoint and the port of it that is meant.
struct Endpoint {
    workload: Arc<Workload>,
    port: u16,
}

impl<R: RngCore> Router<'_, R> {
    fn decide(&mut self) -> Result<Upstream, Reject> {
        self.refuse_own_ports()?;
        let network = &self.request.source.network;
        match self.request.destination {
            Destination::Address(address) => {
                let ip = address.ip();
                if let Some(service) = self.visible(self.snapshot.services_at(network, ip)) {
                    return self.reach_service(service, Found::Vip);
                }
                if let Some(workload) = self.snapshot.workload_at(network, ip) {
                    return self.reach_workload(workload.clone());
                }
                let around = self.snapshot.services_around(network, ip).find_map(|found| self.visible(found));
                match around {
                    Some(service) => self.reach_service(service, Found::Range),
                    None => self.pass_through(Step::Unknown),
                }
            }
            Destination::Hostname(hostname, _) => {
                if let Some(service) = self.visible(self.snapshot.services_named(hostname)) {
                    return self.reach_service(service, Found::Hostname);
                }
                match self.snapshot.workloads_named(hostname).first() {
                    Some(workload) => self.reach_workload(workload.clone()),
                    None => Err(Reject::UnknownHostname(hostname.into())),
                }
            }
        }
    }

    /// Whether a workload has just failed.
    fn is_excluded(&self, workload: &Workload) -> bool {
        self.request.excluded.contains(&workload.uid)
    }

    fn refuse_own_ports(&self) -> Result<(), Reject> {
        let RouteRequest { source, source_address, settings, .. } = self.request;
        let Destination::Address(destination) = self.request.destination else { return Ok(()) };
        let ip = destination.ip().to_canonical();
        let own = ip.is_loopback()
            || ip.is_unspecified()
            || ip == source_address.to_canonical()
            || source.addresses.contains(&ip);
        if own && settings.own_ports.contains(&destination.port()) {
            return Err(Reject::OwnPort(destination.port()));
        }
        Ok(())
    }

    /// Among services that share an address: the client's namespace, then the canonical one, then the preferred namespace, then
    /// the first by name. What the client may not see is not there.
    fn visible<'s>(&self, services: &'s [Arc<Service>]) -> Option<&'s Arc<Service>> {
        let source = self.request.source;
        let preferred = self.request.settings.preferred_service_namespace.as_ref();
        services.iter().filter(|service| service.visible_to(source)).min_by_key(|service| {
            let own = service.namespace == source.namespace;
            (!own, !service.canonical, preferred != Some(&service.namespace))
        })
    }

    fn reach_service(&mut self, service: &Arc<Service>, found: Found) -> Result<Upstream, Reject> {
        self.why.push(Step::Service(service.clone(), found));
        self.service = Some(service.clone());
        if let Some(waypoint) = self.waypoint_of(service) {
            if self.is_from(&waypoint) {
                self.why.push(Step::FromWaypoint);
            } else {
                return self.through_waypoint(&waypoint);
            }
        }
        if service.load_balancer.mode == Mode::Passthrough {
            return self.reach_address_asked_for();
        }
        let endpoint = self.choose_endpoint(service)?;
        self.reach_endpoint(endpoint)
    }

    /// The service chooses nothing; a workload may still be known to stand at the address.
    fn reach_address_asked_for(&mut self) -> Result<Upstream, Reject> {
        let Destination::Address(address) = self.request.destination else {
            return Err(Reject::UnknownHostname(
                self.service.as_ref().map(|service| service.hostname.clone()).unwrap_or_default(),
            ));
        };
        match self.snapshot.workload_at(&self.request.source.network, address.ip()) {
            Some(workload) => {
                self.why.push(Step::PassthroughService);
                self.reach_endpoint(Endpoint { workload: workload.clone(), port: address.port() })
            }
            None => self.pass_through(Step::PassthroughService),
        }
    }

    fn pass_through(&mut self, step: Step) -> Result<Upstream, Reject> {
        self.why.push(step);
        match self.request.destination {
            Destination::Address(address) => {
                Ok(Upstream { connect: Target::Address(address), path: Path::Tcp, workload: None })
            }
            Destination::Hostname(name, _) => Err(Reject::UnknownHostname(name.into())),
        }
    }

    fn choose_endpoint(&mut self, service: &Service) -> Result<Endpoint, Reject> {
        let (key, number) = (service.key(), self.request.destination.port());
        let Some(port) = service.port(number) else {
            return Err(Reject::UnknownPort { service: key, port: number });
        };
        let target = |workload: &Workload| own_port(workload, &key, number).or(port.target);
        let RouteRequest { source, excluded, .. } = *self.request;
        let eligible = |workload: &Workload| {
            // What is in another network needs no address here: its gateway is asked for the service.
            let beyond = workload.network != source.network && workload.network_gateway.is_some();
            target(workload).is_some()
                && (beyond || address(workload, service, None).is_some() || !workload.hostname.is_empty())
                && !excluded.contains(&workload.uid)
        };
        let endpoints = self.snapshot.endpoints(&key);
        self.choices = endpoints.map_or(0, |endpoints| endpoints.len());
        let choice = endpoints
            .and_then(|endpoints| endpoints.choose(self.request.source, self.rng, eligible))
            .ok_or(Reject::NoHealthyUpstream { service: key.clone(), port: number })?;
        let workload = choice.workload.clone();
        self.why.push(Step::Endpoint {
            workload: workload.clone(),
            shared: choice.shared,
            of: choice.preferences.len(),
        });
        let port = target(&workload).expect("an endpoint without the port is not eligible");
        Ok(Endpoint { workload, port })
    }

    fn reach_workload(&mut self, workload: Arc<Workload>) -> Result<Upstream, Reject> {
        self.why.push(Step::Workload(workload.clone()));
        if let Some(waypoint) = workload.waypoint.clone() {
            if self.is_from(&waypoint) {
                self.why.push(Step::FromWaypoint);
            } else {
                return self.through_waypoint(&waypoint);
            }
        }
        self.reach_endpoint(Endpoint { workload, port: self.request.destination.port() })
    }

    fn reach_endpoint(&mut self, endpoint: Endpoint) -> Result<Upstream, Reject> {
        let Endpoint { workload, port } = endpoint;
        if workload.network != self.request.source.network
            && let Some(gateway) = workload.network_gateway.clone()
        {
            return self.through_network_gateway(&gateway, &workload);
        }
        let address = match (self.request.destination, &self.service) {
            (Destination::Address(asked), _) if workload.addresses.contains(&asked.ip().to_canonical()) => {
                Some(asked.ip().to_canonical())
            }
            (destination, Some(service)) => address(&workload, service, destination.is_v6()),
            (_, None) => workload.addresses.first().copied(),
        };
        let target = |port| match address {
            Some(address) => Ok(Target::Address((address, port).into())),
            None if workload.hostname.is_empty() => Err(Reject::NoAddress(workload.uid.clone())),
            None => Ok(Target::Resolve { hostname: workload.hostname.clone(), port }),
        };
        let (connect, path) = match workload.protocol {
            Protocol::Tcp => (target(port)?, Path::Tcp),
            Protocol::Hbone => {
                let authority = match target(port)? {
                    Target::Address(address) => Authority::Address(address),
                    Target::Resolve { port, .. } => Authority::Resolved(port),
                };
                let expected = expected(&workload, self.service.as_deref())?;
                (target(HBONE_PORT)?, Path::Hbone(Tunnel { authority, expected }))
            }
        };
        self.why.push(Step::Direct(workload.protocol));
        Ok(Upstream { connect, path, workload: Some(workload) })
    }
}

/// The endpoint's own port for a port of a service; it wins over what the service says.
fn own_port(workload: &Workload, service: &NamespacedHostname, number: u16) -> Option<u16> {
    let port = workload.membership(service)?.ports.iter().find(|port| port.number == number)?;
    port.target
}

/// The endpoint's address: of a family that the service has, and of the family that was asked for if there is one.
fn address(workload: &Workload, service: &Service, v6: Option<bool>) -> Option<IpAddr> {
    let mut usable = workload.addresses.iter().filter(|address| service.ip_families.accept(**address));
    let first = usable.clone().next();
    usable.find(|address| Some(address.is_ipv6()) == v6).or(first).copied()
}

/// Who may stand at the end of a tunnel to a workload: the workload, and who else may serve the service.
fn expected(workload: &Workload, service: Option<&Service>) -> Result<Identities, Reject> {
    let mut expected: Identities = workload.identity().into_iter().collect();
    // Names of other kinds may stand there too, for gateways that terminate TLS; no node proxy can prove them.
    let names = service.into_iter().flat_map(|service| &service.subject_alt_names);
    for id in names.filter_map(|name| name.parse().ok()) {
        if !expected.contains(&id) {
            expected.push(id);
        }
    }
    if expected.is_empty() { Err(Reject::NoIdentity(workload.uid.clone())) } else { Ok(expected) }
}

#[cfg(test)]
mod tests;
