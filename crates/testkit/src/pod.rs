//! A pod of a running mesh: its applications, its proxy, and what that proxy tells.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Command, ExitStatus, Output};
use std::sync::Arc;

use serde_json::Value;
use zspire_sys::netns::Netns;
use zspire_sys::nft::Redirection;
use zspire_sys::process::in_netns;
use zspire_sys::topology;

use crate::app::{self, Greeter, Greeting, Listener};
use crate::capture::Recording;
use crate::host::{ADMIN, Host, READINESS, STATS, Serves};
use crate::http::{self, Answer};
use crate::mesh::{World, lock};
use crate::plan::{APPLICATION_PORT, PodPlan};
use crate::process::Process;
use crate::wait::until;

/// A pod. Clones are the same pod.
#[derive(Debug, Clone)]
pub struct Pod(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    plan: PodPlan,
    place: topology::Pod,
    world: Arc<World>,
    host: Arc<Host>,
}

impl Pod {
    pub(crate) fn new(plan: PodPlan, place: topology::Pod, host: &Arc<Host>) -> Self {
        Self(Arc::new(Inner { plan, place, world: host.world.clone(), host: host.clone() }))
    }

    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.0.host
    }

    pub(crate) fn plan(&self) -> &PodPlan {
        &self.0.plan
    }

    /// Its name, and its service account's.
    pub fn name(&self) -> &str {
        &self.0.plan.name
    }

    /// Its identity.
    pub fn spiffe_id(&self) -> String {
        self.0.plan.spiffe_id()
    }

    /// The trust domain that it is of.
    pub fn trust_domain(&self) -> &str {
        &self.0.plan.trust_domain
    }

    /// Its UID, where it is enrolled with one; looks like Kubernetes' own.
    pub fn uid(&self) -> String {
        let [_, _, node, pod] = self.0.place.address.octets();
        format!("00000000-0000-4000-8000-0000{node:04}{pod:04}")
    }

    /// Its IPv4 address.
    pub fn address(&self) -> IpAddr {
        self.0.place.address.into()
    }

    /// Its IPv6 address.
    #[track_caller]
    pub fn v6(&self) -> IpAddr {
        self.0.place.v6.expect("the pod was asked to be dual stack").into()
    }

    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        std::iter::once(self.address()).chain(self.0.place.v6.map(IpAddr::from)).collect()
    }

    /// Its application.
    pub fn app(&self) -> SocketAddr {
        self.at(APPLICATION_PORT)
    }

    /// A port of it.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.address(), port).into()
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.0.place.netns
    }

    /// Does something in the pod.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns().run(f).expect("the namespace can be entered")
    }

    /// A network behind the pod, as of a virtual machine that runs there: an interface of the pod's leads to it.
    #[track_caller]
    pub fn guest(&self, interface: &str) -> Netns {
        let guest = Netns::new().expect("a namespace");
        let there = format!("/proc/{}/fd/{}", std::process::id(), guest.as_fd().as_raw_fd());
        let ip = |netns: &Netns, arguments: &str| {
            let mut command = Command::new("ip");
            self.0.world.surroundings(command.args(arguments.split(' ')));
            let done = in_netns(netns, command).output().expect("ip");
            assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
        };
        ip(self.netns(), &format!("link add {interface} type veth peer name eth0 netns {there}"));
        ip(self.netns(), &format!("address add 10.0.2.1/24 dev {interface}"));
        ip(self.netns(), &format!("link set {interface} up"));
        ip(&guest, "address add 10.0.2.2/24 dev eth0");
        ip(&guest, "link set eth0 up");
        ip(&guest, "route add default via 10.0.2.1");
        guest
    }

    /// A command in the pod, with nothing of this process's environment.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments);
        self.0.world.surroundings(&mut command);
        in_netns(self.netns(), command)
    }

    /// The program under test in the pod, with nothing of this process's environment, and not as its proxy.
    pub fn program(&self, arguments: &[&str]) -> Command {
        in_netns(self.netns(), self.0.world.zspire(arguments))
    }

    /// What a command of ours prints, where its proxy is.
    pub fn zspire(&self, arguments: &[&str]) -> Output {
        in_netns(&self.0.host.netns, self.0.world.zspire(arguments))
            .output()
            .expect("the program under test can be started")
    }

    /// What a port on the pod's loopback answers, which speaks HTTP.
    pub(crate) fn ask_loopback(&self, port: u16, request: &str) -> io::Result<Answer> {
        http::ask(self.netns(), port, request, &[])
    }

    // Applications.

    /// Records what the pod says to itself and to its proxy from now on.
    #[track_caller]
    pub fn record(&self) -> Recording {
        Recording::start(self.netns(), "lo")
    }

    /// Listens at the application's port.
    pub fn listen(&self) -> Listener {
        self.listen_at(APPLICATION_PORT)
    }

    /// Listens at a port.
    pub fn listen_at(&self, port: u16) -> Listener {
        Listener::new(self.netns(), port)
    }

    /// Starts a server at the application's port that greets its clients.
    pub fn greet(&self) -> Greeter {
        self.greet_at(APPLICATION_PORT)
    }

    /// The same at another port.
    pub fn greet_at(&self, port: u16) -> Greeter {
        Greeter::start(self.netns(), self.name(), port)
    }

    /// Opens a connection.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        app::connect(self.netns(), to)
    }

    /// Opens a connection; one that is captured is open as soon as the proxy has it.
    #[track_caller]
    pub fn open(&self, to: SocketAddr) -> TcpStream {
        self.connect(to).unwrap_or_else(|error| panic!("{} cannot connect to {to}: {error}", self.name()))
    }

    /// Opens a connection from one of its addresses.
    pub fn open_from(&self, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        app::connect_from(self.netns(), from, to)
    }

    /// Opens a connection and waits to be greeted.
    pub fn ask(&self, to: SocketAddr) -> io::Result<Greeting> {
        app::greeting(&self.connect(to)?)
    }

    /// Is greeted, at the first attempt.
    #[track_caller]
    pub fn reaches(&self, to: SocketAddr) -> Greeting {
        self.ask(to).unwrap_or_else(|error| panic!("{} does not reach {to}: {error}", self.name()))
    }

    /// Is not greeted, by a connection that ends rather than hangs.
    #[track_caller]
    pub fn is_refused(&self, to: SocketAddr) {
        match self.ask(to) {
            Ok(greeting) => panic!("{} reaches {to}: {greeting:?}", self.name()),
            Err(error) => assert!(
                !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
                "{} is left waiting by {to}",
                self.name()
            ),
        }
    }

    // The proxy.

    /// Starts its proxy, also again.
    pub fn start(&self) {
        self.0.host.start();
    }

    /// The command that starts its proxy.
    pub fn proxy_command(&self) -> Command {
        self.0.host.proxy_command()
    }

    /// A command with the settings of its proxy, where the proxy is.
    pub fn with_settings(&self, arguments: &[&str]) -> Command {
        self.0.host.with_settings(arguments)
    }

    /// Does something with its proxy's process.
    #[track_caller]
    pub fn proxy<T>(&self, f: impl FnOnce(&mut Process) -> T) -> T {
        f(lock(&self.0.host.proxy).as_mut().unwrap_or_else(|| panic!("{} has no proxy", self.name())))
    }

    /// Tells its proxy to stop.
    #[track_caller]
    pub fn drain(&self) {
        self.proxy(Process::terminate);
    }

    /// Waits for its proxy to end.
    #[track_caller]
    pub fn ended(&self) -> ExitStatus {
        self.proxy(Process::ended)
    }

    /// Waits until its proxy says that it is ready, and fails at once if it ends instead.
    #[track_caller]
    pub fn wait_until_ready(&self) {
        until(&format!("the proxy of {} to be ready", self.name()), || {
            let ready = self.readiness();
            assert!(self.proxy(Process::runs), "the proxy of {} has ended:\n{}", self.name(), self.proxy(|p| p.log()));
            ready
        });
    }

    /// Whether its proxy is ready, and if not, why.
    pub fn readiness(&self) -> Result<(), String> {
        let answer = self.http(READINESS, "GET /healthz/ready", &[]).map_err(|error| format!("no answer: {error}"))?;
        if answer.status == 200 { Ok(()) } else { Err(answer.body) }
    }

    /// What its proxy knows, as `/config_dump` has it.
    #[track_caller]
    pub fn dump(&self) -> Value {
        let answer = self.http(ADMIN, "GET /config_dump", &[]).expect("the admin port answers");
        serde_json::from_str(&answer.body).expect("the dump is JSON")
    }

    /// From now on its DNS queries are redirected too.
    #[track_caller]
    pub fn redirect_dns(&self) {
        let rules = Redirection { dns: Some(15053), ..Redirection::default() };
        self.run(|| rules.apply()).expect("a pod's queries can be redirected");
    }

    /// An answer of its proxy's admin port.
    #[track_caller]
    pub fn admin(&self, request: &str, headers: &[&str]) -> Answer {
        self.http(ADMIN, request, headers).expect("the admin port answers")
    }

    /// Whether the admin port of its proxy can be reached.
    pub fn connect_admin(&self) -> io::Result<()> {
        self.http(ADMIN, "GET /config_dump", &[]).map(drop)
    }

    /// Its proxy's metrics.
    #[track_caller]
    pub fn metrics(&self) -> String {
        self.http(STATS, "GET /metrics", &[]).expect("the metrics port answers").body
    }

    /// Waits for a line of metrics that has all of these parts.
    #[track_caller]
    pub fn metric(&self, parts: &[&str]) -> String {
        until(&format!("a metric of {} with {parts:?}", self.name()), || {
            let page = self.metrics();
            let line = page.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            line.map(str::to_owned).ok_or("there is none")
        })
    }

    /// Waits for a line in its proxy's access log.
    #[track_caller]
    pub fn access(&self, direction: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        // A proxy of several pods tells of all of them in one log.
        let own = match (&self.0.host.serves, direction) {
            (Serves::Pod, _) => None,
            (Serves::Node, "inbound") => Some("dst.workload"),
            (Serves::Node, _) => Some("src.workload"),
        };
        let of_this_pod = |line: &Value| own.is_none_or(|own| line[own].is_null() || line[own] == self.name());
        self.proxy(|proxy| {
            proxy.line(&format!("{direction} access"), |line| {
                line["scope"] == "access" && line["direction"] == direction && of_this_pod(line) && is_it(line)
            })
        })
    }

    /// Waits for a line in its proxy's access log whose error has this text.
    #[track_caller]
    pub fn refusal(&self, direction: &str, why: &str) -> Value {
        self.access(direction, |line| line["error"].as_str().is_some_and(|error| error.contains(why)))
    }

    fn http(&self, port: u16, request: &str, headers: &[&str]) -> io::Result<Answer> {
        http::ask(&self.0.host.netns, self.0.host.port(port), request, headers)
    }
}
