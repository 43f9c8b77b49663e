//! Services: names and addresses that stand for endpoints.

use std::net::IpAddr;

use crate::{Extension, Gateway, NamespacedHostname, NetworkAddress, NetworkCidr, Str, Workload};

/// One service, with every field of the wire contract. Its endpoints are the workloads that name it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// Short name.
    pub name: Str,
    /// Namespace that defines it.
    pub namespace: Str,
    /// Full hostname.
    pub hostname: Str,
    /// Its virtual addresses; none if it is headless.
    pub vips: Vec<NetworkAddress>,
    /// Its virtual address ranges.
    pub cidr_vips: Vec<NetworkCidr>,
    /// Its ports, ordered.
    pub ports: Vec<Port>,
    /// Identities that its endpoints may prove besides their own, as the text that discovery sent.
    pub subject_alt_names: Vec<Str>,
    /// The waypoint that connections to it pass through.
    pub waypoint: Option<Gateway>,
    /// Several waypoints, one of which is drawn for each connection; they take the place of [`Service::waypoint`].
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How an endpoint is chosen.
    pub load_balancer: LoadBalancer,
    /// Address families of the service.
    pub ip_families: IpFamilies,
    /// Whether it is the one that a hostname defined by several means.
    pub canonical: bool,
    /// Whether an ingress gateway uses the waypoint too; of no use to a node proxy.
    pub ingress_use_waypoint: bool,
    /// Who may see it.
    pub visibility: Visibility,
    /// Extensions, carried and not understood.
    pub extensions: Vec<Extension>,
}

impl Service {
    /// Its name.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }

    /// The port with a number.
    pub fn port(&self, number: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.number == number)
    }

    /// Whether workloads of a namespace may use it.
    pub fn visible_to(&self, workload: &Workload) -> bool {
        self.visibility == Visibility::Public || self.namespace == workload.namespace
    }
}

/// A port of a service and what it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    /// The port of the service.
    pub number: u16,
    /// The port of the endpoint; none if each endpoint says it itself (a named target port).
    pub target: Option<u16>,
    /// What is spoken on it.
    pub protocol: AppProtocol,
}

/// What is spoken on a port; a node proxy treats all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum AppProtocol {
    /// Not said.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// TCP.
    Tcp,
    /// TLS.
    Tls,
}

/// A waypoint and its share of the connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub waypoint: Gateway,
    /// Its share; none for 0.
    pub weight: u32,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct LoadBalancer {
    /// What endpoint and client should have in common, most important first.
    pub preferences: Vec<Scope>,
    /// What to do about endpoints that have it not.
    pub mode: Mode,
    /// Which endpoints count.
    pub health: HealthPolicy,
}

/// Something that an endpoint and a client may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

impl Scope {
    /// What a workload has in this scope.
    pub fn of(self, workload: &Workload) -> &Str {
        match self {
            Self::Region => &workload.locality.region,
            Self::Zone => &workload.locality.zone,
            Self::Subzone => &workload.locality.subzone,
            Self::Node => &workload.node,
            Self::Cluster => &workload.cluster_id,
            Self::Network => &workload.network,
        }
    }
}

/// What to do about endpoints that do not share the client's scopes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// Preferences are not used.
    #[default]
    Standard,
    /// Only endpoints that share every scope.
    Strict,
    /// The endpoints that share most scopes, counted from the first.
    Failover,
    /// None is chosen: the connection goes to the address that was asked for.
    Passthrough,
}

/// Which endpoints count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HealthPolicy {
    /// Those that are ready.
    #[default]
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// Address families of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum IpFamilies {
    /// Not said: any.
    #[default]
    Automatic,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether an endpoint may be reached by an address of this family.
    pub fn accept(self, address: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::Ipv4 => address.is_ipv4(),
            Self::Ipv6 => address.is_ipv6(),
        }
    }
}

/// Who may see a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Visibility {
    /// Everyone.
    #[default]
    Public,
    /// Workloads of its namespace.
    Namespace,
}
