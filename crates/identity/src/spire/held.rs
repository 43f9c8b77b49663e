//! What is held for one workload: a state machine that is told what the agent said and what time it is.
//!
//! ```text
//!            an SVID that passes every check
//!  Pending ─────────────────────────────────▶ Ready ──── an SVID that does not: the last good one stays
//!     ▲                                        │ │ │
//!     │ nothing matches, never had one         │ │ └─ not_after passes ─▶ Failed
//!     │                                        │ └─ outage: stays
//!     └── (never ready)                        └─ workload gone, SVID no longer offered ─▶ Revoked, key dropped
//! ```

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use zspire_model::{SpiffeId, Str};

use super::select::{self, Wanted};
use super::{Config, Meaning, Offer, Process, Reference, Refusal, Update};
use crate::clock::{Clock, rfc3339};
use crate::credentials::{Credentials, Svid};
use crate::key::PrivateKey;
use crate::source::{State, Watch};
use crate::story::{Asked, Offered, Story};
use crate::tls::Policy;

/// What an update has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A new generation is in use.
    Ready,
    /// Nothing matches the workload.
    Empty,
    /// What is held is no longer offered, and still held.
    Absent,
    /// Nothing of it can be used.
    Unusable,
}

/// One workload.
#[derive(Debug)]
pub(super) struct Held {
    id: SpiffeId,
    states: watch::Sender<State>,
    story: watch::Sender<Story>,
    hint: Option<Str>,
    accept_other_id: bool,
    /// What was asked about last, if that was a process.
    process: Option<Arc<dyn Process>>,
    /// The proxy's own credentials, whose ID is nobody else's.
    own: Option<Watch>,
    policy: Policy,
    clock: Arc<dyn Clock>,
}

impl Held {
    pub(super) fn new(
        id: SpiffeId,
        states: watch::Sender<State>,
        story: watch::Sender<Story>,
        config: &Config,
    ) -> Self {
        let Config { policy, clock, hint, accept_other_id, own } = config.clone();
        Self { id, states, story, hint, accept_other_id, process: None, own, policy, clock }
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
    pub(super) fn asked(&mut self, reference: &Reference) {
        self.process = match reference {
            Reference::Process(process) => Some(process.clone()),
            Reference::Pod { .. } | Reference::Selectors(_) | Reference::Own => None,
        };
        let selectors = match reference {
            Reference::Process(process) => process.selectors(),
            Reference::Selectors(selectors) => {
                selectors.iter().map(|(kind, value)| format!("{kind}:{value}").into()).collect()
            }
            Reference::Pod { .. } | Reference::Own => Vec::new(),
        };
        let asked = Asked { kind: reference.kind(), reference: reference.to_string().into(), selectors };
        self.story.send_modify(|story| story.ask(asked));
    }

    /// The agent is asked again after a pause.
    pub(super) fn waits(&self, pause: Duration) {
        let at = self.clock.now() + pause;
        self.story.send_modify(|story| story.retry_at = Some(at));
    }

    /// The agent has answered.
    pub(super) fn update(&self, update: &Update) -> Outcome {
        let offered = |offer: &Offer| Offered { id: offer.id.clone(), hint: offer.hint.clone() };
        let offered = update.offers.iter().map(offered).collect();
        let now = self.clock.now();
        self.story.send_modify(|story| story.answered(offered, &update.bundles, now));
        let offers = |id: &SpiffeId| update.offers.iter().any(|offer| offer.id == *id);
        let absent = self.states.borrow().credentials().is_some_and(|held| !offers(held.id()));
        if update.offers.is_empty() && !absent {
            self.redact();
            return Outcome::Empty;
        }
        match self.credentials(update) {
            Err(_) if absent => {
                let offered = select::list(&update.offers);
                tracing::warn!(id = %self.id, offered, "the SPIRE agent no longer offers the SVID, it is asked again");
                Outcome::Absent
            }
            Ok(credentials) => {
                self.story.send_modify(Story::went_right);
                self.enter(State::Ready(Arc::new(credentials)));
                Outcome::Ready
            }
            Err(why) => {
                self.unusable(&why);
                Outcome::Unusable
            }
        }
    }

    fn credentials(&self, update: &Update) -> Result<Credentials, String> {
        let process = self.process.as_ref();
        if let Some(process) = process.filter(|process| !process.is_alive()) {
            return Err(format!("process {} has ended", process.pid()));
        }
        // Where any ID will do, that of the proxy must not. It is looked at now: what a process is can change.
        let could_be_the_proxy = process.is_some_and(|process| process.is_of_own_user());
        let accept_other_id = self.accept_other_id && !could_be_the_proxy;
        let own = self.own.as_ref().and_then(Watch::credentials).map(|own| own.id().clone());
        let wanted = Wanted { accept_other_id, own, hint: self.hint.clone() };
        let offer = select::select(&update.offers, &self.id, &wanted).map_err(|e| e.to_string())?;
        let svid = Svid {
            id: offer.id.clone(),
            chain: offer.chain.clone(),
            key: PrivateKey::from_pkcs8(offer.key.to_vec()),
            bundles: update.bundles.clone(),
        };
        let made = Credentials::new(svid, &self.policy, &self.clock);
        let made = made.map_err(|e| format!("the SVID of {}: {e}", offer.id))?;
        // To verifiers it is good through the second that it ends with, which is too short to begin with it.
        if made.not_after() <= self.clock.now() {
            return Err(format!("the SVID expired at {}", rfc3339(made.not_after())));
        }
        Ok(made)
    }

    /// Nothing matches the workload, or not any more.
    pub(super) fn redact(&self) {
        let story = self.story.borrow();
        let offered =
            story.answer.iter().flatten().map(|offered| offered.id.to_string()).collect::<Vec<_>>().join(", ");
        drop(story);
        let instead = if offered.is_empty() { String::new() } else { format!(" (the agent offers {offered} only)") };
        self.take_away("NoEntry", &format!("{}{instead}", self.no_entry()));
    }

    /// An answer of which nothing can be used: what is held stays.
    fn unusable(&self, why: &str) {
        self.note("Unusable", why);
        if self.is_ready() {
            tracing::warn!(id = %self.id, error = why, "an answer of the SPIRE agent cannot be used, keeping the last SVID");
        } else {
            self.fail(why, Duration::ZERO);
        }
    }

    /// The agent could not be asked, or has said no.
    pub(super) fn refused(&self, refusal: &Refusal, retry_in: Duration) {
        let known = self.story.borrow().trouble.as_ref().is_some_and(|last| last.lasts && last.code == refusal.code);
        self.note(refusal.code, &refusal.why);
        match refusal.meaning {
            Meaning::Gone => self.take_away(refusal.code, &refusal.why),
            // Once for all the times that it is tried again.
            _ if self.is_ready() && known => {
                tracing::debug!(id = %self.id, error = %refusal.why, "still no word from the SPIRE agent");
            }
            _ if self.is_ready() => {
                tracing::warn!(id = %self.id, error = %refusal.why, "no word from the SPIRE agent, keeping the last SVID");
            }
            _ => self.fail(&refusal.why, retry_in),
        }
    }

    /// There is nothing to ask about yet.
    pub(super) fn not_located(&self, why: &Str) {
        self.note("NotLocated", why);
        if !self.is_ready() {
            self.enter(State::Pending { why: why.clone() });
        }
    }

    /// Looks at the clock: an agent without its server goes on serving SVIDs that have expired. Whether that was so.
    pub(super) fn tick(&self) -> bool {
        let Some(not_after) = self.not_after() else { return false };
        if self.clock.now() < not_after {
            return false;
        }
        let last = self.story.borrow().wrong().cloned();
        let why = match last {
            Some(error) => format!("the SVID expired at {}: {error}", rfc3339(not_after)),
            None => format!("the SVID expired at {} and the SPIRE agent has sent no other", rfc3339(not_after)),
        };
        tracing::error!(id = %self.id, %why, "identity lost");
        self.fail(&why, Duration::ZERO);
        true
    }

    /// The workload is gone.
    pub(super) fn forgotten(&self) {
        self.enter(State::Revoked { why: "the workload is gone".into() });
    }

    /// From outside it must not work a moment longer.
    fn take_away(&self, code: &'static str, why: &str) {
        let had = self.is_ready();
        if had {
            tracing::warn!(id = %self.id, why, "the SPIRE agent has taken the SVID away");
        }
        self.note(code, why);
        let why: Str = why.into();
        let revoked = had || matches!(&*self.states.borrow(), State::Revoked { .. });
        let state = if revoked { State::Revoked { why } } else { State::Pending { why } };
        self.enter(state);
    }

    fn fail(&self, why: &str, retry_in: Duration) {
        self.enter(State::Failed { why: why.into(), retry_at: self.clock.now() + retry_in });
    }

    fn enter(&self, state: State) {
        let before = self.states.send_replace(state);
        if before.label() != self.states.borrow().label() {
            let now = self.clock.now();
            self.story.send_modify(|story| story.since = now);
        }
    }

    fn note(&self, code: &'static str, why: &str) {
        let now = self.clock.now();
        self.story.send_modify(|story| story.went_wrong(code, why.into(), now));
    }

    fn no_entry(&self) -> String {
        let reference = self.story.borrow().asked.as_ref().map(|asked| asked.reference.clone()).unwrap_or_default();
        format!(
            "no entry matches this workload ({reference}): register one with SPIFFE ID {} and selectors that it has, parented to \
             this node's agent",
            self.id
        )
    }
}
