//! Measures the source of identities that asks a SPIRE agent: thousands of subscriptions to a fake agent in another process.
//!
//!     target/release/spire-load --subscriptions 10000
//!
//! Prints one JSON object. The source runs on one thread, as in the proxy. The fake agent (`--agent SOCKET`) is this program again:
//! it does what it reads from standard input and says when it is done.

use std::error::Error;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use zspire_identity::spire::{Config, Endpoint, Locate, Reference, delegated, subscriptions};
use zspire_identity::{Priority, Source as _, Watch, WorkloadKey};
use zspire_model::{SpiffeId, Str};
use zspire_testkit::fake_agent::FakeAgent;

type Outcome<T> = Result<T, Box<dyn Error>>;

const TRUST_DOMAIN: &str = "example.org";
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the agent is away when it is restarted.
const AWAY: Duration = Duration::from_millis(500);
/// `USER_HZ`: the unit of times in /proc on every architecture of Linux in use.
const TICKS: f64 = 100.0;

/// Measure subscriptions to a fake SPIRE agent.
#[derive(Debug, Parser)]
struct Args {
    /// Workloads
    #[arg(long, default_value_t = 10_000)]
    subscriptions: usize,
    /// Workloads that come in a second; 0: all at once
    #[arg(long, default_value_t = 0)]
    rate: usize,
    /// How long to watch at rest, in seconds
    #[arg(long, default_value_t = 20)]
    idle: u64,
    /// Be the fake agent at this socket
    #[arg(long, value_name = "SOCKET")]
    agent: Option<PathBuf>,
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    if let Some(socket) = &args.agent {
        return be_the_agent(socket, args.subscriptions);
    }
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("agent.sock");
    let agent = Agent::start(&socket, args.subscriptions)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(measure(agent, &socket, &args))?;
    #[allow(clippy::print_stdout)] // it is what this program is for
    {
        println!("{measured}");
    }
    Ok(())
}

fn id(number: usize) -> SpiffeId {
    format!("spiffe://{TRUST_DOMAIN}/ns/load/sa/account-{number}").parse().expect("a SPIFFE ID")
}

/// Serves, and does what standard input says: `restart`, or `wait` until all streams are open.
fn be_the_agent(socket: &Path, subscriptions: usize) -> Outcome<()> {
    let mut agent = FakeAgent::new(socket, &TRUST_DOMAIN.parse()?);
    (0..subscriptions).for_each(|number| agent.prepare(&id(number)));
    agent.listen();
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "restart" => {
                agent.die();
                std::thread::sleep(AWAY);
                agent.listen();
            }
            _ => {
                while agent.streams() < subscriptions {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        writeln!(out, "done")?;
    }
    Ok(())
}

/// The fake agent's process; it ends when its standard input does.
struct Agent {
    _child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Agent {
    fn start(socket: &Path, subscriptions: usize) -> Outcome<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--agent").arg(socket).args(["--subscriptions", &subscriptions.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let commands = child.stdin.take().ok_or("no standard input")?;
        let answers = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        let mut agent = Self { _child: child, commands, answers };
        agent.answer()?;
        Ok(agent)
    }

    fn answer(&mut self) -> Outcome<()> {
        let mut line = String::new();
        match self.answers.read_line(&mut line)? {
            0 => Err("the fake agent has ended".into()),
            _ => Ok(()),
        }
    }

    /// Has it do something, while this thread goes on with the source.
    async fn tell(mut self, command: &'static str) -> Outcome<Self> {
        let told = tokio::task::spawn_blocking(move || {
            writeln!(self.commands, "{command}").map_err(|error| error.to_string())?;
            self.answer().map_err(|error| error.to_string())?;
            Ok::<Self, String>(self)
        });
        Ok(told.await??)
    }
}

/// Asks about each workload by the name that the fake gives it.
#[derive(Debug)]
struct ByName;

impl Locate for ByName {
    fn locate(&self, key: &WorkloadKey, _: usize) -> Result<Reference, Str> {
        Ok(Reference::Selectors(Arc::new([("fake".into(), format!("id:{}", key.id).into())])))
    }
}

async fn measure(agent: Agent, socket: &Path, args: &Args) -> Outcome<serde_json::Value> {
    let stop = CancellationToken::new();
    let (asking, bundles) = delegated::new(Endpoint::Unix(socket.into()));
    tokio::spawn(bundles.run(stop.clone()));
    let (source, driver) = subscriptions::new(Arc::new(asking), Arc::new(ByName), Config::default());
    tokio::spawn(driver.run(stop.clone()));
    let key = |number| WorkloadKey { id: id(number), workload: Some(format!("pod-{number}").into()) };
    // The connection is made, and code is warm, before anything is measured.
    let warm = WorkloadKey { id: id(0), workload: Some("warm".into()) };
    source.watch(&warm, Priority::WarmUp).ready(tokio::time::Instant::now() + PATIENCE).await?;
    source.forget(&warm);
    sleep(Duration::from_millis(200)).await;

    let (begun, before) = (Instant::now(), resident()?);
    let mut ready = Vec::with_capacity(args.subscriptions);
    for number in 0..args.subscriptions {
        let watch = source.watch(&key(number), Priority::WarmUp);
        ready.push(tokio::spawn(when_ready(watch)));
        if args.rate > 0 && (number + 1) % args.rate.div_ceil(100) == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    }
    let mut at = Vec::with_capacity(ready.len());
    for task in ready {
        at.push(task.await??);
    }
    let all_ready = begun.elapsed();
    // Each answer says when it was made.
    let mut times: Vec<Duration> = Vec::with_capacity(at.len());
    for (number, (entry, at)) in source.entries().iter().zip(by_order(at)).enumerate() {
        let hint = entry.story.answer.as_ref().and_then(|answer| answer.first()).map(|svid| svid.hint.clone());
        let sent: u64 = hint.ok_or(format!("{number} was not answered"))?.parse()?;
        let sent = SystemTime::UNIX_EPOCH + Duration::from_nanos(sent);
        times.push(at.duration_since(sent).unwrap_or_default());
    }
    times.sort_unstable();
    let quantile = |q: f64| times[((times.len() - 1) as f64 * q) as usize].as_secs_f64() * 1000.0;

    sleep(Duration::from_secs(3)).await;
    let each = resident()?.saturating_sub(before) as f64 / args.subscriptions as f64;
    let (rested, cpu) = (Instant::now(), cpu()?);
    sleep(Duration::from_secs(args.idle)).await;
    let idle = (self::cpu()? - cpu) / rested.elapsed().as_secs_f64() * 100.0;

    let agent = agent.tell("restart").await?;
    let listening = Instant::now();
    let agent = tokio::time::timeout(PATIENCE, agent.tell("wait")).await??;
    let again = listening.elapsed();
    let served = source.entries().iter().filter(|entry| entry.state.credentials().is_some()).count();
    drop(agent);
    stop.cancel();
    let round = |value: f64| (value * 100.0).round() / 100.0;
    Ok(serde_json::json!({
        "subscriptions": args.subscriptions,
        "rate": args.rate,
        "first_p50_ms": round(quantile(0.5)),
        "first_p99_ms": round(quantile(0.99)),
        "all_ready_s": round(all_ready.as_secs_f64()),
        "kib_each": round(each),
        "idle_cpu_percent": round(idle),
        "reestablished_s": round(again.as_secs_f64()),
        "served_meanwhile": served,
    }))
}

/// When a workload has its SVID, with its name.
async fn when_ready(watch: Watch) -> Result<(SpiffeId, SystemTime), String> {
    let ready = watch.ready(tokio::time::Instant::now() + PATIENCE).await;
    let credentials = ready.map_err(|error| error.to_string())?;
    Ok((credentials.id().clone(), SystemTime::now()))
}

/// In the order of entries.
fn by_order(mut at: Vec<(SpiffeId, SystemTime)>) -> impl Iterator<Item = SystemTime> {
    at.sort_by(|a, b| a.0.cmp(&b.0));
    at.into_iter().map(|(_, at)| at)
}

/// Resident memory of this process in KiB.
fn resident() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// User and system seconds of this process so far.
fn cpu() -> Outcome<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / TICKS)
}
