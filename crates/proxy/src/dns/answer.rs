//! What a name means to a client: a function of the mesh, the client and the question.
//!
//! Answered from the mesh: addresses of services (virtual ones, or those of their endpoints if there are none), of workloads that
//! have a hostname, of the single endpoints of headless services, and SRV records of services. A name that is known but has no
//! record of the type asked for is answered with nothing, and with an SOA record that says for how long; forwarding it would
//! let another server deny it. Whatever is not known is forwarded.
//!
//! Names are tried as Kubernetes' resolvers write them: as they are, with what is missing of the cluster's domain, and without
//! a search domain that the client's resolver has put behind them. For the last, the answer begins with a CNAME.

use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::{Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::Rng;
use rand::seq::SliceRandom as _;
use zspire_model::{AppProtocol, NamespacedHostname, Port, Service, Snapshot, Str, Workload};

/// Lifetime of what is answered, in seconds.
const TTL: u32 = 30;
/// The same for what is not there: it may come.
const NEGATIVE_TTL: u32 = 5;
/// Addresses in one answer; more would not fit, and nobody tries them all.
const MOST: usize = 64;

/// What answers depend on besides the mesh.
#[derive(Debug, Clone)]
pub(crate) struct Zone {
    /// The cluster's domain, as a name.
    domain: Name,
    preferred_namespace: Option<Str>,
}

/// What is done with a question.
#[derive(Debug, PartialEq)]
pub(crate) enum Decision {
    /// It is answered from the mesh.
    Answer(Box<Answer>),
    /// Somebody else has to be asked.
    Forward,
    /// It is refused.
    Refuse(ResponseCode),
}

/// An answer. Without records it is that there are none, which `soa` says with authority.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) records: Vec<Record>,
    pub(crate) soa: Option<Record>,
    pub(crate) additionals: Vec<Record>,
}

impl Zone {
    /// The zone of a cluster; none if its domain is no name.
    pub(crate) fn new(domain: &str, preferred_namespace: Option<Str>) -> Option<Self> {
        let mut domain = Name::from_ascii(domain).ok()?.to_lowercase();
        domain.set_fqdn(true);
        Some(Self { domain, preferred_namespace })
    }

    /// What to answer to a client.
    pub(crate) fn answer(&self, snapshot: &Snapshot, client: &Workload, query: &Query, rng: &mut impl Rng) -> Decision {
        if query.query_class() != DNSClass::IN {
            return Decision::Forward;
        }
        if matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR) {
            return Decision::Refuse(ResponseCode::Refused);
        }
        let asked = query.name();
        for candidate in self.candidates(asked, client) {
            let mut lookup = Lookup { zone: self, snapshot, client, owner: &candidate.name, rng: &mut *rng };
            let Some(found) = lookup.find(&candidate.name) else { continue };
            let Some(mut answer) = lookup.records(&found, query.query_type()) else { return Decision::Forward };
            if answer.records.is_empty() {
                answer.soa = Some(self.soa(&candidate.name, snapshot.version()));
            }
            // The client's resolver reads an answer by the name that it has asked for.
            match candidate.stripped {
                true => answer.records.insert(0, record(asked, RData::CNAME(CNAME(candidate.name.clone())))),
                false => rename(&mut answer.records, &candidate.name, asked),
            }
            return Decision::Answer(Box::new(answer));
        }
        Decision::Forward
    }

    /// The names that a client may mean by one, the most literal first.
    fn candidates(&self, asked: &Name, client: &Workload) -> Vec<Candidate> {
        let mut name = asked.to_lowercase();
        name.set_fqdn(true);
        let mut all = Vec::new();
        let mut add = |name: Name, stripped: bool| {
            if !all.iter().any(|it: &Candidate| it.name == name) {
                all.push(Candidate { name, stripped });
            }
        };
        add(name.clone(), false);
        self.completed(&name, client).into_iter().for_each(|name| add(name, false));
        for search in self.search_domains(client) {
            let Some(stripped) = strip(&name, &search) else { continue };
            add(stripped.clone(), true);
            self.completed(&stripped, client).into_iter().for_each(|name| add(name, true));
        }
        all
    }

    /// `name`, `name.namespace` and `name.namespace.svc` as the services of Kubernetes that they may be.
    fn completed(&self, name: &Name, client: &Workload) -> Option<Name> {
        let is_svc = name.num_labels() > 2 && name.iter().next_back() == Some(b"svc");
        let suffix = match name.num_labels() {
            1 => self.search_domains(client).next(),
            2 => self.svc(),
            _ if is_svc => Some(self.domain.clone()),
            _ => None,
        };
        name.clone().append_domain(&suffix?).ok()
    }

    fn svc(&self) -> Option<Name> {
        Name::from_labels(["svc"]).ok()?.append_domain(&self.domain).ok()
    }

    /// As in the `resolv.conf` of a pod, the longest first.
    fn search_domains(&self, client: &Workload) -> impl Iterator<Item = Name> {
        let svc = self.svc();
        let namespace = Name::from_labels([client.namespace.as_bytes()]).ok();
        let own = namespace.zip(svc.clone()).and_then(|(namespace, svc)| namespace.append_domain(&svc).ok());
        own.into_iter().chain(svc).chain([self.domain.clone()])
    }

    fn soa(&self, name: &Name, version: u64) -> Record {
        let apex = if self.domain.zone_of(name) { self.domain.clone() } else { name.clone() };
        let below = |label: &str| apex.prepend_label(label).unwrap_or_else(|_| apex.clone());
        // Serial numbers go round.
        let serial = (version % u64::from(u32::MAX)) as u32;
        let soa = SOA::new(below("ns.dns"), below("hostmaster"), serial, 7200, 1800, 86_400, NEGATIVE_TTL);
        Record::from_rdata(apex.clone(), NEGATIVE_TTL, RData::SOA(soa))
    }
}

#[derive(Debug)]
struct Candidate {
    name: Name,
    /// Whether a search domain was taken off.
    stripped: bool,
}

/// What a name stands for.
enum Found<'a> {
    Service(&'a Arc<Service>),
    /// One endpoint of a headless service.
    Endpoint(&'a Arc<Workload>),
    /// Workloads with a hostname.
    Workloads(&'a [Arc<Workload>]),
    /// Ports of a service, for an SRV name.
    Ports(&'a Arc<Service>, Vec<Port>),
}

struct Lookup<'a, R> {
    zone: &'a Zone,
    snapshot: &'a Snapshot,
    client: &'a Workload,
    owner: &'a Name,
    rng: R,
}

impl<'a, R: Rng> Lookup<'a, R> {
    fn find(&self, name: &Name) -> Option<Found<'a>> {
        let text = text(name)?;
        if let Some(service) = self.service(&text) {
            return Some(Found::Service(service));
        }
        let workloads = self.snapshot.workloads_named(&text);
        if !workloads.is_empty() {
            return Some(Found::Workloads(workloads));
        }
        let (first, rest) = text.split_once('.')?;
        if let Some(found) = self.ports(first, rest) {
            return Some(found);
        }
        if let Some(service) = self.service(rest)
            && is_headless(service)
            && let Some(endpoint) = self.endpoint(service, first)
        {
            return Some(Found::Endpoint(endpoint));
        }
        self.wildcard(rest).map(Found::Service)
    }

    /// Among services of one hostname: the client's namespace, then the canonical one, then the preferred namespace, then the
    /// first. What the client may not see is not there.
    fn service(&self, hostname: &str) -> Option<&'a Arc<Service>> {
        let preferred = self.zone.preferred_namespace.as_ref();
        let visible = self.snapshot.services_named(hostname).iter().filter(|service| service.visible_to(self.client));
        visible.min_by_key(|service| {
            let own = service.namespace == self.client.namespace;
            (!own, !service.canonical, preferred != Some(&service.namespace))
        })
    }

    /// `*.example.com` for whatever is below `example.com`, the longest first.
    fn wildcard(&self, mut rest: &str) -> Option<&'a Arc<Service>> {
        loop {
            if let Some(service) = self.service(&format!("*.{rest}")) {
                return Some(service);
            }
            rest = rest.split_once('.')?.1;
        }
    }

    /// The endpoint with a pod's hostname, or with an address written with dashes, as Kubernetes names those without.
    fn endpoint(&self, service: &Arc<Service>, label: &str) -> Option<&'a Arc<Workload>> {
        let key = service.key();
        let endpoints = self.snapshot.endpoints(&key)?;
        let uid = format!("{}//Pod/{}/{label}", self.client.cluster_id, service.namespace);
        if let Some(workload) = self.snapshot.workload(&uid).filter(|workload| endpoints.has_member(&workload.uid)) {
            return Some(workload);
        }
        let dashed = |address: &IpAddr| address.to_string().replace(['.', ':'], "-") == label;
        endpoints.iter().find(|workload| *workload.name == *label || workload.addresses.iter().any(dashed))
    }

    /// `_port._tcp.service`: the port by its number or by what is spoken on it.
    fn ports(&self, port: &str, rest: &str) -> Option<Found<'a>> {
        let (port, service) = (port.strip_prefix('_')?, rest.strip_prefix("_tcp.")?);
        let service = self.service(service)?;
        let named = |it: &&Port| port.parse() == Ok(it.number) || word(it.protocol) == Some(port);
        let ports: Vec<Port> = service.ports.iter().filter(named).copied().collect();
        // Discovery does not carry the names of ports: a server that knows them may know this one.
        (!ports.is_empty()).then_some(Found::Ports(service, ports))
    }

    /// The records of a type; none if somebody else may have them.
    fn records(&mut self, found: &Found<'_>, kind: RecordType) -> Option<Answer> {
        let answer = |records| Some(Answer { records, ..Answer::default() });
        match (found, kind) {
            (Found::Service(service), RecordType::SRV) => {
                let ports = service.ports.clone();
                Some(self.ports_of(service, &ports))
            }
            (Found::Ports(service, ports), RecordType::SRV) => Some(self.ports_of(service, ports)),
            (_, RecordType::A | RecordType::AAAA) => {
                let addresses = self.addresses(found, kind);
                answer(addresses.into_iter().map(|address| record(self.owner, rdata(address))).collect())
            }
            _ => answer(Vec::new()),
        }
    }

    fn addresses(&mut self, found: &Found<'_>, kind: RecordType) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = match found {
            Found::Ports(..) => Vec::new(),
            Found::Endpoint(workload) => workload.addresses.to_vec(),
            Found::Workloads(workloads) => workloads.iter().flat_map(|it| it.addresses.iter().copied()).collect(),
            Found::Service(service) if is_headless(service) => {
                let endpoints = self.snapshot.endpoints(&service.key());
                endpoints.into_iter().flat_map(|it| it.iter()).flat_map(|it| it.addresses.iter().copied()).collect()
            }
            Found::Service(service) => {
                let near = service.vips.iter().filter(|vip| vip.network == self.client.network);
                near.map(|vip| vip.address).collect()
            }
        };
        addresses.retain(|address| address.is_ipv4() == (kind == RecordType::A));
        addresses.sort_unstable();
        addresses.dedup();
        addresses.shuffle(&mut self.rng);
        addresses.truncate(MOST);
        addresses
    }

    /// One record for each port; for each endpoint and port if the service is headless.
    fn ports_of(&mut self, service: &Arc<Service>, ports: &[Port]) -> Answer {
        let mut answer = Answer::default();
        if !is_headless(service) {
            let Some(target) = name_of(&service.hostname) else { return answer };
            for port in ports {
                answer.records.push(record(self.owner, RData::SRV(SRV::new(0, 100, port.number, target.clone()))));
            }
            let found = Found::Service(service);
            for kind in [RecordType::A, RecordType::AAAA] {
                let addresses = self.addresses(&found, kind);
                answer.additionals.extend(addresses.into_iter().map(|address| record(&target, rdata(address))));
            }
            return answer;
        }
        let key = service.key();
        let mut endpoints: Vec<_> = self.snapshot.endpoints(&key).into_iter().flat_map(|it| it.iter()).collect();
        endpoints.sort_unstable_by(|a, b| a.uid.cmp(&b.uid));
        endpoints.shuffle(&mut self.rng);
        for workload in endpoints.into_iter().take(MOST) {
            let Some(target) = name_of(&format!("{}.{}", label(workload), service.hostname)) else { continue };
            for port in ports.iter().filter_map(|port| target_port(workload, &key, port)) {
                answer.records.push(record(self.owner, RData::SRV(SRV::new(0, 100, port, target.clone()))));
            }
            answer.additionals.extend(workload.addresses.iter().map(|address| record(&target, rdata(*address))));
        }
        answer
    }
}

/// The port of an endpoint that a port of the service leads to.
fn target_port(workload: &Workload, service: &NamespacedHostname, port: &Port) -> Option<u16> {
    let membership = workload.services.iter().find(|membership| membership.service == *service)?;
    let own = membership.ports.iter().find(|own| own.number == port.number);
    own.and_then(|own| own.target).or(port.target).or(Some(port.number))
}

/// What an endpoint is called below its service.
fn label(workload: &Workload) -> String {
    match (workload.name.contains('.') || workload.name.is_empty(), workload.addresses.first()) {
        (true, Some(address)) => address.to_string().replace(['.', ':'], "-"),
        _ => workload.name.to_string(),
    }
}

fn is_headless(service: &Service) -> bool {
    service.vips.is_empty() && service.cidr_vips.is_empty()
}

/// As ports of these protocols are mostly called.
fn word(protocol: AppProtocol) -> Option<&'static str> {
    match protocol {
        AppProtocol::Http11 => Some("http"),
        AppProtocol::Http2 => Some("http2"),
        AppProtocol::Grpc => Some("grpc"),
        AppProtocol::Tcp => Some("tcp"),
        AppProtocol::Tls => Some("tls"),
        AppProtocol::Unknown => None,
    }
}

fn rdata(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

fn record(owner: &Name, data: RData) -> Record {
    Record::from_rdata(owner.clone(), TTL, data)
}

/// What is answered under another name than was asked for, as it was asked for.
fn rename(records: &mut [Record], from: &Name, to: &Name) {
    for record in records.iter_mut().filter(|record| record.name == *from) {
        record.name = to.clone();
    }
}

fn name_of(hostname: &str) -> Option<Name> {
    let mut name = Name::from_ascii(hostname).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// A lower-case name as hostnames of the mesh are written; none for the root and for labels that are no text.
fn text(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !text.is_empty() {
            text.push('.');
        }
        let plain = |byte: &u8| byte.is_ascii_graphic() && *byte != b'.' && *byte != b'\\';
        text.push_str(std::str::from_utf8(label).ok().filter(|label| label.as_bytes().iter().all(plain))?);
    }
    (!text.is_empty()).then_some(text)
}

/// A name without a domain behind it; none if nothing is left of it.
fn strip(name: &Name, domain: &Name) -> Option<Name> {
    let left = name.num_labels().checked_sub(domain.num_labels()).filter(|left| *left > 0)?;
    if !domain.zone_of(name) {
        return None;
    }
    let mut stripped = Name::from_labels(name.iter().take(usize::from(left))).ok()?;
    stripped.set_fqdn(true);
    Some(stripped)
}

#[cfg(test)]
mod tests;
