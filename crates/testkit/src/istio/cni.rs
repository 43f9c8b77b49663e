//! Istio's own node agent on a node of a mesh, and what it finds there: pods' processes, their namespaces, a network plugin.
//!
//! The agent's paths are fixed, so it gets a root of its own ([`machine.sh`](../../src/istio/machine.sh)). It finds pods by the control
//! groups of their processes, and the node's network by process 1: hence a process namespace. In the place of the container runtime the
//! test starts the first process of each pod ([`Cni::run_pod`]) and calls the plugin ([`Cni::plug`]).

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Mutex;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use zspire_sys::netns::Netns;
use zspire_sys::process::in_netns;
use zspire_sys::topology;

use super::{Istio, SYSTEM};
use crate::http;
use crate::mesh::lock;
use crate::peers::feed;
use crate::plan::NAMESPACE;
use crate::pod::Pod;
use crate::process::{self, Process};
use crate::wait::{until, within};

/// Where the agent says that it is ready.
const HEALTH: u16 = 8000;
const NAME: &str = "istio-cni";
/// What a test's control groups begin with, before its process: to the agent, they are a kubelet's.
const GROUP: &str = "kubepods-zspire-test-";
/// Where everything is by which programs are found.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Istio's node agent, and the machine that it is on. Ends with its value.
#[derive(Debug)]
pub struct Cni {
    // In the order in which they end.
    agent: Mutex<Option<Process>>,
    pods: Mutex<BTreeMap<String, Process>>,
    machine: Process,
    groups: Groups,
    node: String,
    netns: Netns,
    folder: PathBuf,
    environment: BTreeMap<String, String>,
}

/// Makes the machines of the nodes, each for the pods there.
#[track_caller]
pub(crate) fn machines(istio: &Istio, folder: &Path, nodes: &[topology::Node], pods: &[Pod]) -> Vec<Cni> {
    let cluster = istio.cluster();
    let chart = cluster.programs().join("charts").join(NAME).display().to_string();
    cluster.apply(&cluster.run("helm", &["template", NAME, &chart, "-n", SYSTEM, "--set", "ambient.enabled=true"]));
    let of_node = |node: &topology::Node| {
        let pods: Vec<_> = pods.iter().filter(|pod| pod.host().node == node.name).cloned().collect();
        Cni::new(istio, folder, (&node.name, &node.netns), &pods)
    };
    nodes.iter().map(of_node).collect()
}

/// The folder with the agent's socket, in which the node's proxy looks for it.
pub(crate) fn zds(folder: &Path, node: &str) -> PathBuf {
    folder.join(format!("{node}.ztunnel"))
}

impl Cni {
    /// Makes the machine with these namespaces; the agent is started by [`start`](Self::start).
    #[track_caller]
    fn new(istio: &Istio, folder: &Path, (node, netns): (&str, &Netns), pods: &[Pod]) -> Self {
        let own = |what: &str| folder.join(format!("{node}.{what}"));
        let (root, secrets, ready, zds) = (own("root"), own("secrets"), own("made"), zds(folder, node));
        for folder in [&root, &secrets, &zds] {
            fs::create_dir(folder).expect("the test's own folder");
        }
        let cluster = istio.cluster();
        let token = cluster.kubectl(&["-n", SYSTEM, "create", "token", NAME, "--duration=1h"]);
        fs::write(secrets.join("token"), token.trim()).expect("the test's own folder");
        fs::write(secrets.join("namespace"), SYSTEM).expect("the test's own folder");
        fs::copy(cluster.authority(), secrets.join("ca.crt")).expect("the API server has made it");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--ipc", "--fork", "--kill-child", "sh", "-c", include_str!("machine.sh")]);
        command.arg("machine").args([&root, cluster.programs(), &zds, &secrets, &ready]);
        command.args(pods.iter().map(|pod| {
            let descriptor = pod.netns().as_fd().as_raw_fd();
            format!("{}=/proc/{}/fd/{descriptor}", pod.name(), std::process::id())
        }));
        command.env_clear().env("PATH", PATH);
        let mut machine = Process::start(&format!("machine-{node}"), folder, in_netns(netns, command));
        until("the machine to be made", || {
            assert!(machine.runs(), "it has ended:\n{}", machine.log());
            fs::metadata(&ready).map(drop)
        });
        let mut environment = environment(istio, node);
        environment.extend(pods.iter().flat_map(|pod| pod.plan().environment.clone()));
        let (agent, pods, groups) = (Mutex::default(), Mutex::default(), Groups::new(&own("groups"), node));
        let (node, netns, folder) = (node.into(), netns.clone(), folder.into());
        Self { agent, pods, machine, groups, node, netns, folder, environment }
    }

    /// The name of its node.
    pub(crate) fn node(&self) -> &str {
        &self.node
    }

    /// Starts the agent, also again; returns when it is ready.
    #[track_caller]
    pub fn start(&self) {
        // The one before ends first: both want the same ports.
        self.kill();
        let mut command = self.inside("/programs/install-cni", &["--log_output_level=default:info,cni-agent:debug"]);
        command.envs(&self.environment);
        *lock(&self.agent) = Some(Process::start(&format!("cni-{}", self.node), &self.folder, command));
        until("Istio's node agent to be ready", || {
            self.agent(|process| assert!(process.runs(), "it has ended:\n{}", process.log()));
            match http::ask(&self.netns, HEALTH, "GET /readyz", &[]) {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => Err(answer.body),
                Err(error) => Err(error.to_string()),
            }
        });
    }

    /// Tells the agent to stop, as a kubelet does it, and waits for that.
    #[track_caller]
    pub fn stop(&self) -> ExitStatus {
        process::ask_to_end(self.agent(|process| process.child()));
        let ended = self.agent(Process::ended);
        *lock(&self.agent) = None;
        ended
    }

    /// Ends the agent as a crash would.
    pub fn kill(&self) {
        if let Some(mut starter) = lock(&self.agent).take() {
            process::kill(starter.child());
            starter.ended();
        }
    }

    /// Does something with the agent's process.
    #[track_caller]
    pub fn agent<T>(&self, f: impl FnOnce(&mut Process) -> T) -> T {
        f(lock(&self.agent).as_mut().expect("the agent runs"))
    }

    /// Starts the first process of a pod, by which the agent finds its namespace: another pod's, if that is its sandbox.
    #[track_caller]
    pub fn run_pod(&self, uid: &str, sandbox: &Pod) {
        let group = self.groups.make(uid, sandbox);
        let mut command = Command::new("nsenter");
        command.arg(format!("--pid={}", self.namespace("pid_for_children")));
        // It ends with whoever has started it, which ends with the test.
        command.args(["setpriv", "--pdeathsig=KILL", "sh", "-c"]);
        command.arg("echo 0 >\"$0\" && exec sleep infinity").arg(group.join("cgroup.procs"));
        command.env_clear().env("PATH", PATH);
        let process =
            Process::start(&format!("pod-{}", sandbox.name()), &self.folder, in_netns(sandbox.netns(), command));
        until("the pod's first process to be in its control group", || {
            let members = fs::read_to_string(group.join("cgroup.procs")).map_err(|error| error.to_string())?;
            if members.trim().is_empty() { Err(process.log()) } else { Ok(()) }
        });
        lock(&self.pods).insert(sandbox.name().into(), process);
    }

    /// Ends the process of a pod or sandbox.
    #[track_caller]
    pub fn end_pod(&self, sandbox: &Pod) {
        let mut starter = lock(&self.pods).remove(sandbox.name()).expect("the pod runs");
        process::kill(starter.child());
        starter.ended();
    }

    /// Calls Istio's plugin for a new pod, as a container runtime does it: what it says if the pod must not start.
    pub fn plug(&self, pod: &Pod, sandbox: &Pod) -> Result<(), String> {
        let list = fs::read(self.path("host/etc/cni/net.d/10-test.conflist")).map_err(|error| error.to_string())?;
        let list: Value = serde_json::from_slice(&list).map_err(|error| error.to_string())?;
        let plugins = list["plugins"].as_array().into_iter().flatten();
        let mut own = plugins.clone().find(|plugin| plugin["type"] == NAME).ok_or(list.to_string())?.clone();
        let addresses = sandbox.addresses();
        let ips = addresses.iter().map(|ip| json!({ "version": version(*ip), "address": whole(*ip), "interface": 0 }));
        own["cniVersion"] = "0.3.1".into();
        own["name"] = list["name"].clone();
        own["prevResult"] = json!({
            "cniVersion": "0.3.1",
            "interfaces": [{ "name": "eth0", "sandbox": format!("/var/run/netns/{}", sandbox.name()) }],
            "ips": ips.collect::<Vec<_>>(),
            "dns": {},
        });
        let container = container(sandbox);
        let mut command = self.inside("/opt/cni/bin/istio-cni", &[]);
        command.envs([
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", &container),
            ("CNI_NETNS", &format!("/var/run/netns/{}", sandbox.name())),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ]);
        let of = format!("K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={}", pod.name());
        command.env("CNI_ARGS", format!("IgnoreUnknown=1;{of};K8S_POD_INFRA_CONTAINER_ID={container}"));
        let output = feed(&mut command, &own.to_string());
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        if output.status.success() { Ok(()) } else { Err(said) }
    }

    /// A program in all namespaces of the machine.
    fn inside(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        for (option, namespace) in [("mount", "mnt"), ("pid", "pid_for_children"), ("ipc", "ipc"), ("net", "net")] {
            command.arg(format!("--{option}={}", self.namespace(namespace)));
        }
        command.args(["setpriv", "--pdeathsig=KILL", "chroot"]).arg(self.root()).arg(program).args(arguments);
        command.env_clear().env("PATH", PATH);
        command
    }

    fn namespace(&self, name: &str) -> String {
        format!("/proc/{}/ns/{name}", self.machine.id())
    }

    fn root(&self) -> PathBuf {
        self.folder.join(format!("{}.root", self.node))
    }

    /// A file of the machine.
    fn path(&self, name: &str) -> PathBuf {
        let root = self.root();
        let inside = root.strip_prefix("/").expect("it is absolute");
        Path::new("/proc").join(self.machine.id().to_string()).join("root").join(inside).join(name)
    }
}

/// What the chart has in the agent's environment.
#[track_caller]
fn environment(istio: &Istio, node: &str) -> BTreeMap<String, String> {
    let map = istio.cluster().get(&["-n", SYSTEM, "configmap", "istio-cni-config"]);
    let data = map["data"].as_object().expect("the chart has a ConfigMap").iter();
    let mut all: BTreeMap<_, _> =
        data.map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned())).collect();
    let (host, port) = istio.cluster().service();
    let own = [
        ("NODE_NAME", node.to_owned()),
        ("REPAIR_NODE_NAME", node.to_owned()),
        ("POD_NAME", format!("{NAME}-{node}")),
        ("POD_NAMESPACE", SYSTEM.to_owned()),
        ("ALLOW_SWITCH_TO_HOST_NS", "true".to_owned()),
        // What it finds by itself can be another kind at its second start, when rules of the first kind are there.
        ("FORCE_IPTABLES_BINARY", "nft".to_owned()),
        ("KUBERNETES_SERVICE_HOST", host.to_string()),
        ("KUBERNETES_SERVICE_PORT", port.to_string()),
    ];
    all.extend(own.map(|(name, value)| (name.to_owned(), value)));
    all
}

/// A container's number, which a pod's control group ends with.
fn container(sandbox: &Pod) -> String {
    sandbox.uid().replace('-', "").repeat(2)
}

fn version(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "4" } else { "6" }
}

fn whole(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}

/// The control groups of a node's pods: a part of the machine's one tree, which is why they have to be removed.
#[derive(Debug)]
struct Groups {
    mounted: PathBuf,
    own: PathBuf,
}

impl Groups {
    #[track_caller]
    fn new(at: &Path, node: &str) -> Self {
        fs::create_dir(at).expect("the test's own folder");
        let none = None::<&str>;
        mount(none, at, Some("cgroup2"), MsFlags::empty(), none).expect(
            "control groups of version 2 can be mounted: this needs root on the machine, or a privileged container",
        );
        remove_left(at);
        let own = at.join(format!("{GROUP}{}-{node}", std::process::id()));
        fs::create_dir(&own)
            .expect("control groups can be made: this needs root on the machine, or a privileged container");
        Self { mounted: at.into(), own }
    }

    #[track_caller]
    fn make(&self, uid: &str, sandbox: &Pod) -> PathBuf {
        let group = self.own.join(format!("pod{uid}")).join(container(sandbox));
        fs::create_dir_all(&group).expect("control groups can be made");
        group
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        let removed = within(std::time::Duration::from_secs(5), || remove_groups(&self.own));
        let unmounted = umount2(&self.mounted, MntFlags::MNT_DETACH);
        if !std::thread::panicking() {
            removed.expect("no process is left in the pods' control groups");
            unmounted.expect("it is mounted");
        }
    }
}

/// Removes those of tests that were killed.
fn remove_left(mounted: &Path) {
    for entry in fs::read_dir(mounted).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix(GROUP).and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            // Another test may be as fast.
            let _ = remove_groups(&entry.path());
        }
    }
}

/// Their files cannot be removed, and go with them.
fn remove_groups(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}
