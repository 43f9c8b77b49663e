//! The pods that this proxy serves, and the proxies that serve them.
//!
//! Owns the set of pods by UID: it starts a pod's proxy, retries one that did not start, replaces one whose
//! network namespace changed, drains one that went. A node agent says which pods there are: [`client`] keeps the
//! connection to it, [`zds`] knows its messages. How a proxy is made is the [`Launcher`]'s, in earnest [`launcher`]'s;
//! [`place`] keeps an identity out of a namespace that is not its pod's.
//!
//! ```text
//!              start fails              retried
//!   added ───▶ Pending ◀──────────────────────┐
//!     │           └──────── starts ───▶ Up    │
//!     └──────── starts ───────────────▶ Up    │
//!                     other namespace: drain, then as added
//!                     deleted, or not in the snapshot: drain, gone
//! ```

pub mod client;
pub mod identity;
pub mod launcher;
pub mod place;
pub mod references;
pub mod zds;

pub use client::{Board, Client};

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::WorkloadName;

/// First pause before a proxy that did not start is tried again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// A pod as the node agent names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInfo {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
}

impl From<&WorkloadName> for PodInfo {
    fn from(name: &WorkloadName) -> Self {
        let WorkloadName { namespace, name, service_account } = name.clone();
        Self { name, namespace, service_account }
    }
}

/// A pod's network namespace: the descriptor, and the inode by which namespaces are compared.
#[derive(Debug, Clone)]
pub struct Namespace {
    pub descriptor: Arc<OwnedFd>,
    pub inode: u64,
}

/// Makes and ends proxies of single pods.
pub trait Launcher {
    /// A running proxy. Dropping it without draining cuts its connections.
    type Proxy;

    /// Starts the proxy of a pod; it listens when this returns.
    fn start(&self, uid: &str, pod: &PodInfo, namespace: &Namespace) -> Result<Self::Proxy, anyhow::Error>;

    /// Stops a proxy: no new connections, live ones until the drain deadline. Does not wait for that.
    fn drain(&self, uid: &str, proxy: Self::Proxy);
}

struct Pod<P> {
    info: PodInfo,
    namespace: Namespace,
    state: State<P>,
}

enum State<P> {
    Up(P),
    Pending { why: String, tries: u32, retry_at: Instant },
}

/// The pods by UID.
pub struct Pods<L: Launcher> {
    launcher: L,
    pods: BTreeMap<String, Pod<L::Proxy>>,
    /// UIDs named since the connection began; `Some` until the snapshot is whole.
    snapshot: Option<BTreeSet<String>>,
}

impl<L: Launcher> fmt::Debug for Pods<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pods").field("pods", &self.pods.keys()).finish_non_exhaustive()
    }
}

/// One pod, as views show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    pub uid: String,
    pub info: PodInfo,
    /// Why it is not up; `None`: it is.
    pub pending: Option<String>,
}

impl<L: Launcher> Pods<L> {
    /// No pods.
    pub fn new(launcher: L) -> Self {
        Self { launcher, pods: BTreeMap::new(), snapshot: None }
    }

    /// A new connection to the node agent: what it does not name before the snapshot ends is gone.
    pub fn begin_snapshot(&mut self) {
        self.snapshot = Some(BTreeSet::new());
    }

    /// A pod is there, with this namespace. An error means that its proxy does not run yet; it is retried.
    pub fn add(&mut self, uid: &str, info: PodInfo, namespace: Namespace, now: Instant) -> Result<(), String> {
        if let Some(named) = &mut self.snapshot {
            named.insert(uid.to_owned());
        }
        if let Some(known) = self.pods.get(uid) {
            let same = known.namespace.inode == namespace.inode && known.info == info;
            if same && matches!(known.state, State::Up(_)) {
                return Ok(());
            }
            if !same {
                self.remove(uid);
            }
        }
        let tries = match self.pods.get(uid).map(|p| &p.state) {
            Some(State::Pending { tries, .. }) => *tries,
            _ => 0,
        };
        let state = self.start(uid, &info, &namespace, tries, now);
        let outcome = match &state {
            State::Up(_) => Ok(()),
            State::Pending { why, .. } => Err(why.clone()),
        };
        self.pods.insert(uid.to_owned(), Pod { info, namespace, state });
        outcome
    }

    /// A pod that the agent cannot give a namespace for is still there: what runs for it goes on.
    pub fn keep(&mut self, uid: &str) -> Result<(), String> {
        match &mut self.snapshot {
            Some(named) => {
                named.insert(uid.to_owned());
                Ok(())
            }
            None => Err("keep is for the snapshot, which has ended".into()),
        }
    }

    /// A pod went. Unknown ones are gone already.
    pub fn delete(&mut self, uid: &str) {
        if let Some(named) = &mut self.snapshot {
            named.remove(uid);
        }
        self.remove(uid);
    }

    /// The snapshot is whole: what it did not name is gone.
    pub fn end_snapshot(&mut self) {
        let Some(named) = self.snapshot.take() else { return };
        let gone: Vec<String> = self.pods.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
        for uid in gone {
            self.remove(&uid);
        }
    }

    /// Tries again what is due. Call it at [`Pods::next_retry`].
    pub fn retry(&mut self, now: Instant) {
        let due: Vec<String> = self
            .pods
            .iter()
            .filter(|(_, pod)| matches!(pod.state, State::Pending { retry_at, .. } if retry_at <= now))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in due {
            let Some(mut pod) = self.pods.remove(&uid) else { continue };
            if let State::Pending { tries, .. } = pod.state {
                pod.state = self.start(&uid, &pod.info, &pod.namespace, tries, now);
            }
            self.pods.insert(uid, pod);
        }
    }

    /// When the next pending pod is due.
    pub fn next_retry(&self) -> Option<Instant> {
        let due = |pod: &Pod<L::Proxy>| match pod.state {
            State::Pending { retry_at, .. } => Some(retry_at),
            State::Up(_) => None,
        };
        self.pods.values().filter_map(due).min()
    }

    /// Drains every pod.
    pub fn drain_all(&mut self) {
        let all: Vec<String> = self.pods.keys().cloned().collect();
        for uid in all {
            self.remove(&uid);
        }
    }

    /// All pods, by UID.
    pub fn view(&self) -> Vec<PodView> {
        let view = |(uid, pod): (&String, &Pod<L::Proxy>)| PodView {
            uid: uid.clone(),
            info: pod.info.clone(),
            pending: match &pod.state {
                State::Up(_) => None,
                State::Pending { why, .. } => Some(why.clone()),
            },
        };
        self.pods.iter().map(view).collect()
    }

    fn start(&self, uid: &str, info: &PodInfo, namespace: &Namespace, tries: u32, now: Instant) -> State<L::Proxy> {
        match self.launcher.start(uid, info, namespace) {
            Ok(proxy) => {
                tracing::info!(uid, pod = %info, netns = namespace.inode, "pod is served");
                State::Up(proxy)
            }
            Err(error) => {
                let why = format!("{error:#}");
                let pause = RETRY_MIN.saturating_mul(1 << tries.min(16)).min(RETRY_MAX);
                tracing::warn!(uid, pod = %info, error = %why, retry_in = ?pause, "cannot serve pod yet");
                State::Pending { why, tries: tries + 1, retry_at: now + pause }
            }
        }
    }

    fn remove(&mut self, uid: &str) {
        if let Some(pod) = self.pods.remove(uid) {
            tracing::info!(uid, pod = %pod.info, "pod is no longer served");
            if let State::Up(proxy) = pod.state {
                self.launcher.drain(uid, proxy);
            }
        }
    }
}

impl fmt::Display for PodInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests;
