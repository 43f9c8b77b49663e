//! The node agent of a machine without Kubernetes: enrols pods, which here are network namespaces, into the mesh.
//!
//! It does there what istio-cni does on a Kubernetes node: redirects a pod's connections by rules in its namespace, and
//! hands the namespace to the node proxy over ZDS.
//!
//! ```text
//!  zspire enroll ──▶ control ──▶ Book ──1──▶ folder: what is enrolled, and its namespace   (survives a crash)
//!                                 ├────2──▶ rules in the namespace                        (from here all is refused)
//!                                 └────3──▶ zds: add, to the newest proxy                 (from here it is served)
//! ```
//! Leaving goes the other way round, so that there is no moment at which an enrolled pod's connections pass in plain text.
//! When it ends, however it ends, rules and namespaces stay; the next start takes them up again. Start at [`run`].
//!
//! Tasks: one that accepts proxies and one for each of them ([`zds`]), one that accepts commands and one for each
//! ([`control`]), one for each pod that watches for its end ([`book`]).

pub mod book;
pub mod control;
pub mod folder;
mod rules;
mod zds;

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;
use zspire_sys::netns::Netns;
use zspire_sys::nft::Redirection;
use zspire_sys::privileges::{self, Capability};
use zspire_sys::scm::Listener;

use crate::BuildInfo;
use crate::config::AgentConfig;
use crate::shutdown::Signals;
use crate::supervision;
use crate::tasks::Tasks;
use crate::telemetry;

use book::Book;
use folder::Folder;

/// Runs the node agent until it is told to stop. Must be called before the process has threads.
pub fn run(config: &AgentConfig, build: &BuildInfo) -> anyhow::Result<()> {
    // Rules, namespaces, and the namespaces of other users' processes.
    let keep = [Capability::NetAdmin, Capability::SysAdmin, Capability::SysPtrace];
    let unsettled = privileges::retain_capabilities(&keep).err();
    let (_logging, _written_at_the_end) = telemetry::start(&config.log_filter, config.log_format)?;
    tracing::info!(version = build.version, revision = build.revision, "zspire node agent starts");
    if let Some(error) = unsettled {
        tracing::warn!(%error, "cannot give up capabilities");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    runtime.block_on(serve(config))
}

async fn serve(config: &AgentConfig) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot take over signals")?;
    let tasks = Tasks::default();
    // First: who cannot have the sockets must not touch what another agent has.
    let control = listen(&config.socket, "commands (ZSPIRE_AGENT_SOCKET)")?;
    let proxies = listen(&config.zds, "node proxies (INPOD_UDS)")?;
    let home = Netns::current().context("cannot open the network namespace of this process")?;
    let rules =
        Redirection { mark: config.packet_mark, dns: config.dns_capture.then_some(15053), ..Redirection::default() };
    let folder = Folder::open(&config.state_dir).context("ZSPIRE_AGENT_STATE_DIR")?;
    let book = Arc::new(Book::new(folder, rules, home)?);
    book.restore(&tasks.stop).await?;
    tasks.spawn("node proxies", zds::accept(proxies, book.hub(), tasks.stop.clone()));
    tasks.spawn("commands", control::accept(control, book.clone(), tasks.stop.clone()));
    tracing::info!(commands = %config.socket.display(), proxies = %config.zds.display(), "listening");
    config.supervisor.ready();
    tasks.spawn("signs of life", supervision::live(config.supervisor.clone(), tasks.stop.clone(), || async {}));
    let quit = CancellationToken::new();
    let reason = tokio::select! {
        reason = signals.stop(&quit) => Some(reason),
        () = tasks.stop.cancelled() => None,
    };
    tracing::info!(?reason, "stopping; the rules in the pods stay");
    config.supervisor.stopping();
    tasks.stop.cancel();
    tasks.finished().await;
    // A proxy that connects from now on finds nobody, instead of somebody who does not answer.
    for path in [&config.zds, &config.socket] {
        let _ = std::fs::remove_file(path);
    }
    anyhow::ensure!(reason.is_some(), "a part of the node agent has failed; the log says which");
    Ok(())
}

fn listen(path: &Path, what: &str) -> anyhow::Result<Listener> {
    let failed = || format!("cannot listen for {what} at {}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(failed)?;
    }
    let listener = Listener::bind(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => anyhow::Error::new(error).context("another node agent runs there"),
        _ => error.into(),
    });
    let listener = listener.with_context(failed)?;
    listener.set_nonblocking(true).with_context(failed)?;
    Ok(listener)
}
