//! Workloads, services and policies as the dump shows them. Empty fields are left out, as ztunnel does.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;
use zspire_model as model;
use zspire_model::Snapshot;
use zspire_model::policy::{Action, Scope};
use zspire_model::service::{HealthPolicy, IpFamilies, Mode, Scope as LoadScope, Visibility};
use zspire_model::workload::{ApplicationProtocol, Health, NetworkMode};

fn empty(text: &&str) -> bool {
    text.is_empty()
}

type Ports = BTreeMap<u16, u16>;

fn ports(ports: &[model::Port]) -> Ports {
    // A named target port is resolved by each workload; 0 stands for it, as on the wire.
    ports.iter().map(|p| (p.number, p.target.unwrap_or(0))).collect()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Workload<'a> {
    workload_ips: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<Gateway>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_gateway: Option<Gateway>,
    protocol: &'static str,
    network_mode: &'static str,
    uid: &'a str,
    name: &'a str,
    namespace: &'a str,
    #[serde(skip_serializing_if = "empty")]
    trust_domain: &'a str,
    service_account: &'a str,
    #[serde(skip_serializing_if = "empty")]
    network: &'a str,
    #[serde(skip_serializing_if = "empty")]
    workload_name: &'a str,
    #[serde(skip_serializing_if = "empty")]
    workload_type: &'a str,
    #[serde(skip_serializing_if = "empty")]
    canonical_name: &'a str,
    #[serde(skip_serializing_if = "empty")]
    canonical_revision: &'a str,
    #[serde(skip_serializing_if = "empty")]
    hostname: &'a str,
    node: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    native_tunnel: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<ApplicationTunnel>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    authorization_policies: Vec<String>,
    status: &'static str,
    cluster_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    locality: Option<Locality<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    services: Option<BTreeMap<String, Ports>>,
    capacity: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Gateway {
    destination: String,
    hbone_mtls_port: u16,
}

impl Gateway {
    fn new(gateway: &model::Gateway) -> Self {
        Self { destination: gateway.destination.to_string(), hbone_mtls_port: gateway.hbone_port }
    }
}

#[derive(Serialize)]
struct ApplicationTunnel {
    protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

#[derive(Serialize)]
struct Locality<'a> {
    region: &'a str,
    zone: &'a str,
    subzone: &'a str,
}

/// Workloads by UID; with the services that each says it is part of, if asked.
pub(super) fn workloads(snapshot: &Snapshot, with_services: bool) -> Vec<Workload<'_>> {
    let mut all: Vec<_> = snapshot.workloads().map(|w| workload(w, with_services)).collect();
    all.sort_unstable_by_key(|w| w.uid);
    all
}

fn workload(w: &model::Workload, with_services: bool) -> Workload<'_> {
    let locality = &*w.locality;
    Workload {
        workload_ips: &w.addresses,
        waypoint: w.waypoint.as_deref().map(Gateway::new),
        network_gateway: w.network_gateway.as_deref().map(Gateway::new),
        protocol: w.protocol.as_str(),
        network_mode: match w.network_mode {
            NetworkMode::Standard => "Standard",
            NetworkMode::HostNetwork => "HostNetwork",
        },
        uid: &w.uid,
        name: &w.name,
        namespace: &w.namespace,
        trust_domain: w.trust_domain.as_str(),
        service_account: &w.service_account,
        network: &w.network,
        workload_name: &w.workload_name,
        // Without a name the type says nothing.
        workload_type: if w.workload_name.is_empty() { "" } else { w.workload_type.as_str() },
        canonical_name: &w.canonical_name,
        canonical_revision: &w.canonical_revision,
        hostname: &w.hostname,
        node: &w.node,
        native_tunnel: w.native_tunnel,
        application_tunnel: w.application_tunnel.map(|tunnel| ApplicationTunnel {
            protocol: match tunnel.protocol {
                ApplicationProtocol::None => "NONE",
                ApplicationProtocol::Proxy => "PROXY",
            },
            port: tunnel.port,
        }),
        authorization_policies: w.authorization_policies.iter().map(ToString::to_string).collect(),
        status: health(w.status),
        cluster_id: &w.cluster_id,
        locality: (*locality != model::Locality::default()).then_some(Locality {
            region: &locality.region,
            zone: &locality.zone,
            subzone: &locality.subzone,
        }),
        services: with_services.then(|| w.services.iter().map(|m| (m.service.to_string(), ports(&m.ports))).collect()),
        capacity: w.capacity,
    }
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Healthy => "Healthy",
        Health::Unhealthy => "Unhealthy",
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Service<'a> {
    name: &'a str,
    namespace: &'a str,
    hostname: &'a str,
    vips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<String>,
    ports: Ports,
    endpoints: BTreeMap<String, Endpoint<'a>>,
    subject_alt_names: &'a [model::Str],
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<Gateway>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<WeightedWaypoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancer: Option<LoadBalancer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_families: Option<&'static str>,
    canonical: bool,
    visibility: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint<'a> {
    workload_uid: &'a str,
    port: Ports,
    status: &'static str,
}

#[derive(Serialize)]
struct WeightedWaypoint {
    destination: Gateway,
    weight: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LoadBalancer {
    routing_preferences: Vec<&'static str>,
    mode: &'static str,
    health_policy: &'static str,
}

/// Services by namespace and hostname.
pub(super) fn services(snapshot: &Snapshot) -> Vec<Service<'_>> {
    let mut all: Vec<_> = snapshot.services().map(|s| service(snapshot, s)).collect();
    all.sort_unstable_by_key(|s| (s.namespace, s.hostname));
    all
}

fn service<'a>(snapshot: &'a Snapshot, s: &'a model::Service) -> Service<'a> {
    let key = s.key();
    let endpoint = |w: &'a model::Workload| {
        let port = w.membership(&key).map(|m| ports(&m.ports)).unwrap_or_default();
        (w.uid.to_string(), Endpoint { workload_uid: &w.uid, port, status: health(w.status) })
    };
    Service {
        name: &s.name,
        namespace: &s.namespace,
        hostname: &s.hostname,
        vips: s.vips.iter().map(ToString::to_string).collect(),
        cidr_vips: s.cidr_vips.iter().map(ToString::to_string).collect(),
        ports: ports(&s.ports),
        endpoints: snapshot.endpoints(&key).into_iter().flat_map(|all| all.members()).map(|w| endpoint(w)).collect(),
        subject_alt_names: &s.subject_alt_names,
        waypoint: s.waypoint.as_ref().map(Gateway::new),
        weighted_waypoints: s
            .weighted_waypoints
            .iter()
            .map(|w| WeightedWaypoint { destination: Gateway::new(&w.waypoint), weight: w.weight })
            .collect(),
        load_balancer: load_balancer(&s.load_balancer),
        ip_families: match s.ip_families {
            IpFamilies::Automatic => None,
            IpFamilies::Ipv4 => Some("IPv4"),
            IpFamilies::Ipv6 => Some("IPv6"),
            IpFamilies::Dual => Some("Dual"),
        },
        canonical: s.canonical,
        visibility: match s.visibility {
            Visibility::Public => "Public",
            Visibility::Namespace => "Namespace",
        },
    }
}

fn load_balancer(lb: &model::LoadBalancer) -> Option<LoadBalancer> {
    if *lb == model::LoadBalancer::default() {
        return None;
    }
    Some(LoadBalancer {
        routing_preferences: lb
            .preferences
            .iter()
            .map(|scope| match scope {
                LoadScope::Region => "Region",
                LoadScope::Zone => "Zone",
                LoadScope::Subzone => "Subzone",
                LoadScope::Node => "Node",
                LoadScope::Cluster => "Cluster",
                LoadScope::Network => "Network",
            })
            .collect(),
        mode: match lb.mode {
            Mode::Standard => "Standard",
            Mode::Strict => "Strict",
            Mode::Failover => "Failover",
            Mode::Passthrough => "Passthrough",
        },
        health_policy: match lb.health {
            HealthPolicy::OnlyHealthy => "OnlyHealthy",
            HealthPolicy::AllowAll => "AllowAll",
        },
    })
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Policy<'a> {
    name: &'a str,
    namespace: &'a str,
    scope: &'static str,
    action: &'static str,
    dry_run: bool,
    rules: Vec<Vec<Vec<Match<'a>>>>,
    /// A field that zspire does not know: the policy denies what it might deny.
    #[serde(skip_serializing_if = "Option::is_none")]
    unsupported: Option<&'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Match<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<StringMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_namespaces: Vec<StringMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service_accounts: Vec<ServiceAccount<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_service_accounts: Vec<ServiceAccount<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    principals: Vec<StringMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_principals: Vec<StringMatch<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_source_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    destination_ports: &'a [u16],
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    not_destination_ports: &'a [u16],
}

#[derive(Serialize)]
enum StringMatch<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Suffix(&'a str),
    Presence(BTreeMap<(), ()>),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceAccount<'a> {
    namespace: &'a str,
    service_account: &'a str,
}

/// Policies by namespace and name.
pub(super) fn policies(snapshot: &Snapshot) -> Vec<Policy<'_>> {
    let mut all: Vec<_> = snapshot.policies().map(|p| policy(p)).collect();
    all.sort_unstable_by_key(|p| (p.namespace, p.name));
    all
}

fn policy(p: &model::Policy) -> Policy<'_> {
    Policy {
        name: &p.name,
        namespace: &p.namespace,
        scope: match p.scope {
            Scope::Global => "Global",
            Scope::Namespace => "Namespace",
            Scope::WorkloadSelector => "WorkloadSelector",
        },
        action: match p.action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
        },
        dry_run: p.dry_run,
        rules: p.groups.iter().map(|g| g.iter().map(|r| r.iter().map(matching).collect()).collect()).collect(),
        unsupported: p.unsupported.as_deref(),
    }
}

fn matching(m: &model::Match) -> Match<'_> {
    fn strings(all: &[model::StringMatch]) -> Vec<StringMatch<'_>> {
        fn one(s: &model::StringMatch) -> StringMatch<'_> {
            match s {
                model::StringMatch::Exact(text) => StringMatch::Exact(text),
                model::StringMatch::Prefix(text) => StringMatch::Prefix(text),
                model::StringMatch::Suffix(text) => StringMatch::Suffix(text),
                model::StringMatch::Presence => StringMatch::Presence(BTreeMap::new()),
            }
        }
        all.iter().map(one).collect()
    }
    fn accounts(all: &[model::ServiceAccountMatch]) -> Vec<ServiceAccount<'_>> {
        all.iter().map(|a| ServiceAccount { namespace: &a.namespace, service_account: &a.service_account }).collect()
    }
    fn nets<T: ToString>(all: &[T]) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }
    Match {
        namespaces: strings(&m.namespaces),
        not_namespaces: strings(&m.not_namespaces),
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
        principals: strings(&m.principals),
        not_principals: strings(&m.not_principals),
        source_ips: nets(&m.source_ips),
        not_source_ips: nets(&m.not_source_ips),
        destination_ips: nets(&m.destination_ips),
        not_destination_ips: nets(&m.not_destination_ips),
        destination_ports: &m.destination_ports,
        not_destination_ports: &m.not_destination_ports,
    }
}
