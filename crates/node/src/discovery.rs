//! Where the mesh comes from: a discovery server, or a file.
//!
//! Owns the task that writes [`Mesh`], and says how discovery stands. A file is read before the proxy starts (what cannot be
//! read is an error then), and again whenever it changes (what cannot be read then is reported, and the mesh stays as it was).

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;
use zspire_identity::grpc::Channel;
use zspire_model::{Change, TrustDomain};
use zspire_xds::client::{self, Client, Sink};
use zspire_xds::file;

use crate::config::{Config, LocalXds, Mode, Server};
use crate::mesh::Mesh;
use crate::readiness::{Blocker, Problem, Readiness};
use crate::tasks::Tasks;

/// How discovery stands, for views.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// The server's address, or the file.
    pub source: String,
    /// Whether the newest state is being followed.
    pub connected: bool,
    /// What was wrong last.
    pub last_error: Option<String>,
    /// A mesh file, how often it was read again, and how that went.
    pub file: Option<FileReloads>,
}

/// How often a mesh file was read again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileReloads {
    pub accepted: u64,
    pub rejected: u64,
    /// Whether the file as it is now is not in force.
    pub is_rejected: bool,
}

/// How discovery stands. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Board(Arc<Mutex<Status>>);

impl Board {
    /// As it is now.
    pub fn status(&self) -> Status {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The mesh file was read again, and why it was not taken.
    fn reloaded(&self, rejected: Option<String>) {
        self.change(|status| {
            let file = status.file.get_or_insert_default();
            file.is_rejected = rejected.is_some();
            if file.is_rejected {
                file.rejected += 1
            } else {
                file.accepted += 1
            }
            status.last_error = rejected;
        });
    }

    fn change(&self, f: impl FnOnce(&mut Status)) {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Discovery under way.
#[derive(Debug)]
pub struct Discovery {
    pub board: Board,
    /// What a client of a discovery server counts.
    pub stats: Option<client::Stats>,
    /// Asks for single resources, where not all are followed.
    pub on_demand: Option<client::Demand>,
}

/// [`client::Demand`] as the data plane asks it.
#[derive(Debug)]
pub struct OnDemand(pub client::Demand);

impl zspire_proxy::OnDemand for OnDemand {
    fn get(&self, key: String) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> {
        let demand = self.0.clone();
        Box::pin(async move { demand.get(&key).await.map(drop).map_err(|error| error.to_string()) })
    }
}

/// Starts to follow the mesh.
pub fn start(
    config: &Config,
    channel: Option<Channel>,
    mesh: &Mesh,
    readiness: &Readiness,
    tasks: &Tasks,
) -> anyhow::Result<Discovery> {
    let board = Board::default();
    if let Some(local) = &config.local_xds {
        // Workloads that name no trust domain are of the mesh's own.
        let domain = config.trust_domain.parse().context("TRUST_DOMAIN")?;
        from_file(local, domain, mesh, &board, tasks)?;
        let observed = board.clone();
        readiness.observe("mesh file", move || {
            let status = observed.status();
            let why = status.last_error.filter(|_| status.file.is_some_and(|file| file.is_rejected))?;
            Some(Problem::note(format!("the changed file is not used, the mesh before stays in force: {why}")))
        });
        return Ok(Discovery { board, stats: None, on_demand: None });
    }
    let (Some(channel), Some(server)) = (channel, &config.xds) else {
        tracing::warn!("neither XDS_ADDRESS nor LOCAL_XDS_PATH is set: the mesh is empty");
        board.change(|status| status.source = "none".into());
        mesh.is_whole();
        return Ok(Discovery { board, stats: None, on_demand: None });
    };
    let (stats, on_demand) = from_server(config, server, channel, mesh, &board, readiness, tasks);
    Ok(Discovery { board, stats: Some(stats), on_demand })
}

fn from_file(local: &LocalXds, domain: TrustDomain, mesh: &Mesh, board: &Board, tasks: &Tasks) -> anyhow::Result<()> {
    match local {
        LocalXds::Text(text) => {
            let resources = file::parse_in(text, "LOCAL_XDS", &domain).context("LOCAL_XDS")?;
            mesh.apply(resources.iter().map(zspire_xds::Resource::put));
            mesh.is_whole();
            board.change(|status| {
                status.source = "LOCAL_XDS".into();
                status.connected = true;
            });
        }
        LocalXds::Path(path) => {
            let watcher = file::Watcher::new(path).trust_domain(domain.clone());
            let first = file::load_in(path, &domain).context("LOCAL_XDS_PATH")?;
            give_back_text();
            mesh.apply(first.changes());
            mesh.is_whole();
            board.change(|status| {
                status.source = path.display().to_string();
                status.connected = true;
                status.file = Some(FileReloads::default());
            });
            let (mesh, board, stop) = (mesh.clone(), board.clone(), tasks.stop.clone());
            tasks.spawn("mesh file", follow(path.clone(), watcher, first, mesh, board, stop));
        }
    }
    Ok(())
}

/// The text of a file was one large piece of memory, which the allocator keeps for a while and does not use for the many small ones
/// that a mesh is made of: without this a process has both at its highest.
fn give_back_text() {
    zspire_sys::allocator::purge();
}

/// Follows a file until stopped; what cannot be read leaves the mesh as it was.
async fn follow(
    path: PathBuf,
    mut watcher: file::Watcher,
    mut current: file::Mesh,
    mesh: Mesh,
    board: Board,
    stop: CancellationToken,
) {
    loop {
        let changed = tokio::select! {
            () = stop.cancelled() => return,
            changed = watcher.changed() => changed,
        };
        match changed {
            Ok(new) => {
                give_back_text();
                let changes = file::diff(&current, &new);
                tracing::info!(file = %path.display(), changes = changes.len(), "mesh file read again");
                mesh.apply(changes);
                current = new;
                board.reloaded(None);
            }
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::new(error));
                tracing::error!(file = %path.display(), %error, "the mesh file was not taken, the last good one stays");
                board.reloaded(Some(error));
            }
        }
    }
}

fn from_server(
    config: &Config,
    server: &Server,
    channel: Channel,
    mesh: &Mesh,
    board: &Board,
    readiness: &Readiness,
    tasks: &Tasks,
) -> (client::Stats, Option<client::Demand>) {
    board.change(|status| status.source = server.address.clone());
    let waiting = readiness.block("discovery", format!("asking {} for the mesh", server.address));
    let sink =
        FromServer { mesh: mesh.clone(), board: board.clone(), waiting: Some(waiting), server: server.address.clone() };
    let id =
        client::Config::node_id(config.instance_ip, &config.pod_name, &config.pod_namespace, &config.cluster_domain);
    let settings = client::Config {
        server: server.address.clone(),
        node_metadata: metadata(config),
        on_demand: config.xds_on_demand,
        ..client::Config::new(id)
    };
    let client = Client::new(settings, channel);
    let (stats, demand) = (client.stats(), client.demand());
    tasks.spawn("discovery", client.run(sink, tasks.stop.clone()));
    if let (Some(demand), Mode::Dedicated(pod)) = (demand.clone(), &config.mode) {
        // Nothing is known before it is asked for, the pod itself included.
        let uid = format!("{}//Pod/{}/{}", config.cluster_id, pod.namespace, pod.name);
        let stop = tasks.stop.clone();
        tasks.spawn("own workload", async move {
            tokio::select! {
                () = stop.cancelled() => {}
                answer = demand.get(&uid) => tracing::debug!(uid, ?answer, "own workload"),
            }
        });
    }
    (stats, demand)
}

/// The node metadata that istiod reads, and what the operator adds to it.
fn metadata(config: &Config) -> std::collections::BTreeMap<String, serde_json::Value> {
    let mut all = config.node_metadata.clone();
    all.extend([
        ("NAME".to_owned(), config.pod_name.clone().into()),
        ("NAMESPACE".to_owned(), config.pod_namespace.clone().into()),
        ("INSTANCE_IPS".to_owned(), config.instance_ip.to_string().into()),
        ("NODE_NAME".to_owned(), config.node_name.clone().into()),
        ("CLUSTER_ID".to_owned(), config.cluster_id.clone().into()),
    ]);
    all
}

/// Writes what a discovery server says.
struct FromServer {
    mesh: Mesh,
    board: Board,
    waiting: Option<Blocker>,
    server: String,
}

impl Sink for FromServer {
    fn apply(&mut self, changes: Vec<Change>) {
        self.mesh.apply(changes);
    }

    fn synced(&mut self) {
        self.mesh.is_whole();
        if let Some(waiting) = self.waiting.take() {
            waiting.ready();
        }
    }

    fn state(&mut self, status: client::Status) {
        match status {
            client::Status::Connected => self.board.change(|board| board.connected = true),
            client::Status::Connecting { attempt, last_error } => {
                if let (Some(waiting), Some(error)) = (&self.waiting, &last_error) {
                    waiting.because(format!("no mesh from {} after {attempt} attempts: {error}", self.server));
                }
                self.board.change(|board| {
                    board.connected = false;
                    if last_error.is_some() {
                        board.last_error = last_error;
                    }
                });
            }
        }
    }
}
