//! Measures the CA: starts `zspire control-plane`, joins as a node, and asks for certificates as fast as they come.
//!
//!     target/release/ca-load --seconds 5 --in-flight 16 --zspire target/release/zspire
//!
//! Prints one JSON object. The CPU time is that of the control plane alone; the request is made once, so that the client costs
//! little. Tasks: one for each request in flight, on one thread. The control plane is ended with this program.

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tokio::task::LocalSet;
use zspire_identity::PrivateKey;
use zspire_identity::grpc::{self, Channel, Roots};
use zspire_identity::join::{self, Node};
use zspire_wire::ca::IstioCertificateRequest;
use zspire_wire::ca::istio_certificate_service_client::IstioCertificateServiceClient;

type Outcome<T> = Result<T, Box<dyn Error>>;

const NODE: &str = "load";
/// Identities asked for in turn.
const IDENTITIES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(20);
/// `USER_HZ`: the unit of times in /proc on every architecture of Linux in use.
const TICKS: f64 = 100.0;

/// Measure how many certificates the control plane issues.
#[derive(Debug, Parser)]
struct Args {
    /// How long to measure
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Requests under way at the same time
    #[arg(long, default_value_t = 16)]
    in_flight: usize,
    /// Connections that they are spread over
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// The program
    #[arg(long, default_value = "target/release/zspire")]
    zspire: PathBuf,
    /// Folder for its state; a temporary one if there is none
    #[arg(long)]
    dir: Option<PathBuf>,
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    let temporary = tempfile::tempdir()?;
    let folder = args.dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    let server = Server::start(&args.zspire, &folder)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = LocalSet::new().block_on(&runtime, measure(&server, &args))?;
    server.stop()?;
    #[allow(clippy::print_stdout)] // it is what this program is for
    {
        println!("{measured}");
    }
    Ok(())
}

/// The control plane under load.
struct Server {
    child: Child,
    zspire: PathBuf,
    folder: PathBuf,
    address: String,
}

impl Server {
    fn start(zspire: &Path, folder: &Path) -> Outcome<Self> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("mesh.yaml"), mesh())?;
        let (address, admin) = (free_port()?, free_port()?);
        let child = Self::command(zspire, folder)
            .args(["--address", &address, "--admin", &admin, "--log", "warn", "run"])
            .stdout(Stdio::null())
            .spawn()?;
        let mut server = Self { child, zspire: zspire.to_owned(), folder: folder.to_owned(), address };
        server.wait_until_ready(&admin)?;
        Ok(server)
    }

    fn command(zspire: &Path, folder: &Path) -> Command {
        let mut command = Command::new(zspire);
        command.arg("control-plane").arg("--state").arg(folder.join("state"));
        command.arg("--mesh").arg(folder.join("mesh.yaml"));
        command
    }

    fn wait_until_ready(&mut self, admin: &str) -> Outcome<()> {
        let begin = Instant::now();
        while !is_ready(admin) {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the control plane ended: {status}").into());
            }
            if begin.elapsed() > PATIENCE {
                return Err("the control plane does not become ready".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn token(&self) -> Outcome<join::JoinToken> {
        let output = Self::command(&self.zspire, &self.folder).args(["token", "--node", NODE]).output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
        }
        Ok(String::from_utf8(output.stdout)?.parse()?)
    }

    /// User and system time so far, in seconds.
    fn cpu(&self) -> Outcome<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<_> = text.rsplit_once(')').ok_or("no name in stat")?.1.split_whitespace().collect();
        let ticks = |at: usize| -> Outcome<f64> { Ok(fields.get(at).ok_or("stat is short")?.parse()?) };
        // utime and stime are fields 14 and 15; what is left begins with field 3.
        Ok((ticks(11)? + ticks(12)?) / TICKS)
    }

    fn stop(mut self) -> Outcome<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the control plane ended: {status}").into()) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone, unless something failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> Outcome<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

fn is_ready(admin: &str) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(admin)?;
        stream.write_all(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

fn identity(number: usize) -> String {
    format!("spiffe://cluster.local/ns/load/sa/account-{number}")
}

fn mesh() -> String {
    let workload = |number| {
        format!(
            "- {{uid: load/{number}, name: pod-{number}, namespace: load, serviceAccount: account-{number}, \
             workloadIps: [10.0.0.{number}], protocol: HBONE, node: {NODE}}}\n"
        )
    };
    format!("workloads:\n{}", (0..IDENTITIES).map(workload).collect::<String>())
}

async fn measure(server: &Server, args: &Args) -> Outcome<serde_json::Value> {
    let roots = Roots::File(server.folder.join("state/root-cert.pem"));
    let ca = grpc::Config::new(format!("https://{}", server.address), roots);
    let config = join::Config { ca: ca.clone(), node: NODE.into(), state_dir: server.folder.join("node") };
    let node = Node::join(config, &server.token()?).await?;
    let connect = || Channel::new(grpc::Config { client: Some(node.identity()), ..ca.clone() });
    let channels = (0..args.connections.max(1)).map(|_| connect()).collect::<Result<Vec<_>, _>>()?;
    let requests: Rc<[_]> = requests()?.into();
    // Connections are made, and code is warm, before the clock starts.
    load(&channels, &requests, args.in_flight, Duration::from_millis(300)).await?;
    let (begin, before) = (Instant::now(), server.cpu()?);
    let mut times = load(&channels, &requests, args.in_flight, Duration::from_secs_f64(args.seconds)).await?;
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), server.cpu()? - before);
    times.sort_unstable();
    let quantile = |q: f64| times[((times.len() - 1) as f64 * q) as usize].as_secs_f64() * 1000.0;
    let count = times.len() as f64;
    let round = |value: f64| (value * 100.0).round() / 100.0;
    Ok(serde_json::json!({
        "per_second": round(count / seconds),
        "per_cpu_second": round(count / cpu),
        "certificates": times.len(),
        "seconds": round(seconds),
        "cpu_seconds": round(cpu),
        "p50_ms": round(quantile(0.5)),
        "p99_ms": round(quantile(0.99)),
        "in_flight": args.in_flight,
    }))
}

fn requests() -> Outcome<Vec<IstioCertificateRequest>> {
    let csr = PrivateKey::generate().request(None)?;
    let request = |number| {
        let asked = Value { kind: Some(Kind::StringValue(identity(number))) };
        let metadata = Struct { fields: [("ImpersonatedIdentity".to_owned(), asked)].into() };
        IstioCertificateRequest { csr: csr.clone(), validity_duration: 86_400, metadata: Some(metadata) }
    };
    Ok((0..IDENTITIES).map(request).collect())
}

/// How long each certificate took.
async fn load(
    channels: &[Channel],
    requests: &Rc<[IstioCertificateRequest]>,
    in_flight: usize,
    time: Duration,
) -> Outcome<Vec<Duration>> {
    let end = Instant::now() + time;
    let ask = |number: usize| {
        let mut client = IstioCertificateServiceClient::new(channels[number % channels.len()].clone());
        let requests = requests.clone();
        tokio::task::spawn_local(async move {
            let mut times = Vec::new();
            let mut next = number;
            while Instant::now() < end {
                let begin = Instant::now();
                client.create_certificate(requests[next % requests.len()].clone()).await?;
                times.push(begin.elapsed());
                next += 1;
            }
            Ok::<_, tonic::Status>(times)
        })
    };
    let tasks: Vec<_> = (0..in_flight.max(1)).map(ask).collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    Ok(times)
}
