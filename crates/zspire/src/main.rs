//! The `zspire` program: subcommands and output, nothing else.
//!
//! What the proxy does is in `zspire_node`, what the control plane does in `zspire_control_plane`.
//! The program starts without threads: the demo must enter its namespaces before there are any.

#![forbid(unsafe_code)]

mod control_plane;
mod demo;
mod doctor;
mod enroll;
mod exit;
mod identity;
mod inspect;
mod proxy;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// An ambient-mesh node proxy: SPIFFE identities for every pod, traffic in mutually authenticated tunnels.
#[derive(Debug, Parser)]
#[command(name = "zspire", version, about, arg_required_else_help = true, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 ok, 1 something was found, 2 wrong usage or configuration, 3 cannot reach what was asked."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring up a mesh on this machine and send traffic through it
    Demo(demo::Args),
    /// Run the node proxy, configured by its environment
    Proxy(proxy::Args),
    /// Run zspire's own control plane: certificate authority and workload discovery
    ControlPlane(Box<control_plane::Args>),
    /// Enrol pods of this machine into the mesh, where there is no Kubernetes to do it
    NodeAgent,
    /// Enrol a network namespace, or a process in one, as a pod
    Enroll(enroll::Enroll),
    /// Take a pod out of the mesh
    Unenroll(enroll::Unenroll),
    /// Show the pods that are enrolled here
    Enrolled(enroll::List),
    /// Show the workloads that a proxy knows
    Workloads(inspect::Args),
    /// Show the services that a proxy knows
    Services(inspect::Args),
    /// Show the authorization policies that a proxy knows
    Policies(inspect::Args),
    /// Show the certificates that a proxy holds
    Certificates(inspect::Args),
    /// Show the connections that a proxy carries
    Connections(inspect::Args),
    /// Show where each pod's identity comes from, and why it has none
    #[command(subcommand)]
    Identity(identity::Command),
    /// Find what keeps a proxy with these settings from its work; exit code 1 if a check fails
    Doctor(doctor::Args),
    /// Check files of workloads, services and policies
    Validate {
        /// Files or folders; all of them together make one mesh
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Print a completion script for a shell
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
    /// Print version, revision and compiler
    Version,
    /// Print a generated document
    #[command(hide = true)]
    Docs {
        #[arg(value_parser = ["configuration"])]
        page: String,
    },
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Demo(args) => demo::run(args),
        Command::Proxy(args) => proxy::run(&args),
        Command::ControlPlane(args) => control_plane::run(*args),
        Command::NodeAgent => enroll::node_agent(),
        Command::Enroll(args) => enroll::enroll(args),
        Command::Unenroll(args) => enroll::unenroll(args),
        Command::Enrolled(args) => enroll::enrolled(&args),
        Command::Workloads(args) => inspect::run(inspect::View::Workloads, &args),
        Command::Services(args) => inspect::run(inspect::View::Services, &args),
        Command::Policies(args) => inspect::run(inspect::View::Policies, &args),
        Command::Certificates(args) => inspect::run(inspect::View::Certificates, &args),
        Command::Connections(args) => inspect::run(inspect::View::Connections, &args),
        Command::Identity(command) => identity::run(command),
        Command::Doctor(args) => doctor::run(&args),
        Command::Validate { files } => control_plane::validate(&files),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "zspire", &mut std::io::stdout());
            exit::OK
        }
        Command::Man => man(),
        Command::Version => exit::print(&proxy::build_info().to_string()),
        Command::Docs { .. } => {
            exit::print(&format!("{}{}", zspire_node::config::options::reference(), control_plane::reference()))
        }
    }
}

/// The manual: the program's page, then one for each subcommand.
fn man() -> ExitCode {
    let command = Cli::command().disable_help_subcommand(true);
    let mut page = Vec::new();
    let mut rendered = clap_mangen::Man::new(command.clone()).render(&mut page);
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = format!("zspire-{}", sub.get_name());
        rendered = rendered.and_then(|()| clap_mangen::Man::new(sub.clone().name(name)).render(&mut page));
    }
    match rendered.and_then(|()| std::io::stdout().write_all(&page)) {
        Ok(()) => exit::OK,
        Err(_) => exit::finding(),
    }
}
