//! Runs the node proxy that its environment configures, once in each of several network namespaces, all in this process.
//!
//!     target/release/many-proxies /run/netns/client /run/netns/client-2
//!
//! For measurements of more connections than a process may have descriptors. That limit is one of a table of descriptors, and a
//! thread can have a table of its own, which the threads that it starts share. So each proxy here has one; they are otherwise what
//! `zspire proxy` runs, allocator included. Ends with the first of them that fails, or when all have been told to stop.

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use anyhow::Context as _;
use clap::Parser;
use nix::sched::{CloneFlags, unshare};
use zspire_node::BuildInfo;
use zspire_node::config::Config;
use zspire_sys::allocator;
use zspire_sys::netns::Netns;

/// Run a proxy in each of some network namespaces.
#[derive(Debug, Parser)]
struct Args {
    /// Files that stand for the namespaces
    #[arg(required = true)]
    namespaces: Vec<PathBuf>,
}

const BUILD: BuildInfo =
    BuildInfo { version: env!("CARGO_PKG_VERSION"), revision: "unknown", rustc: "unknown", profile: "unknown" };

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // What tokio has once in a process, its way to hear of signals, comes with the first runtime. It has to be there before the
    // tables part, so that its descriptors mean the same in all of them.
    drop(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
    let (ended, ends) = mpsc::channel();
    for namespace in args.namespaces {
        let ended = ended.clone();
        thread::Builder::new().name("proxy".into()).spawn(move || {
            let outcome = catch_unwind(|| proxy(&namespace)).unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked")));
            let outcome = outcome.with_context(|| format!("the proxy in {}", namespace.display()));
            // Nobody listens any more when another has ended first.
            let _ = ended.send(outcome);
        })?;
    }
    drop(ended);
    ends.into_iter().collect()
}

/// Runs a proxy in a namespace, on the calling thread, which has its own descriptors and its own network from then on.
fn proxy(namespace: &Path) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_FILES).context("cannot have a table of descriptors")?;
    Netns::open(namespace)?.enter_thread()?;
    zspire_node::run(Config::load()?, BUILD, || {
        allocator::start_background();
    })
}
