//! The commands that show what a running proxy knows: tables for people, JSON for programs.
//!
//! Owns how the admin port is reached ([`fetch`]), the parts of the dump that are shown ([`dump`]) and
//! their columns ([`tables`]), which are those of `istioctl ztunnel-config`.

mod dump;
pub(crate) mod fetch;
pub(crate) mod tables;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, ValueEnum};

use crate::exit;

/// What is to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    Workloads,
    Services,
    Policies,
    Certificates,
    Connections,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

/// Options of every inspecting command.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// Admin address of the proxy
    #[arg(long, value_name = "HOST:PORT", default_value = "localhost:15000", env = "ZSPIRE_ADMIN")]
    admin: String,
    /// Read a saved /config_dump instead of asking a proxy
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    file: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Show this namespace only
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
}

/// Fetches the dump and prints one view of it.
pub(crate) fn run(view: View, args: &Args) -> ExitCode {
    let text = match &args.file {
        Some(path) => std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display())),
        None => fetch::get(&args.admin, "/config_dump"),
    };
    let dump = match text.and_then(|text| dump::parse(&text)) {
        Ok(dump) => dump,
        Err(error) => return exit::complain(error, exit::cannot_reach()),
    };
    let namespace = args.namespace.as_deref();
    let printed = match args.output {
        Output::Json => dump.json(view, namespace),
        Output::Table => tables::table(&dump, view, namespace),
    };
    exit::print(&printed)
}
