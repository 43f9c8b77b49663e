//! The state of the mesh in this process: discovery writes it here, and here is who has to be told of what changed.
//!
//! ```text
//!  discovery ──changes──▶ Mesh ──▶ snapshot (readers)          the data plane looks things up in it
//!                          ├─────▶ authorization (a counter)   live connections are asked about again
//!                          ├─────▶ Local of each pod           its workload and its credentials
//!                          └─────▶ source of identities        certificates are prefetched, and forgotten
//! ```
//! It is the only writer, and is called from the one task that discovery runs in.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use zspire_identity::{Priority, Source, Watch, WorkloadKey};
use zspire_model::workload::FoundIdentity;
use zspire_model::{Applied, Change, IdTemplate, Reader, Store, Str, Workload};
use zspire_proxy::{Known, Local};

use crate::config::WorkloadName;

/// Which workloads get their certificates before anybody asks.
#[derive(Debug, Clone)]
pub struct Prefetch {
    /// Those of this node; none if the node is not named.
    pub node: Str,
}

/// The mesh of this process. Clones are the same.
#[derive(Debug, Clone)]
pub struct Mesh(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    reader: Reader,
    /// There are identities to give up.
    leaving: Notify,
    authorization: watch::Sender<u64>,
    discovered: watch::Sender<bool>,
    source: Arc<dyn Source>,
    cluster_id: Str,
    prefetch: Option<Prefetch>,
    /// How identities of our own trust domain follow from names, if not by Istio's pattern.
    ids: Option<IdTemplate>,
}

#[derive(Debug)]
struct State {
    store: Store,
    pods: Vec<Pod>,
    /// The identities in use, by UID of the workload.
    held: HashMap<Str, (WorkloadKey, Watch)>,
    /// Those that nobody is to use any more, and that are not given up yet.
    left: Vec<WorkloadKey>,
}

#[derive(Debug)]
struct Pod {
    name: WorkloadName,
    own: Option<Watch>,
    local: watch::Sender<Known>,
}

impl Mesh {
    /// An empty mesh.
    pub fn new(source: Arc<dyn Source>, cluster_id: &str, prefetch: Option<Prefetch>, ids: Option<IdTemplate>) -> Self {
        let (store, reader) = Store::new();
        let state = Mutex::new(State { store, pods: Vec::new(), held: HashMap::new(), left: Vec::new() });
        let ((authorization, _), (discovered, _)) = (watch::channel(0), watch::channel(false));
        let cluster_id = cluster_id.into();
        let leaving = Notify::new();
        Self(Arc::new(Shared { state, reader, leaving, authorization, discovered, source, cluster_id, prefetch, ids }))
    }

    /// To look things up.
    pub fn reader(&self) -> Reader {
        self.0.reader.clone()
    }

    /// Changes whenever a connection that was allowed may be denied now.
    pub fn authorization(&self) -> watch::Receiver<u64> {
        self.0.authorization.subscribe()
    }

    /// Whether discovery has told everything once.
    pub fn discovered(&self) -> watch::Receiver<bool> {
        self.0.discovered.subscribe()
    }

    /// Discovery has told everything, workloads and policies: what the mesh does not show now is not in it.
    pub fn is_whole(&self) {
        self.0.discovered.send_replace(true);
    }

    /// Follows a pod: its workload, as soon as discovery knows one of this name, and its credentials. `own` are the
    /// credentials of the pod where each has its own; else those of the workload's identity are used.
    pub fn follow(&self, name: &WorkloadName, own: Option<Watch>) -> watch::Receiver<Known> {
        let mut state = self.lock();
        let known = state.store.snapshot().workloads().find(|workload| self.is(name, workload)).cloned();
        let local = known.map_or(Known::Waiting, |workload| self.local(&mut state, workload, own.clone()));
        let (sender, receiver) = watch::channel(local);
        state.pods.retain(|pod| !pod.local.is_closed());
        state.pods.push(Pod { name: name.clone(), own, local: sender });
        receiver
    }

    /// Applies what discovery says.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) {
        let mut state = self.lock();
        let applied = state.store.apply(changes.into_iter().map(|change| self.with_ids(change)));
        for change in &applied.workloads {
            let gone = change
                .old
                .as_ref()
                .filter(|old| change.new.as_ref().is_none_or(|new| new.identity() != old.identity()));
            if let Some(old) = gone {
                Self::leave(&mut state, old);
            }
            if let Some(old) = &change.old {
                self.went(&mut state, old, change.new.as_deref());
            }
            if let Some(new) = &change.new {
                self.came(&mut state, new);
            }
        }
        self.announce(&applied);
        if !state.left.is_empty() {
            self.0.leaving.notify_one();
        }
    }

    /// Gives up identities that nobody uses any more, until `stop`. What a pod is told first passes through other tasks of this
    /// runtime: were its identity given up before, its connections would be cut as if it had been revoked.
    pub async fn give_up(self, stop: CancellationToken) {
        while stop.run_until_cancelled(self.0.leaving.notified()).await.is_some() {
            self.give_up_left();
        }
    }

    fn give_up_left(&self) {
        let mut state = self.lock();
        let State { left, held, .. } = &mut *state;
        for key in left.drain(..) {
            if !held.values().any(|(used, _)| *used == key) {
                self.0.source.forget(&key);
            }
        }
    }

    fn with_ids(&self, mut change: Change) -> Change {
        if let (Some(ids), Change::PutWorkload(workload)) = (&self.0.ids, &mut change) {
            let workload = Arc::make_mut(workload);
            workload.id_template = Some(ids.clone());
            workload.id = FoundIdentity::default();
        }
        change
    }

    fn announce(&self, applied: &Applied) {
        // Last, so that whoever is told sees everything. Which policies a pod names it learns with its workload.
        if !applied.policies.is_empty() {
            self.0.authorization.send_modify(|version| *version = applied.version);
        }
    }

    fn came(&self, state: &mut State, workload: &Arc<Workload>) {
        let pods: Vec<usize> = (0..state.pods.len()).filter(|n| self.is(&state.pods[*n].name, workload)).collect();
        for pod in pods {
            let own = state.pods[pod].own.clone();
            let local = self.local(state, workload.clone(), own);
            state.pods[pod].local.send_replace(local);
        }
        let ours = self.0.prefetch.as_ref().is_some_and(|prefetch| {
            !prefetch.node.is_empty() && workload.node == prefetch.node && self.is_of_this_cluster(workload)
        });
        if ours && workload.protocol == zspire_model::Protocol::Hbone {
            self.hold(state, workload);
        }
    }

    /// A workload is gone, or is now something else: also another service account is no longer the pod that is followed.
    fn went(&self, state: &mut State, old: &Workload, new: Option<&Workload>) {
        let was = |pod: &&Pod| self.is(&pod.name, old) && !new.is_some_and(|new| self.is(&pod.name, new));
        for pod in state.pods.iter().filter(was) {
            pod.local.send_replace(Known::Waiting);
        }
    }

    fn local(&self, state: &mut State, workload: Arc<Workload>, own: Option<Watch>) -> Known {
        match own.or_else(|| self.hold(state, &workload)) {
            Some(credentials) => Known::Here(Arc::new(Local { workload, credentials })),
            None => Known::Waiting,
        }
    }

    /// Follows a workload's credentials, and so asks for them.
    fn hold(&self, state: &mut State, workload: &Workload) -> Option<Watch> {
        if let Some((_, watch)) = state.held.get(&workload.uid) {
            return Some(watch.clone());
        }
        let key = WorkloadKey { id: workload.identity()?, workload: Some(workload.uid.clone()) };
        let watch = self.0.source.watch(&key, Priority::WarmUp);
        state.held.insert(workload.uid.clone(), (key, watch.clone()));
        Some(watch)
    }

    fn leave(state: &mut State, workload: &Workload) {
        state.left.extend(state.held.remove(&workload.uid).map(|(key, _)| key));
    }

    fn is(&self, name: &WorkloadName, workload: &Workload) -> bool {
        *workload.name == *name.name
            && *workload.namespace == *name.namespace
            && *workload.service_account == *name.service_account
            && self.is_of_this_cluster(workload)
    }

    /// Several clusters may have a pod of the same name.
    fn is_of_this_cluster(&self, workload: &Workload) -> bool {
        workload.cluster_id.is_empty() || workload.cluster_id == self.0.cluster_id
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
