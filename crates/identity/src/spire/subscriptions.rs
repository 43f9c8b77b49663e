//! The source: one stream to the agent for each workload, kept open while the workload is there.
//!
//! Tasks: one for each workload, owned by [`Driver::run`]. A workload's task is the only writer of its state.
//!
//! ```text
//!           ┌─────────── back-off, or somebody waits ───────────┐
//!           ▼                                                   │
//!  Waiting ───▶ locate ───▶ Opening ───▶ Streaming ── ended ────┤
//!                  │            └── refused ────────────────────┤
//!                  └── nothing to ask about yet ────────────────┘
//! ```
//! An agent looks at a workload's selectors once, when the stream is opened. While nothing matches it is therefore opened again
//! from time to time, and not merely waited for.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use rand::Rng as _;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::held::{Held, Outcome};
use super::{Agent, Config, Locate, Meaning, Reference, Refusal, Update, Updates};
use crate::clock::Clock;
use crate::source::{Entry, Priority, Source, State, Watch, WorkloadKey};
use crate::stats::{Latency, Stats};
use crate::story::Story;

/// Longest time until a stream is open. An agent that attests processes looks for the container of one for half a minute.
const OPEN: Duration = Duration::from_secs(60);
/// First pause after a failure; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause after failures.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Pause after an answer that says that the question is wrong.
const MISTAKE_PAUSE: Duration = Duration::from_secs(600);
/// Somebody who waits ends a pause, but not more often than this.
const ON_DEMAND_INTERVAL: Duration = Duration::from_secs(1);
/// How long it may be in doubt whether an SVID that is no longer offered was taken away.
///
/// While an agent replaces the SVIDs of a tainted CA it has none, and says so to whoever listens: just what it says when a
/// registration has ended. It is told apart by asking again: on a new stream SPIRE answers at once if nothing matches the
/// workload, and waits if something does whose SVID is not there yet.
const DOUBT: Duration = Duration::from_secs(10);
/// Wall clocks jump; they are looked at this often, once for all workloads.
const RECHECK: Duration = Duration::from_secs(10);
/// A wall clock that goes on otherwise than the monotonic one by more than this has jumped.
const JUMP: Duration = Duration::from_secs(1);

/// A source and the task that makes it work.
pub fn new(agent: Arc<dyn Agent>, locate: Arc<dyn Locate>, config: Config) -> (Subscriptions, Driver) {
    let (start, started) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        agent,
        locate,
        config,
        slots: Mutex::default(),
        counts: Mutex::default(),
        start,
        jumped: Notify::new(),
    });
    (Subscriptions(shared.clone()), Driver { shared, started })
}

/// The source. Clones are the same source.
#[derive(Clone)]
pub struct Subscriptions(Arc<Shared>);

struct Shared {
    agent: Arc<dyn Agent>,
    locate: Arc<dyn Locate>,
    config: Config,
    slots: Mutex<HashMap<WorkloadKey, Slot>>,
    counts: Mutex<Counts>,
    /// As many as there are workloads on the node.
    start: mpsc::UnboundedSender<Follow>,
    /// Told when the wall clock has jumped.
    jumped: Notify,
}

struct Slot {
    states: watch::Receiver<State>,
    story: watch::Receiver<Story>,
    demand: Arc<Notify>,
    gone: CancellationToken,
}

/// Numbers since the start.
#[derive(Debug, Default)]
struct Counts {
    issued: u64,
    updates: u64,
    failures: BTreeMap<&'static str, u64>,
    /// From the moment that a workload was there to its first SVID.
    first: Latency,
}

impl Shared {
    fn slots(&self) -> MutexGuard<'_, HashMap<WorkloadKey, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for Subscriptions {
    fn name(&self) -> &'static str {
        self.0.agent.name()
    }

    fn watch(&self, key: &WorkloadKey, _: Priority) -> Watch {
        let mut slots = self.0.slots();
        let slot = slots.entry(key.clone()).or_insert_with(|| {
            let (states, seen) = watch::channel(State::Pending { why: "the SPIRE agent is asked for its SVID".into() });
            let (story, told) = watch::channel(Story::new(self.0.config.clock.now()));
            let slot = Slot { states: seen, story: told, demand: Arc::default(), gone: CancellationToken::new() };
            let held = Held::new(key.id.clone(), states, story, &self.0.config);
            let (demand, gone) = (slot.demand.clone(), slot.gone.clone());
            // Fails only when the source has stopped, which the watch tells by itself.
            let _ = self.0.start.send(Follow {
                key: key.clone(),
                held,
                demand,
                gone,
                waiting_since: Some(Instant::now()),
                doubt: None,
                process: None,
                useless: 0,
            });
            slot
        });
        let demand = slot.demand.clone();
        Watch::new(slot.states.clone(), move || demand.notify_one()).patient()
    }

    fn forget(&self, key: &WorkloadKey) {
        if let Some(slot) = self.0.slots().remove(key) {
            slot.gone.cancel();
        }
    }

    fn entries(&self) -> Vec<Entry> {
        let mut all: Vec<(WorkloadKey, State, Story)> = {
            let slots = self.0.slots();
            let known = |(key, slot): (&WorkloadKey, &Slot)| {
                (key.clone(), slot.states.borrow().clone(), slot.story.borrow().clone())
            };
            slots.iter().map(known).collect()
        };
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let agent = self.0.agent.id();
        let entry = |(key, state, story)| Entry { agent: agent.clone(), ..Entry::new(key, state, story, self.name()) };
        all.into_iter().map(entry).collect()
    }

    fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for (key, slot) in self.0.slots().iter() {
            let (state, story) = (slot.states.borrow(), slot.story.borrow());
            stats.held += 1;
            match state.credentials() {
                Some(credentials) => {
                    stats.ready += 1;
                    stats.expiry.push((key.id.clone(), credentials.not_after()));
                    stats.since.push((key.id.clone(), credentials.not_before()));
                }
                None => stats.in_flight += 1,
            }
            stats.trusted(&story.bundles);
        }
        let counts = self.0.counts();
        stats.issued = counts.issued;
        stats.updates = counts.updates;
        stats.failures = counts.failures.clone();
        stats.errors = counts.failures.clone();
        stats.first = counts.first;
        stats
    }
}

impl fmt::Debug for Subscriptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriptions").field("agent", &self.0.agent).finish_non_exhaustive()
    }
}

/// Keeps the streams. See [`Driver::run`].
pub struct Driver {
    shared: Arc<Shared>,
    started: mpsc::UnboundedReceiver<Follow>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("agent", &self.shared.agent).finish_non_exhaustive()
    }
}

impl Driver {
    /// Runs until `shutdown`; streams end then. Credentials handed out stay usable.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let tasks = TaskTracker::new();
        let mut wall = Wall::new(&*self.shared.config.clock);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = sleep_until(wall.next_look()) => if wall.has_jumped(&*self.shared.config.clock) {
                    self.shared.jumped.notify_waiters();
                },
                follow = self.started.recv() => match follow {
                    Some(follow) => {
                        let (shared, shutdown) = (self.shared.clone(), shutdown.clone());
                        tasks.spawn(async move {
                            tokio::select! {
                                () = follow.run(&shared) => {}
                                () = shutdown.cancelled() => {}
                            }
                        });
                    }
                    None => break,
                },
            }
        }
        tasks.close();
        tasks.wait().await;
    }
}

/// Compares the wall clock with the monotonic one, so that ten thousand workloads need not.
struct Wall {
    wall: SystemTime,
    monotonic: Instant,
}

impl Wall {
    fn new(clock: &dyn Clock) -> Self {
        Self { wall: clock.now(), monotonic: Instant::now() }
    }

    fn next_look(&self) -> Instant {
        self.monotonic + RECHECK
    }

    fn has_jumped(&mut self, clock: &dyn Clock) -> bool {
        let before = std::mem::replace(self, Self::new(clock));
        let expected = before.wall + self.monotonic.duration_since(before.monotonic);
        let late = self.wall.duration_since(expected).unwrap_or_else(|early| early.duration());
        late > JUMP
    }
}

/// The task of one workload.
struct Follow {
    key: WorkloadKey,
    held: Held,
    demand: Arc<Notify>,
    gone: CancellationToken,
    /// Since when its first SVID is waited for; `None` once it was there.
    waiting_since: Option<Instant>,
    /// When to give up what is held, since the agent no longer offers it.
    doubt: Option<Instant>,
    /// The process that was asked about last.
    process: Option<Ended>,
    /// Answers in a row that were of no use.
    useless: usize,
}

enum Phase {
    Waiting { until: Instant },
    Opening(Pin<Box<dyn Future<Output = Result<Updates, Refusal>> + Send>>),
    Streaming { updates: Updates, reopen: Option<Instant> },
}

type Ended = Pin<Box<dyn Future<Output = ()> + Send>>;

enum Event {
    Gone,
    /// Time to look at the clock.
    Clock,
    /// Time to ask.
    Ask,
    /// Time to give up what the agent no longer offers.
    Redact,
    Opened(Result<Updates, Refusal>),
    Update(Option<Result<Update, Refusal>>),
    ProcessEnded,
}

impl Follow {
    async fn run(mut self, shared: &Shared) {
        let mut pause = Pause::default();
        let mut phase = Phase::Waiting { until: Instant::now() };
        loop {
            match self.next(shared, &mut phase, &mut pause).await {
                Event::Gone => return self.held.forgotten(),
                Event::Clock => {
                    if self.held.tick()
                        && let Phase::Streaming { reopen, .. } = &mut phase
                    {
                        // A stream that has said nothing for so long may have nobody at its other end.
                        *reopen = Some(self.wait(pause.after_failure()));
                    }
                }
                Event::Ask => phase = self.ask(shared, &mut pause),
                Event::Redact => {
                    self.redact(shared);
                    if let Phase::Streaming { reopen, .. } = &mut phase {
                        *reopen = Some(self.wait(pause.after_failure()));
                    }
                }
                Event::Opened(Ok(updates)) => phase = Phase::Streaming { updates, reopen: None },
                Event::Opened(Err(refusal)) | Event::Update(Some(Err(refusal))) => {
                    phase = self.refused(shared, &refusal, &mut pause);
                }
                Event::Update(None) => {
                    let refusal = Refusal::outage("Ended", "the SPIRE agent has ended the stream");
                    phase = self.refused(shared, &refusal, &mut pause);
                }
                Event::Update(Some(Ok(update))) => {
                    let again = self.updated(shared, &update, &mut pause);
                    match &mut phase {
                        _ if again == Again::Now => phase = self.ask(shared, &mut pause),
                        Phase::Streaming { reopen, .. } => *reopen = again.at(),
                        Phase::Waiting { .. } | Phase::Opening(_) => {}
                    }
                }
                Event::ProcessEnded => {
                    let why = "the process that the SPIRE agent was asked about has ended";
                    let refusal = Refusal { meaning: Meaning::Gone, code: "ProcessEnded", why: why.into() };
                    phase = self.refused(shared, &refusal, &mut pause);
                }
            }
        }
    }

    async fn next(&mut self, shared: &Shared, phase: &mut Phase, pause: &mut Pause) -> Event {
        let (clock, doubt) = (self.clock(), self.doubt);
        let ready = self.held.is_ready();
        let demanded = pause.demanded(&self.demand, ready);
        tokio::select! {
            biased;
            () = self.gone.cancelled() => Event::Gone,
            () = or_never(self.process.as_mut()) => {
                self.process = None;
                Event::ProcessEnded
            }
            event = async {
                match phase {
                    Phase::Waiting { until } => tokio::select! {
                        () = sleep_until(*until) => Event::Ask,
                        () = demanded => Event::Ask,
                    },
                    Phase::Opening(opening) => Event::Opened(opening.await),
                    Phase::Streaming { updates, reopen } => tokio::select! {
                        biased;
                        update = updates.next() => Event::Update(update),
                        () = until(*reopen) => Event::Ask,
                        () = demanded, if reopen.is_some() => Event::Ask,
                    },
                }
            } => event,
            () = until(doubt) => Event::Redact,
            () = until(clock) => Event::Clock,
            () = shared.jumped.notified() => Event::Clock,
        }
    }

    /// When what is held expires, unless the clock jumps.
    fn clock(&self) -> Option<Instant> {
        let left = self.held.not_after()?.duration_since(self.held.now()).unwrap_or_default();
        // Clocks that are set right slowly do not jump: half of the time first. At the end a little later, so that it has passed.
        let wait = if left > 2 * RECHECK { left / 2 } else { left + Duration::from_millis(1) };
        Some(Instant::now() + wait)
    }

    fn ask(&mut self, shared: &Shared, pause: &mut Pause) -> Phase {
        let reference = match shared.locate.locate(&self.key, self.useless) {
            Ok(reference) => reference,
            Err(why) => {
                self.held.not_located(&why);
                return Phase::Waiting { until: self.wait(pause.after_failure()) };
            }
        };
        pause.asked();
        self.held.asked(&reference);
        // Until another one is asked about, the identity is that of this one.
        self.process = match &reference {
            Reference::Process(process) => Some(process.ended()),
            Reference::Pod { .. } | Reference::Selectors(_) | Reference::Own => None,
        };
        let agent = shared.agent.clone();
        let opening = Box::pin(async move {
            let late =
                || Refusal::outage("Timeout", format!("no stream from the SPIRE agent within {} s", OPEN.as_secs()));
            timeout(OPEN, agent.subscribe(&reference)).await.unwrap_or_else(|_| Err(late()))
        });
        Phase::Opening(opening)
    }

    /// When to open the stream again, if it has nothing to offer.
    fn updated(&mut self, shared: &Shared, update: &Update, pause: &mut Pause) -> Again {
        let outcome = self.held.update(update);
        let mut counts = shared.counts();
        counts.updates += 1;
        let code = match outcome {
            Outcome::Ready => {
                (self.doubt, self.useless) = (None, 0);
                counts.issued += 1;
                if let Some(since) = self.waiting_since.take() {
                    counts.first.observe(since.elapsed());
                }
                pause.reset();
                return Again::Never;
            }
            Outcome::Absent if self.doubt.is_none() => {
                self.doubt = Some(Instant::now() + DOUBT);
                return Again::Now;
            }
            Outcome::Absent => {
                drop(counts);
                self.redact(shared);
                return Again::At(self.wait(pause.after_failure()));
            }
            Outcome::Empty => "NoEntry",
            Outcome::Unusable => "Unusable",
        };
        self.doubt = None;
        self.useless += 1;
        *counts.failures.entry(code).or_default() += 1;
        drop(counts);
        Again::At(self.wait(pause.after_failure()))
    }

    /// Gives up what the agent no longer offers, unless it was lost otherwise meanwhile.
    fn redact(&mut self, shared: &Shared) {
        self.doubt = None;
        self.useless += 1;
        if self.held.is_ready() {
            *shared.counts().failures.entry("NoEntry").or_default() += 1;
            self.held.redact();
        }
    }

    fn refused(&mut self, shared: &Shared, refusal: &Refusal, pause: &mut Pause) -> Phase {
        *shared.counts().failures.entry(refusal.code).or_default() += 1;
        let wait = match refusal.meaning {
            Meaning::Mistake => MISTAKE_PAUSE,
            Meaning::Gone | Meaning::Outage | Meaning::Unregistered => pause.after_failure(),
        };
        match refusal.meaning {
            Meaning::Unregistered if self.doubt.is_some() => self.redact(shared),
            _ => self.held.refused(refusal, wait),
        }
        Phase::Waiting { until: self.wait(wait) }
    }

    /// The end of a pause, which is told.
    fn wait(&self, pause: Duration) -> Instant {
        self.held.waits(pause);
        Instant::now() + pause
    }
}

/// Whether a stream is opened again although it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Again {
    Never,
    Now,
    At(Instant),
}

impl Again {
    fn at(self) -> Option<Instant> {
        match self {
            Self::At(at) => Some(at),
            Self::Never | Self::Now => None,
        }
    }
}

async fn or_never(future: Option<&mut Ended>) {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// How long to wait before the agent is asked again.
#[derive(Debug, Default)]
struct Pause {
    failures: u32,
    asked: Option<Instant>,
}

impl Pause {
    /// 250 ms, 500 ms … 30 s, of each a random part (full jitter), so that a node's pods do not all come back at once.
    fn after_failure(&mut self) -> Duration {
        let doubled = FIRST_PAUSE.saturating_mul(1 << self.failures.min(10)).min(MAX_PAUSE);
        self.failures = self.failures.saturating_add(1);
        doubled.mul_f64(rand::rng().random_range(0.25..=1.0))
    }

    fn asked(&mut self) {
        self.asked = Some(Instant::now());
    }

    fn reset(&mut self) {
        self.failures = 0;
    }

    /// Completes when somebody waits who may end the pause.
    fn demanded(&self, demand: &Arc<Notify>, ready: bool) -> impl Future<Output = ()> + use<> {
        let (demand, allowed) = (demand.clone(), self.asked.map(|at| at + ON_DEMAND_INTERVAL));
        async move {
            if ready {
                std::future::pending::<()>().await;
            }
            demand.notified().await;
            until_passed(allowed).await;
        }
    }
}

async fn until_passed(at: Option<Instant>) {
    if let Some(at) = at {
        sleep_until(at).await;
    }
}
