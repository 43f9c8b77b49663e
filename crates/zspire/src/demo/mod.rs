//! `zspire demo`: a mesh on this machine, with real processes and real traffic, and what can be seen of it.
//!
//! [`stage`] is where it runs, [`children`] are its processes, [`app`] the applications in its pods, [`capture`] what was on
//! the wire, [`report`] what it tells; this file is the plot. The process must have no threads when it enters its namespaces.

mod app;
mod capture;
mod children;
mod mesh;
mod report;
mod spire;
mod stage;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args as ClapArgs, ValueEnum};
use serde_json::Value;
use zspire_sys::userns;

use crate::exit;
use children::Children;
use mesh::{APPLICATION_PORT, CLIENT, INTRUDER, NAMESPACE, POLICY, SERVER};
use report::{Report, Step, Verdict, Voice};
use stage::{Host, Pod, Stage};

/// How long anything that has to come about may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at something that has to come about.
const LOOK: Duration = Duration::from_millis(10);

/// Where identities come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
enum Identity {
    /// zspire's own control plane, which is discovery as well
    ControlPlane,
    /// A real SPIRE; discovery is a file
    Spire,
}

/// Options of the demo.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// End when everything has been shown, instead of staying up
    #[arg(long)]
    once: bool,
    /// Print one JSON document instead of text
    #[arg(long, requires = "once")]
    json: bool,
    /// Use loopback addresses and SOCKS5, as where user namespaces are forbidden
    #[arg(long)]
    loopback: bool,
    /// Where identities come from
    #[arg(long, value_enum, default_value_t = Identity::ControlPlane)]
    identity: Identity,
    #[command(subcommand)]
    app: Option<app::App>,
}

/// Runs the demo, or one of the applications in it.
pub(crate) fn run(args: Args) -> ExitCode {
    if let Some(app) = args.app {
        return app::run(app);
    }
    let voice = Voice::new(args.json);
    let (stage, why_loopback) = match set_stage(args.loopback) {
        Ok(stage) => stage,
        Err(error) => return exit::complain(error, exit::finding()),
    };
    if let Some(why) = &why_loopback {
        voice.line(&format!("no namespaces, so loopback addresses and SOCKS5 instead: {why}\n"));
    }
    let mut demo = match Demo::new(stage, why_loopback, args.identity, voice) {
        Ok(demo) => demo,
        Err(error) => return exit::complain(error, exit::finding()),
    };
    demo.play();
    if !args.once && demo.report.ok {
        demo.stay();
    }
    demo.end();
    if args.json {
        let text = serde_json::to_string_pretty(&demo.report).unwrap_or_default();
        exit::print(&format!("{text}\n"));
    }
    if demo.report.ok { exit::OK } else { exit::finding() }
}

/// Namespaces where they are allowed; else loopback, and why.
fn set_stage(loopback: bool) -> anyhow::Result<(Stage, Option<String>)> {
    if loopback {
        return Ok((Stage::loopback()?, Some("--loopback was asked for".into())));
    }
    match userns::enter() {
        Ok(()) => Ok((Stage::namespaces()?, None)),
        Err(error) => Ok((Stage::loopback()?, Some(format!("{:#}", anyhow::Error::new(error))))),
    }
}

struct Demo {
    stage: Stage,
    children: Children,
    /// Gone when the demo ends.
    folder: PathBuf,
    program: PathBuf,
    canary: String,
    /// None: the control plane.
    spire: Option<spire::Spire>,
    voice: Voice,
    report: Report,
    interrupted: Arc<AtomicBool>,
    recorder: Option<capture::Recorder>,
}

impl Demo {
    fn new(stage: Stage, why_loopback: Option<String>, identity: Identity, voice: Voice) -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("zspire-demo-{}", std::process::id()));
        let spire = match identity {
            Identity::ControlPlane => None,
            Identity::Spire => {
                let why = why_loopback.as_deref().unwrap_or_default();
                anyhow::ensure!(why_loopback.is_none(), "--identity spire needs namespaces: {why}");
                Some(spire::Spire::find(&folder, stage.control_plane.ip())?)
            }
        };
        let mut random = [0; 16];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
        let canary: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        // It will hold the CA's key: for this user alone.
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .create(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let report = Report {
            ok: true,
            mode: stage.mode(),
            identity,
            why_loopback,
            steps: Vec::new(),
            pods: Vec::new(),
            paths: Vec::new(),
            capture: None,
            verdicts: Vec::new(),
        };
        let program = std::env::current_exe().context("cannot find this program")?;
        let (children, interrupted) = (Children::new(folder.clone()), interruption()?);
        Ok(Self { stage, children, folder, program, canary, spire, voice, report, interrupted, recorder: None })
    }

    /// One step after the other; the first that fails ends it.
    fn play(&mut self) {
        type Play = fn(&mut Demo) -> anyhow::Result<String>;
        let issuer: (&'static str, Play) = match self.spire {
            None => ("control plane", Self::control_plane),
            Some(_) => ("SPIRE", Self::start_spire),
        };
        let steps: [(&'static str, Play); 9] = [
            ("network", Self::network),
            issuer,
            ("proxies", Self::proxies),
            ("enrol", Self::enrol),
            ("identities", Self::identities),
            ("applications", Self::applications),
            ("request", Self::request),
            ("capture", Self::capture),
            ("denied", Self::denied),
        ];
        for (name, step) in steps {
            if !self.step(name, step) {
                return;
            }
        }
    }

    fn step(&mut self, name: &'static str, step: impl FnOnce(&mut Self) -> anyhow::Result<String>) -> bool {
        let started = Instant::now();
        let done = step(self);
        let ok = done.is_ok();
        let detail = done.unwrap_or_else(|error| format!("{error:#}"));
        let step = Step { name, ok, detail, seconds: started.elapsed().as_secs_f64() };
        self.voice.step(&step);
        self.report.steps.push(step);
        self.report.ok &= ok;
        ok
    }

    fn network(&mut self) -> anyhow::Result<String> {
        let pods =
            self.stage.pods.iter().map(|pod| format!("{} {} on {}", pod.plan.name, pod.address, pod.plan.node_name()));
        let pods = pods.collect::<Vec<_>>().join(", ");
        Ok(format!("2 nodes and 3 pods ({}): {pods}; service {}", self.stage.mode(), self.stage.service()))
    }

    fn zspire(&self, arguments: &[&str]) -> Command {
        self.zspire_as(&self.program, arguments)
    }

    fn zspire_as(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir(&self.folder);
        command
    }

    fn control_plane_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.zspire(&[&["control-plane"], arguments].concat());
        let address = self.stage.control_plane;
        command
            .env("ZSPIRE_CP_ADDRESS", address.to_string())
            .env("ZSPIRE_CP_HOSTNAMES", address.ip().to_string())
            .env("ZSPIRE_CP_ADMIN", "127.0.0.1:0")
            .env("ZSPIRE_CP_MESH", self.folder.join("mesh.yaml"))
            .env("ZSPIRE_CP_STATE", self.folder.join("control-plane"));
        self.stage.outside(command)
    }

    fn write_mesh(&self) -> anyhow::Result<()> {
        let addresses: Vec<_> = self.stage.pods.iter().map(|pod| pod.address).collect();
        Ok(std::fs::write(self.folder.join("mesh.yaml"), mesh::file(&addresses, self.stage.vip))?)
    }

    /// A server, an agent on each node, and an entry for each pod's application.
    fn start_spire(&mut self) -> anyhow::Result<String> {
        self.write_mesh()?;
        let spire = self.spire.clone().context("SPIRE was not asked for")?;
        self.children.start("spire-server", self.stage.outside(spire.server()?))?;
        self.until("SPIRE's server to answer", |_| spire.ask(&["bundle", "show"]).map(drop))?;
        std::fs::create_dir(self.folder.join("apps"))?;
        for pod in &self.stage.pods {
            let application = self.application(pod);
            spire::copy(&self.program, &application)?;
            spire.register(&self.stage.host(pod).name, &application, &pod.plan.spiffe_id())?;
        }
        for n in 0..self.stage.hosts.len() {
            let name = self.stage.hosts[n].name.clone();
            let command = self.stage.hosts[n].inside(spire.agent(&name, &self.program)?);
            self.children.start(&format!("spire-agent-{name}"), command)?;
            self.until(&format!("the SPIRE agent of {name} to serve"), |_| spire.serves(&name))?;
        }
        Ok("a server, an agent on each node, which the proxy asks by the Broker API; an entry for the program of each pod".into())
    }

    /// The program that a pod runs, by whose path an agent knows it.
    fn application(&self, pod: &Pod) -> PathBuf {
        self.folder.join("apps").join(pod.plan.name)
    }

    fn control_plane(&mut self) -> anyhow::Result<String> {
        self.write_mesh()?;
        let command = self.control_plane_command(&[]);
        self.children.start("control-plane", command)?;
        // A token for each proxy: whoever has it may join once, as that node.
        let names: Vec<_> = self.stage.hosts.iter().map(|host| (host.name.clone(), host.node.clone())).collect();
        for (name, node) in names {
            let token = self.until("a join token", |demo| {
                let output = demo.control_plane_command(&["token", "--node", &node]).output()?;
                anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
                Ok(output.stdout)
            })?;
            std::fs::write(self.folder.join(format!("{name}.token")), token)?;
        }
        Ok(format!(
            "certificates and discovery on {}, one single-use join token for each proxy",
            self.stage.control_plane
        ))
    }

    fn proxies(&mut self) -> anyhow::Result<String> {
        let mut commands = Vec::new();
        for host in &self.stage.hosts {
            commands.push((format!("proxy-{}", host.name), self.proxy(host)));
            if host.is_node() {
                commands.push((format!("agent-{}", host.name), self.agent(host, &["node-agent"])));
            }
        }
        for (name, command) in commands {
            self.children.start(&name, command)?;
        }
        for n in 0..self.stage.hosts.len() {
            let name = self.stage.hosts[n].name.clone();
            self.until(&format!("the proxy of {name} to be ready"), |demo| {
                demo.stage.hosts[n].readiness().map_err(|why| anyhow::anyhow!("{why}"))
            })?;
        }
        let which = match self.stage.hosts.iter().all(Host::is_node) {
            true => "one on each node, and a node agent beside it",
            false => "one in each pod, dedicated",
        };
        let how =
            if self.spire.is_some() { "following the mesh file" } else { "joined, and following the control plane" };
        Ok(format!("{which}; {how}"))
    }

    /// A command of a node's agent, or one that asks it.
    fn agent(&self, host: &Host, arguments: &[&str]) -> Command {
        let mut command = self.zspire(arguments);
        command.envs(host.agent_environment(&self.folder));
        host.inside(command)
    }

    fn enrol(&mut self) -> anyhow::Result<String> {
        if !self.stage.hosts.iter().all(Host::is_node) {
            return Ok("not done: on loopback each proxy serves one pod, which asks it by SOCKS5".into());
        }
        let mut told = String::from("connections redirected by rules in the pod, then served by the node's proxy");
        for n in 0..self.stage.pods.len() {
            let pod = &self.stage.pods[n];
            let netns = pod.netns_file().context("a pod among namespaces has one")?;
            let arguments = match self.spire {
                None => enroll_arguments(pod, &["--netns", &netns]),
                Some(_) => {
                    // It is the process that is attested, so it has to be there.
                    let command = self.zspire_as(&self.application(pod), &["demo", "pause"]);
                    let (name, command) = (format!("pod-{}", pod.plan.name), pod.inside(command));
                    let process = self.children.start(&name, command)?.to_string();
                    enroll_arguments(&self.stage.pods[n], &["--pid", &process])
                }
            };
            let pod = &self.stage.pods[n];
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let output = self.agent(self.stage.host(pod), &arguments).output()?;
            anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
            told += &format!("\n{}: {}", self.stage.host(pod).name, String::from_utf8_lossy(&output.stdout).trim());
        }
        Ok(told)
    }

    fn proxy(&self, host: &Host) -> Command {
        let (name, control_plane) = (&host.name, format!("https://{}", self.stage.control_plane));
        let mut command = self.zspire(&["proxy"]);
        match &self.spire {
            Some(spire) => command.envs(spire.proxy_environment(name)),
            None => command
                .env("CA_ADDRESS", &control_plane)
                .env("XDS_ADDRESS", &control_plane)
                .env("ZSPIRE_JOIN_TOKEN", self.folder.join(format!("{name}.token")))
                .env("ZSPIRE_STATE_DIR", self.folder.join(format!("{name}.state"))),
        };
        command
            .env("NODE_NAME", &host.node)
            .env("LOG_FORMAT", "json")
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .envs(host.proxy_environment(&self.folder));
        host.inside(command)
    }

    /// What a command of ours, run where the pod's proxy is, prints as JSON.
    fn ask(&self, pod: &Pod, command: &str) -> anyhow::Result<Value> {
        let host = self.stage.host(pod);
        let output = host.inside(self.zspire(&[command, "--admin", &host.admin(), "-o", "json"])).output()?;
        anyhow::ensure!(
            output.status.success(),
            "zspire {command}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        serde_json::from_slice(&output.stdout).with_context(|| format!("zspire {command} -o json"))
    }

    fn identities(&mut self) -> anyhow::Result<String> {
        let mut told = String::from(match self.spire {
            None => "X.509-SVIDs, issued by the control plane to the node of each pod",
            Some(_) => "X.509-SVIDs from SPIRE, each attested by its node's agent for a process of the pod",
        });
        for n in 0..self.stage.pods.len() {
            let expected = self.stage.pods[n].plan.spiffe_id();
            let entry = self.until(&format!("the certificate {expected}"), |demo| {
                let all = demo.ask(&demo.stage.pods[n], "certificates")?;
                let entry = all.as_array().into_iter().flatten().find(|entry| entry["identity"] == *expected);
                let entry = entry.with_context(|| format!("the proxy holds {all}"))?;
                anyhow::ensure!(entry["state"] == "Available", "its state is {}", entry["state"]);
                Ok(entry.clone())
            })?;
            let pod = &self.stage.pods[n];
            let leaf = &entry["certChain"][0];
            told += &format!(
                "\n{:<9} {expected}  {} to {}",
                pod.plan.name,
                leaf["validFrom"].as_str().unwrap_or("?"),
                leaf["expirationTime"].as_str().unwrap_or("?")
            );
            self.report.pods.push(report::Pod {
                name: pod.plan.name,
                node: pod.plan.node_name(),
                address: pod.address.to_string(),
                spiffe_id: expected,
                certificate: serde_json::json!({
                    "serial_number": leaf["serialNumber"],
                    "not_before": leaf["validFrom"],
                    "not_after": leaf["expirationTime"],
                }),
            });
        }
        Ok(told)
    }

    fn applications(&mut self) -> anyhow::Result<String> {
        let server = self.stage.pod(SERVER);
        let address = match server.socks5() {
            Some(_) => format!("{}:{APPLICATION_PORT}", server.address),
            None => format!("0.0.0.0:{APPLICATION_PORT}"),
        };
        let command = server.inside(self.zspire(&["demo", "serve", &address]));
        self.children.start("app-api", command)?;
        self.recorder = self.stage.link()?.map(capture::Recorder::start).transpose()?;
        let captured = if self.recorder.is_some() { "; packets between the nodes are being captured" } else { "" };
        Ok(format!("an HTTP server in {SERVER}{captured}"))
    }

    /// Sends a request to the service from a pod.
    fn call(&self, from: &str) -> anyhow::Result<String> {
        let pod = self.stage.pod(from);
        let mut command = self.zspire(&["demo", "request", &self.stage.service().to_string(), "--body", &self.canary]);
        if let Some(proxy) = pod.socks5() {
            command.args(["--socks5", &proxy.to_string()]);
        }
        let output = pod.inside(command).output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        anyhow::ensure!(output.status.success(), "{said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn request(&mut self) -> anyhow::Result<String> {
        let answer = self.until("the server to answer", |demo| demo.call(CLIENT))?;
        anyhow::ensure!(answer.contains(&self.canary), "the server did not send back what it was sent: {answer:?}");
        let seen_from = answer.lines().next().unwrap_or_default().trim_start_matches("from ").to_owned();
        let outbound = self.logged(CLIENT, "outbound", None)?;
        let inbound = self.logged(SERVER, "inbound", None)?;
        let text = |line: &Value, field: &str| line[field].as_str().unwrap_or("?").to_owned();
        let steps = vec![
            format!("{} asks for {} and is taken by its own proxy", text(&outbound, "src.addr"), self.stage.service()),
            format!("{} is service {}", self.stage.service(), text(&outbound, "dst.service")),
            format!(
                "a tunnel to {}: TLS 1.3, HTTP/2 CONNECT {}",
                text(&outbound, "dst.addr"),
                text(&outbound, "dst.hbone_addr")
            ),
            format!("there {} has proved to be {}", text(&inbound, "src.addr"), text(&inbound, "src.identity")),
            format!("and the proxy has proved to be {}", text(&outbound, "dst.identity")),
            format!("policies allow it; the application sees a connection from {seen_from}"),
        ];
        let told = format!("{CLIENT} → {SERVER}, answered with what was sent\n{}", steps.join("\n"));
        self.report.verdicts.push(Verdict {
            from: CLIENT,
            to: text(&outbound, "dst.service"),
            allowed: true,
            policy: None,
            why: "no policy denies it, and none demands to be asked".into(),
        });
        self.report.paths.push(report::Path {
            from: CLIENT,
            to: text(&outbound, "dst.service"),
            steps,
            outbound,
            inbound,
        });
        Ok(told)
    }

    /// The line that a pod's proxy logged about a connection: the last one in this direction, from this identity.
    fn logged(&self, pod: &str, direction: &str, from: Option<&str>) -> anyhow::Result<Value> {
        let path = self.children.log(&format!("proxy-{}", self.stage.host(self.stage.pod(pod)).name));
        // A node's proxy tells of all its pods.
        let own = if direction == "inbound" { "dst.workload" } else { "src.workload" };
        let until = Instant::now() + PATIENCE;
        loop {
            let text = std::fs::read_to_string(&path)?;
            let found = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(|line| {
                line["scope"] == "access"
                    && line["direction"] == direction
                    && line[own] == pod
                    && from.is_none_or(|from| line["src.identity"] == from)
            });
            match found {
                Some(line) => return Ok(line),
                None if Instant::now() > until => {
                    anyhow::bail!(
                        "the proxy of {pod} logged no {direction} connection; its last lines:\n{}",
                        children::tail(&path)
                    )
                }
                None if self.interrupted.load(Relaxed) => anyhow::bail!("interrupted"),
                None => std::thread::sleep(LOOK),
            }
        }
    }

    fn capture(&mut self) -> anyhow::Result<String> {
        let Some(recorder) = self.recorder.take() else {
            return Ok("not done: there is no link between nodes to watch on loopback".into());
        };
        let seen = capture::look(&recorder.stop()?, 15008, self.canary.as_bytes());
        self.report.capture = Some(seen.clone());
        anyhow::ensure!(seen.tls13_handshakes > 0, "no TLS 1.3 handshake was seen: {seen:?}");
        anyhow::ensure!(seen.tls_records > 0, "no TLS records were seen: {seen:?}");
        anyhow::ensure!(seen.not_tls == 0, "bytes between the proxies that are not TLS: {seen:?}");
        anyhow::ensure!(seen.canary_found == 0, "the canary was on the wire in plain text: {seen:?}");
        Ok(format!(
            "between the nodes: {} packets, {} TLS 1.3 handshakes, {} encrypted records, nothing else between the proxies; \
             the canary {} that was sent in the body is in none of them",
            seen.packets, seen.tls13_handshakes, seen.tls_records, self.canary
        ))
    }

    fn denied(&mut self) -> anyhow::Result<String> {
        let Err(error) = self.call(INTRUDER) else { anyhow::bail!("the request of {INTRUDER} was answered") };
        let identity = self.stage.pod(INTRUDER).plan.spiffe_id();
        let line = self.logged(SERVER, "inbound", Some(&identity))?;
        let why = line["error"].as_str().unwrap_or_default().to_owned();
        anyhow::ensure!(
            why.contains(POLICY),
            "it failed, but not by policy {POLICY}: {why:?}; the client said {error:#}"
        );
        self.report.verdicts.push(Verdict {
            from: INTRUDER,
            to: format!("{SERVER}.{NAMESPACE}.svc.cluster.local"),
            allowed: false,
            policy: Some(POLICY),
            why: why.clone(),
        });
        Ok(format!(
            "{INTRUDER} → {SERVER}: refused by policy {POLICY}\nthe proxy of {SERVER}: {why}\nthe client: {error:#}"
        ))
    }

    /// Tries until it comes about. Fails early when a process has ended.
    fn until<T>(&mut self, what: &str, mut attempt: impl FnMut(&Self) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let until = Instant::now() + PATIENCE;
        loop {
            let error = match attempt(self) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            self.children.all_run()?;
            anyhow::ensure!(!self.interrupted.load(Relaxed), "interrupted");
            if Instant::now() > until {
                return Err(error.context(format!("waited {PATIENCE:?} for {what}")));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Stays up until Ctrl-C.
    fn stay(&mut self) {
        if let Err(error) = self.offer() {
            self.voice.line(&format!("zspire: {error:#}"));
            return;
        }
        while !self.interrupted.load(Relaxed) {
            std::thread::sleep(LOOK);
        }
        self.voice.line("");
    }

    /// Puts a script for each pod into the folder that runs a command in it, and says what to try.
    fn offer(&mut self) -> anyhow::Result<()> {
        std::os::unix::fs::symlink(&self.program, self.folder.join("zspire"))?;
        let mut nodes = Vec::new();
        for n in (0..self.stage.hosts.len()).filter(|n| self.stage.hosts[*n].is_node()) {
            let host = &self.stage.hosts[n];
            let (name, command) = (host.name.clone(), host.inside(self.zspire(&["demo", "pause"])));
            let id = self.children.start(&format!("pause-{name}"), command)?;
            let host = &self.stage.hosts[n];
            nodes.push(script(&self.folder, &name, Some(id), &self.host_environment(host))?);
        }
        let (mut scripts, mut ids) = (Vec::new(), Vec::new());
        for n in 0..self.stage.pods.len() {
            let name = self.stage.pods[n].plan.name;
            let command = self.stage.pods[n].inside(self.zspire(&["demo", "pause"]));
            let id = self.children.start(&format!("pause-{name}"), command)?;
            let pod = &self.stage.pods[n];
            let (enter, host) = (pod.socks5().is_none().then_some(id), self.stage.host(pod));
            scripts.push(script(&self.folder, name, enter, &self.host_environment(host))?);
            ids.push(id);
        }
        let service = self.stage.service();
        let request = |n: usize| match self.stage.pods[n].socks5() {
            Some(proxy) => format!("zspire demo request {service} --socks5 {proxy}"),
            None => format!("zspire demo request {service}"),
        };
        self.voice.line("\nThe mesh stays up. Try, in another terminal:\n");
        let proxy = nodes.first().unwrap_or(&scripts[0]);
        self.voice.line(&format!("  {} zspire certificates", proxy.display()));
        self.voice.line(&format!("  {} zspire identity list", proxy.display()));
        self.voice.line(&format!("  {} {}", scripts[0].display(), request(0)));
        self.voice.line(&format!("  {} {}", scripts[1].display(), request(1)));
        if let Some(node) = nodes.first() {
            let pod = &self.stage.pods[0];
            let arguments = enroll_arguments(pod, &["--pid", &ids[0].to_string()]).join(" ");
            self.voice.line(&format!("  {} zspire enrolled", node.display()));
            self.voice.line(&format!("  {} zspire unenroll {NAMESPACE}/{}", node.display(), pod.plan.name));
            self.voice.line(&format!("  {} zspire {arguments}", node.display()));
        }
        self.voice.line("\nCtrl-C ends it and leaves nothing behind.");
        Ok(())
    }

    /// What commands need to find a proxy and its node agent.
    fn host_environment(&self, host: &Host) -> String {
        let [_, (socket, path), _] = host.agent_environment(&self.folder);
        format!("ZSPIRE_ADMIN={} {socket}={path}", host.admin())
    }

    fn end(&mut self) {
        self.step("clean-up", |demo| {
            let count = demo.children.stop_all()?;
            for host in demo.stage.hosts.iter().filter(|host| host.is_node()) {
                let [.., (_, enrolled)] = host.agent_environment(&demo.folder);
                // Node agents leave it for the next one. One that never started has none.
                if Path::new(&enrolled).exists() {
                    zspire_sys::netns::release_all(Path::new(&enrolled)).context("cannot let go of the pods")?;
                }
            }
            std::fs::remove_dir_all(&demo.folder)
                .with_context(|| format!("cannot remove {}", demo.folder.display()))?;
            Ok(format!("{count} processes ended, their files removed; the namespaces end with this process"))
        });
    }
}

/// A flag that is set by Ctrl-C, SIGTERM or the end of the terminal: whoever waits looks at it, so that the demo always cleans up.
fn interruption() -> anyhow::Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate, mut hangup) = {
        let _in_runtime = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        set.store(true, Relaxed);
    })?;
    Ok(flag)
}

/// The command that enrols a pod.
fn enroll_arguments(pod: &Pod, place: &[&str]) -> Vec<String> {
    let name = pod.plan.name;
    let who = ["--name", name, "--namespace", NAMESPACE, "--service-account", name];
    ["enroll"].iter().chain(place).chain(&who).map(|&argument| argument.to_owned()).collect()
}

/// A script that runs its arguments in a pod or on a node, where a process is that keeps the place.
fn script(folder: &Path, name: &str, pause: Option<u32>, environment: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    let enter = pause
        .map(|pause| format!("nsenter --target {pause} --user --net --preserve-credentials -- "))
        .unwrap_or_default();
    let folder = folder.display();
    let text =
        format!("#!/bin/sh\n# Runs a command in {name}.\nPATH=\"{folder}:$PATH\" {environment} exec {enter}\"$@\"\n");
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    Ok(path)
}
