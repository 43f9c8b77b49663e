//! A mesh that runs: namespaces, a control plane if there is one, a proxy for each captured pod, and the mesh file.
//!
//! What a proxy's surroundings are is here ([`World`]); what can be done with a pod is in [`crate::pod`].

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zspire_sys::netns::Netns;
use zspire_sys::nft::Redirection;
use zspire_sys::process::in_netns;
use zspire_sys::topology::{self, Topology};

use crate::app::Greeter;
use crate::capture::Recording;
use crate::host::{Host, Serves};
use crate::istio::{self, Cni, Istio};
use crate::plan::{Mode, NAMESPACE, Plan, PodPlan, SERVICE_PORT, Source, proxy_name};
use crate::pod::Pod;
use crate::process::Process;
use crate::spire::{self, Settings, Spire};
use crate::wait::until;

/// Names the program to test, in place of the one beside the tests.
const PROGRAM: &str = "ZSPIRE_TEST_PROGRAM";
/// Where the control plane listens, on the uplink.
const CONTROL_PLANE_PORT: u16 = 15012;
/// How much of each log is shown when a test fails.
const SHOWN: usize = 6000;
/// How many lines about something that went wrong are shown of what was before.
const TROUBLES: usize = 20;

/// What all processes of one test share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) program: PathBuf,
    pub(crate) source: Source,
    pub(crate) control_plane: SocketAddr,
}

/// A mesh that runs. When the test fails, its logs are shown.
#[derive(Debug)]
pub struct Mesh {
    // First: processes end before what they run in.
    control_plane: Mutex<Option<Process>>,
    enrolling: Mutex<Vec<Process>>,
    spire: Option<Spire>,
    cni: Vec<Cni>,
    istio: Option<Istio>,
    pods: Vec<Pod>,
    plan: Mutex<Plan>,
    world: Arc<World>,
    hosts: Vec<Arc<Host>>,
    nodes: Vec<topology::Node>,
    topology: Topology,
}

impl Mesh {
    #[track_caller]
    pub(crate) fn start(plan: Plan) -> Self {
        let mut topology = Topology::new().expect("a network");
        let world = Arc::new(World::new(plan.source, topology.uplink_address()));
        let mut nodes: Vec<_> = plan.nodes.iter().map(|name| topology.node(name).expect("a node")).collect();
        let hosts: Vec<_> = (0..nodes.len()).map(|n| Arc::new(node_host(&plan, &nodes[n], n, &world))).collect();
        let mut counts = vec![0; nodes.len()];
        let mut pods = Vec::new();
        for pod in &plan.pods {
            counts[pod.node] += 1;
            let place = place(&mut nodes[pod.node], pod, counts[pod.node], plan.mode);
            let host = match plan.mode {
                Mode::Dedicated => Arc::new(pod_host(&plan, pod, &place.netns, &world)),
                Mode::Shared | Mode::ByHand | Mode::IstioCni => hosts[pod.node].clone(),
            };
            pods.push(Pod::new(pod.clone(), place, &host));
        }
        let control_plane_runs = plan.control_plane_runs;
        let spire = match plan.source {
            Source::Spire(settings) => Some(start_spire(&plan, settings, &nodes, &topology, &world)),
            Source::Files | Source::ControlPlane | Source::Istio => None,
        };
        let istio = (plan.source == Source::Istio).then(|| {
            let uplink = (topology.uplink(), topology.uplink_address());
            let nodes: Vec<_> = nodes.iter().map(|node| (node.name.clone(), node.address)).collect();
            Istio::start(&plan, world.folder.path(), uplink, &nodes, &pods)
        });
        let cni = match (&istio, plan.mode) {
            (Some(istio), Mode::IstioCni) => istio::cni::machines(istio, world.folder.path(), &nodes, &pods),
            _ => Vec::new(),
        };
        let (control_plane, enrolling, plan) = (Mutex::default(), Mutex::default(), Mutex::new(plan));
        let mesh = Self { control_plane, enrolling, spire, cni, istio, pods, plan, world, hosts, nodes, topology };
        mesh.edit(|_| {});
        let host = |pod: &Pod| format!("{} {}.test\n", pod.address(), pod.name());
        let hosts: String = mesh.pods.iter().map(host).collect();
        fs::write(mesh.path("hosts"), hosts).expect("the test's own folder");
        if mesh.world.source.has_control_plane() {
            mesh.start_control_plane();
            mesh.issue_tokens();
            if !control_plane_runs {
                mesh.stop_control_plane();
            }
        }
        if let Some(spire) = &mesh.spire {
            mesh.pods.iter().filter(|pod| pod.plan().captured).for_each(|pod| spire.bring(pod, pod.plan().registered));
        }
        mesh.start_proxies(control_plane_runs);
        mesh
    }

    fn start_proxies(&self, ready: bool) {
        let started = || self.pods.iter().filter(|pod| pod.plan().captured && pod.plan().started);
        match lock(&self.plan).mode {
            Mode::Dedicated => started().for_each(Pod::start),
            Mode::ByHand => return self.hosts.iter().for_each(|host| host.start()),
            Mode::IstioCni => {
                self.hosts.iter().for_each(|host| host.start());
                started().for_each(|pod| self.cni(&pod.host().name).run_pod(&self.istio().uid(pod), pod));
                self.cni.iter().for_each(Cni::start);
                if ready {
                    started().for_each(|pod| self.istio().wait_for_redirection(pod, Some("enabled")));
                }
            }
            Mode::Shared => {
                for host in &self.hosts {
                    host.start();
                    host.start_agent();
                }
                match ready {
                    true => started().for_each(|pod| self.enroll(pod)),
                    false => self.enroll_later(started()),
                }
            }
        }
        if ready {
            started().for_each(Pod::wait_until_ready);
        }
    }

    /// Enrols pods without waiting for them to be served: that is known not to come soon.
    fn enroll_later<'a>(&self, pods: impl Iterator<Item = &'a Pod>) {
        for pod in pods {
            let name = format!("enroll-{}", pod.name());
            lock(&self.enrolling).push(self.process_of(&name, self.enroll_command(pod)));
        }
    }

    /// Has a pod served that was not from the start: starts its proxy, or enrols it at its node's.
    #[track_caller]
    pub fn start_pod(&self, pod: &Pod) {
        match self.is_shared() {
            true => self.enroll(pod),
            false => pod.start(),
        }
    }

    /// Enrols a pod at the agent of its node.
    #[track_caller]
    pub fn enroll(&self, pod: &Pod) {
        let output = self.enroll_command(pod).output().expect("the program under test can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The command that enrols a pod.
    pub fn enroll_command(&self, pod: &Pod) -> Command {
        let place = self.spire.as_ref().and_then(|spire| spire.place(pod));
        let netns = || format!("/proc/{}/fd/{}", std::process::id(), pod.netns().as_fd().as_raw_fd());
        let (by, place) = place.unwrap_or_else(|| ("--netns", netns()));
        let arguments = ["enroll", by, &place, "--name", pod.name(), "--namespace", NAMESPACE];
        let (account, uid) = (["--service-account", pod.name()], pod.uid());
        // Otherwise the agent makes one up from the name.
        let uid = if self.spire.is_some() { &["--uid", &*uid][..] } else { &[] };
        pod.host().agent_command(&[&arguments[..], &account, uid].concat())
    }

    /// The SPIRE that identities come from.
    #[track_caller]
    pub fn spire(&self) -> &Spire {
        self.spire.as_ref().expect("the mesh was asked for with a SPIRE")
    }

    /// The Istio that certificates and discovery come from.
    #[track_caller]
    pub fn istio(&self) -> &Istio {
        self.istio.as_ref().expect("the mesh was asked for with an Istio")
    }

    /// Starts kubelets by which `kubectl` and `istioctl` reach the proxies and istiod; they end with the value.
    #[track_caller]
    pub fn start_kubelets(&self) -> Vec<Process> {
        let nodes: Vec<_> = self.nodes.iter().map(|node| (&*node.name, &node.netns, node.address)).collect();
        self.istio().start_kubelets((self.topology.uplink(), self.topology.uplink_address()), &nodes)
    }

    /// Istio's node agent on a node.
    #[track_caller]
    pub fn cni(&self, node: &str) -> &Cni {
        let found = self.cni.iter().find(|cni| cni.node() == node);
        found.unwrap_or_else(|| panic!("the mesh has no node {node} with Istio's agent"))
    }

    /// Whether a proxy serves all pods of its node.
    pub fn is_shared(&self) -> bool {
        lock(&self.plan).mode != Mode::Dedicated
    }

    /// The token by which the pod's proxy has joined the control plane.
    #[track_caller]
    pub fn token(&self, pod: &Pod) -> String {
        fs::read_to_string(self.path(&format!("{}.token", pod.host().name))).expect("the proxy has a token")
    }

    /// The node's socket for pods.
    #[track_caller]
    pub fn zds(&self, node: &str) -> PathBuf {
        self.host(node).zds()
    }

    /// A command that speaks to the agent of a node.
    #[track_caller]
    pub fn agent_command(&self, node: &str, arguments: &[&str]) -> Command {
        self.host(node).agent_command(arguments)
    }

    /// Does something with the process of a node's agent.
    #[track_caller]
    pub fn agent<T>(&self, node: &str, f: impl FnOnce(&mut Process) -> T) -> T {
        f(lock(&self.host(node).agent).as_mut().expect("the node has an agent"))
    }

    /// Starts the agent of a node, also again; returns when it answers.
    #[track_caller]
    pub fn start_agent(&self, node: &str) {
        self.host(node).start_agent();
    }

    /// Starts another proxy on a node; the one before, which runs on, is returned when the new one is ready.
    #[track_caller]
    pub fn start_successor(&self, node: &str) -> Process {
        let old = self.begin_succession(node);
        let served = self.pods.iter().find(|pod| pod.host().name == node).expect("the node has a pod");
        served.wait_until_ready();
        old
    }

    /// A command of the node itself.
    #[track_caller]
    pub fn node_command(&self, node: &str, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        self.world.surroundings(command.args(arguments));
        in_netns(self.node(node), command)
    }

    /// A port of a node's own address, where its proxy runs.
    #[track_caller]
    pub fn node_at(&self, node: &str, port: u16) -> SocketAddr {
        let found = self.nodes.iter().find(|it| it.name == node);
        (found.unwrap_or_else(|| panic!("the mesh has no node {node}")).address, port).into()
    }

    /// The same, without waiting for the new one.
    #[track_caller]
    pub fn begin_succession(&self, node: &str) -> Process {
        self.host(node).start_successor()
    }

    /// Starts a proxy on a node that asks SPIRE; the one before, which asks the control plane, is returned as by
    /// [`start_successor`](Self::start_successor).
    #[track_caller]
    pub fn move_to_spire(&self, node: &str) -> Process {
        self.host(node).moved.store(true, Relaxed);
        self.start_successor(node)
    }

    /// The reverse.
    #[track_caller]
    pub fn move_back(&self, node: &str) -> Process {
        self.host(node).moved.store(false, Relaxed);
        self.start_successor(node)
    }

    /// The namespace of a node.
    #[track_caller]
    pub fn node(&self, node: &str) -> &Netns {
        &self.host(node).netns
    }

    #[track_caller]
    fn host(&self, node: &str) -> &Arc<Host> {
        self.hosts.iter().find(|host| host.name == node).unwrap_or_else(|| panic!("the mesh has no node {node}"))
    }

    /// The pod with a name.
    #[track_caller]
    pub fn pod(&self, name: &str) -> Pod {
        self.pods.iter().find(|pod| pod.name() == name).unwrap_or_else(|| panic!("the mesh has no pod {name}")).clone()
    }

    /// The address of a service.
    #[track_caller]
    pub fn service(&self, name: &str) -> SocketAddr {
        let plan = lock(&self.plan);
        let service = plan.services.iter().find(|service| service.name == name);
        (service.unwrap_or_else(|| panic!("the mesh has no service {name}")).vip, SERVICE_PORT).into()
    }

    /// Changes what the mesh consists of: the file is replaced as a whole, as an operator's tools do it.
    pub fn edit(&self, change: impl FnOnce(&mut Plan)) {
        let mut plan = lock(&self.plan);
        change(&mut plan);
        let addresses: Vec<_> = self.pods.iter().map(Pod::addresses).collect();
        let nodes: Vec<_> = self.nodes.iter().map(|node| IpAddr::from(node.address)).collect();
        self.write_file(&plan.file(&addresses, &nodes));
    }

    /// Replaces the mesh file by any text.
    pub fn write_file(&self, text: &str) {
        let new = self.path("mesh.new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, self.path("mesh.json"))).expect("the test's own folder");
    }

    /// The text of the mesh file.
    pub fn file(&self) -> String {
        fs::read_to_string(self.path("mesh.json")).expect("the test's own folder")
    }

    /// A file of this test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.world.folder.path().join(name)
    }

    /// The namespace between the nodes.
    pub fn uplink(&self) -> &Netns {
        self.topology.uplink()
    }

    /// Starts a server outside the nodes, at the uplink's address, that greets its clients.
    pub fn greet_outside(&self, port: u16) -> Greeter {
        Greeter::start(self.topology.uplink(), "uplink", port)
    }

    /// Records the packets between the first node and the second.
    #[track_caller]
    pub fn record(&self) -> Recording {
        Recording::start(&self.nodes[0].netns, Topology::link())
    }

    /// Starts a program of this test in a namespace; it ends with the value.
    #[track_caller]
    pub fn process(&self, name: &str, netns: &Netns, mut command: Command) -> Process {
        self.world.surroundings(&mut command);
        Process::start(name, self.world.folder.path(), in_netns(netns, command))
    }

    /// Starts a command that is ready to be started.
    #[track_caller]
    pub fn process_of(&self, name: &str, command: Command) -> Process {
        Process::start(name, self.world.folder.path(), command)
    }

    /// The same, and nobody reads what it writes.
    #[track_caller]
    pub fn process_unread(&self, name: &str, command: Command) -> Process {
        Process::start_unread(name, self.world.folder.path(), command)
    }

    /// Starts the control plane, also again; returns when it answers.
    pub fn start_control_plane(&self) {
        let process = Process::start("control-plane", self.world.folder.path(), self.control_plane_command(&[]));
        *lock(&self.control_plane) = Some(process);
        until("the control plane to listen", || {
            self.topology.uplink().run(|| std::net::TcpStream::connect(self.world.control_plane))?.map(drop)
        });
    }

    /// Ends the control plane as a crash would.
    pub fn stop_control_plane(&self) {
        drop(lock(&self.control_plane).take());
    }

    fn control_plane_command(&self, arguments: &[&str]) -> Command {
        let address = self.world.control_plane;
        let mut command = self.world.zspire(&[&["control-plane"], arguments].concat());
        command
            .env("ZSPIRE_CP_ADDRESS", address.to_string())
            .env("ZSPIRE_CP_HOSTNAMES", address.ip().to_string())
            .env("ZSPIRE_CP_ADMIN", "127.0.0.1:0")
            .env("ZSPIRE_CP_MESH", self.path("mesh.json"))
            .env("ZSPIRE_CP_STATE", self.path("control-plane"));
        if self.spire.is_some() {
            command.env("ZSPIRE_CP_CACERTS", self.path(spire::CACERTS));
        }
        in_netns(self.topology.uplink(), command)
    }

    fn issue_tokens(&self) {
        let of_pods = self.pods.iter().filter(|pod| pod.plan().captured).map(Pod::host);
        let hosts: Vec<_> = match lock(&self.plan).mode {
            Mode::Dedicated => of_pods.collect(),
            Mode::Shared | Mode::ByHand | Mode::IstioCni => self.hosts.iter().collect(),
        };
        for host in hosts {
            let token = until("a join token", || {
                let output =
                    self.control_plane_command(&["token", "--node", &host.node]).output().map_err(|e| e.to_string())?;
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                if output.status.success() { Ok(output.stdout) } else { Err(said) }
            });
            fs::write(self.path(&format!("{}.token", host.name)), token).expect("the test's own folder");
        }
    }
}

/// Starts a SPIRE around the nodes.
#[track_caller]
fn start_spire(plan: &Plan, settings: Settings, nodes: &[topology::Node], topology: &Topology, world: &World) -> Spire {
    let node = |(n, node): (usize, &'_ topology::Node)| spire::Node {
        name: node.name.clone(),
        netns: node.netns.clone(),
        trust_domain: plan.trust_domain_of(n).to_owned(),
    };
    let nodes: Vec<_> = nodes.iter().enumerate().map(node).collect();
    let uplink = (topology.uplink(), topology.uplink_address());
    Spire::start(settings, world.folder.path(), uplink, &nodes)
}

fn pod_host(plan: &Plan, pod: &PodPlan, netns: &Netns, world: &Arc<World>) -> Host {
    Host {
        name: pod.name.clone(),
        node: plan.nodes[pod.node].clone(),
        serves: Serves::Pod,
        netns: netns.clone(),
        environment: pod.environment.clone(),
        descriptors: pod.descriptors,
        hosts: pod.hosts,
        world: world.clone(),
        moved: AtomicBool::new(false),
        generation: AtomicU16::new(0),
        proxy: Mutex::default(),
        agent: Mutex::default(),
    }
}

/// The proxy of a node has the settings of all the pods there.
fn node_host(plan: &Plan, place: &topology::Node, node: usize, world: &Arc<World>) -> Host {
    let mut environment = BTreeMap::from([("INSTANCE_IP".to_owned(), place.address.to_string())]);
    let pods = || plan.pods.iter().filter(|pod| pod.node == node && pod.captured);
    for (name, value) in pods().flat_map(|pod| &pod.environment) {
        let before = environment.insert(name.clone(), value.clone());
        assert!(before.is_none_or(|before| before == *value), "two pods of a node want different values of {name}");
    }
    if plan.mode == Mode::IstioCni {
        let socket = istio::cni::zds(world.folder.path(), &plan.nodes[node]).join("ztunnel.sock");
        environment.insert("INPOD_UDS".into(), socket.display().to_string());
    }
    if plan.proxies_listed {
        let name = proxy_name(&plan.nodes[node]);
        environment.insert("POD_NAMESPACE".into(), NAMESPACE.into());
        environment.extend(["POD_NAME", "SERVICE_ACCOUNT"].map(|variable| (variable.into(), name.clone())));
    }
    Host {
        name: plan.nodes[node].clone(),
        node: plan.nodes[node].clone(),
        serves: Serves::Node,
        netns: place.netns.clone(),
        environment,
        descriptors: pods().find_map(|pod| pod.descriptors),
        hosts: pods().any(|pod| pod.hosts),
        world: world.clone(),
        moved: AtomicBool::new(false),
        generation: AtomicU16::new(0),
        proxy: Mutex::default(),
        agent: Mutex::default(),
    }
}

/// Makes the pod's namespace, with redirection if it is captured and nobody else will see to it.
fn place(node: &mut topology::Node, plan: &PodPlan, number: u8, mode: Mode) -> topology::Pod {
    let address = node.pod_address(number);
    let pod = match plan.dual_stack {
        true => node.dual_stack_pod(&plan.name, address),
        false => node.pod(&plan.name, address),
    };
    let pod = pod.expect("a pod");
    if plan.captured && matches!(mode, Mode::Dedicated | Mode::ByHand) {
        let applied = pod.netns.run(|| Redirection::default().apply());
        applied.expect("the namespace can be entered").expect("a pod's connections can be redirected");
    }
    pod
}

impl World {
    fn new(source: Source, uplink: Ipv4Addr) -> Self {
        let folder = tempfile::Builder::new().prefix("zspire-test-").tempdir().expect("a folder for temporary files");
        let run = folder.path().join("run");
        fs::create_dir(&run).expect("the test's own folder");
        fs::set_permissions(&run, fs::Permissions::from_mode(0o700)).expect("the test's own folder");
        let control_plane = (IpAddr::from(uplink), CONTROL_PLANE_PORT).into();
        Self { folder, program: program(), source, control_plane }
    }

    /// A command of the program under test, with nothing of this process's environment.
    pub(crate) fn zspire(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        self.surroundings(&mut command);
        command
    }

    /// What every process finds.
    pub(crate) fn surroundings(&self, command: &mut Command) {
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("XDG_RUNTIME_DIR", self.folder.path().join("run"))
            .current_dir(self.folder.path());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A folder that something is mounted in cannot be removed; agents leave their pods' namespaces there.
        let entries = fs::read_dir(self.folder.path()).into_iter().flatten().flatten().map(|entry| entry.path());
        for path in entries.filter(|path| path.extension().is_some_and(|it| it == "enrolled")) {
            let _ = zspire_sys::netns::release_all(&path);
        }
    }
}

/// The program under test: beside this test binary, and not older than its sources.
fn program() -> PathBuf {
    if let Some(given) = std::env::var_os(PROGRAM) {
        return given.into();
    }
    let test = std::env::current_exe().expect("a test has a file");
    let profile = test.parent().and_then(Path::parent).expect("tests are in target/<profile>/deps");
    let program = profile.join("zspire");
    let built = fs::metadata(&program).and_then(|meta| meta.modified());
    let built = built.unwrap_or_else(|_| panic!("{} is missing: run `cargo build -p zspire`", program.display()));
    // Written by cargo: `program: source source …`, with blanks in names escaped.
    let sources = fs::read_to_string(program.with_extension("d")).unwrap_or_default();
    for source in sources.replace("\\ ", "\u{0}").split_whitespace().skip(1) {
        let changed = fs::metadata(source.replace('\u{0}', " ")).and_then(|meta| meta.modified());
        assert!(
            changed.is_ok_and(|changed| changed <= built),
            "{} is older than {source}: run `cargo build -p zspire`",
            program.display()
        );
    }
    program
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_logs(self.world.folder.path());
        }
    }
}

/// Prints the last part of each log, for the report of a failed test.
fn show_logs(folder: &Path) {
    use std::io::Write as _;
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut logs: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|it| it == "log")).collect();
    logs.sort();
    for path in logs {
        let text = fs::read(&path).unwrap_or_default();
        let (before, tail) = text.split_at(text.len().saturating_sub(SHOWN));
        let tail = format!("{}{}", troubles(&String::from_utf8_lossy(before)), String::from_utf8_lossy(tail));
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let _ = writeln!(std::io::stderr(), "---- {name}\n{tail}");
    }
}

/// The last lines that are about something that went wrong.
fn troubles(log: &str) -> String {
    let is_one = |line: &&str| ["\"level\":\"warn\"", "\"level\":\"error\""].iter().any(|level| line.contains(level));
    let lines: Vec<&str> = log.lines().filter(is_one).collect();
    lines[lines.len().saturating_sub(TROUBLES)..].iter().map(|line| format!("{line}\n")).collect()
}

/// A test that panicked elsewhere is no reason to hide its logs.
pub(crate) fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
