//! Meshes for the tests of this crate, in few words.

use std::fmt::Display;
use std::sync::Arc;

use crate::service::WeightedWaypoint;
use crate::{
    Change, Gateway, GatewayDestination, HBONE_PORT, Membership, NamespacedHostname, NamespacedName, NetworkAddress,
    NetworkCidr, Policy, Port, Protocol, Service, Snapshot, Store, Workload,
};

/// Changes a value in the middle of an expression.
pub(crate) trait With: Sized {
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

impl With for Workload {}
impl With for Service {}
impl With for Policy {}

/// A pod in namespace `ns` that takes HBONE, with a service account of its name.
pub(crate) fn pod(name: &str, address: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/ns/{name}").into(),
        name: name.into(),
        namespace: "ns".into(),
        trust_domain: "cluster.local".parse().unwrap(),
        service_account: name.into(),
        addresses: std::iter::once(address.parse().unwrap()).collect(),
        protocol: Protocol::Hbone,
        ..Workload::default()
    }
}

/// What the mesh knows to stand at an address, and nothing more.
pub(crate) fn entry(uid: &str, address: &str) -> Workload {
    Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "ns".into(),
        addresses: std::iter::once(address.parse().unwrap()).collect(),
        ..Workload::default()
    }
}

impl Workload {
    /// The same as an endpoint of a service (`name` is one of namespace `ns`).
    pub(crate) fn of(self, name: &str) -> Self {
        self.of_ports(name, &[])
    }

    /// The same with ports of its own for ports of the service.
    pub(crate) fn of_ports(self, name: &str, ports: &[(u16, u16)]) -> Self {
        self.with(|workload| {
            let ports: Vec<_> = ports.iter().map(|(number, target)| port(*number, Some(*target))).collect();
            let new = Membership { service: key(name), ports: ports.into() };
            let mut all: Vec<_> = workload.services.iter().cloned().chain([new]).collect();
            all.sort_by(|a, b| a.service.cmp(&b.service));
            workload.services = all.into();
        })
    }

    pub(crate) fn in_network(self, network: &str) -> Self {
        self.with(|workload| workload.network = network.into())
    }

    pub(crate) fn behind(self, waypoint: Gateway) -> Self {
        self.with(|workload| workload.waypoint = Some(Arc::new(waypoint)))
    }
}

/// The service `name.ns` with port 80, whose target is 8080.
pub(crate) fn service(name: &str, vip: &str) -> Service {
    let vips = (!vip.is_empty()).then(|| address("", vip));
    let NamespacedHostname { namespace, hostname } = key(name);
    Service {
        name: name.into(),
        namespace,
        hostname,
        vips: vips.into_iter().collect(),
        ports: vec![port(80, Some(8080))],
        ..Service::default()
    }
}

/// `name` in namespace `ns`; `namespace/name` in another. Its hostname does not have the namespace.
pub(crate) fn key(name: &str) -> NamespacedHostname {
    let (namespace, name) = name.split_once('/').unwrap_or(("ns", name));
    NamespacedHostname { namespace: namespace.into(), hostname: format!("{name}.test").into() }
}

pub(crate) fn policy_key(name: &str) -> NamespacedName {
    NamespacedName { namespace: "ns".into(), name: name.into() }
}

pub(crate) fn port(number: u16, target: Option<u16>) -> Port {
    Port { number, target, protocol: Default::default() }
}

pub(crate) fn address(network: &str, address: &str) -> NetworkAddress {
    NetworkAddress { network: network.into(), address: address.parse().unwrap() }
}

pub(crate) fn cidr(network: &str, net: &str) -> NetworkCidr {
    NetworkCidr { network: network.into(), net: net.parse().unwrap() }
}

/// The gateway that is a service.
pub(crate) fn gateway(name: &str) -> Gateway {
    Gateway { destination: GatewayDestination::Hostname(key(name)), hbone_port: HBONE_PORT }
}

/// The gateway at an address.
pub(crate) fn gateway_at(network: &str, at: &str) -> Gateway {
    Gateway { destination: GatewayDestination::Address(address(network, at)), hbone_port: HBONE_PORT }
}

pub(crate) fn weighted(name: &str, weight: u32) -> WeightedWaypoint {
    WeightedWaypoint { waypoint: gateway(name), weight }
}

impl From<Workload> for Change {
    fn from(workload: Workload) -> Self {
        Self::PutWorkload(Arc::new(workload))
    }
}

impl From<Service> for Change {
    fn from(service: Service) -> Self {
        Self::PutService(Arc::new(service))
    }
}

impl From<Policy> for Change {
    fn from(policy: Policy) -> Self {
        Self::PutPolicy(Arc::new(policy))
    }
}

/// A mesh that grows.
#[derive(Default, Clone)]
pub(crate) struct Mesh(Vec<Change>);

impl Mesh {
    pub(crate) fn and(mut self, change: impl Into<Change>) -> Self {
        self.0.push(change.into());
        self
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let (mut store, _) = Store::new();
        store.apply(self.0.iter().cloned());
        store.snapshot().clone()
    }
}

/// The parts, one after another.
pub(crate) fn join<T: Display>(parts: impl IntoIterator<Item = T>, between: &str) -> String {
    parts.into_iter().map(|part| part.to_string()).collect::<Vec<_>>().join(between)
}
