//! The entries of a file, in ztunnel's words, and what each becomes in the model.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use smallvec::SmallVec;
use zspire_model::service::WeightedWaypoint;
use zspire_model::{
    ApplicationTunnel, Gateway, GatewayDestination, HBONE_PORT, Interner, LoadBalancer, Locality, Match, Membership,
    NamespacedHostname, NamespacedName, NetworkAddress, NetworkCidr, Policy, Port, Service, ServiceAccountMatch,
    SpiffeId, StringMatch, TrustDomain, Workload,
};

use super::words::*;

/// Text of the file, not copied where the parser can avoid it.
type Text<'a> = Cow<'a, str>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WorkloadEntry<'a> {
    #[serde(borrow)]
    uid: Text<'a>,
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow, default)]
    namespace: Text<'a>,
    #[serde(borrow, default)]
    trust_domain: Text<'a>,
    #[serde(borrow, default)]
    service_account: Text<'a>,
    #[serde(borrow, default)]
    network: Text<'a>,
    #[serde(default)]
    workload_ips: Vec<Ip>,
    #[serde(borrow, default)]
    hostname: Text<'a>,
    #[serde(default)]
    protocol: ProtocolWord,
    #[serde(default)]
    network_mode: NetworkModeWord,
    #[serde(default)]
    status: HealthWord,
    capacity: Option<u32>,
    #[serde(borrow)]
    waypoint: Option<GatewayEntry<'a>>,
    #[serde(borrow)]
    network_gateway: Option<GatewayEntry<'a>>,
    application_tunnel: Option<ApplicationTunnelEntry>,
    #[serde(default)]
    native_tunnel: bool,
    #[serde(borrow, default)]
    node: Text<'a>,
    #[serde(borrow, default)]
    cluster_id: Text<'a>,
    #[serde(borrow, default)]
    locality: LocalityEntry<'a>,
    #[serde(borrow, default)]
    canonical_name: Text<'a>,
    #[serde(borrow, default)]
    canonical_revision: Text<'a>,
    #[serde(default)]
    workload_type: WorkloadTypeWord,
    #[serde(borrow, default)]
    workload_name: Text<'a>,
    #[serde(borrow, default)]
    services: Pairs<Text<'a>, Pairs<u16, u16>>,
    #[serde(borrow, default)]
    authorization_policies: Vec<Text<'a>>,
}

impl WorkloadEntry<'_> {
    pub(super) fn build(self, shared: &mut Interner, mesh: &TrustDomain) -> Result<Workload, String> {
        if self.uid.is_empty() {
            return Err("uid: it is empty: give each workload its own".into());
        }
        let trust_domain = match &*self.trust_domain {
            "" => mesh.clone(),
            name => TrustDomain::new(shared.text(name)).map_err(|why| format!("trustDomain: {why}"))?,
        };
        if !self.service_account.is_empty() {
            SpiffeId::istio(&trust_domain, &self.namespace, &self.service_account)
                .map_err(|why| format!("namespace and serviceAccount give no SPIFFE id: {why}"))?;
        }
        let locality = self.locality.build(shared);
        Ok(Workload {
            id_template: None,
            id: Default::default(),
            uid: (&*self.uid).into(),
            name: (&*self.name).into(),
            namespace: shared.text(&self.namespace),
            trust_domain,
            service_account: shared.text(&self.service_account),
            network: shared.text(&self.network),
            addresses: distinct(&self.workload_ips),
            hostname: shared.text(&self.hostname),
            protocol: self.protocol.into(),
            network_mode: self.network_mode.into(),
            status: self.status.into(),
            capacity: self.capacity.unwrap_or(1),
            waypoint: gateway(shared, self.waypoint, "waypoint")?.map(|it| shared.gateway(it)),
            network_gateway: gateway(shared, self.network_gateway, "networkGateway")?.map(|it| shared.gateway(it)),
            application_tunnel: self.application_tunnel.map(Into::into),
            native_tunnel: self.native_tunnel,
            node: shared.text(&self.node),
            cluster_id: shared.text(&self.cluster_id),
            locality: shared.locality(locality),
            canonical_name: shared.text(&self.canonical_name),
            canonical_revision: shared.text(&self.canonical_revision),
            workload_type: self.workload_type.into(),
            workload_name: shared.text(&self.workload_name),
            services: memberships(shared, self.services)?,
            authorization_policies: policies(shared, &self.authorization_policies)?,
            extensions: Arc::default(),
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServiceEntry<'a> {
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow)]
    namespace: Text<'a>,
    #[serde(borrow)]
    hostname: Text<'a>,
    #[serde(borrow, default)]
    vips: Vec<Text<'a>>,
    #[serde(borrow, default)]
    cidr_vips: Vec<Text<'a>>,
    #[serde(default)]
    ports: Pairs<u16, u16>,
    /// Dumps have it; endpoints are the workloads that name the service.
    #[serde(default, rename = "endpoints")]
    _endpoints: IgnoredAny,
    #[serde(borrow, default)]
    subject_alt_names: Vec<Text<'a>>,
    #[serde(borrow)]
    waypoint: Option<GatewayEntry<'a>>,
    #[serde(borrow, default)]
    weighted_waypoints: Vec<WeightedWaypointEntry<'a>>,
    #[serde(default)]
    load_balancer: Option<LoadBalancerEntry>,
    #[serde(default)]
    ip_families: Option<IpFamiliesWord>,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    ingress_use_waypoint: bool,
    #[serde(default)]
    visibility: VisibilityWord,
}

impl ServiceEntry<'_> {
    pub(super) fn build(self, shared: &mut Interner) -> Result<Service, String> {
        named("namespace", &self.namespace)?;
        if self.hostname.is_empty() {
            return Err("hostname: it is empty: write the name that clients use".into());
        }
        let waypoint = gateway(shared, self.waypoint, "waypoint")?;
        let weighted = self.weighted_waypoints.into_iter().map(|it| it.build(shared));
        Ok(Service {
            weighted_waypoints: weighted.collect::<Result<_, _>>()?,
            name: shared.text(&self.name),
            namespace: shared.text(&self.namespace),
            hostname: shared.text(&self.hostname),
            vips: self.vips.iter().map(|it| vip(shared, it)).collect::<Result<_, _>>()?,
            cidr_vips: self.cidr_vips.iter().map(|it| cidr_vip(shared, it)).collect::<Result<_, _>>()?,
            ports: ports(self.ports)?,
            subject_alt_names: self.subject_alt_names.iter().map(|it| shared.text(it)).collect(),
            waypoint,
            load_balancer: self.load_balancer.map(Into::into).unwrap_or_default(),
            ip_families: self.ip_families.map(Into::into).unwrap_or_default(),
            canonical: self.canonical,
            ingress_use_waypoint: self.ingress_use_waypoint,
            visibility: self.visibility.into(),
            extensions: Vec::new(),
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PolicyEntry<'a> {
    #[serde(borrow)]
    name: Text<'a>,
    #[serde(borrow)]
    namespace: Text<'a>,
    scope: PolicyScopeWord,
    action: ActionWord,
    #[serde(borrow, default)]
    rules: Vec<Vec<Vec<MatchEntry<'a>>>>,
    #[serde(default)]
    dry_run: bool,
}

impl PolicyEntry<'_> {
    pub(super) fn build(self, shared: &mut Interner) -> Result<Policy, String> {
        named("namespace", &self.namespace)?;
        if self.name.is_empty() {
            return Err("name: it is empty: give each policy a name".into());
        }
        let mut groups = Vec::with_capacity(self.rules.len());
        for group in self.rules {
            let mut rules = Vec::with_capacity(group.len());
            for rule in group {
                rules.push(rule.into_iter().map(|it| it.build(shared)).collect::<Result<_, _>>()?);
            }
            groups.push(rules);
        }
        Ok(Policy {
            namespace: shared.text(&self.namespace),
            name: shared.text(&self.name),
            scope: self.scope.into(),
            action: self.action.into(),
            groups,
            dry_run: self.dry_run,
            extensions: Vec::new(),
            unsupported: None,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[derive(Default)]
struct MatchEntry<'a> {
    #[serde(borrow)]
    namespaces: Vec<StringMatchEntry<'a>>,
    #[serde(borrow)]
    not_namespaces: Vec<StringMatchEntry<'a>>,
    #[serde(borrow)]
    service_accounts: Vec<ServiceAccountEntry<'a>>,
    #[serde(borrow)]
    not_service_accounts: Vec<ServiceAccountEntry<'a>>,
    #[serde(borrow)]
    principals: Vec<StringMatchEntry<'a>>,
    #[serde(borrow)]
    not_principals: Vec<StringMatchEntry<'a>>,
    #[serde(borrow)]
    source_ips: Vec<Text<'a>>,
    #[serde(borrow)]
    not_source_ips: Vec<Text<'a>>,
    #[serde(borrow)]
    destination_ips: Vec<Text<'a>>,
    #[serde(borrow)]
    not_destination_ips: Vec<Text<'a>>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

impl MatchEntry<'_> {
    fn build(self, shared: &mut Interner) -> Result<Match, String> {
        let mut texts = |from: Vec<StringMatchEntry<'_>>| from.into_iter().map(|it| it.build(shared)).collect();
        let (namespaces, not_namespaces) = (texts(self.namespaces), texts(self.not_namespaces));
        let (principals, not_principals) = (texts(self.principals), texts(self.not_principals));
        let mut accounts = |from: Vec<ServiceAccountEntry<'_>>| from.into_iter().map(|it| it.build(shared)).collect();
        Ok(Match {
            namespaces,
            not_namespaces,
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            principals,
            not_principals,
            source_ips: ranges("sourceIps", &self.source_ips)?,
            not_source_ips: ranges("notSourceIps", &self.not_source_ips)?,
            destination_ips: ranges("destinationIps", &self.destination_ips)?,
            not_destination_ips: ranges("notDestinationIps", &self.not_destination_ips)?,
            destination_ports: self.destination_ports,
            not_destination_ports: self.not_destination_ports,
            extensions: Vec::new(),
        })
    }
}

/// `!Exact text` in YAML, `{"Exact": "text"}` in JSON. The name is what an error calls it.
#[derive(Deserialize)]
#[serde(rename = "string match: !Exact, !Prefix, !Suffix or !Presence")]
enum StringMatchEntry<'a> {
    Exact(#[serde(borrow)] Text<'a>),
    Prefix(#[serde(borrow)] Text<'a>),
    Suffix(#[serde(borrow)] Text<'a>),
    Presence,
}

impl StringMatchEntry<'_> {
    fn build(self, shared: &mut Interner) -> StringMatch {
        match self {
            Self::Exact(text) => StringMatch::Exact(shared.text(&text)),
            Self::Prefix(text) => StringMatch::Prefix(shared.text(&text)),
            Self::Suffix(text) => StringMatch::Suffix(shared.text(&text)),
            Self::Presence => StringMatch::Presence,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceAccountEntry<'a> {
    #[serde(borrow)]
    namespace: Text<'a>,
    #[serde(borrow)]
    service_account: Text<'a>,
}

impl ServiceAccountEntry<'_> {
    fn build(self, shared: &mut Interner) -> ServiceAccountMatch {
        ServiceAccountMatch {
            namespace: shared.text(&self.namespace),
            service_account: shared.text(&self.service_account),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct GatewayEntry<'a> {
    #[serde(borrow)]
    destination: Text<'a>,
    #[serde(default = "hbone_port")]
    hbone_mtls_port: u16,
}

fn hbone_port() -> u16 {
    HBONE_PORT
}

impl GatewayEntry<'_> {
    /// `network/address` or `namespace/hostname`: what can be an address is one.
    fn build(self, shared: &mut Interner, field: &str) -> Result<Gateway, String> {
        let text = &*self.destination;
        let (first, second) = text.split_once('/').filter(|(_, second)| !second.is_empty()).ok_or_else(|| {
            format!("{field}: destination {text:?} is neither network/address nor namespace/hostname")
        })?;
        let destination = match second.parse::<IpAddr>() {
            Ok(address) => GatewayDestination::Address(NetworkAddress {
                network: shared.text(first),
                address: address.to_canonical(),
            }),
            Err(_) => GatewayDestination::Hostname(NamespacedHostname {
                namespace: shared.text(first),
                hostname: shared.text(second),
            }),
        };
        Ok(Gateway { destination, hbone_port: self.hbone_mtls_port })
    }
}

fn gateway(shared: &mut Interner, from: Option<GatewayEntry<'_>>, field: &str) -> Result<Option<Gateway>, String> {
    from.map(|it| it.build(shared, field)).transpose()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WeightedWaypointEntry<'a> {
    #[serde(borrow)]
    destination: GatewayEntry<'a>,
    weight: u32,
}

impl WeightedWaypointEntry<'_> {
    fn build(self, shared: &mut Interner) -> Result<WeightedWaypoint, String> {
        Ok(WeightedWaypoint { waypoint: self.destination.build(shared, "weightedWaypoints")?, weight: self.weight })
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct LocalityEntry<'a> {
    #[serde(borrow)]
    region: Text<'a>,
    #[serde(borrow)]
    zone: Text<'a>,
    #[serde(borrow)]
    subzone: Text<'a>,
}

impl LocalityEntry<'_> {
    fn build(self, shared: &mut Interner) -> Locality {
        let mut text = |text: &str| shared.text(text);
        Locality { region: text(&self.region), zone: text(&self.zone), subzone: text(&self.subzone) }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ApplicationTunnelEntry {
    protocol: ApplicationProtocolWord,
    port: Option<u16>,
}

impl From<ApplicationTunnelEntry> for ApplicationTunnel {
    fn from(from: ApplicationTunnelEntry) -> Self {
        Self { protocol: from.protocol.into(), port: from.port.filter(|port| *port != 0) }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct LoadBalancerEntry {
    routing_preferences: Vec<ScopeWord>,
    mode: ModeWord,
    health_policy: HealthPolicyWord,
}

impl From<LoadBalancerEntry> for LoadBalancer {
    fn from(from: LoadBalancerEntry) -> Self {
        Self {
            preferences: from.routing_preferences.into_iter().map(Into::into).collect(),
            mode: from.mode.into(),
            health: from.health_policy.into(),
        }
    }
}

/// An address of a workload.
#[derive(Clone, Copy)]
struct Ip(IpAddr);

impl<'de> Deserialize<'de> for Ip {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(deserializer)?;
        let wrong = |_| D::Error::custom(format_args!("workloadIps: {text:?} is not an IP address"));
        text.parse().map(Self).map_err(wrong)
    }
}

/// A map, as the pairs that stand there.
struct Pairs<K, V>(Vec<(K, V)>);

impl<K, V> Default for Pairs<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, K: Deserialize<'de>, V: Deserialize<'de>> Deserialize<'de> for Pairs<K, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}

struct PairsVisitor<K, V>(PhantomData<(K, V)>);

impl<'de, K: Deserialize<'de>, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<K, V> {
    type Value = Pairs<K, V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}

impl<K: Eq + Hash + fmt::Display, V> Pairs<K, V> {
    /// JSON parsers let a key stand twice.
    fn unique(self, field: &str) -> Result<Vec<(K, V)>, String> {
        let mut keys = HashSet::with_capacity(self.0.len());
        match self.0.iter().find(|(key, _)| !keys.insert(key)) {
            Some((key, _)) => Err(format!("{field}: {key} stands there twice: remove one")),
            None => Ok(self.0),
        }
    }
}

/// Target 0 is a port that each endpoint says itself.
fn ports(from: Pairs<u16, u16>) -> Result<Vec<Port>, String> {
    let port = |(number, target): (u16, u16)| match number {
        0 => Err("ports: 0 is not a port".to_owned()),
        number => Ok(Port { number, target: (target != 0).then_some(target), protocol: Default::default() }),
    };
    let mut ports = from.unique("ports")?.into_iter().map(port).collect::<Result<Vec<_>, _>>()?;
    ports.sort_unstable();
    Ok(ports)
}

fn memberships(shared: &mut Interner, from: Pairs<Text<'_>, Pairs<u16, u16>>) -> Result<Arc<[Membership]>, String> {
    let mut memberships = Vec::with_capacity(from.0.len());
    for (name, of_workload) in from.unique("services")? {
        let (namespace, hostname) = pair("services", &name, "namespace/hostname")?;
        let service = NamespacedHostname { namespace: shared.text(namespace), hostname: shared.text(hostname) };
        let ports = ports(of_workload)?;
        memberships.push(Membership { service, ports: shared.ports(ports) });
    }
    memberships.sort_by(|a, b| a.service.cmp(&b.service));
    Ok(shared.memberships(memberships))
}

fn policies(shared: &mut Interner, from: &[Text<'_>]) -> Result<Arc<[NamespacedName]>, String> {
    let mut names = Vec::with_capacity(from.len());
    for text in from {
        let (namespace, name) = pair("authorizationPolicies", text, "namespace/name")?;
        names.push(NamespacedName { namespace: shared.text(namespace), name: shared.text(name) });
    }
    Ok(shared.policies(names))
}

fn pair<'a>(field: &str, text: &'a str, form: &str) -> Result<(&'a str, &'a str), String> {
    text.split_once('/')
        .filter(|(first, second)| !first.is_empty() && !second.is_empty())
        .ok_or_else(|| format!("{field}: {text:?} has not the form {form}"))
}

fn named(field: &str, text: &str) -> Result<(), String> {
    match text {
        "" => Err(format!("{field}: it is empty: name it")),
        text if text.contains('/') => Err(format!("{field}: {text:?} has a slash: names have none")),
        _ => Ok(()),
    }
}

fn distinct(from: &[Ip]) -> SmallVec<[IpAddr; 1]> {
    let mut addresses = SmallVec::new();
    for address in from {
        let address = address.0.to_canonical();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

fn vip(shared: &mut Interner, text: &str) -> Result<NetworkAddress, String> {
    let wrong = || format!("vips: {text:?} has not the form network/address (\"/10.0.0.1\" without a network)");
    let (network, address) = text.split_once('/').ok_or_else(wrong)?;
    let address = address.parse::<IpAddr>().map_err(|_| wrong())?;
    Ok(NetworkAddress { network: shared.text(network), address: address.to_canonical() })
}

fn cidr_vip(shared: &mut Interner, text: &str) -> Result<NetworkCidr, String> {
    let wrong = || format!("cidrVips: {text:?} has not the form network/address/length (\"/10.0.0.0/24\")");
    let (network, net) = text.split_once('/').ok_or_else(wrong)?;
    let net = net.parse::<IpNet>().map_err(|_| wrong())?;
    Ok(NetworkCidr { network: shared.text(network), net: net.trunc() })
}

/// An address alone is a range of one.
fn ranges(field: &str, from: &[Text<'_>]) -> Result<Vec<IpNet>, String> {
    let range = |text: &Text<'_>| {
        let one = || text.parse::<IpAddr>().ok().map(|address| IpNet::from(address.to_canonical()));
        let range = text.parse::<IpNet>().ok().or_else(one);
        range.ok_or_else(|| format!("{field}: {text:?} is neither an address nor a range (\"10.0.0.0/8\")"))
    };
    from.iter().map(range).collect()
}
