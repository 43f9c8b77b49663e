//! Workloads: whatever has an address and, mostly, an identity.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use smallvec::SmallVec;

use crate::spiffe::template::{IdTemplate, Names};
use crate::{Gateway, NamespacedHostname, NamespacedName, Port, SpiffeId, Str, TrustDomain};

/// One workload, with every field of the wire contract. What replicas share (memberships, policies, locality) is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Unique name, for a pod `<cluster>//Pod/<namespace>/<name>`.
    pub uid: Str,
    /// Name of the pod or entry.
    pub name: Str,
    /// Its namespace.
    pub namespace: Str,
    /// Trust domain of its identity.
    pub trust_domain: TrustDomain,
    /// Its service account; empty where there is no identity.
    pub service_account: Str,
    /// How its identity follows from its names, if not by Istio's pattern. Not on the wire: whoever reads the mesh sets it.
    pub id_template: Option<IdTemplate>,
    /// Network of its addresses.
    pub network: Str,
    /// Its addresses: none, one, or one of each family.
    pub addresses: SmallVec<[IpAddr; 1]>,
    /// The name to resolve where there is no address; empty otherwise.
    pub hostname: Str,
    /// How a peer reaches it.
    pub protocol: Protocol,
    /// Whether [`Workload::addresses`] are its own or its node's.
    pub network_mode: NetworkMode,
    /// Whether it may be chosen as an endpoint.
    pub status: Health,
    /// Weight among the endpoints of a service; none are sent to 0.
    pub capacity: u32,
    /// The waypoint that connections to its own addresses pass through.
    pub waypoint: Option<Arc<Gateway>>,
    /// The gateway of its network, for peers in another one.
    pub network_gateway: Option<Arc<Gateway>>,
    /// How its node proxy hands connections to it (a waypoint behind a node proxy).
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Whether it takes HBONE itself.
    pub native_tunnel: bool,
    /// Node that it runs on; empty if none.
    pub node: Str,
    /// Cluster that it belongs to.
    pub cluster_id: Str,
    /// Where it runs.
    pub locality: Arc<Locality>,
    /// Name of the application, for metrics.
    pub canonical_name: Str,
    /// Revision of the application, for metrics.
    pub canonical_revision: Str,
    /// What [`Workload::workload_name`] names.
    pub workload_type: WorkloadType,
    /// Name of what owns the pod.
    pub workload_name: Str,
    /// The services that it is an endpoint of, ordered by name.
    pub services: Arc<[Membership]>,
    /// The policies that select it by label.
    pub authorization_policies: Arc<[NamespacedName]>,
    /// Extensions, carried and not understood.
    pub extensions: Arc<[Extension]>,
    /// What [`Workload::identity`] has found.
    pub id: FoundIdentity,
}

/// The identity that follows from a workload's names, once somebody has asked for it: every connection does. It says nothing about
/// a workload, so that all are equal, and a clone has none, since its names may be changed.
#[derive(Default)]
pub struct FoundIdentity(OnceLock<Option<SpiffeId>>);

impl Clone for FoundIdentity {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for FoundIdentity {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for FoundIdentity {}

impl fmt::Debug for FoundIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("_")
    }
}

impl Workload {
    /// The identity that it should prove; none without a service account. The names that it follows from must not be changed after
    /// the first call: change a clone's.
    pub fn identity(&self) -> Option<SpiffeId> {
        self.id.0.get_or_init(|| self.find_identity()).clone()
    }

    /// Whether it should prove this identity.
    pub fn is(&self, id: &SpiffeId) -> bool {
        self.id.0.get_or_init(|| self.find_identity()).as_ref() == Some(id)
    }

    fn find_identity(&self) -> Option<SpiffeId> {
        let template = self.id_template.as_ref().filter(|template| *template.trust_domain() == self.trust_domain);
        match template {
            Some(_) if self.service_account.is_empty() => None,
            Some(template) => template.id(&self.names()).ok(),
            None => SpiffeId::istio(&self.trust_domain, &self.namespace, &self.service_account).ok(),
        }
    }

    fn names(&self) -> Names<'_> {
        let Self { namespace, service_account, name, node, .. } = self;
        Names { namespace, service_account, pod: name, node }
    }

    /// Its membership in a service.
    pub fn membership(&self, service: &NamespacedHostname) -> Option<&Membership> {
        self.services.iter().find(|membership| membership.service == *service)
    }
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            uid: Str::default(),
            name: Str::default(),
            namespace: Str::default(),
            trust_domain: TrustDomain::default(),
            service_account: Str::default(),
            id_template: None,
            network: Str::default(),
            addresses: SmallVec::new(),
            hostname: Str::default(),
            protocol: Protocol::Tcp,
            network_mode: NetworkMode::Standard,
            status: Health::Healthy,
            capacity: 1,
            waypoint: None,
            network_gateway: None,
            application_tunnel: None,
            native_tunnel: false,
            node: Str::default(),
            cluster_id: Str::default(),
            locality: Arc::default(),
            canonical_name: Str::default(),
            canonical_revision: Str::default(),
            workload_type: WorkloadType::Deployment,
            workload_name: Str::default(),
            services: Arc::default(),
            authorization_policies: Arc::default(),
            extensions: Arc::default(),
            id: FoundIdentity::default(),
        }
    }
}

/// One service that a workload is an endpoint of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Membership {
    /// Name of the service, known or not yet known.
    pub service: NamespacedHostname,
    /// The workload's own ports for the ports of the service, ordered; they win over the service's.
    pub ports: Arc<[Port]>,
}

/// How a peer reaches a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Protocol {
    /// Plain TCP: nothing in front of it takes HBONE.
    #[default]
    Tcp,
    /// HBONE.
    Hbone,
}

impl Protocol {
    /// The word for it in metrics, logs and dumps.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Hbone => "HBONE",
        }
    }
}

/// Whose address a workload has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NetworkMode {
    /// Its own.
    #[default]
    Standard,
    /// Its node's: the address says nothing about who is behind it.
    HostNetwork,
}

/// Whether a workload reports itself ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Health {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready.
    Unhealthy,
}

/// What owns a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WorkloadType {
    /// A deployment.
    #[default]
    Deployment,
    /// A cron job.
    CronJob,
    /// Nothing: a pod by itself.
    Pod,
    /// A job.
    Job,
}

impl WorkloadType {
    /// The word for it in dumps and in `baggage`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Where a workload runs, from coarse to fine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Locality {
    /// Region.
    pub region: Str,
    /// Zone in the region.
    pub zone: Str,
    /// Subzone in the zone.
    pub subzone: Str,
}

/// How a node proxy hands a connection to the application behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// What precedes the bytes.
    pub protocol: ApplicationProtocol,
    /// The application's port; the requested one if none.
    pub port: Option<u16>,
}

/// What precedes the bytes that a node proxy hands to the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ApplicationProtocol {
    /// Nothing.
    #[default]
    None,
    /// A PROXY protocol header (version 2) with the peer's SPIFFE id.
    Proxy,
}

/// A named extension, carried and not understood.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Extension {
    /// Its name.
    pub name: Str,
    /// Type of the value.
    pub type_url: Str,
    /// The value as it came.
    pub value: Arc<[u8]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_speaks_of_its_own_trust_domain_only() {
        let template = IdTemplate::new("spiffe://{trust_domain}/{node}/{pod}", &"ours".parse().unwrap()).unwrap();
        let workload = |domain: &str, account: &str| Workload {
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: account.into(),
            node: "n1".into(),
            trust_domain: domain.parse().unwrap(),
            id_template: Some(template.clone()),
            ..Workload::default()
        };
        let id = |domain, account| workload(domain, account).identity().map(|id| id.to_string());
        assert_eq!(id("ours", "web").as_deref(), Some("spiffe://ours/n1/web-1"));
        assert_eq!(id("theirs", "web").as_deref(), Some("spiffe://theirs/ns/shop/sa/web"));
        assert_eq!(id("ours", ""), None, "without a service account there is no identity");
    }
}
