//! `zspire demo`: a mesh on this machine, with real processes and real traffic, and what can be seen of it.
//!
//! [`stage`] is where it runs, [`children`] are its processes, [`commands`] how they are called, [`app`] the applications in its
//! pods, [`capture`] what was on the wire, [`report`] what it tells. This file is the plot; its steps are in [`setup`] and
//! [`requests`], and what comes after them in [`stay`]. The process must have no threads when it enters its namespaces.

mod app;
mod capture;
mod children;
mod commands;
mod mesh;
mod report;
mod requests;
mod setup;
mod spire;
mod stage;
mod stay;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args as ClapArgs, ValueEnum};
use zspire_sys::userns;

use crate::exit;
use children::Children;
use report::{Report, Step, Voice};
use stage::Stage;

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
