//! The model to the wire: the inverse of decoding.

use std::net::IpAddr;

use ipnet::IpNet;
use prost::Message as _;
use prost::bytes::Bytes;
use zspire_model::policy::{Action, Scope as PolicyScope};
use zspire_model::service::{HealthPolicy, IpFamilies, Mode, Scope, Visibility};
use zspire_model::workload::{ApplicationProtocol, Health, NetworkMode, WorkloadType};
use zspire_model::{
    AppProtocol, Extension, Gateway, GatewayDestination, LoadBalancer, Match, Policy, Port, Protocol, Service,
    ServiceAccountMatch, StringMatch, TrustDomain, Workload,
};
use zspire_wire::{security, workload as wire};

use crate::Resource;

/// The value of a resource, as it stands in the `Any` of its type.
pub fn encode(resource: &Resource) -> Vec<u8> {
    match resource {
        Resource::Policy(policy) => encode_policy(policy),
        Resource::Workload(_) | Resource::Service(_) => encode_address(resource),
    }
}

/// An `istio.workload.Address`; empty for a policy, which is none.
pub fn encode_address(resource: &Resource) -> Vec<u8> {
    use wire::address::Type;
    let address = match resource {
        Resource::Workload(it) => Some(Type::Workload(workload(it))),
        Resource::Service(it) => Some(Type::Service(service(it))),
        Resource::Policy(_) => None,
    };
    wire::Address { r#type: address }.encode_to_vec()
}

/// An `istio.workload.Workload`.
pub fn encode_workload(from: &Workload) -> Vec<u8> {
    workload(from).encode_to_vec()
}

/// An `istio.workload.Service`.
pub fn encode_service(from: &Service) -> Vec<u8> {
    service(from).encode_to_vec()
}

/// An `istio.security.Authorization`.
pub fn encode_policy(from: &Policy) -> Vec<u8> {
    policy(from).encode_to_vec()
}

fn workload(from: &Workload) -> wire::Workload {
    let default_domain = from.trust_domain == TrustDomain::default();
    wire::Workload {
        name: from.name.to_string(),
        namespace: from.namespace.to_string(),
        addresses: from.addresses.iter().map(octets).collect(),
        network: from.network.to_string(),
        tunnel_protocol: match from.protocol {
            Protocol::Tcp => wire::TunnelProtocol::None,
            Protocol::Hbone => wire::TunnelProtocol::Hbone,
        } as i32,
        trust_domain: if default_domain { String::new() } else { from.trust_domain.to_string() },
        service_account: from.service_account.to_string(),
        waypoint: from.waypoint.as_deref().map(gateway),
        node: from.node.to_string(),
        canonical_name: from.canonical_name.to_string(),
        canonical_revision: from.canonical_revision.to_string(),
        workload_type: workload_type(from.workload_type) as i32,
        workload_name: from.workload_name.to_string(),
        native_tunnel: from.native_tunnel,
        authorization_policies: from.authorization_policies.iter().map(ToString::to_string).collect(),
        status: match from.status {
            Health::Healthy => wire::WorkloadStatus::Healthy,
            Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
        } as i32,
        cluster_id: from.cluster_id.to_string(),
        network_gateway: from.network_gateway.as_deref().map(gateway),
        uid: from.uid.to_string(),
        hostname: from.hostname.to_string(),
        services: from.services.iter().map(|it| (it.service.to_string(), port_list(&it.ports))).collect(),
        application_tunnel: from.application_tunnel.map(|it| wire::ApplicationTunnel {
            protocol: match it.protocol {
                ApplicationProtocol::None => wire::application_tunnel::Protocol::None,
                ApplicationProtocol::Proxy => wire::application_tunnel::Protocol::Proxy,
            } as i32,
            port: it.port.map_or(0, u32::from),
        }),
        locality: locality(from),
        network_mode: match from.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        } as i32,
        extensions: from.extensions.iter().map(workload_extension).collect(),
        capacity: (from.capacity != 1).then_some(from.capacity),
    }
}

fn service(from: &Service) -> wire::Service {
    let vips = from.vips.iter().map(|vip| wire::NetworkAddress {
        network: vip.network.to_string(),
        address: octets(&vip.address),
        length: None,
    });
    let ranges = from.cidr_vips.iter().map(|vip| wire::NetworkAddress {
        network: vip.network.to_string(),
        address: octets(&vip.net.network()),
        length: Some(vip.net.prefix_len().into()),
    });
    wire::Service {
        name: from.name.to_string(),
        namespace: from.namespace.to_string(),
        hostname: from.hostname.to_string(),
        addresses: vips.chain(ranges).collect(),
        ports: from.ports.iter().map(port).collect(),
        subject_alt_names: from.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: from.waypoint.as_ref().map(gateway),
        load_balancing: (from.load_balancer != LoadBalancer::default()).then(|| load_balancer(&from.load_balancer)),
        ip_families: match from.ip_families {
            IpFamilies::Automatic => wire::IpFamilies::Automatic,
            IpFamilies::Ipv4 => wire::IpFamilies::Ipv4Only,
            IpFamilies::Ipv6 => wire::IpFamilies::Ipv6Only,
            IpFamilies::Dual => wire::IpFamilies::Dual,
        } as i32,
        extensions: from.extensions.iter().map(workload_extension).collect(),
        canonical: from.canonical,
        ingress_use_waypoint: from.ingress_use_waypoint,
        weighted_waypoints: from
            .weighted_waypoints
            .iter()
            .map(|it| wire::WeightedWaypoint { destination: Some(gateway(&it.waypoint)), weight: it.weight })
            .collect(),
        visibility: match from.visibility {
            Visibility::Public => wire::service::Visibility::Public,
            Visibility::Namespace => wire::service::Visibility::Namespace,
        } as i32,
    }
}

fn octets(address: &IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

fn locality(from: &Workload) -> Option<wire::Locality> {
    let it = &from.locality;
    let empty = it.region.is_empty() && it.zone.is_empty() && it.subzone.is_empty();
    (!empty).then(|| wire::Locality {
        region: it.region.to_string(),
        zone: it.zone.to_string(),
        subzone: it.subzone.to_string(),
    })
}

fn gateway(from: &Gateway) -> wire::GatewayAddress {
    use wire::gateway_address::Destination;
    wire::GatewayAddress {
        destination: Some(match &from.destination {
            GatewayDestination::Hostname(name) => Destination::Hostname(wire::NamespacedHostname {
                namespace: name.namespace.to_string(),
                hostname: name.hostname.to_string(),
            }),
            GatewayDestination::Address(at) => Destination::Address(wire::NetworkAddress {
                network: at.network.to_string(),
                address: octets(&at.address),
                length: None,
            }),
        }),
        hbone_mtls_port: from.hbone_port.into(),
    }
}

fn port_list(from: &[Port]) -> wire::PortList {
    wire::PortList { ports: from.iter().map(port).collect() }
}

fn port(from: &Port) -> wire::Port {
    let protocol = match from.protocol {
        AppProtocol::Unknown => wire::AppProtocol::Unknown,
        AppProtocol::Http11 => wire::AppProtocol::Http11,
        AppProtocol::Http2 => wire::AppProtocol::Http2,
        AppProtocol::Grpc => wire::AppProtocol::Grpc,
        AppProtocol::Tcp => wire::AppProtocol::Tcp,
        AppProtocol::Tls => wire::AppProtocol::Tls,
    };
    wire::Port {
        service_port: from.number.into(),
        target_port: from.target.map_or(0, u32::from),
        app_protocol: protocol as i32,
    }
}

fn workload_type(from: WorkloadType) -> wire::WorkloadType {
    match from {
        WorkloadType::Deployment => wire::WorkloadType::Deployment,
        WorkloadType::CronJob => wire::WorkloadType::Cronjob,
        WorkloadType::Pod => wire::WorkloadType::Pod,
        WorkloadType::Job => wire::WorkloadType::Job,
    }
}

fn load_balancer(from: &LoadBalancer) -> wire::LoadBalancing {
    use wire::load_balancing as lb;
    let scope = |scope: &Scope| match scope {
        Scope::Region => lb::Scope::Region as i32,
        Scope::Zone => lb::Scope::Zone as i32,
        Scope::Subzone => lb::Scope::Subzone as i32,
        Scope::Node => lb::Scope::Node as i32,
        Scope::Cluster => lb::Scope::Cluster as i32,
        Scope::Network => lb::Scope::Network as i32,
    };
    wire::LoadBalancing {
        routing_preference: from.preferences.iter().map(scope).collect(),
        mode: match from.mode {
            Mode::Standard => lb::Mode::UnspecifiedMode,
            Mode::Strict => lb::Mode::Strict,
            Mode::Failover => lb::Mode::Failover,
            Mode::Passthrough => lb::Mode::Passthrough,
        } as i32,
        health_policy: match from.health {
            HealthPolicy::OnlyHealthy => lb::HealthPolicy::OnlyHealthy,
            HealthPolicy::AllowAll => lb::HealthPolicy::AllowAll,
        } as i32,
    }
}

fn config(from: &Extension) -> Option<prost_types::Any> {
    let empty = from.type_url.is_empty() && from.value.is_empty();
    (!empty).then(|| prost_types::Any { type_url: from.type_url.to_string(), value: from.value.to_vec() })
}

fn workload_extension(from: &Extension) -> wire::Extension {
    wire::Extension { name: from.name.to_string(), config: config(from) }
}

fn policy_extension(from: &Extension) -> security::Extension {
    security::Extension { name: from.name.to_string(), config: config(from) }
}

fn policy(from: &Policy) -> security::Authorization {
    let supported = from.unsupported.is_none();
    let action = if supported { from.action } else { Action::Deny };
    security::Authorization {
        name: from.name.to_string(),
        namespace: from.namespace.to_string(),
        scope: match from.scope {
            PolicyScope::Global => security::Scope::Global,
            PolicyScope::Namespace => security::Scope::Namespace,
            PolicyScope::WorkloadSelector => security::Scope::WorkloadSelector,
        } as i32,
        action: match action {
            Action::Allow => security::Action::Allow,
            Action::Deny => security::Action::Deny,
        } as i32,
        groups: if supported { from.groups.iter().map(|rules| group(rules)).collect() } else { vec![everything()] },
        dry_run: from.dry_run,
        extensions: from.extensions.iter().map(policy_extension).collect(),
    }
}

/// Every connection has a port that is not 0.
fn everything() -> security::Group {
    let matches = vec![security::Match { not_destination_ports: vec![0], ..Default::default() }];
    security::Group { rules: vec![security::Rules { matches }] }
}

fn group(rules: &[Vec<Match>]) -> security::Group {
    let rules = rules.iter().map(|matches| security::Rules { matches: matches.iter().map(conditions).collect() });
    security::Group { rules: rules.collect() }
}

fn conditions(from: &Match) -> security::Match {
    security::Match {
        namespaces: texts(&from.namespaces),
        not_namespaces: texts(&from.not_namespaces),
        principals: texts(&from.principals),
        not_principals: texts(&from.not_principals),
        source_ips: ranges(&from.source_ips),
        not_source_ips: ranges(&from.not_source_ips),
        destination_ips: ranges(&from.destination_ips),
        not_destination_ips: ranges(&from.not_destination_ips),
        destination_ports: from.destination_ports.iter().copied().map(u32::from).collect(),
        not_destination_ports: from.not_destination_ports.iter().copied().map(u32::from).collect(),
        service_accounts: accounts(&from.service_accounts),
        not_service_accounts: accounts(&from.not_service_accounts),
        extensions: from.extensions.iter().map(policy_extension).collect(),
    }
}

fn texts(from: &[StringMatch]) -> Vec<security::StringMatch> {
    use security::string_match::MatchType;
    let one = |it: &StringMatch| match it {
        StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
        StringMatch::Presence => MatchType::Presence(()),
    };
    from.iter().map(|it| security::StringMatch { match_type: Some(one(it)) }).collect()
}

fn ranges(from: &[IpNet]) -> Vec<security::Address> {
    let one = |net: &IpNet| security::Address { address: octets(&net.addr()), length: net.prefix_len().into() };
    from.iter().map(one).collect()
}

fn accounts(from: &[ServiceAccountMatch]) -> Vec<security::ServiceAccountMatch> {
    let one = |it: &ServiceAccountMatch| security::ServiceAccountMatch {
        namespace: it.namespace.to_string(),
        service_account: it.service_account.to_string(),
    };
    from.iter().map(one).collect()
}
