//! What is held for one workload: a state machine that is told what the agent said and what time it is.
//!
//! ```text
//!            an SVID that passes every check
//!  Pending ─────────────────────────────────▶ Ready ──── an SVID that does not: the last good one stays
//!     ▲                                        │ │ │
//!     │ nothing matches, never had one         │ │ └─ not_after passes ─▶ Failed
//!     │                                        │ └─ outage: stays
//!     └── (never ready)                        └─ empty answer, workload gone ─▶ Revoked, key dropped
//! ```

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use zspire_model::{SpiffeId, Str};

use super::select::{self, Wanted};
use super::{Meaning, Refusal, Update};
use crate::clock::{Clock, rfc3339};
use crate::credentials::{Credentials, Svid};
use crate::key::PrivateKey;
use crate::source::State;
use crate::tls::Policy;

/// What there is to know about one workload for whoever asks why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Story {
    /// What the agent was asked about last.
    pub reference: Option<String>,
    /// The SPIFFE IDs of its last answer, with their hints; `None` before there was one.
    pub answered: Option<String>,
    /// The trust domains of its last answer.
    pub trust_domains: Vec<String>,
    /// What went wrong last, if nothing has gone right since.
    pub error: Option<Str>,
    /// Streams that were opened.
    pub opened: u64,
    /// Messages that came.
    pub updates: u64,
}

/// What an update has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A new generation is in use.
    Ready,
    /// Nothing matches the workload.
    Empty,
    /// Nothing of it can be used.
    Unusable,
}

/// One workload.
#[derive(Debug)]
pub(super) struct Held {
    id: SpiffeId,
    states: watch::Sender<State>,
    story: watch::Sender<Story>,
    wanted: Wanted,
    policy: Policy,
    clock: Arc<dyn Clock>,
}

impl Held {
    pub(super) fn new(
        id: SpiffeId,
        states: watch::Sender<State>,
        story: watch::Sender<Story>,
        wanted: Wanted,
        policy: Policy,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { id, states, story, wanted, policy, clock }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.states.borrow().credentials().is_some()
    }

    pub(super) fn now(&self) -> SystemTime {
        self.clock.now()
    }

    /// Until when what is held can be used.
    pub(super) fn not_after(&self) -> Option<SystemTime> {
        self.states.borrow().credentials().map(|credentials| credentials.not_after())
    }

    /// The agent is about to be asked.
    pub(super) fn asked(&self, reference: &str) {
        self.story.send_modify(|story| {
            story.reference = Some(reference.to_owned());
            story.opened += 1;
        });
    }

    /// The agent has answered.
    pub(super) fn update(&self, update: &Update) -> Outcome {
        let answered = select::list(&update.offers);
        let domains = update.bundles.iter().map(|(domain, _)| domain.to_string()).collect();
        self.story.send_modify(|story| {
            story.answered = Some(answered);
            story.trust_domains = domains;
            story.updates += 1;
        });
        if update.offers.is_empty() {
            self.take_away(&self.no_entry());
            return Outcome::Empty;
        }
        match self.credentials(update) {
            Ok(credentials) => {
                self.story.send_modify(|story| story.error = None);
                self.states.send_replace(State::Ready(Arc::new(credentials)));
                Outcome::Ready
            }
            Err(why) => {
                self.unusable(&why);
                Outcome::Unusable
            }
        }
    }

    fn credentials(&self, update: &Update) -> Result<Credentials, String> {
        let offer = select::select(&update.offers, &self.id, &self.wanted).map_err(|e| e.to_string())?;
        let svid = Svid {
            id: offer.id.clone(),
            chain: offer.chain.clone(),
            key: PrivateKey::from_pkcs8(offer.key.to_vec()),
            bundles: update.bundles.clone(),
        };
        Credentials::new(svid, &self.policy, &self.clock).map_err(|e| format!("the SVID of {}: {e}", offer.id))
    }

    /// An answer of which nothing can be used: what is held stays.
    pub(super) fn unusable(&self, why: &str) {
        self.note(why);
        if self.is_ready() {
            tracing::warn!(id = %self.id, error = why, "an answer of the SPIRE agent cannot be used, keeping the last SVID");
        } else {
            self.fail(why, Duration::ZERO);
        }
    }

    /// The agent could not be asked, or has said no.
    pub(super) fn refused(&self, refusal: &Refusal, retry_in: Duration) {
        self.note(&refusal.why);
        match refusal.meaning {
            Meaning::Gone => self.take_away(&refusal.why),
            Meaning::Outage | Meaning::Mistake if self.is_ready() => {
                tracing::warn!(id = %self.id, error = %refusal.why, "no word from the SPIRE agent, keeping the last SVID");
            }
            Meaning::Outage | Meaning::Mistake => self.fail(&refusal.why, retry_in),
        }
    }

    /// There is nothing to ask about yet.
    pub(super) fn not_located(&self, why: &Str) {
        self.note(why);
        if !self.is_ready() {
            self.states.send_replace(State::Pending { why: why.clone() });
        }
    }

    /// Looks at the clock: an agent without its server goes on serving SVIDs that have expired.
    pub(super) fn tick(&self) {
        let Some(not_after) = self.not_after() else { return };
        if self.clock.now() < not_after {
            return;
        }
        let last = self.story.borrow().error.clone();
        let why = match last {
            Some(error) => format!("the SVID expired at {}: {error}", rfc3339(not_after)),
            None => format!("the SVID expired at {} and the SPIRE agent has sent no other", rfc3339(not_after)),
        };
        tracing::error!(id = %self.id, %why, "identity lost");
        self.fail(&why, Duration::ZERO);
    }

    /// The workload is gone.
    pub(super) fn forgotten(&self) {
        self.states.send_replace(State::Revoked { why: "the workload is gone".into() });
    }

    /// From outside it must not work a moment longer.
    fn take_away(&self, why: &str) {
        let had = self.is_ready();
        if had {
            tracing::warn!(id = %self.id, why, "the SPIRE agent has taken the SVID away");
        }
        self.note(why);
        let why: Str = why.into();
        let revoked = had || matches!(&*self.states.borrow(), State::Revoked { .. });
        let state = if revoked { State::Revoked { why } } else { State::Pending { why } };
        self.states.send_replace(state);
    }

    fn fail(&self, why: &str, retry_in: Duration) {
        self.states.send_replace(State::Failed { why: why.into(), retry_at: self.clock.now() + retry_in });
    }

    fn note(&self, why: &str) {
        self.story.send_modify(|story| story.error = Some(why.into()));
    }

    fn no_entry(&self) -> String {
        let reference = self.story.borrow().reference.clone().unwrap_or_default();
        format!(
            "no entry matches this workload ({reference}): register one with SPIFFE ID {} and selectors that it has, parented to \
             this node's agent",
            self.id
        )
    }
}
