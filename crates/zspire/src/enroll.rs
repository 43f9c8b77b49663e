//! `zspire node-agent`, and the commands that ask it: `enroll`, `unenroll`, `enrolled`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, ValueEnum};
use zspire_node::agent::book::{Enrolled, Enrolment, Which};
use zspire_node::agent::control::{Agent, Error};
use zspire_node::agent::folder::Until;
use zspire_node::config::AgentConfig;
use zspire_sys::netns::Netns;
use zspire_sys::pidfd::Pidfd;

use crate::inspect::tables;
use crate::{exit, proxy};

/// How to reach the node agent.
#[derive(Debug, ClapArgs)]
struct Socket {
    /// Socket of the node agent
    #[arg(long = "agent", value_name = "PATH", env = "ZSPIRE_AGENT_SOCKET", default_value = "/run/zspire/agent.sock")]
    path: PathBuf,
}

/// Enrol a pod. It is served when the command ends.
#[derive(Debug, ClapArgs)]
#[group(id = "place", required = true, multiple = false, args = ["netns", "pid"])]
pub(crate) struct Enroll {
    /// Network namespace of the pod: a file such as /run/netns/NAME
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// A process in the pod; the pod leaves the mesh when it ends
    #[arg(long)]
    pid: Option<u32>,
    /// Name of the workload, as discovery knows it
    #[arg(long)]
    name: String,
    /// Namespace of the workload
    #[arg(long)]
    namespace: String,
    /// Service account of the workload
    #[arg(long)]
    service_account: String,
    /// What the pod is called between agent and proxy, unique on this node [default: NAMESPACE.NAME]
    #[arg(long)]
    uid: Option<String>,
    #[command(flatten)]
    socket: Socket,
}

/// Take a pod out of the mesh: its live connections are drained, then its rules are removed.
#[derive(Debug, ClapArgs)]
#[group(id = "which", required = true, multiple = false, args = ["pod", "uid"])]
pub(crate) struct Unenroll {
    /// The pod
    #[arg(value_name = "NAMESPACE/NAME")]
    pod: Option<String>,
    /// The pod, by the uid that it was enrolled with
    #[arg(long)]
    uid: Option<String>,
    #[command(flatten)]
    socket: Socket,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// Show who is enrolled.
#[derive(Debug, ClapArgs)]
pub(crate) struct List {
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(flatten)]
    socket: Socket,
}

/// Runs the node agent until it is told to stop.
pub(crate) fn node_agent() -> ExitCode {
    let config = match AgentConfig::load() {
        Ok(config) => config,
        Err(error) => return exit::complain(error, exit::usage()),
    };
    match zspire_node::agent::run(&config, &proxy::build_info()) {
        Ok(()) => exit::OK,
        Err(error) => exit::complain(error, exit::finding()),
    }
}

/// Enrols a pod.
pub(crate) fn enroll(args: Enroll) -> ExitCode {
    let (netns, process) = match place(&args) {
        Ok(place) => place,
        Err(error) => return exit::complain(error, exit::cannot_reach()),
    };
    // The agent may be elsewhere: a relative path means nothing to it.
    let file = args.netns.as_ref().and_then(|path| std::path::absolute(path).ok());
    let enrolment = Enrolment {
        name: args.name,
        namespace: args.namespace,
        service_account: args.service_account,
        uid: args.uid,
        file,
    };
    match Agent(&args.socket.path).enroll(enrolment, &netns, process.as_ref()) {
        Ok(Enrolled { record, pending: None }) => {
            exit::print(&format!("{} is enrolled (uid {})\n", record.pod(), record.uid))
        }
        Ok(Enrolled { record, pending: Some(why) }) => exit::complain(
            format_args!(
                "{} is enrolled, but not served yet: {why}; until it is, all its connections are refused",
                record.pod()
            ),
            exit::finding(),
        ),
        Err(error) => failed(error),
    }
}

/// The namespace, and the process that it was named by.
fn place(args: &Enroll) -> anyhow::Result<(Netns, Option<Pidfd>)> {
    use anyhow::Context as _;
    if let Some(path) = &args.netns {
        let netns =
            Netns::open(path).with_context(|| format!("cannot open the network namespace {}", path.display()))?;
        return Ok((netns, None));
    }
    let pid = args.pid.context("neither --netns nor --pid is given")?;
    // Held first: what is opened after is of this process, if it is still there then.
    let process = Pidfd::open(pid).with_context(|| format!("cannot find the process {pid}"))?;
    let netns =
        Netns::of_process(pid).with_context(|| format!("cannot open the network namespace of process {pid}"))?;
    anyhow::ensure!(!process.ended()?, "the process {pid} has ended");
    Ok((netns, Some(process)))
}

/// Takes a pod out.
pub(crate) fn unenroll(args: Unenroll) -> ExitCode {
    let which = match (args.uid, args.pod.as_deref().map(|pod| pod.split_once('/'))) {
        (Some(uid), _) => Which::Uid(uid),
        (None, Some(Some((namespace, name)))) => Which::Pod { namespace: namespace.into(), name: name.into() },
        _ => return exit::complain("a pod is named NAMESPACE/NAME", exit::usage()),
    };
    match Agent(&args.socket.path).unenroll(which) {
        Ok(pod) => exit::print(&format!("{} is no longer enrolled\n", pod.record.pod())),
        Err(error) => failed(error),
    }
}

/// Prints who is enrolled.
pub(crate) fn enrolled(args: &List) -> ExitCode {
    let pods = match Agent(&args.socket.path).enrolled() {
        Ok(pods) => pods,
        Err(error) => return failed(error),
    };
    match args.output {
        Output::Json => exit::print(&format!("{}\n", serde_json::to_string_pretty(&pods).unwrap_or_default())),
        Output::Table => exit::print(&table(&pods)),
    }
}

fn table(pods: &[Enrolled]) -> String {
    let row = |Enrolled { record, pending }: &Enrolled| {
        let until = match &record.until {
            Until::Unenrolled => "unenrolled".to_owned(),
            Until::Process { pid, .. } => format!("process {pid} ends"),
            Until::File(file) => format!("{} is gone", file.display()),
        };
        let state = pending.as_ref().map_or("served".to_owned(), |why| format!("pending: {why}"));
        let (namespace, name, account) = (&record.namespace, &record.name, &record.service_account);
        [namespace, name, account, &record.uid, &until, &state].map(Clone::clone).to_vec()
    };
    let header = ["NAMESPACE", "NAME", "SERVICE ACCOUNT", "UID", "UNTIL", "STATE"];
    tables::render(&header, pods.iter().map(row).collect())
}

fn failed(error: Error) -> ExitCode {
    let code = match &error {
        Error::Unreachable { .. } => exit::cannot_reach(),
        Error::Refused(_) => exit::finding(),
    };
    exit::complain(format_args!("{:#}", anyhow::Error::new(error)), code)
}
