//! The contract of a source of identities: it is watched.
//!
//! A SPIRE agent streams, and Istio's CA can be made to look like a stream; the reverse would lose revocation.
//! The value of a [`Watch`] is always current:
//!
//! ```text
//!            issued                 renewal failed: stays Ready until it expires
//!  Pending ─────────▶ Ready ◀────┐──────────────────────────┐
//!     ▲  │              │  renewed│                          │
//!     │  └─failed─▶ Failed ◀──────┴──── expired ◀────────────┘
//!     └──retried──────┘           Revoked: the source took it away, at once and from any state
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::Instant;
use zspire_model::{SpiffeId, Str};

use crate::credentials::Credentials;
use crate::stats::Stats;
use crate::story::Story;
use crate::x509::CertificateView;

/// Where identities come from.
pub trait Source: fmt::Debug + Send + Sync + 'static {
    /// What it is called in views and metrics, for example `istio-ca`.
    fn name(&self) -> &'static str;

    /// Follows the credentials of a workload, and asks for them with `priority` if they are not there.
    ///
    /// Returns at once. The workload counts as a user of the identity until [`Source::forget`].
    fn watch(&self, key: &WorkloadKey, priority: Priority) -> Watch;

    /// The workload is gone: when it was the last user of its credentials, their key is dropped.
    fn forget(&self, key: &WorkloadKey);

    /// Everything held, for admin views; public parts only.
    fn entries(&self) -> Vec<Entry>;

    /// Numbers for metrics.
    fn stats(&self) -> Stats;
}

/// Whose credentials: a workload and the identity expected for it.
///
/// Sources that issue per identity share one certificate between workloads with the same `id`;
/// sources that attest workloads (SPIRE) never do, and need `workload`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadKey {
    /// The expected identity.
    pub id: SpiffeId,
    /// Pod UID, or another name of the workload that is unique on this node.
    pub workload: Option<Str>,
}

/// How urgent a certificate is. Higher is sooner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Renewal of something that still works.
    Background,
    /// Expected to be needed soon.
    WarmUp,
    /// A connection waits for it.
    OnDemand,
}

/// The state of one workload's credentials.
#[derive(Debug, Clone)]
pub enum State {
    /// Not there yet.
    Pending {
        /// What it waits for.
        why: Str,
    },
    /// Usable.
    Ready(Arc<Credentials>),
    /// Taken away by the source. Its tunnels must be closed.
    Revoked {
        /// What the source said.
        why: Str,
    },
    /// Could not be obtained.
    Failed {
        /// The last error, with its causes.
        why: Str,
        /// When it is tried again without being asked.
        retry_at: SystemTime,
    },
}

impl State {
    /// A short name for views and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Pending { .. } => "pending",
            Self::Ready(_) => "ready",
            Self::Revoked { .. } => "revoked",
            Self::Failed { .. } => "failed",
        }
    }

    /// The credentials, if they can be used.
    pub fn credentials(&self) -> Option<&Arc<Credentials>> {
        match self {
            Self::Ready(credentials) => Some(credentials),
            _ => None,
        }
    }

    /// Why there are none.
    pub fn why(&self) -> Option<&Str> {
        match self {
            Self::Ready(_) => None,
            Self::Pending { why } | Self::Revoked { why } | Self::Failed { why, .. } => Some(why),
        }
    }
}

/// The current and future credentials of one workload. Cloning is cheap; clones see the same.
#[derive(Clone)]
pub struct Watch {
    states: watch::Receiver<State>,
    demand: Arc<dyn Fn() + Send + Sync>,
    /// Whether one failed attempt says nothing of the next.
    patient: bool,
}

impl Watch {
    /// For sources: `demand` is called when somebody waits for the credentials and they are not ready.
    pub fn new(states: watch::Receiver<State>, demand: impl Fn() + Send + Sync + 'static) -> Self {
        Self { states, demand: Arc::new(demand), patient: false }
    }

    /// Of a source that goes on asking, whose first refusals pass: an agent that has just started knows nobody.
    pub fn patient(self) -> Self {
        Self { patient: true, ..self }
    }

    /// The current state.
    pub fn state(&self) -> State {
        self.states.borrow().clone()
    }

    /// The current credentials, if they are ready.
    pub fn credentials(&self) -> Option<Arc<Credentials>> {
        self.states.borrow().credentials().cloned()
    }

    /// Waits for the next state. `None` once the source has gone. Safe to cancel.
    pub async fn changed(&mut self) -> Option<State> {
        self.states.changed().await.ok()?;
        Some(self.states.borrow_and_update().clone())
    }

    /// The credentials now, or as soon as they are there.
    ///
    /// When they are not, this is on-demand demand: it is fetched before anything else, and a source that is backing
    /// off tries again at once. Returns with the reason when that attempt fails (unless the source is [patient](Self::patient)),
    /// when they are taken away, or when `deadline` passes. Safe to cancel.
    pub async fn ready(&self, deadline: Instant) -> Result<Arc<Credentials>, NotReady> {
        let mut states = self.states.clone();
        if let Some(credentials) = states.borrow_and_update().credentials() {
            return Ok(credentials.clone());
        }
        (self.demand)();
        loop {
            let Ok(changed) = tokio::time::timeout_at(deadline, states.changed()).await else {
                let why = states.borrow().why().cloned().unwrap_or_else(|| "not ready".into());
                return Err(NotReady { why, timed_out: true });
            };
            if changed.is_err() {
                return Err(NotReady { why: "the source of identities has stopped".into(), timed_out: false });
            }
            match &*states.borrow_and_update() {
                State::Ready(credentials) => return Ok(credentials.clone()),
                State::Pending { .. } => {}
                State::Failed { .. } if self.patient => {}
                State::Revoked { why } | State::Failed { why, .. } => {
                    return Err(NotReady { why: why.clone(), timed_out: false });
                }
            }
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&*self.states.borrow()).finish()
    }
}

/// There are no credentials to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the identity is not ready{}: {why}", if *.timed_out { " in time" } else { "" })]
pub struct NotReady {
    /// What the source says about it.
    pub why: Str,
    /// Whether the wait ended by its deadline.
    pub timed_out: bool,
}

/// One held identity, as admin views show it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The identity: that of the certificate, or the expected one while there is none.
    pub id: SpiffeId,
    /// The identity that is expected.
    pub expected: SpiffeId,
    /// The workload, for sources that issue per workload.
    pub workload: Option<Str>,
    /// Its state.
    pub state: State,
    /// Leaf first; empty when there is none.
    pub chain: Vec<CertificateView>,
    /// Roots of its own trust domain.
    pub roots: Vec<CertificateView>,
    /// [`Source::name`].
    pub source: &'static str,
    /// What has happened to it.
    pub story: Story,
    /// Who the SPIRE agent behind it has proved to be.
    pub agent: Option<SpiffeId>,
}

impl Entry {
    /// What is seen of a workload in this state.
    pub fn new(key: WorkloadKey, state: State, story: Story, source: &'static str) -> Self {
        let credentials = state.credentials();
        let chain = credentials.map(|c| c.chain_view()).unwrap_or_default();
        let roots = credentials.map(|c| c.roots_view()).unwrap_or_default();
        let id = credentials.map_or_else(|| key.id.clone(), |c| c.id().clone());
        Self { id, expected: key.id, workload: key.workload, state, chain, roots, source, story, agent: None }
    }
}
