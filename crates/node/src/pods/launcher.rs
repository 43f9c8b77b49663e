//! Starts and ends the proxies of pods, each with its sockets in the pod's network namespace.
//!
//! A proxy that ends has until the drain deadline for its live connections; [`Drains`] is who waits for that. Tasks: one for
//! each pod that is served ([`place`](super::place)), one for each that drains.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zspire_model::Str;
use zspire_proxy::workers::Workers;
use zspire_proxy::{Known, Listeners, PodSpec, Proxy, Shared};
use zspire_sys::netns::{Netns, Visit};
use zspire_sys::socket;

use super::identity::{Held, PerPod};
use super::place::{self, Passed};
use super::{Launcher, Namespace, PodInfo};
use crate::config::WorkloadName;
use crate::mesh::Mesh;

/// How long discovery is asked for a pod's own workload.
const DEMAND: Duration = Duration::from_secs(30);

/// What all pods have in common.
#[derive(Debug)]
pub struct Settings {
    pub workers: Arc<Workers>,
    pub shared: Arc<Shared>,
    pub mesh: Mesh,
    /// Where every pod has credentials of its own.
    pub per_pod: Option<PerPod>,
    /// The cluster, part of a workload's UID.
    pub cluster_id: String,
    pub ipv6: bool,
    pub socks5: bool,
    pub dns: zspire_proxy::dns::Listen,
    /// Whether a proxy of an older process may serve the same pods meanwhile.
    pub overlap: bool,
    /// How long live connections may go on.
    pub deadline: Duration,
}

/// Starts and ends the proxies of pods.
#[derive(Debug)]
pub struct PodLauncher {
    settings: Settings,
    home: Netns,
    drains: Drains,
    counts: Arc<Counts>,
    checks: Checks,
}

/// What has been started and stopped, for metrics.
#[derive(Debug, Default)]
pub struct Counts {
    pub started: AtomicU64,
    pub stopped: AtomicU64,
    /// Times that a pod's namespace was found not to be the pod's.
    pub refused: AtomicU64,
}

/// What is known of each pod that is served, by UID. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Checks(Arc<Mutex<BTreeMap<String, Passed>>>);

impl Checks {
    /// Why a pod is not served although its proxy runs.
    pub fn refusal(&self, uid: &str) -> Option<Str> {
        match &*self.lock().get(uid)?.borrow() {
            Known::Refused(why) => Some(why.clone()),
            Known::Waiting | Known::Here(_) => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Passed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The proxies that drain. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Drains {
    tasks: TaskTracker,
    cut: CancellationToken,
}

impl Drains {
    /// Waits until every proxy that drains by now has ended. Safe to cancel.
    pub async fn finished(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Cuts what is left in all of them.
    pub fn cut(&self) {
        self.cut.cancel();
    }
}

/// A pod that is served.
#[derive(Debug)]
pub struct Served {
    proxy: Proxy,
    check: Check,
    identity: Option<Held>,
}

/// The task that looks whether the namespace is the pod's; it ends with the value.
#[derive(Debug)]
struct Check(AbortHandle);

impl Drop for Check {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl PodLauncher {
    /// Nothing is served yet. Proxies have to be started from a thread of this process's own network namespace.
    pub fn new(settings: Settings) -> anyhow::Result<Self> {
        let home = Netns::current().context("cannot open the network namespace of this process")?;
        Ok(Self { settings, home, drains: Drains::default(), counts: Arc::default(), checks: Checks::default() })
    }

    /// Who waits for the proxies that drain.
    pub fn drains(&self) -> Drains {
        self.drains.clone()
    }

    /// What has been started and stopped.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// What is known of the pods.
    pub fn checks(&self) -> Checks {
        self.checks.clone()
    }

    fn place(&self, namespace: &Namespace) -> anyhow::Result<Visit> {
        let descriptor = namespace.descriptor.try_clone().context("cannot keep the pod's network namespace")?;
        let there = Netns::from_fd(descriptor).context("cannot keep the pod's network namespace")?;
        Ok(Visit::new(there, self.home.clone()))
    }

    fn demand(&self, pod: &PodInfo) {
        let Some(on_demand) = self.settings.shared.on_demand.clone() else { return };
        // Nothing is known before it is asked for, the pod itself included.
        let key = format!("{}//Pod/{}/{}", self.settings.cluster_id, pod.namespace, pod.name);
        tokio::spawn(async move {
            // It is asked for again with the next attempt, if there is one.
            let answer = tokio::time::timeout(DEMAND, on_demand.get(key.clone())).await;
            tracing::debug!(uid = key, ?answer, "a pod's own workload");
        });
    }
}

impl Launcher for PodLauncher {
    type Proxy = Served;

    fn start(&self, uid: &str, pod: &PodInfo, namespace: &Namespace) -> anyhow::Result<Served> {
        let place = self.place(namespace)?;
        let name = WorkloadName {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            service_account: pod.service_account.clone(),
        };
        let enter = "cannot enter the pod's network namespace (CAP_SYS_ADMIN)";
        let ipv6 = place.run(|| {
            if let Err(error) = socket::migrate_waiting_clients() {
                tracing::debug!(%error, "clients that wait at a proxy while another takes over may be reset");
            }
            self.settings.ipv6 && socket::ipv6_available()
        });
        let ipv6 = ipv6.context(enter)?;
        let identity = self.settings.per_pod.as_ref().map(|per_pod| per_pod.ask(uid, pod, namespace)).transpose()?;
        let own = identity.as_ref().map(|held| held.watch.clone());
        let (counts, refused) = (self.counts.clone(), pod.clone());
        let on_refusal = move |why: &str| {
            counts.refused.fetch_add(1, Relaxed);
            tracing::error!(pod = %refused, error = why, "the pod's connections are refused");
        };
        let (local, check) = place::check(place.clone(), self.settings.mesh.follow(&name, own), on_refusal)
            .context("cannot look at the pod's network namespace")?;
        self.demand(pod);
        let spec = PodSpec {
            uid: uid.into(),
            local: local.clone(),
            listeners: Listeners { dns: self.settings.dns, ..Listeners::well_known(None, ipv6, self.settings.socks5) },
            place: Some(place),
            overlap: self.settings.overlap,
            only: None,
        };
        let proxy = Proxy::start(&self.settings.workers, &self.settings.shared, spec)?;
        let check = Check(tokio::spawn(check).abort_handle());
        self.counts.started.fetch_add(1, Relaxed);
        self.checks.lock().insert(uid.to_owned(), local);
        Ok(Served { proxy, check, identity })
    }

    fn drain(&self, uid: &str, served: Served) {
        self.checks.lock().remove(uid);
        let (uid, cut, counts) = (uid.to_owned(), self.drains.cut.clone(), self.counts.clone());
        let deadline = self.settings.deadline;
        served.proxy.drain();
        self.drains.tasks.spawn(async move {
            // The pod may be found to be another while it drains.
            let Served { proxy, check: _check, identity: _identity } = served;
            tokio::select! {
                () = proxy.drained() => {}
                () = tokio::time::sleep(deadline) => tracing::warn!(uid, "connections are cut at the deadline"),
                () = cut.cancelled() => {}
            }
            proxy.cut().await;
            counts.stopped.fetch_add(1, Relaxed);
        });
    }
}

/// The inode by which a namespace is told from others, if the descriptor is one of a network namespace.
pub fn inode(descriptor: &OwnedFd) -> std::io::Result<u64> {
    Netns::from_fd(descriptor.try_clone()?)?.inode()
}
