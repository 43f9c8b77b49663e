//! The state of the mesh: one writer, and readers that take an immutable [`Snapshot`] and never wait.
//!
//! The maps of a snapshot are persistent (imbl): a delta copies the nodes that it touches and shares all others with the snapshot
//! before, so applying it costs in proportion to the delta. [`Store::apply`] takes a batch and publishes once: during a batch
//! nodes that are not yet published are changed in place, which makes the first load as cheap as for a mutable map.

mod endpoints;
mod network;
mod snapshot;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

use crate::{NamespacedHostname, NamespacedName, Policy, Service, Str, Workload};

pub(crate) use endpoints::below;
pub use endpoints::{Choice, Endpoints};
pub use snapshot::{Applying, Snapshot};

/// One change of the mesh.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A workload is new or different.
    PutWorkload(Arc<Workload>),
    /// A service is new or different.
    PutService(Arc<Service>),
    /// A policy is new or different.
    PutPolicy(Arc<Policy>),
    /// The workload with this UID is gone.
    RemoveWorkload(Str),
    /// A service is gone.
    RemoveService(NamespacedHostname),
    /// A policy is gone.
    RemovePolicy(NamespacedName),
}

/// What a batch of changes changed. A change to what already was is not among them.
#[derive(Debug, Clone, Default)]
pub struct Applied {
    /// Version of the snapshot that shows it.
    pub version: u64,
    /// The workloads that are new, different or gone.
    pub workloads: Vec<WorkloadChange>,
    /// The services that are new, different or gone.
    pub services: Vec<NamespacedHostname>,
    /// The policies that are new, different or gone.
    pub policies: Vec<NamespacedName>,
}

impl Applied {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.workloads.is_empty() && self.services.is_empty() && self.policies.is_empty()
    }

    /// Whether a connection that was allowed before may be denied now: policies or what selects them changed.
    pub fn affects_authorization(&self) -> bool {
        !self.policies.is_empty() || self.workloads.iter().any(WorkloadChange::changes_policies)
    }
}

/// A workload before and after.
#[derive(Debug, Clone)]
pub struct WorkloadChange {
    /// As it was; none if it is new.
    pub old: Option<Arc<Workload>>,
    /// As it is; none if it is gone.
    pub new: Option<Arc<Workload>>,
}

impl WorkloadChange {
    fn changes_policies(&self) -> bool {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) => {
                old.authorization_policies != new.authorization_policies || old.namespace != new.namespace
            }
            _ => false,
        }
    }
}

/// The writer. There is one.
#[derive(Debug)]
pub struct Store {
    current: Snapshot,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    snapshot: ArcSwap<Snapshot>,
    version: AtomicU64,
}

/// A reader. Cloning it is cheap; reading never waits for the writer.
#[derive(Debug, Clone)]
pub struct Reader(Arc<Shared>);

impl Store {
    /// An empty store and its reader.
    #[allow(clippy::new_ret_no_self, reason = "the pair is what there is to make")]
    pub fn new() -> (Self, Reader) {
        let shared = Arc::new(Shared { snapshot: ArcSwap::default(), version: AtomicU64::new(0) });
        (Self { current: Snapshot::default(), shared: shared.clone() }, Reader(shared))
    }

    /// Applies a batch and publishes one snapshot with all of it; none if it changes nothing.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Applied {
        let mut applied = Applied { version: self.current.version(), ..Applied::default() };
        for change in changes {
            self.current.apply(change, &mut applied);
        }
        if !applied.is_empty() {
            applied.version += 1;
            self.current.set_version(applied.version);
            self.shared.snapshot.store(Arc::new(self.current.clone()));
            self.shared.version.store(applied.version, Ordering::Release);
        }
        applied
    }

    /// The state with all that was applied.
    pub fn snapshot(&self) -> &Snapshot {
        &self.current
    }

    /// One more reader.
    pub fn reader(&self) -> Reader {
        Reader(self.shared.clone())
    }
}

impl Reader {
    /// The newest snapshot. Hold it for one decision, not for a connection: it keeps what it shows in memory.
    pub fn load(&self) -> Arc<Snapshot> {
        self.0.snapshot.load_full()
    }

    /// Calls `f` with the newest snapshot, without touching its reference count.
    pub fn with<T>(&self, f: impl FnOnce(&Snapshot) -> T) -> T {
        f(&self.0.snapshot.load())
    }

    /// Version of the newest snapshot; it grows with every change.
    pub fn version(&self) -> u64 {
        self.0.version.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests;
