//! Workloads and services from the wire.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;
use zspire_model::service::{HealthPolicy, IpFamilies, Mode, Scope, Visibility, WeightedWaypoint};
use zspire_model::workload::{ApplicationProtocol, Health, NetworkMode, WorkloadType};
use zspire_model::{
    AppProtocol, ApplicationTunnel, Extension, Gateway, GatewayDestination, HBONE_PORT, Interner, LoadBalancer,
    Locality, Membership, NamespacedHostname, NamespacedName, NetworkAddress, NetworkCidr, Port, Protocol, Service,
    SpiffeId, TrustDomain, Workload,
};
use zspire_wire::workload as wire;

use super::Error;

pub(super) fn workload(shared: &mut Interner, from: wire::Workload) -> Result<Workload, Error> {
    if from.uid.is_empty() {
        return Err(Error::Missing("uid"));
    }
    let trust_domain = trust_domain(shared, &from.trust_domain)?;
    // Checked here, so that a workload without an identity is one that has no service account.
    if !from.service_account.is_empty() {
        SpiffeId::istio(&trust_domain, &from.namespace, &from.service_account)
            .map_err(|why| Error::invalid("service_account", why))?;
    }
    let locality = from.locality.unwrap_or_default();
    let locality = Locality {
        region: shared.text(&locality.region),
        zone: shared.text(&locality.zone),
        subzone: shared.text(&locality.subzone),
    };
    Ok(Workload {
        id_template: None,
        id: Default::default(),
        // Of its own: nothing but the name of this workload is equal to it.
        uid: from.uid.into(),
        name: from.name.as_str().into(),
        namespace: shared.text(&from.namespace),
        trust_domain,
        service_account: shared.text(&from.service_account),
        network: shared.text(&from.network),
        addresses: addresses(&from.addresses)?,
        hostname: shared.text(&from.hostname),
        protocol: protocol(from.tunnel_protocol)?,
        network_mode: network_mode(from.network_mode)?,
        status: status(from.status)?,
        capacity: from.capacity.unwrap_or(1),
        waypoint: from.waypoint.map(|it| gateway(shared, it, "waypoint")).transpose()?.map(|it| shared.gateway(it)),
        network_gateway: from
            .network_gateway
            .map(|it| gateway(shared, it, "network_gateway"))
            .transpose()?
            .map(|it| shared.gateway(it)),
        application_tunnel: from.application_tunnel.map(application_tunnel).transpose()?,
        native_tunnel: from.native_tunnel,
        node: shared.text(&from.node),
        cluster_id: shared.text(&from.cluster_id),
        locality: shared.locality(locality),
        canonical_name: shared.text(&from.canonical_name),
        canonical_revision: shared.text(&from.canonical_revision),
        workload_type: workload_type(from.workload_type)?,
        workload_name: shared.text(&from.workload_name),
        services: memberships(shared, from.services)?,
        authorization_policies: policies(shared, &from.authorization_policies)?,
        extensions: {
            let extensions = from.extensions.into_iter().map(|it| extension(shared, it.name, it.config)).collect();
            shared.extensions(extensions)
        },
    })
}

pub(super) fn service(shared: &mut Interner, from: wire::Service) -> Result<Service, Error> {
    if from.hostname.is_empty() {
        return Err(Error::Missing("hostname"));
    }
    if from.namespace.is_empty() {
        return Err(Error::Missing("namespace"));
    }
    check_part("namespace", &from.namespace)?;
    let (vips, cidr_vips) = virtual_addresses(shared, from.addresses)?;
    let waypoint = from.waypoint.map(|it| gateway(shared, it, "waypoint")).transpose()?;
    let weighted = from.weighted_waypoints.into_iter().map(|it| weighted_waypoint(shared, it));
    Ok(Service {
        weighted_waypoints: weighted.collect::<Result<_, _>>()?,
        name: shared.text(&from.name),
        namespace: shared.text(&from.namespace),
        hostname: shared.text(&from.hostname),
        vips,
        cidr_vips,
        ports: ports(from.ports)?,
        subject_alt_names: from.subject_alt_names.iter().map(|name| shared.text(name)).collect(),
        waypoint,
        load_balancer: from.load_balancing.map(load_balancer).transpose()?.unwrap_or_default(),
        ip_families: ip_families(from.ip_families)?,
        canonical: from.canonical,
        ingress_use_waypoint: from.ingress_use_waypoint,
        visibility: visibility(from.visibility)?,
        extensions: from.extensions.into_iter().map(|it| extension(shared, it.name, it.config)).collect(),
    })
}

/// Istio leaves its default out.
fn trust_domain(shared: &mut Interner, name: &str) -> Result<TrustDomain, Error> {
    let name = if name.is_empty() { "cluster.local" } else { name };
    TrustDomain::new(shared.text(name)).map_err(|why| Error::invalid("trust_domain", why))
}

/// An address of 4 or 16 bytes. Lookups are by canonical addresses, so an IPv4 address in IPv6 clothes is taken out of them.
pub(super) fn address(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Error> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(IpAddr::from(v6).to_canonical()),
        Err(_) => Err(Error::invalid(field, format_args!("an address has 4 or 16 bytes, not {}", bytes.len()))),
    }
}

/// A range: what was canonicalized from IPv6 to IPv4 loses the 96 bits that went.
pub(super) fn range(field: &'static str, bytes: &[u8], length: u32) -> Result<IpNet, Error> {
    let address = address(field, bytes)?;
    let length = if bytes.len() == 16 && address.is_ipv4() { length.checked_sub(96) } else { Some(length) };
    length
        .and_then(|length| u8::try_from(length).ok())
        .and_then(|length| IpNet::new(address, length).ok())
        .ok_or_else(|| Error::invalid(field, "the prefix length does not fit the address"))
}

fn addresses(from: &[prost::bytes::Bytes]) -> Result<SmallVec<[IpAddr; 1]>, Error> {
    let mut addresses = SmallVec::new();
    for bytes in from {
        let address = address("addresses", bytes)?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn virtual_addresses(
    shared: &mut Interner,
    from: Vec<wire::NetworkAddress>,
) -> Result<(Vec<NetworkAddress>, Vec<NetworkCidr>), Error> {
    let (mut vips, mut ranges) = (Vec::new(), Vec::new());
    for it in from {
        let network = shared.text(&it.network);
        match it.length {
            None => vips.push(NetworkAddress { network, address: address("addresses", &it.address)? }),
            Some(length) => {
                ranges.push(NetworkCidr { network, net: range("addresses", &it.address, length)?.trunc() });
            }
        }
    }
    Ok((vips, ranges))
}

fn gateway(shared: &mut Interner, from: wire::GatewayAddress, field: &'static str) -> Result<Gateway, Error> {
    use wire::gateway_address::Destination;
    let destination = match from.destination {
        Some(Destination::Hostname(name)) => GatewayDestination::Hostname(NamespacedHostname {
            namespace: shared.text(&name.namespace),
            hostname: shared.text(&name.hostname),
        }),
        Some(Destination::Address(at)) => GatewayDestination::Address(NetworkAddress {
            network: shared.text(&at.network),
            address: address(field, &at.address)?,
        }),
        None => return Err(Error::invalid(field, "neither a hostname nor an address")),
    };
    Ok(Gateway { destination, hbone_port: optional_port(field, from.hbone_mtls_port)?.unwrap_or(HBONE_PORT) })
}

fn weighted_waypoint(shared: &mut Interner, from: wire::WeightedWaypoint) -> Result<WeightedWaypoint, Error> {
    let destination = from.destination.ok_or(Error::Missing("weighted_waypoints.destination"))?;
    Ok(WeightedWaypoint { waypoint: gateway(shared, destination, "weighted_waypoints")?, weight: from.weight })
}

/// 0 is how proto3 says nothing.
fn optional_port(field: &'static str, number: u32) -> Result<Option<u16>, Error> {
    let port = u16::try_from(number).map_err(|_| Error::invalid(field, format_args!("{number} is not a port")))?;
    Ok((port != 0).then_some(port))
}

/// Ordered by number; of several with one number the last counts, as in ztunnel.
fn ports(from: Vec<wire::Port>) -> Result<Vec<Port>, Error> {
    let mut ports = Vec::with_capacity(from.len());
    for it in from.into_iter().rev() {
        ports.push(Port {
            number: optional_port("service_port", it.service_port)?.ok_or(Error::Missing("service_port"))?,
            target: optional_port("target_port", it.target_port)?,
            protocol: app_protocol(it.app_protocol),
        });
    }
    ports.sort_by_key(|port| port.number);
    ports.dedup_by_key(|port| port.number);
    Ok(ports)
}

fn memberships(
    shared: &mut Interner,
    from: std::collections::BTreeMap<String, wire::PortList>,
) -> Result<Arc<[Membership]>, Error> {
    let mut memberships = Vec::with_capacity(from.len());
    for (name, list) in from {
        let (namespace, hostname) = name
            .split_once('/')
            .filter(|(namespace, hostname)| !namespace.is_empty() && !hostname.is_empty())
            .ok_or_else(|| Error::invalid("services", format_args!("{name:?} is not namespace/hostname")))?;
        let service = NamespacedHostname { namespace: shared.text(namespace), hostname: shared.text(hostname) };
        let ports = ports(list.ports)?;
        memberships.push(Membership { service, ports: shared.ports(ports) });
    }
    memberships.sort_by(|a, b| a.service.cmp(&b.service));
    Ok(shared.memberships(memberships))
}

fn policies(shared: &mut Interner, from: &[String]) -> Result<Arc<[NamespacedName]>, Error> {
    let mut names = Vec::with_capacity(from.len());
    for text in from {
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| Error::invalid("authorization_policies", format_args!("{text:?} is not namespace/name")))?;
        names.push(NamespacedName { namespace: shared.text(namespace), name: shared.text(name) });
    }
    Ok(shared.policies(names))
}

pub(super) fn extension(shared: &mut Interner, name: String, config: Option<prost_types::Any>) -> Extension {
    let config = config.unwrap_or_default();
    Extension {
        name: shared.text(&name),
        type_url: shared.text(&config.type_url),
        value: config.value.as_slice().into(),
    }
}

/// Names are joined by a slash, so the first part of a name has none.
pub(super) fn check_part(field: &'static str, text: &str) -> Result<(), Error> {
    if text.contains('/') { Err(Error::invalid(field, format_args!("{text:?} has a slash"))) } else { Ok(()) }
}

fn application_tunnel(from: wire::ApplicationTunnel) -> Result<ApplicationTunnel, Error> {
    let protocol = match wire::application_tunnel::Protocol::try_from(from.protocol) {
        Ok(wire::application_tunnel::Protocol::None) => ApplicationProtocol::None,
        Ok(wire::application_tunnel::Protocol::Proxy) => ApplicationProtocol::Proxy,
        Err(_) => return Err(unknown("application_tunnel.protocol", from.protocol)),
    };
    Ok(ApplicationTunnel { protocol, port: optional_port("application_tunnel.port", from.port)? })
}

fn load_balancer(from: wire::LoadBalancing) -> Result<LoadBalancer, Error> {
    use wire::load_balancing as lb;
    let mode = match lb::Mode::try_from(from.mode) {
        Ok(lb::Mode::UnspecifiedMode) => Mode::Standard,
        Ok(lb::Mode::Strict) => Mode::Strict,
        Ok(lb::Mode::Failover) => Mode::Failover,
        Ok(lb::Mode::Passthrough) => Mode::Passthrough,
        Err(_) => return Err(unknown("load_balancing.mode", from.mode)),
    };
    let health = match lb::HealthPolicy::try_from(from.health_policy) {
        Ok(lb::HealthPolicy::OnlyHealthy) => HealthPolicy::OnlyHealthy,
        Ok(lb::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
        Err(_) => return Err(unknown("load_balancing.health_policy", from.health_policy)),
    };
    let preferences = from.routing_preference.into_iter().map(scope).collect::<Result<_, _>>()?;
    Ok(LoadBalancer { preferences, mode, health })
}

fn scope(from: i32) -> Result<Scope, Error> {
    use wire::load_balancing::Scope as Wire;
    Ok(match Wire::try_from(from) {
        Ok(Wire::Region) => Scope::Region,
        Ok(Wire::Zone) => Scope::Zone,
        Ok(Wire::Subzone) => Scope::Subzone,
        Ok(Wire::Node) => Scope::Node,
        Ok(Wire::Cluster) => Scope::Cluster,
        Ok(Wire::Network) => Scope::Network,
        Ok(Wire::UnspecifiedScope) | Err(_) => return Err(unknown("load_balancing.routing_preference", from)),
    })
}

/// The one enumeration whose unknown values are harmless: a node proxy treats every protocol as TCP.
fn app_protocol(from: i32) -> AppProtocol {
    match wire::AppProtocol::try_from(from) {
        Ok(wire::AppProtocol::Unknown) | Err(_) => AppProtocol::Unknown,
        Ok(wire::AppProtocol::Http11) => AppProtocol::Http11,
        Ok(wire::AppProtocol::Http2) => AppProtocol::Http2,
        Ok(wire::AppProtocol::Grpc) => AppProtocol::Grpc,
        Ok(wire::AppProtocol::Tcp) => AppProtocol::Tcp,
        Ok(wire::AppProtocol::Tls) => AppProtocol::Tls,
    }
}

fn protocol(from: i32) -> Result<Protocol, Error> {
    match wire::TunnelProtocol::try_from(from) {
        Ok(wire::TunnelProtocol::None) => Ok(Protocol::Tcp),
        Ok(wire::TunnelProtocol::Hbone) => Ok(Protocol::Hbone),
        // Taken for TCP it would be plain text to a peer that expects TLS.
        Ok(wire::TunnelProtocol::LegacyIstioMtls) => {
            Err(Error::invalid("tunnel_protocol", "LEGACY_ISTIO_MTLS is not supported"))
        }
        Err(_) => Err(unknown("tunnel_protocol", from)),
    }
}

fn network_mode(from: i32) -> Result<NetworkMode, Error> {
    match wire::NetworkMode::try_from(from) {
        Ok(wire::NetworkMode::Standard) => Ok(NetworkMode::Standard),
        Ok(wire::NetworkMode::HostNetwork) => Ok(NetworkMode::HostNetwork),
        Err(_) => Err(unknown("network_mode", from)),
    }
}

fn status(from: i32) -> Result<Health, Error> {
    match wire::WorkloadStatus::try_from(from) {
        Ok(wire::WorkloadStatus::Healthy) => Ok(Health::Healthy),
        Ok(wire::WorkloadStatus::Unhealthy) => Ok(Health::Unhealthy),
        Err(_) => Err(unknown("status", from)),
    }
}

fn workload_type(from: i32) -> Result<WorkloadType, Error> {
    match wire::WorkloadType::try_from(from) {
        Ok(wire::WorkloadType::Deployment) => Ok(WorkloadType::Deployment),
        Ok(wire::WorkloadType::Cronjob) => Ok(WorkloadType::CronJob),
        Ok(wire::WorkloadType::Pod) => Ok(WorkloadType::Pod),
        Ok(wire::WorkloadType::Job) => Ok(WorkloadType::Job),
        Err(_) => Err(unknown("workload_type", from)),
    }
}

fn ip_families(from: i32) -> Result<IpFamilies, Error> {
    match wire::IpFamilies::try_from(from) {
        Ok(wire::IpFamilies::Automatic) => Ok(IpFamilies::Automatic),
        Ok(wire::IpFamilies::Ipv4Only) => Ok(IpFamilies::Ipv4),
        Ok(wire::IpFamilies::Ipv6Only) => Ok(IpFamilies::Ipv6),
        Ok(wire::IpFamilies::Dual) => Ok(IpFamilies::Dual),
        Err(_) => Err(unknown("ip_families", from)),
    }
}

fn visibility(from: i32) -> Result<Visibility, Error> {
    match wire::service::Visibility::try_from(from) {
        Ok(wire::service::Visibility::Public) => Ok(Visibility::Public),
        Ok(wire::service::Visibility::Namespace) => Ok(Visibility::Namespace),
        Err(_) => Err(unknown("visibility", from)),
    }
}

fn unknown(field: &'static str, value: i32) -> Error {
    Error::invalid(field, format_args!("unknown value {value}"))
}
