//! `zspire proxy`: configuration errors are usage errors, everything else is the node's.

use std::process::ExitCode;

use clap::Args as ClapArgs;
use zspire_node::BuildInfo;
use zspire_node::config::Config;

use crate::exit;

/// Options of the proxy. It is configured by its environment (docs/configuration.md).
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// Accepted for charts that start ztunnel as `proxy ztunnel`; means nothing
    #[arg(hide = true)]
    role: Option<String>,
}

/// What this program was built from.
pub(crate) fn build_info() -> BuildInfo {
    BuildInfo {
        version: env!("CARGO_PKG_VERSION"),
        revision: env!("ZSPIRE_REVISION"),
        rustc: env!("ZSPIRE_RUSTC"),
        profile: env!("ZSPIRE_PROFILE"),
    }
}

/// Runs until it is told to stop and has drained.
pub(crate) fn run(_: &Args) -> ExitCode {
    let config = match Config::load() {
        Ok(config) => config,
        Err(error) => return exit::complain(error, exit::usage()),
    };
    let settled = || {
        zspire_sys::allocator::start_background();
    };
    match zspire_node::run(config, build_info(), settled) {
        Ok(()) => exit::OK,
        Err(error) => exit::complain(error, exit::finding()),
    }
}
