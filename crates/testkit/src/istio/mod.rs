//! A real Istio around a mesh: an API server with the objects of the plan, and istiod.
//!
//! Start reading at [`Istio`]. Both run in the uplink's namespace, so that all tests can use the same ports at the same time. The
//! programs are built by `scripts/peers/build istio`. The test stands in for the kubelet: it says that pods run, and makes the
//! tokens of proxies.

mod authority;
mod cluster;
pub(crate) mod cni;
mod istiod;
mod kubelet;
mod objects;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use zspire_sys::netns::Netns;

pub use authority::Authority;
pub use cluster::Cluster;
pub use cni::Cni;
pub use istiod::Istiod;

use crate::mesh::lock;
use crate::peers::Peers;
use crate::plan::{Mode, NAMESPACE, Plan};
use crate::pod::Pod;
use crate::process::Process;
use crate::wait::until;

/// Istio's programs, and what they run on, of the versions in `scripts/peers/istio/go.mod`.
const PEERS: Peers = Peers {
    name: "istio",
    variable: "ZSPIRE_TEST_ISTIO",
    programs: &[
        "etcd",
        "kube-apiserver",
        "kubectl",
        "istiod",
        "istioctl",
        "install-cni",
        "istio-cni",
        "helm",
        "kubelet",
    ],
};

/// The namespace of the control plane and of the proxies.
pub const SYSTEM: &str = "istio-system";
/// The name of the cluster.
pub const CLUSTER: &str = "Kubernetes";
/// What proxies are called, and their service account.
const PROXY: &str = "ztunnel";

/// The pod of a node's proxy.
pub fn proxy_pod(node: &str) -> String {
    format!("{PROXY}-{node}")
}

/// An Istio that runs.
#[derive(Debug)]
pub struct Istio {
    // First: it ends before what it asks.
    istiod: Istiod,
    cluster: Cluster,
    plan: Plan,
    folder: PathBuf,
    /// The roots that istiod will publish, where a test has said so.
    roots: Mutex<Option<String>>,
}

impl Istio {
    /// Starts everything, with the objects of a plan.
    #[track_caller]
    pub(crate) fn start(
        plan: &Plan,
        folder: &Path,
        uplink: (&Netns, Ipv4Addr),
        nodes: &[(String, Ipv4Addr)],
        pods: &[Pod],
    ) -> Self {
        let programs = PEERS.folder();
        let cluster = Cluster::start(folder, uplink, &programs);
        let istio = Self {
            istiod: Istiod::new(folder, uplink),
            cluster,
            plan: plan.clone(),
            folder: folder.into(),
            roots: Mutex::default(),
        };
        istio.cluster.apply(&cluster::list(&objects::namespaces()));
        istio.cluster.apply(&cluster::list(&objects::objects(plan)));
        let proxies = nodes
            .iter()
            .map(|(node, address)| objects::status(SYSTEM, &proxy_pod(node), &[IpAddr::from(*address)], true));
        let running = |pod: &&Pod| pod.plan().listed && (plan.mode != Mode::IstioCni || pod.plan().started);
        let applications = pods.iter().filter(running);
        let applications = applications.map(|pod| objects::status(NAMESPACE, pod.name(), &pod.addresses(), true));
        istio.cluster.apply_status(&cluster::list(&proxies.chain(applications).collect::<Vec<_>>()));
        nodes.iter().for_each(|(node, _)| istio.give_token(node));
        if plan.control_plane_runs {
            istio.start_istiod();
        }
        istio
    }

    /// Starts kubelets that forward ports, for the nodes and for a machine on which istiod is a pod, and lists the daemon set that
    /// the proxies are of; they end with the value.
    #[track_caller]
    pub(crate) fn start_kubelets(
        &self,
        uplink: (&Netns, Ipv4Addr),
        nodes: &[(&str, &Netns, Ipv4Addr)],
    ) -> Vec<Process> {
        self.cluster.apply(&cluster::list(&objects::control_plane()));
        let all = || nodes.iter().copied().chain([(objects::CONTROL_PLANE, uplink.0, uplink.1)]);
        let statuses = all().map(|(node, _, address)| kubelet::status(node, address));
        let istiod = objects::status(SYSTEM, "istiod-0", &[uplink.1.into()], true);
        self.cluster.apply_status(&cluster::list(&statuses.chain([istiod]).collect::<Vec<_>>()));
        let programs = PEERS.folder();
        kubelet::show_address(uplink);
        all().map(|(node, netns, address)| kubelet::start(node, (netns, address), &self.folder, &programs)).collect()
    }

    /// Its API server.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Its istiod.
    pub fn istiod(&self) -> &Istiod {
        &self.istiod
    }

    /// Starts istiod, also again; returns when it is ready and has told the proxies its root.
    #[track_caller]
    pub fn start_istiod(&self) {
        self.istiod.start(&self.cluster);
        self.deliver_root();
    }

    /// Makes a root with a CA below it, for [`plug_in`](Self::plug_in).
    #[track_caller]
    pub fn authority(&self, name: &str) -> Authority {
        Authority::new(&self.folder, name)
    }

    /// From its next start on, istiod signs with this CA, and has the mesh trust these roots.
    #[track_caller]
    pub fn plug_in(&self, signs: &Authority, trusted: &[&Authority]) {
        *lock(&self.roots) = Some(trusted.iter().map(|authority| authority.root()).collect());
        signs.install(&self.folder.join("istiod/etc/cacerts"), trusted);
    }

    /// Writes the root that istiod has published where the proxies look for it, as a kubelet does it.
    #[track_caller]
    pub fn deliver_root(&self) {
        let root = until("istiod to publish its root", || {
            let name =
                ["-n", SYSTEM, "get", "configmap", "istio-ca-root-cert", "-o", "jsonpath={.data.root-cert\\.pem}"];
            match self.cluster.try_kubectl(&name, "")? {
                root if root.is_empty() => Err("it is empty".to_owned()),
                root if lock(&self.roots).as_ref().is_some_and(|roots| *roots != root) => {
                    Err("it is another".to_owned())
                }
                root => Ok(root),
            }
        });
        let new = self.folder.join("root-cert.new");
        fs::write(&new, root).and_then(|()| fs::rename(&new, root_file(&self.folder))).expect("the test's own folder");
    }

    /// Writes a token for the proxy of a node, as its kubelet does it.
    #[track_caller]
    pub fn give_token(&self, node: &str) {
        self.write_token(node, &self.make_token(node, "istio-ca"));
    }

    /// A token of a node's proxy for an audience.
    #[track_caller]
    pub fn make_token(&self, node: &str, audience: &str) -> String {
        let pod = proxy_pod(node);
        let of = ["-n", SYSTEM, "create", "token", PROXY, "--bound-object-kind=Pod", "--bound-object-name", &pod];
        let token = self.cluster.kubectl(&[&of[..], &["--duration=1h", "--audience", audience]].concat());
        token.trim().to_owned()
    }

    /// A token as the API server makes them, which was good until a minute ago.
    #[track_caller]
    pub fn expired_token(&self, node: &str) -> String {
        self.cluster.sign_again(&self.make_token(node, "istio-ca"), |claims| {
            let issued = claims["iat"].as_i64().expect("a token has a time");
            for (claim, ago) in [("iat", 3600), ("nbf", 3600), ("exp", 60)] {
                claims[claim] = (issued - ago).into();
            }
        })
    }

    /// Replaces the file in which the proxy of a node looks for its token.
    #[track_caller]
    pub fn write_token(&self, node: &str, token: &str) {
        let new = self.folder.join(format!("{node}.token.new"));
        fs::write(&new, token)
            .and_then(|()| fs::rename(&new, token_file(&self.folder, node)))
            .expect("the test's own folder");
    }

    /// Tells the cluster of a pod that runs.
    #[track_caller]
    pub fn add(&self, pod: &Pod) {
        self.add_on(pod, &pod.host().node);
    }

    /// The same, and it says that the pod is on this node, whatever is true.
    #[track_caller]
    pub fn add_on(&self, pod: &Pod, node: &str) {
        self.cluster.apply(&cluster::list(&objects::pod_objects(&self.plan, pod.plan(), node)));
        self.set_ready(pod, true);
    }

    /// Tells it that a pod is no more.
    #[track_caller]
    pub fn remove(&self, pod: &Pod) {
        self.cluster.delete(&["-n", NAMESPACE, "pod", pod.name()]);
    }

    /// The UID that a pod has now.
    #[track_caller]
    pub fn uid(&self, pod: &Pod) -> String {
        let found = self.cluster.get(&["-n", NAMESPACE, "pod", pod.name()]);
        found["metadata"]["uid"].as_str().expect("every object has one").to_owned()
    }

    /// Waits for what the node agent says of a pod's redirection.
    #[track_caller]
    pub fn wait_for_redirection(&self, pod: &Pod, state: Option<&str>) {
        until(&format!("the redirection of {} to be {state:?}", pod.name()), || {
            let found = self.cluster.get(&["-n", NAMESPACE, "pod", pod.name()]);
            let now = &found["metadata"]["annotations"]["ambient.istio.io/redirection"];
            if now.as_str() == state { Ok(()) } else { Err(now.to_string()) }
        });
    }

    /// The kubelet says how far a pod has come, such as `Succeeded`.
    #[track_caller]
    pub fn set_phase(&self, pod: &Pod, phase: &str) {
        let mut status = objects::status(NAMESPACE, pod.name(), &pod.addresses(), false);
        status["status"]["phase"] = phase.into();
        self.cluster.apply_status(&status.to_string());
    }

    /// The kubelet says that a pod runs in a new sandbox, and has its addresses.
    #[track_caller]
    pub fn set_addresses(&self, pod: &Pod, sandbox: &Pod) {
        self.cluster.apply_status(&objects::status(NAMESPACE, pod.name(), &sandbox.addresses(), true).to_string());
    }

    /// The kubelet says that a pod is ready, or not.
    #[track_caller]
    pub fn set_ready(&self, pod: &Pod, ready: bool) {
        self.cluster.apply_status(&objects::status(NAMESPACE, pod.name(), &pod.addresses(), ready).to_string());
    }
}

/// The root that proxies verify istiod against.
pub(crate) fn root_file(folder: &Path) -> PathBuf {
    folder.join("root-cert.pem")
}

/// The token of a node's proxy.
pub(crate) fn token_file(folder: &Path, node: &str) -> PathBuf {
    folder.join(format!("{node}.token"))
}

/// What the proxy of a node is told.
pub(crate) fn environment(folder: &Path, istiod: SocketAddr, node: &str) -> Vec<(&'static str, String)> {
    let (url, root) = (format!("https://{istiod}"), root_file(folder).display().to_string());
    vec![
        ("CA_ADDRESS", url.clone()),
        ("XDS_ADDRESS", url),
        ("ALT_CA_HOSTNAME", istiod::NAME.into()),
        ("ALT_XDS_HOSTNAME", istiod::NAME.into()),
        ("CA_ROOT_CA", root.clone()),
        ("XDS_ROOT_CA", root),
        ("AUTH_TOKEN", token_file(folder, node).display().to_string()),
        ("CLUSTER_ID", CLUSTER.into()),
        ("ISTIO_META_ISTIO_VERSION", "1.31".into()),
        ("POD_NAME", proxy_pod(node)),
        ("POD_NAMESPACE", SYSTEM.into()),
        ("SERVICE_ACCOUNT", PROXY.into()),
    ]
}
