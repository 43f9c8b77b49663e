//! When each identity is asked for: a state machine without tasks, sockets or a clock of its own.
//!
//! ```text
//!  demand ──▶ Queued ──start──▶ Flying ──issued──▶ Waiting (renewal at half-life ± 10 %)
//!                ▲                │ │                  │
//!                │                │ └─failed─▶ Waiting (retry with back-off)
//!                └────────────────┼────── due, or demanded on demand
//!  queue full ──▶ Parked ──on demand──▶ Queued      forgotten: gone from any of them
//! ```

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::watch;
use tokio::time::Instant;
use zspire_model::{SpiffeId, Str};

use super::{Failure, Limits};
use crate::clock::rfc3339;
use crate::credentials::Credentials;
use crate::source::{Priority, State};
use crate::stats::Stats;
use crate::story::{Asked, Offered, Story};

/// Wall clocks jump; nothing that depends on one sleeps for longer than this.
const RECHECK: Duration = Duration::from_secs(10);
/// First pause after a failure; it doubles with each further one.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest pause after failures.
const MAX_BACKOFF: Duration = Duration::from_secs(150);
/// On-demand demand ignores the back-off, but not more often than this for one identity.
const ON_DEMAND_INTERVAL: Duration = Duration::from_secs(1);
/// A request that has taken this long no longer counts against the limit of concurrent requests, so that
/// identities whose request hangs do not hold up the others.
const STALLED: Duration = Duration::from_secs(2);
/// Requests under way, stalled ones included, never exceed this many times the limit.
const STALLED_FACTOR: usize = 8;

/// A moment, by both clocks: certificates live by the wall, waiting by the monotonic one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) wall: SystemTime,
    pub(super) mono: Instant,
}

/// Work to do: obtain a certificate for `id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) id: SpiffeId,
    pub(super) ticket: Ticket,
}

/// Distinguishes attempts; what comes back for an older one is ignored. Also the order within a priority.
pub(super) type Ticket = u64;

#[derive(Debug)]
struct Slot {
    states: watch::Sender<State>,
    users: HashSet<Option<Str>>,
    phase: Phase,
    failures: u32,
    last_end: Option<Instant>,
    story: Story,
    /// Since when its first certificate is waited for; `None` once it was there.
    waiting_since: Option<Instant>,
}

impl Slot {
    fn enter(&mut self, state: State, now: SystemTime) -> State {
        let before = self.states.send_replace(state);
        if before.label() != self.states.borrow().label() {
            self.story.since = now;
        }
        before
    }
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Parked,
    Queued { priority: Priority, ticket: Ticket },
    Flying { ticket: Ticket },
    Renewal { at: SystemTime },
    Retry { at: Instant, priority: Priority },
}

/// All identities of one source.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: Limits,
    random: StdRng,
    slots: HashMap<SpiffeId, Slot>,
    queue: BTreeMap<(Reverse<Priority>, Ticket), SpiffeId>,
    flights: BTreeMap<Ticket, Instant>,
    renewals: BTreeSet<(SystemTime, SpiffeId)>,
    retries: BTreeSet<(Instant, SpiffeId)>,
    expiries: BTreeSet<(SystemTime, SpiffeId)>,
    next_ticket: Ticket,
    stats: Stats,
}

impl Scheduler {
    pub(super) fn new(limits: Limits, seed: Option<u64>) -> Self {
        Self {
            limits,
            random: seed.map_or_else(StdRng::from_os_rng, StdRng::seed_from_u64),
            slots: HashMap::new(),
            queue: BTreeMap::new(),
            flights: BTreeMap::new(),
            renewals: BTreeSet::new(),
            retries: BTreeSet::new(),
            expiries: BTreeSet::new(),
            next_ticket: 0,
            stats: Stats::default(),
        }
    }

    /// Adds a user of an identity, and asks for it.
    pub(super) fn watch(
        &mut self,
        id: &SpiffeId,
        user: Option<Str>,
        priority: Priority,
        now: Now,
    ) -> watch::Receiver<State> {
        let slot = self.slots.entry(id.clone()).or_insert_with(|| Slot {
            states: watch::Sender::new(State::Pending { why: "its certificate has not been asked for yet".into() }),
            users: HashSet::new(),
            phase: Phase::Parked,
            failures: 0,
            last_end: None,
            story: Story::new(now.wall),
            waiting_since: Some(now.mono),
        });
        slot.users.insert(user);
        let states = slot.states.subscribe();
        self.demand(id, priority, now);
        states
    }

    /// Asks for an identity that is held already. An identity that has been forgotten stays so.
    pub(super) fn demand(&mut self, id: &SpiffeId, priority: Priority, now: Now) {
        let Some(slot) = self.slots.get(id) else { return };
        match slot.phase {
            Phase::Parked => self.enqueue(id, priority, now),
            Phase::Queued { priority: current, ticket } if priority > current => {
                self.queue.remove(&(Reverse(current), ticket));
                self.enqueue(id, priority, now);
            }
            Phase::Retry { at, .. }
                if priority == Priority::OnDemand && slot.states.borrow().credentials().is_none() =>
            {
                let allowed = slot.last_end.map_or(now.mono, |end| end + ON_DEMAND_INTERVAL);
                self.retry_at(id, at.min(allowed), priority);
                self.tick(now);
            }
            Phase::Queued { .. } | Phase::Flying { .. } | Phase::Renewal { .. } | Phase::Retry { .. } => {}
        }
    }

    /// Removes a user. Without users an identity is dropped, with its key.
    pub(super) fn forget(&mut self, id: &SpiffeId, user: &Option<Str>) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.users.remove(user);
        if !slot.users.is_empty() {
            return;
        }
        self.leave_phase(id);
        let slot = self.slots.remove(id).expect("it was there a moment ago");
        if let Some(credentials) = slot.states.borrow().credentials() {
            self.expiries.remove(&(credentials.not_after(), id.clone()));
        }
        slot.states.send_replace(State::Revoked { why: "no workload on this node uses it any more".into() });
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Now) {
        while let Some((at, id)) = self.expiries.first().cloned()
            && at <= now.wall
        {
            self.expiries.remove(&(at, id.clone()));
            self.expire(&id, now);
        }
        while let Some((at, id)) = self.renewals.first().cloned()
            && at <= now.wall
        {
            self.leave_phase(&id);
            self.enqueue(&id, Priority::Background, now);
        }
        while let Some((at, id)) = self.retries.first().cloned()
            && at <= now.mono
        {
            let Some(Phase::Retry { priority, .. }) = self.slots.get(&id).map(|slot| slot.phase) else {
                self.retries.remove(&(at, id));
                continue;
            };
            self.leave_phase(&id);
            self.enqueue(&id, priority, now);
        }
    }

    /// The next request to make, if one may be made.
    pub(super) fn start(&mut self, now: Now) -> Option<Job> {
        let busy = self.flights.values().filter(|since| **since + STALLED > now.mono).count();
        if busy >= self.limits.concurrent || self.flights.len() >= self.limits.concurrent * STALLED_FACTOR {
            return None;
        }
        let ((_, ticket), id) = self.queue.pop_first()?;
        self.flights.insert(ticket, now.mono);
        let slot = self.slot(&id);
        slot.phase = Phase::Flying { ticket };
        let reference = format!("a certificate for {id}").into();
        slot.story.ask(Asked { kind: "certificate", reference, selectors: Vec::new() });
        Some(Job { id, ticket })
    }

    /// What became of a request.
    pub(super) fn finish(&mut self, job: Job, result: Result<Arc<Credentials>, Failure>, now: Now) {
        if let Some(begun) = self.flights.remove(&job.ticket) {
            self.stats.latency.observe(now.mono.duration_since(begun));
        }
        let Some(slot) = self.slots.get_mut(&job.id) else { return };
        if !matches!(slot.phase, Phase::Flying { ticket } if ticket == job.ticket) {
            return;
        }
        slot.last_end = Some(now.mono);
        match result {
            Ok(credentials) => self.issued(&job.id, credentials, now),
            Err(failure) => self.failed(&job.id, &failure, now),
        }
    }

    /// When [`Scheduler::tick`] or [`Scheduler::start`] has something to do.
    pub(super) fn next_wake(&self, now: Now) -> Instant {
        let wall = [self.renewals.first(), self.expiries.first()].into_iter().flatten();
        let wall = wall.map(|(at, _)| now.mono + at.duration_since(now.wall).unwrap_or_default());
        let retry = self.retries.first().map(|(at, _)| *at);
        let stalled = self.flights.values().map(|since| *since + STALLED).filter(|at| *at > now.mono).min();
        let stalled = stalled.filter(|_| !self.queue.is_empty());
        wall.chain(retry).chain(stalled).chain([now.mono + RECHECK]).min().expect("at least the recheck")
    }

    /// Every identity with its state.
    pub(super) fn states(&self) -> Vec<(SpiffeId, State, Story)> {
        let known = |(id, slot): (&SpiffeId, &Slot)| (id.clone(), slot.states.borrow().clone(), slot.story.clone());
        let mut states: Vec<_> = self.slots.iter().map(known).collect();
        states.sort_by(|a, b| a.0.cmp(&b.0));
        states
    }

    pub(super) fn stats(&self) -> Stats {
        let mut stats = self.stats.clone();
        stats.queued = self.queue.len();
        stats.in_flight = self.flights.len();
        stats.expiry = self.expiries.iter().map(|(at, id)| (id.clone(), *at)).collect();
        let ready = |id: &SpiffeId| self.slots.get(id)?.states.borrow().credentials().map(|it| it.not_before());
        stats.held = self.slots.len();
        stats.ready = self.expiries.len();
        stats.updates = stats.issued;
        self.slots.values().for_each(|slot| stats.trusted(&slot.story.bundles));
        stats.since = self.expiries.iter().filter_map(|(_, id)| Some((id.clone(), ready(id)?))).collect();
        stats
    }

    fn issued(&mut self, id: &SpiffeId, credentials: Arc<Credentials>, now: Now) {
        self.stats.issued += 1;
        // Counted from now, not from the certificate's beginning: CAs date it back, and short ones would already be due.
        let left = credentials.not_after().duration_since(now.wall).unwrap_or_default();
        let share = 0.5 * self.random.random_range(0.9..=1.1);
        let at = now.wall + left.mul_f64(share).max(FIRST_BACKOFF);
        let slot = self.slots.get_mut(id).expect("the caller looked it up");
        slot.failures = 0;
        slot.phase = Phase::Renewal { at };
        let offered = Offered { id: credentials.id().clone(), hint: Str::default() };
        slot.story.answered(vec![offered], credentials.bundles(), now.wall);
        slot.story.went_right();
        if let Some(since) = slot.waiting_since.take() {
            self.stats.first.observe(now.mono.duration_since(since));
        }
        let expiry = (credentials.not_after(), id.clone());
        let before = slot.enter(State::Ready(credentials), now.wall);
        self.renewals.insert((at, id.clone()));
        if let Some(old) = before.credentials() {
            self.expiries.remove(&(old.not_after(), id.clone()));
        }
        self.expiries.insert(expiry);
    }

    fn failed(&mut self, id: &SpiffeId, failure: &Failure, now: Now) {
        *self.stats.failures.entry(failure.reason).or_default() += 1;
        if let Some(code) = failure.code {
            *self.stats.refusals.entry(code).or_default() += 1;
        }
        let code = failure.code.unwrap_or(failure.reason);
        *self.stats.errors.entry(code).or_default() += 1;
        let slot = self.slots.get_mut(id).expect("the caller looked it up");
        slot.failures = slot.failures.saturating_add(1);
        slot.story.went_wrong(code, failure.why.clone(), now.wall);
        let mut pause = backoff(slot.failures, &mut self.random);
        let kept = slot.states.borrow().credentials().cloned();
        if let Some(credentials) = &kept {
            // With something to lose, try again in time.
            let left = credentials.not_after().duration_since(now.wall).unwrap_or_default();
            pause = pause.min((left / 2).max(FIRST_BACKOFF));
            tracing::warn!(%id, error = %failure.why, retry_in = ?pause, expires = %rfc3339(credentials.not_after()),
                "cannot renew certificate, keeping the one there is");
        } else {
            tracing::warn!(%id, error = %failure.why, retry_in = ?pause, "cannot obtain certificate");
            let retry_at = now.wall + pause;
            slot.enter(State::Failed { why: failure.why.clone(), retry_at }, now.wall);
        }
        slot.story.retry_at = Some(now.wall + pause);
        let priority = if kept.is_some() { Priority::Background } else { Priority::WarmUp };
        self.retry_at(id, now.mono + pause, priority);
    }

    fn expire(&mut self, id: &SpiffeId, now: Now) {
        let slot = self.slot(id);
        let why = match slot.story.wrong() {
            Some(error) => format!("the certificate has expired and could not be renewed: {error}"),
            None => "the certificate has expired before it was renewed".to_owned(),
        };
        tracing::error!(%id, %why, "identity lost");
        let retry_at = match slot.phase {
            Phase::Retry { at, .. } => now.wall + at.duration_since(now.mono),
            _ => now.wall,
        };
        slot.enter(State::Failed { why: why.into(), retry_at }, now.wall);
    }

    fn enqueue(&mut self, id: &SpiffeId, priority: Priority, now: Now) {
        let full = self.queue.len() >= self.limits.queue;
        let slot = self.slots.get_mut(id).expect("the caller looked it up");
        let state = slot.states.borrow().clone();
        // Turning away is for prefetches: somebody who waits is always let in, and so is a renewal.
        if full && priority != Priority::OnDemand && matches!(state, State::Pending { .. }) {
            self.stats.turned_away += 1;
            slot.phase = Phase::Parked;
            let why = "too many identities wait already; it is fetched when a connection needs it".into();
            slot.enter(State::Pending { why }, now.wall);
            return;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        slot.phase = Phase::Queued { priority, ticket };
        self.queue.insert((Reverse(priority), ticket), id.clone());
        if !matches!(state, State::Ready(_)) {
            let why = match slot.story.wrong() {
                Some(error) => format!("trying again after: {error}").into(),
                None => "its certificate is being fetched".into(),
            };
            slot.enter(State::Pending { why }, now.wall);
        }
    }

    /// Takes an identity off whatever list its phase has it on.
    fn leave_phase(&mut self, id: &SpiffeId) {
        match std::mem::replace(&mut self.slot(id).phase, Phase::Parked) {
            Phase::Parked => {}
            Phase::Queued { priority, ticket } => drop(self.queue.remove(&(Reverse(priority), ticket))),
            Phase::Flying { ticket } => drop(self.flights.remove(&ticket)),
            Phase::Renewal { at } => drop(self.renewals.remove(&(at, id.clone()))),
            Phase::Retry { at, .. } => drop(self.retries.remove(&(at, id.clone()))),
        }
    }

    fn retry_at(&mut self, id: &SpiffeId, at: Instant, priority: Priority) {
        self.leave_phase(id);
        self.slot(id).phase = Phase::Retry { at, priority };
        self.retries.insert((at, id.clone()));
    }

    fn slot(&mut self, id: &SpiffeId) -> &mut Slot {
        self.slots.get_mut(id).expect("lists name only identities that are held")
    }
}

/// 1 s, 2 s, 4 s … 150 s, each shortened by up to a half so that a fleet does not come back at once.
fn backoff(failures: u32, random: &mut StdRng) -> Duration {
    let doubled = FIRST_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(10));
    doubled.min(MAX_BACKOFF).mul_f64(random.random_range(0.5..=1.0))
}
