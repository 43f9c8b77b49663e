//! A real SPIRE around a mesh: a server for each trust domain, an agent on each node, an entry for each pod.
//!
//! Start reading at [`Spire`]. Servers run in the uplink's namespace and agents on their nodes, so that all tests can use the
//! same ports at the same time. Agents attest by user: each pod has a process of a user of its own; or by the kubelet, whose
//! place a [fake](kubelet) takes. The programs are built by `scripts/peers/build spire`; what they are told is in [`server`] and
//! [`agent`].

mod agent;
mod kubelet;
mod pki;
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use zspire_sys::netns::Netns;

pub use agent::Agent;
pub use kubelet::Kubelet;
pub(crate) use pki::CACERTS;
pub use server::{Authorities, Server};

use crate::mesh::lock;
use crate::peers::Peers;
use crate::plan::NAMESPACE;
use crate::pod::Pod;
use crate::process::Process;
use crate::wait::until;

/// SPIRE's programs, of the version in `scripts/peers/spire/go.mod`.
const PEERS: Peers = Peers { name: "spire", variable: "ZSPIRE_TEST_SPIRE", programs: &["spire-server", "spire-agent"] };
/// The user of the first pod's process; each further pod's is one more.
const FIRST_USER: u32 = 20_001;

/// How proxies have identities from SPIRE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The Broker API, about a process of the pod.
    BrokerByProcess,
    /// The same over TCP.
    BrokerOverTcp,
    /// The Broker API, about the pod's UID.
    BrokerByPod,
    /// The Delegated Identity API, about a process of the pod.
    DelegatedByProcess,
    /// The Workload API, by a proxy in the pod, about itself.
    Own,
}

impl Way {
    /// What `IDENTITY_SOURCE` names it.
    pub fn source(self) -> &'static str {
        match self {
            Self::BrokerByProcess | Self::BrokerOverTcp | Self::BrokerByPod => "spire-broker",
            Self::DelegatedByProcess => "spire-delegated",
            Self::Own => "workload-api",
        }
    }

    fn by_process(self) -> bool {
        matches!(self, Self::BrokerByProcess | Self::BrokerOverTcp | Self::DelegatedByProcess)
    }
}

/// The ID that the proxy of a node has itself.
pub fn proxy_id(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/istio-system/sa/ztunnel")
}

/// The ID that stands for all agents of a node: entries are its children.
fn node_id(trust_domain: &str, node: &str) -> String {
    format!("spiffe://{trust_domain}/node/{node}")
}

/// What a proxy is told of the agent of its node.
pub(crate) fn environment(way: Way, folder: &Path, node: &str) -> Vec<(&'static str, String)> {
    let sockets = agent::Sockets::of(folder, node);
    let address = |path: &Path| format!("unix://{}", path.display());
    let reference = if way.by_process() { "pid" } else { "pod" };
    let mut all = vec![("IDENTITY_SOURCE", way.source().to_owned())];
    let broker = match way {
        Way::BrokerOverTcp => format!("tcp://{}", agent::BROKER),
        _ => address(&sockets.broker),
    };
    match way {
        Way::BrokerByProcess | Way::BrokerOverTcp | Way::BrokerByPod => all.extend([
            ("SPIFFE_ENDPOINT_SOCKET", address(&sockets.workload_api)),
            ("SPIFFE_BROKER_SOCKET", broker),
            ("SPIFFE_REFERENCE", reference.to_owned()),
        ]),
        Way::DelegatedByProcess => all.push(("SPIRE_ADMIN_ENDPOINT_SOCKET", address(&sockets.admin))),
        Way::Own => all.push(("SPIFFE_ENDPOINT_SOCKET", address(&sockets.workload_api))),
    }
    all
}

/// What is asked of a SPIRE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How proxies have identities from it.
    pub way: Way,
    /// How long pods' SVIDs are good for, in seconds.
    pub lifetime: u32,
    /// The same of agents' own.
    pub agent_lifetime: u32,
    /// Proxies begin with a control plane, whose root signs for SPIRE as well, until a test moves them.
    pub from_control_plane: bool,
}

impl Settings {
    pub(crate) fn new(way: Way) -> Self {
        Self { way, lifetime: 300, agent_lifetime: 1800, from_control_plane: false }
    }
}

/// A node that is to have an agent.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) netns: Netns,
    pub(crate) trust_domain: String,
}

/// A SPIRE that runs.
#[derive(Debug)]
pub struct Spire {
    way: Way,
    folder: PathBuf,
    lifetime: u32,
    agents: Vec<Agent>,
    kubelets: BTreeMap<String, Kubelet>,
    servers: Vec<Server>,
    pods: Mutex<BTreeMap<String, Workload>>,
    /// The entries of the nodes' proxies.
    proxies: Mutex<BTreeMap<String, String>>,
}

/// What SPIRE has of one pod.
#[derive(Debug)]
struct Workload {
    user: u32,
    process: Option<Process>,
    entry: Option<String>,
}

impl Spire {
    /// Starts servers and agents, and registers the proxies of the nodes.
    #[track_caller]
    pub(crate) fn start(
        settings: Settings,
        folder: &Path,
        uplink: (&Netns, std::net::Ipv4Addr),
        nodes: &[Node],
    ) -> Self {
        let Settings { way, lifetime, from_control_plane, .. } = settings;
        let programs = PEERS.folder();
        let users = fs::read_to_string("/proc/self/uid_map").expect("proc(5)");
        let all = users.split_whitespace().nth(2) == Some("4294967295");
        assert!(all, "agents tell workloads apart by user: these tests need root, not a user namespace");
        pki::make(folder);
        if from_control_plane {
            pki::control_plane(folder);
        }
        let mut names: Vec<&str> = nodes.iter().map(|node| &*node.trust_domain).collect();
        names.sort_unstable();
        names.dedup();
        let servers: Vec<Server> =
            (0..).zip(names).map(|(n, name)| Server::start(name, n, folder, uplink, settings, &programs)).collect();
        let mut kubelets = BTreeMap::new();
        if way == Way::BrokerByPod {
            kubelets.extend(nodes.iter().map(|node| (node.name.clone(), Kubelet::start(&node.netns, &node.name))));
        }
        let of = |node: &Node| servers.iter().find(|server| server.trust_domain() == node.trust_domain);
        let agents: Vec<_> = nodes
            .iter()
            .map(|node| Agent::start(node, of(node).expect("a server for each trust domain"), way, folder, &programs))
            .collect();
        let (pods, proxies) = (Mutex::default(), Mutex::default());
        let spire = Self { way, folder: folder.into(), lifetime, agents, kubelets, servers, pods, proxies };
        for node in nodes {
            let server = spire.server(&node.trust_domain);
            let node_id = node_id(&node.trust_domain, &node.name);
            let selector = format!("x509pop:subject:cn:{}", node.name);
            server.entry(&["-node", "-spiffeID", &node_id, "-selector", &selector]);
            if way != Way::Own {
                spire.register_proxy(&node.name);
            }
        }
        spire
    }

    /// Registers the proxy of a node.
    #[track_caller]
    pub fn register_proxy(&self, node: &str) {
        let domain = self.agent(node).trust_domain();
        let (parent, proxy) = (node_id(domain, node), proxy_id(domain));
        let entry = ["-parentID", &parent, "-spiffeID", &proxy, "-selector", "unix:uid:0"];
        lock(&self.proxies).insert(node.into(), self.server(domain).entry(&entry));
    }

    /// Deletes the entry of a node's proxy; returns when the agent knows.
    #[track_caller]
    pub fn deregister_proxy(&self, node: &str) {
        // An agent that hears of the entry only now could hear of it after it is deleted.
        until("the agent to know of the proxy", || self.agent(node).fetch().map(drop));
        let entry = lock(&self.proxies).remove(node).expect("the proxy is registered");
        self.server(self.agent(node).trust_domain()).run(&["entry", "delete", "-entryID", &entry]);
        // This process is of the same user.
        until("the agent to know of no entry for the proxy", || match self.agent(node).fetch() {
            Ok(svids) => Err(svids),
            Err(_) => Ok(()),
        });
    }

    /// The server of a trust domain.
    #[track_caller]
    pub fn server(&self, trust_domain: &str) -> &Server {
        let found = self.servers.iter().find(|server| server.trust_domain() == trust_domain);
        found.unwrap_or_else(|| panic!("there is no server of {trust_domain}"))
    }

    /// The agent of a node.
    #[track_caller]
    pub fn agent(&self, node: &str) -> &Agent {
        self.agents.iter().find(|agent| agent.node() == node).unwrap_or_else(|| panic!("there is no agent on {node}"))
    }

    /// The kubelet of a node.
    #[track_caller]
    pub fn kubelet(&self, node: &str) -> &Kubelet {
        self.kubelets.get(node).unwrap_or_else(|| panic!("there is no kubelet on {node}"))
    }

    /// Another root signs for SPIRE from the next CA on, not the control plane's.
    #[track_caller]
    pub fn change_root(&self) {
        pki::root(&self.folder);
    }

    /// Makes a pod known to its agent, by a process of its own user or by the kubelet's word, and registers it.
    #[track_caller]
    pub(crate) fn bring(&self, pod: &Pod, register: bool) {
        let user = {
            let mut pods = self.pods();
            let next = FIRST_USER + u32::try_from(pods.len()).expect("few pods");
            pods.entry(pod.name().into()).or_insert(Workload { user: next, process: None, entry: None }).user
        };
        match self.way {
            Way::BrokerByPod => self.kubelet(&pod.host().node).add(pod),
            Way::Own => {}
            Way::BrokerByProcess | Way::BrokerOverTcp | Way::DelegatedByProcess => {
                let process = self.process(pod, user);
                self.pods().get_mut(pod.name()).expect("it was put there").process = Some(process);
            }
        }
        if register {
            self.register(pod);
        }
    }

    /// Starts a process of a user in a pod; returns when it is that user's.
    #[track_caller]
    pub fn process(&self, pod: &Pod, user: u32) -> Process {
        let id = user.to_string();
        let as_user = ["--reuid", &id, "--regid", &id, "--clear-groups", "--pdeathsig", "KILL", "sleep", "infinity"];
        let process = Process::start(&format!("app-{}", pod.name()), &self.folder, pod.command("setpriv", &as_user));
        until("the application to be its user's", || {
            match fs::read_to_string(format!("/proc/{}/status", process.id())) {
                Ok(status)
                    if status.contains(&format!("Uid:\t{id}\t{id}\t{id}")) && status.starts_with("Name:\tsleep") =>
                {
                    Ok(())
                }
                Ok(status) => Err(status),
                Err(error) => Err(error.to_string()),
            }
        });
        process
    }

    /// The user of a pod's process.
    #[track_caller]
    pub fn user(&self, pod: &Pod) -> u32 {
        self.pods().get(pod.name()).expect("a pod of the mesh").user
    }

    /// Does something with the process of a pod.
    #[track_caller]
    pub fn application<T>(&self, pod: &Pod, f: impl FnOnce(&mut Option<Process>) -> T) -> T {
        f(&mut self.pods().get_mut(pod.name()).expect("a pod of the mesh").process)
    }

    /// How a pod is named to whoever enrols it, if by its process.
    pub(crate) fn place(&self, pod: &Pod) -> Option<(&'static str, String)> {
        let process = self.pods().get(pod.name())?.process.as_ref()?.id();
        Some(("--pid", process.to_string()))
    }

    /// Registers a pod.
    #[track_caller]
    pub fn register(&self, pod: &Pod) {
        self.register_as(pod, &pod.spiffe_id(), &[]);
    }

    /// Registers a pod with some SPIFFE ID, and with more of what `spire-server entry create` takes.
    #[track_caller]
    pub fn register_as(&self, pod: &Pod, id: &str, more: &[&str]) {
        let entry = self.register_also(pod, id, more);
        self.pods().get_mut(pod.name()).expect("a pod of the mesh").entry = Some(entry);
    }

    /// Makes an entry that also matches a pod, beside the one that [`deregister`](Self::deregister) deletes: its ID.
    #[track_caller]
    pub fn register_also(&self, pod: &Pod, id: &str, more: &[&str]) -> String {
        let selectors = match self.way {
            Way::BrokerByProcess | Way::BrokerOverTcp | Way::DelegatedByProcess => {
                vec![format!("unix:uid:{}", self.user(pod))]
            }
            Way::BrokerByPod => vec![format!("k8s:ns:{NAMESPACE}"), format!("k8s:sa:{}", pod.name())],
            Way::Own => vec!["unix:uid:0".into()],
        };
        let (parent, lifetime) = (node_id(pod.trust_domain(), &pod.host().node), self.lifetime.to_string());
        let mut arguments = vec!["-parentID", &parent, "-spiffeID", id, "-x509SVIDTTL", &lifetime];
        arguments.extend(selectors.iter().flat_map(|selector| ["-selector", selector]));
        self.server(pod.trust_domain()).entry(&[&arguments, more].concat())
    }

    /// Deletes the entry of a pod.
    #[track_caller]
    pub fn deregister(&self, pod: &Pod) {
        let entry = self.pods().get_mut(pod.name()).and_then(|pod| pod.entry.take()).expect("the pod is registered");
        self.server(pod.trust_domain()).run(&["entry", "delete", "-entryID", &entry]);
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<String, Workload>> {
        lock(&self.pods)
    }
}

/// Waits until a program says on its health port that it is ready, and fails at once if it ends instead.
#[track_caller]
fn wait_until_ready(process: &mut Process, netns: &Netns, port: u16) {
    until("SPIRE to be ready", || {
        assert!(process.runs(), "it has ended:\n{}", process.log());
        match crate::http::ask(netns, port, "GET /ready", &[]) {
            Ok(answer) if answer.status == 200 => Ok(()),
            Ok(answer) => Err(answer.body),
            Err(error) => Err(error.to_string()),
        }
    });
}
