//! What a scenario asks for: nodes, pods, services, policies, and the mesh file that says so.
//!
//! Knows no process and no namespace; [`Plan::start`] hands over to [`crate::mesh`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

use crate::mesh::Mesh;
use crate::policy::Policy;
use crate::spire::{Settings, Way};

/// The namespace of everything in a mesh.
pub const NAMESPACE: &str = "test";
/// The trust domain of a pod unless a test says otherwise.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// The port of every service; its endpoints serve at [`APPLICATION_PORT`].
pub const SERVICE_PORT: u16 = 80;
/// Where applications listen unless a test says otherwise.
pub const APPLICATION_PORT: u16 = 8080;

/// Where proxies have certificates and the mesh from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A development CA in each proxy, and the mesh as a file: the least that works.
    Files,
    /// A control plane, which each proxy joins with a token of its own.
    ControlPlane,
    /// A SPIRE, and the mesh as a file.
    Spire(Settings),
    /// An istiod, and the mesh as objects of a Kubernetes API server.
    Istio,
}

impl Source {
    /// Whether there is a control plane.
    pub(crate) fn has_control_plane(self) -> bool {
        matches!(self, Self::ControlPlane | Self::Spire(Settings { from_control_plane: true, .. }))
    }
}

/// Who serves pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A proxy in each pod.
    Dedicated,
    /// One proxy on each node; a node agent enrols the pods.
    Shared,
    /// One proxy on each node, and the test in the agent's place.
    ByHand,
    /// One proxy on each node, and Istio's own node agent.
    IstioCni,
}

/// What a scenario asks for.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) mode: Mode,
    pub(crate) nodes: Vec<String>,
    pub(crate) pods: Vec<PodPlan>,
    pub(crate) services: Vec<ServicePlan>,
    pub(crate) policies: Vec<Policy>,
    pub(crate) source: Source,
    pub(crate) control_plane_runs: bool,
    /// Whether the proxies of nodes are workloads themselves.
    pub(crate) proxies_listed: bool,
}

/// A pod that is asked for. Its service account has its name.
#[derive(Debug, Clone)]
pub struct PodPlan {
    pub(crate) name: String,
    pub(crate) node: usize,
    pub(crate) captured: bool,
    pub(crate) dual_stack: bool,
    pub(crate) started: bool,
    pub(crate) registered: bool,
    pub(crate) listed: bool,
    pub(crate) trust_domain: String,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) descriptors: Option<u32>,
    pub(crate) hosts: bool,
    pub(crate) tunnel: Option<(&'static str, u16)>,
    pub(crate) selected_by: Vec<String>,
    pub(crate) network: String,
    pub(crate) gateway: Option<Reference>,
    pub(crate) native_tunnel: bool,
    pub(crate) waypoint: Option<String>,
    pub(crate) hostname: Option<String>,
}

/// A service that is asked for.
#[derive(Debug, Clone)]
pub struct ServicePlan {
    pub(crate) name: String,
    pub(crate) vip: Ipv4Addr,
    pub(crate) endpoints: Vec<String>,
    pub(crate) waypoint: Option<Reference>,
    pub(crate) port: u16,
    pub(crate) target: Option<u16>,
    pub(crate) own_targets: BTreeMap<String, u16>,
    pub(crate) network: String,
}

/// How a waypoint or gateway is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// By the address of a pod.
    Address(String),
    /// By the hostname of a service.
    Service(String),
    /// By the hostname of a pod that has no address in the mesh.
    Hostname(String),
}

/// An empty mesh. Tests of a module called `shared` have one proxy on each node, others one in each pod.
pub fn mesh() -> Plan {
    let shared = crate::scenario::test_name().contains("shared::");
    Plan {
        mode: if shared { Mode::Shared } else { Mode::Dedicated },
        nodes: Vec::new(),
        pods: Vec::new(),
        services: Vec::new(),
        policies: Vec::new(),
        source: Source::Files,
        control_plane_runs: true,
        proxies_listed: false,
    }
}

/// A pod with a proxy, which takes all its connections.
pub fn captured(name: &str) -> PodPlan {
    PodPlan {
        name: name.into(),
        node: 0,
        captured: true,
        dual_stack: false,
        started: true,
        registered: true,
        listed: true,
        trust_domain: TRUST_DOMAIN.into(),
        environment: BTreeMap::new(),
        descriptors: None,
        hosts: false,
        tunnel: None,
        selected_by: Vec::new(),
        network: String::new(),
        gateway: None,
        native_tunnel: false,
        waypoint: None,
        hostname: None,
    }
}

/// A pod without a proxy, which the mesh knows as one that has none.
pub fn uncaptured(name: &str) -> PodPlan {
    PodPlan { captured: false, ..captured(name) }
}

impl From<&str> for PodPlan {
    fn from(name: &str) -> Self {
        captured(name)
    }
}

impl PodPlan {
    /// Has an IPv6 address as well.
    #[must_use]
    pub fn dual_stack(self) -> Self {
        Self { dual_stack: true, ..self }
    }

    /// Its proxy is started by the test.
    #[must_use]
    pub fn not_started(self) -> Self {
        Self { started: false, ..self }
    }

    /// The mesh does not know it from the start, and nobody has it served.
    #[must_use]
    pub fn not_listed(self) -> Self {
        Self { listed: false, started: false, ..self }
    }

    /// Nobody has registered it with SPIRE.
    #[must_use]
    pub fn unregistered(self) -> Self {
        Self { registered: false, ..self }
    }

    /// Belongs to another trust domain.
    #[must_use]
    pub fn of_trust_domain(mut self, name: &str) -> Self {
        self.trust_domain = name.into();
        self.with("TRUST_DOMAIN", name)
    }

    /// A variable of its proxy.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    /// Its proxy may have no more open files than that.
    #[must_use]
    pub fn descriptors(self, limit: u32) -> Self {
        Self { descriptors: Some(limit), ..self }
    }

    /// Its proxy resolves `<pod>.test` to the addresses of pods.
    #[must_use]
    pub fn resolving_pods(self) -> Self {
        Self { hosts: true, ..self }
    }

    /// Its application takes tunnels' connections itself, at this port: by the PROXY protocol.
    #[must_use]
    pub fn taking_tunnels(self, port: u16) -> Self {
        Self { tunnel: Some(("PROXY", port)), ..self }
    }

    /// The same, and it gets the bytes alone.
    #[must_use]
    pub fn taking_bare_tunnels(self, port: u16) -> Self {
        Self { tunnel: Some(("NONE", port)), ..self }
    }

    /// Takes tunnels itself, without a proxy.
    #[must_use]
    pub fn taking_tunnels_itself(self) -> Self {
        Self { native_tunnel: true, ..self }
    }

    /// Is in another network than the others, which has this gateway.
    #[must_use]
    pub fn in_network(self, network: &str, gateway: Reference) -> Self {
        Self { network: network.into(), gateway: Some(gateway), ..self }
    }

    /// Connections to its own addresses pass through this pod.
    #[must_use]
    pub fn behind_waypoint(self, waypoint: &str) -> Self {
        Self { waypoint: Some(waypoint.into()), ..self }
    }

    /// The mesh knows it by a hostname instead of addresses.
    #[must_use]
    pub fn known_by_hostname(self, hostname: &str) -> Self {
        Self { hostname: Some(hostname.into()), ..self }
    }

    /// The identity that its proxy has.
    pub(crate) fn spiffe_id(&self) -> String {
        format!("spiffe://{}/ns/{NAMESPACE}/sa/{}", self.trust_domain, self.name)
    }

    fn entry(&self, node: &str, addresses: &[IpAddr], services: &Value, address: impl Fn(&str) -> IpAddr) -> Value {
        let mut entry = json!({
            "uid": format!("Kubernetes//Pod/{NAMESPACE}/{}", self.name),
            "name": self.name,
            "namespace": NAMESPACE,
            "serviceAccount": self.name,
            "trustDomain": self.trust_domain,
            "workloadName": self.name,
            "canonicalName": self.name,
            "clusterId": "Kubernetes",
            "node": node,
            "protocol": if self.captured || self.native_tunnel { "HBONE" } else { "TCP" },
            "workloadIps": addresses,
            "services": services,
        });
        if let Some((protocol, port)) = self.tunnel {
            entry["applicationTunnel"] = json!({ "protocol": protocol, "port": port });
        }
        if !self.selected_by.is_empty() {
            entry["authorizationPolicies"] = json!(self.selected_by);
        }
        if !self.network.is_empty() {
            entry["network"] = json!(self.network);
        }
        if let Some(gateway) = &self.gateway {
            // The gateway itself is in the network of the others.
            entry["networkGateway"] = gateway.entry(&address);
        }
        if let Some(waypoint) = &self.waypoint {
            entry["waypoint"] = Reference::Address(waypoint.clone()).entry(&address);
        }
        if let Some(hostname) = &self.hostname {
            entry["workloadIps"] = json!([]);
            entry["hostname"] = json!(hostname);
        }
        entry
    }
}

impl ServicePlan {
    fn hostname(&self) -> String {
        hostname(&self.name)
    }

    fn entry(&self, address: impl Fn(&str) -> IpAddr) -> Value {
        let mut entry = json!({
            "name": self.name,
            "namespace": NAMESPACE,
            "hostname": self.hostname(),
            "vips": [format!("{}/{}", self.network, self.vip)],
            "ports": { self.port.to_string(): self.target.unwrap_or(APPLICATION_PORT) },
        });
        if let Some(waypoint) = &self.waypoint {
            entry["waypoint"] = waypoint.entry(&address);
        }
        entry
    }
}

/// What the proxy of a node is called where it is a workload itself.
pub fn proxy_name(node: &str) -> String {
    format!("proxy-{node}")
}

/// The hostname of a service.
pub fn hostname(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.cluster.local")
}

impl Reference {
    fn entry(&self, address: impl Fn(&str) -> IpAddr) -> Value {
        let destination = match self {
            Self::Address(pod) => format!("/{}", address(pod)),
            Self::Service(service) => format!("{NAMESPACE}/{}", hostname(service)),
            Self::Hostname(name) => format!("{NAMESPACE}/{name}"),
        };
        json!({ "destination": destination, "hboneMtlsPort": 15008 })
    }
}

impl Plan {
    /// Adds a node; the pods that follow are on it.
    #[must_use]
    pub fn node(mut self, name: &str) -> Self {
        self.nodes.push(name.into());
        self
    }

    /// Adds a pod to the last node: a name alone is one with a proxy.
    #[must_use]
    pub fn pod(mut self, pod: impl Into<PodPlan>) -> Self {
        let node = self.nodes.len().checked_sub(1).expect("a pod comes after the node that it is on");
        self.pods.push(PodPlan { node, ..pod.into() });
        self
    }

    /// Adds a service; its endpoints are pods.
    #[must_use]
    pub fn service(mut self, name: &str, endpoints: &[&str]) -> Self {
        let number = u8::try_from(self.services.len() + 1).expect("few services");
        let endpoints = endpoints.iter().map(|&pod| pod.to_owned()).collect();
        self.services.push(ServicePlan {
            name: name.into(),
            vip: Ipv4Addr::new(10, 96, 1, number),
            endpoints,
            waypoint: None,
            port: SERVICE_PORT,
            target: None,
            own_targets: BTreeMap::new(),
            network: String::new(),
        });
        self
    }

    #[track_caller]
    fn last_service(&mut self) -> &mut ServicePlan {
        self.services.last_mut().expect("this is said of the service before it")
    }

    /// The last service has this port, which leads to that one of its endpoints.
    #[must_use]
    pub fn at_port(mut self, port: u16, target: u16) -> Self {
        self.last_service().port = port;
        self.target(target)
    }

    /// The port of the last service leads to this port of its endpoints; to port 0 if each of them says it itself.
    #[must_use]
    pub fn target(mut self, port: u16) -> Self {
        self.last_service().target = Some(port);
        self
    }

    /// This endpoint of the last service says itself which of its ports is meant.
    #[must_use]
    pub fn own_target(mut self, pod: &str, port: u16) -> Self {
        self.last_service().own_targets.insert(pod.into(), port);
        self
    }

    /// The last service is behind a waypoint that is named otherwise than by address.
    #[must_use]
    pub fn behind_named(mut self, waypoint: Reference) -> Self {
        self.last_service().waypoint = Some(waypoint);
        self
    }

    /// The last service is behind a waypoint, a pod.
    #[must_use]
    pub fn behind(mut self, waypoint: &str) -> Self {
        self.last_service().waypoint = Some(Reference::Address(waypoint.into()));
        self
    }

    /// Adds a policy.
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policies.push(policy);
        self
    }

    /// Makes a pod an endpoint of a service.
    #[track_caller]
    pub fn give_endpoint(&mut self, service: &str, pod: &str) {
        let service = self.services.iter_mut().find(|it| it.name == service).expect("a service of the mesh");
        service.endpoints.push(pod.into());
    }

    /// Adds a policy to a mesh that runs.
    pub fn add_policy(&mut self, policy: Policy) {
        self.policies.push(policy);
    }

    /// Takes a pod out of the mesh file; it goes on running.
    #[track_caller]
    pub fn forget(&mut self, pod: &str) {
        self.pods.iter_mut().find(|it| it.name == pod).expect("a pod of the mesh").listed = false;
    }

    /// Puts it back.
    #[track_caller]
    pub fn remember(&mut self, pod: &str) {
        self.pods.iter_mut().find(|it| it.name == pod).expect("a pod of the mesh").listed = true;
    }

    /// A pod is selected by a policy.
    #[track_caller]
    pub fn select(&mut self, pod: &str, policy: &Policy) {
        self.find(pod).selected_by.push(policy.key());
    }

    /// A pod belongs to another trust domain from now on.
    #[track_caller]
    pub fn move_to_trust_domain(&mut self, pod: &str, name: &str) {
        self.find(pod).trust_domain = name.into();
    }

    #[track_caller]
    fn find(&mut self, pod: &str) -> &mut PodPlan {
        self.pods.iter_mut().find(|it| it.name == pod).expect("a pod of the mesh")
    }

    /// Takes all policies away.
    pub fn remove_policies(&mut self) {
        self.policies.clear();
    }

    /// A proxy in each pod, whatever the test is called: it is about one pod's proxy and its settings.
    #[must_use]
    pub fn dedicated(self) -> Self {
        Self { mode: Mode::Dedicated, ..self }
    }

    /// One proxy on each node; a node agent enrols the pods there.
    #[must_use]
    pub fn shared(self) -> Self {
        Self { mode: Mode::Shared, ..self }
    }

    /// One proxy on each node, and the test itself hands pods over ([`crate::zds`]). The proxies do not wait to be ready.
    #[must_use]
    pub fn by_hand(self) -> Self {
        Self { mode: Mode::ByHand, ..self }
    }

    /// The proxies of the nodes are workloads themselves, called as [`proxy_name`] says.
    #[must_use]
    pub fn proxies_as_workloads(self) -> Self {
        Self { proxies_listed: true, ..self }
    }

    /// Certificates and discovery come from a control plane.
    #[must_use]
    pub fn control_plane(self) -> Self {
        Self { source: Source::ControlPlane, ..self }
    }

    /// The same, and the test starts it. The proxies do not wait to be ready.
    #[must_use]
    pub fn control_plane_down(self) -> Self {
        Self { control_plane_runs: false, ..self.control_plane() }
    }

    /// Certificates come from a SPIRE with a server for each trust domain and an agent on each node; one proxy on each node,
    /// except where a proxy asks for itself.
    #[must_use]
    pub fn spire(self, way: Way) -> Self {
        let mode = if way == Way::Own { Mode::Dedicated } else { Mode::Shared };
        Self { mode, source: Source::Spire(Settings::new(way)), ..self }
    }

    /// SVIDs of pods are good for so many seconds.
    #[must_use]
    pub fn svids_for(mut self, seconds: u32) -> Self {
        self.spire_settings().lifetime = seconds;
        self
    }

    /// Agents' own SVIDs are good for so many seconds.
    #[must_use]
    pub fn agents_for(mut self, seconds: u32) -> Self {
        self.spire_settings().agent_lifetime = seconds;
        self
    }

    /// Proxies begin with a control plane, whose root signs for SPIRE as well ([`Mesh::move_to_spire`]).
    #[must_use]
    pub fn from_control_plane(mut self) -> Self {
        self.spire_settings().from_control_plane = true;
        self
    }

    #[track_caller]
    fn spire_settings(&mut self) -> &mut Settings {
        match &mut self.source {
            Source::Spire(settings) => settings,
            _ => panic!("this is said of a mesh with a SPIRE"),
        }
    }

    /// Certificates and discovery come from a real istiod, which learns of nodes, pods and services from a real Kubernetes API
    /// server; one proxy on each node.
    #[must_use]
    pub fn istio(self) -> Self {
        Self { mode: Mode::Shared, source: Source::Istio, ..self }
    }

    /// The same, and the test starts istiod. The proxies do not wait to be ready.
    #[must_use]
    pub fn istiod_down(self) -> Self {
        Self { control_plane_runs: false, ..self.istio() }
    }

    /// The same with Istio's own node agent on each node ([`crate::istio::Cni`]). Pods that are started have a process there.
    #[must_use]
    pub fn istio_cni(self) -> Self {
        Self { mode: Mode::IstioCni, ..self.istio() }
    }

    /// The trust domain of a node's pods.
    pub(crate) fn trust_domain_of(&self, node: usize) -> &str {
        let pod = self.pods.iter().find(|pod| pod.node == node);
        pod.map_or(TRUST_DOMAIN, |pod| &pod.trust_domain)
    }

    /// Builds the network and starts what was asked for; returns when all of it is ready.
    #[track_caller]
    pub fn start(self) -> Mesh {
        Mesh::start(self)
    }

    /// The mesh file. `addresses` are the pods', in their order, and `nodes` the nodes'.
    pub(crate) fn file(&self, addresses: &[Vec<IpAddr>], nodes: &[IpAddr]) -> String {
        let address = |name: &str| {
            let found = self.pods.iter().position(|pod| pod.name == name);
            addresses[found.expect("a waypoint or gateway is a pod of the mesh")][0]
        };
        let pods = self.pods.iter().zip(addresses).filter(|(pod, _)| pod.listed);
        let workloads: Vec<Value> = pods
            .map(|(pod, ips)| pod.entry(&self.nodes[pod.node], ips, &self.memberships(&pod.name), address))
            .chain(self.proxies(nodes))
            .collect();
        let services: Vec<Value> = self.services.iter().map(|service| service.entry(address)).collect();
        let policies: Vec<Value> = self.policies.iter().map(Policy::entry).collect();
        format!("{:#}\n", json!({ "workloads": workloads, "services": services, "policies": policies }))
    }

    fn proxies(&self, addresses: &[IpAddr]) -> impl Iterator<Item = Value> {
        let listed = self.nodes.iter().zip(addresses).filter(|_| self.proxies_listed);
        listed.map(|(node, &at)| captured(&proxy_name(node)).entry(node, &[at], &json!({}), |_| at))
    }

    fn memberships(&self, pod: &str) -> Value {
        let of = self.services.iter().filter(|service| service.endpoints.iter().any(|name| name == pod));
        of.map(|service| {
            let target = service.own_targets.get(pod).copied().or(service.target).unwrap_or(APPLICATION_PORT);
            (format!("{NAMESPACE}/{}", service.hostname()), json!({ service.port.to_string(): target }))
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
    }
}
