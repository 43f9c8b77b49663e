//! The mesh: files, followed, and what follows from them for discovery and for the CA.
//!
//! At the start the files must be good. Later, files that are not good as a whole change nothing: what was loaded last stays in
//! force, and the reason is in the log, in a metric and in the status. One task, [`Follower::run`]; discovery streams end
//! with it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zspire_model::{TrustDomain, Workload};
use zspire_xds::Resource;
use zspire_xds::file;
use zspire_xds::server::{Connection, ResourceSet};

use crate::metrics::Metrics;
use crate::placement::Placement;
use crate::time_text::rfc3339;

pub use zspire_xds::file::Error;

/// How much there is of everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Workloads.
    pub workloads: usize,
    /// Services.
    pub services: usize,
    /// Authorization policies.
    pub policies: usize,
}

impl Summary {
    fn of(resources: &[Resource]) -> Self {
        let mut summary = Self::default();
        for resource in resources {
            match resource {
                Resource::Workload(_) => summary.workloads += 1,
                Resource::Service(_) => summary.services += 1,
                Resource::Policy(_) => summary.policies += 1,
            }
        }
        summary
    }
}

/// A mesh that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validated {
    /// How much there is in it.
    pub summary: Summary,
    /// What names something that is not there, with file and line. It does not keep the mesh from being used.
    pub findings: Vec<String>,
}

/// Checks files and folders, all of them together as one mesh.
pub fn validate(paths: &[PathBuf]) -> Result<Validated, Error> {
    let mesh = file::load_all(paths, &TrustDomain::default())?;
    Ok(Validated { summary: Summary::of(&mesh.resources), findings: mesh.findings })
}

/// The mesh in force.
#[derive(Debug)]
pub(crate) struct Mesh {
    path: PathBuf,
    placement: Arc<ArcSwap<Placement>>,
    resources: watch::Receiver<Arc<ResourceSet>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    summary: Summary,
    findings: Vec<String>,
    loaded: SystemTime,
    rejected: Option<Rejected>,
}

/// Files that are not in force.
#[derive(Debug)]
struct Rejected {
    at: SystemTime,
    why: String,
}

/// What keeps a [`Mesh`] current.
#[derive(Debug)]
pub(crate) struct Follower {
    mesh: Arc<Mesh>,
    files: Arc<file::Mesh>,
    set: watch::Sender<Arc<ResourceSet>>,
    watcher: file::Watcher,
}

impl Mesh {
    /// Loads a file or folder, and begins to watch it.
    pub(crate) fn load(path: &Path, domain: &TrustDomain) -> Result<(Arc<Self>, Follower), Error> {
        // First, so that a change while loading is not missed.
        let watcher = file::Watcher::new(path).trust_domain(domain.clone());
        let files = file::load_in(path, domain)?;
        warn(&files);
        let set = watch::Sender::new(Arc::new(ResourceSet::new(files.resources.clone())));
        let mesh = Arc::new(Self {
            path: path.to_owned(),
            placement: Arc::new(ArcSwap::from_pointee(placement(&files))),
            resources: set.subscribe(),
            state: Mutex::new(State {
                summary: Summary::of(&files.resources),
                findings: files.findings.clone(),
                loaded: SystemTime::now(),
                rejected: None,
            }),
        });
        Ok((mesh.clone(), Follower { mesh, files: Arc::new(files), set, watcher }))
    }

    pub(crate) fn placement(&self) -> Arc<ArcSwap<Placement>> {
        self.placement.clone()
    }

    pub(crate) fn resources(&self) -> watch::Receiver<Arc<ResourceSet>> {
        self.resources.clone()
    }

    pub(crate) fn status(&self) -> Value {
        let state = self.state.lock().expect("nothing panics while holding it");
        let rejected = state.rejected.as_ref();
        json!({
            "path": self.path.display().to_string(),
            "version": self.resources.borrow().version(),
            "workloads": state.summary.workloads,
            "services": state.summary.services,
            "policies": state.summary.policies,
            "nodes": self.placement.load().nodes(),
            "loadedAt": rfc3339(state.loaded),
            "findings": state.findings,
            "rejected": rejected.map(|it| json!({"at": rfc3339(it.at), "error": it.why})),
        })
    }

    fn accept(&self, files: &file::Mesh, placement: Placement) {
        self.placement.store(Arc::new(placement));
        let mut state = self.state.lock().expect("nothing panics while holding it");
        let (summary, findings) = (Summary::of(&files.resources), files.findings.clone());
        *state = State { summary, findings, loaded: SystemTime::now(), rejected: None };
    }

    fn reject(&self, why: String) {
        let mut state = self.state.lock().expect("nothing panics while holding it");
        state.rejected = Some(Rejected { at: SystemTime::now(), why });
    }
}

impl Follower {
    /// Follows the files until `stop`.
    pub(crate) async fn run(mut self, metrics: Arc<Metrics>, stop: CancellationToken) {
        loop {
            let changed = tokio::select! {
                () = stop.cancelled() => return,
                changed = self.watcher.changed() => changed,
            };
            match changed {
                Ok(files) => self.accept(files, &metrics).await,
                Err(error) => {
                    metrics.mesh_reloads.rejected();
                    metrics.mesh_rejected.set(1);
                    let why = chain_of(&error);
                    tracing::error!(error = why, "the changed mesh files are not used, the mesh before stays in force");
                    self.mesh.reject(why);
                }
            }
        }
    }

    /// With 100,000 workloads this takes a good part of a second, so it is not done between connections.
    async fn accept(&mut self, files: file::Mesh, metrics: &Metrics) {
        let (old, files) = (self.files.clone(), Arc::new(files));
        let (new, before) = (files.clone(), self.set.borrow().clone());
        let work = move || {
            let changes = file::diff(&old, &new);
            let count = changes.len();
            let set = (count > 0).then(|| Arc::new(before.with(changes)));
            (count, set, placement(&new))
        };
        let Ok((count, set, placement)) = tokio::task::spawn_blocking(work).await else {
            return self.mesh.reject("an internal error: taking over the files panicked".into());
        };
        // Discovery first: whoever gets a certificate for a workload should find it in the mesh.
        if let Some(set) = set {
            self.set.send_replace(set);
        }
        self.mesh.accept(&files, placement);
        self.files = files;
        metrics.mesh_reloads.accepted();
        metrics.mesh_rejected.set(0);
        warn(&self.files);
        tracing::info!(changes = count, "took over the changed mesh files");
    }
}

/// What an operator should look at.
fn warn(files: &file::Mesh) {
    for finding in &files.findings {
        tracing::warn!("{finding}");
    }
}

fn placement(files: &file::Mesh) -> Placement {
    Placement::new(files.resources.iter().filter_map(|resource| match resource {
        Resource::Workload(workload) => Some::<&Workload>(workload),
        _ => None,
    }))
}

/// Open discovery streams, for the status.
pub(crate) fn streams(connections: Vec<Connection>) -> Value {
    let stream = |it: Connection| {
        let types = it.types.into_iter().map(|(url, status)| {
            let status = json!({
                "sent": status.sent, "acknowledged": status.acknowledged, "lastRejection": status.last_rejection,
            });
            (url.to_owned(), status)
        });
        json!({
            "node": it.node_id,
            "caller": it.caller,
            "connectedAt": rfc3339(it.connected_at),
            "types": Value::Object(types.collect()),
        })
    };
    connections.into_iter().map(stream).collect()
}

fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
