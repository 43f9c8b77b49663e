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

/// Where a page of the admin port comes from, and how it is printed.
#[derive(Debug, ClapArgs)]
pub(crate) struct Origin {
    /// Admin address of the proxy
    #[arg(long, value_name = "HOST:PORT", default_value = "localhost:15000", env = "ZSPIRE_ADMIN")]
    admin: String,
    /// Read a saved page (/config_dump, for identity /identities) instead of asking a proxy
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    pub(crate) file: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

impl Origin {
    /// The page at `path`.
    pub(crate) fn text(&self, path: &str) -> Result<String, String> {
        match &self.file {
            Some(file) => std::fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display())),
            None => fetch::get(&self.admin, path),
        }
    }
}

/// Options of every inspecting command.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    from: Origin,
    /// Show this namespace only
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
}

/// Fetches the dump and prints one view of it.
pub(crate) fn run(view: View, args: &Args) -> ExitCode {
    let dump = match args.from.text("/config_dump").and_then(|text| dump::parse(&text)) {
        Ok(dump) => dump,
        Err(error) => return exit::complain(error, exit::cannot_reach()),
    };
    let namespace = args.namespace.as_deref();
    let printed = match args.from.output {
        Output::Json => dump.json(view, namespace),
        Output::Table => tables::table(&dump, view, namespace),
    };
    exit::print(&printed)
}
