//! A source that issues one certificate per identity, shared by the workloads that have it.
//!
//! An [`Issuer`] obtains a single SVID (from Istio's CA, from the development CA); everything about *when* is here:
//! priorities, the limit of concurrent requests, deadlines, renewal, back-off, expiry, forgetting.
//!
//! Tasks: one, [`Driver::run`], which owns the requests under way. [`PerIdentity`] reaches it through the shared
//! [`scheduler`] under a mutex that is never held across an await; watchers read their own channel and need neither.

mod scheduler;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use zspire_model::{SpiffeId, Str};

use self::scheduler::{Job, Now, Scheduler};
use crate::clock::{Clock, SystemClock};
use crate::credentials::{Credentials, Svid};
use crate::source::{Entry, Priority, Source, Watch, WorkloadKey};
use crate::stats::Stats;
use crate::tls::Policy;

/// Obtains one SVID.
#[async_trait]
pub trait Issuer: fmt::Debug + Send + Sync + 'static {
    /// What the source is called.
    fn name(&self) -> &'static str;

    /// Obtains an SVID for `id`. It is dropped when its time is up, and checked by the caller.
    async fn issue(&self, id: &SpiffeId) -> Result<Svid, Failure>;
}

/// Why an SVID was not obtained.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Failure {
    /// A name out of a small set, for metrics.
    pub reason: &'static str,
    /// The whole story, with causes.
    pub why: Str,
    /// gRPC's name of the code, if the request ended with one.
    pub code: Option<&'static str>,
}

impl Failure {
    /// A failure with its reason and its story.
    pub fn new(reason: &'static str, why: impl Into<Str>) -> Self {
        Self { reason, why: why.into(), code: None }
    }

    /// The same with the code that the request ended with.
    #[must_use]
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }
}

/// How much at a time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests at a time.
    pub concurrent: usize,
    /// Identities that may wait for their turn; more prefetches than that are turned away.
    pub queue: usize,
    /// Longest time for one request.
    pub deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { concurrent: 8, queue: 10_000, deadline: Duration::from_secs(10) }
    }
}

/// How a source is run.
#[derive(Debug, Clone)]
pub struct Config {
    /// How much at a time.
    pub limits: Limits,
    /// What TLS may use.
    pub policy: Policy,
    /// The clock that certificates are checked by.
    pub clock: Arc<dyn Clock>,
    /// Makes jitter repeatable.
    pub seed: Option<u64>,
}

impl Default for Config {
    fn default() -> Self {
        Self { limits: Limits::default(), policy: Policy::default(), clock: Arc::new(SystemClock), seed: None }
    }
}

/// A source and the task that makes it work.
pub fn new<I: Issuer>(issuer: I, config: Config) -> (PerIdentity, Driver<I>) {
    let shared = Arc::new(Shared {
        name: issuer.name(),
        clock: config.clock.clone(),
        scheduler: Mutex::new(Scheduler::new(config.limits, config.seed)),
        wake: Notify::new(),
    });
    (PerIdentity(shared.clone()), Driver { shared, issuer: Arc::new(issuer), config })
}

/// The source. Clones are the same source.
#[derive(Debug, Clone)]
pub struct PerIdentity(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    name: &'static str,
    clock: Arc<dyn Clock>,
    scheduler: Mutex<Scheduler>,
    wake: Notify,
}

impl Shared {
    fn scheduler(&self) -> MutexGuard<'_, Scheduler> {
        self.scheduler.lock().expect("the scheduler does not panic")
    }

    fn now(&self) -> Now {
        Now { wall: self.clock.now(), mono: Instant::now() }
    }
}

impl Source for PerIdentity {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn watch(&self, key: &WorkloadKey, priority: Priority) -> Watch {
        let states = self.0.scheduler().watch(&key.id, key.workload.clone(), priority, self.0.now());
        self.0.wake.notify_one();
        let (shared, id) = (self.0.clone(), key.id.clone());
        Watch::new(states, move || {
            shared.scheduler().demand(&id, Priority::OnDemand, shared.now());
            shared.wake.notify_one();
        })
    }

    fn forget(&self, key: &WorkloadKey) {
        self.0.scheduler().forget(&key.id, &key.workload);
        self.0.wake.notify_one();
    }

    fn entries(&self) -> Vec<Entry> {
        let states = self.0.scheduler().states();
        // Whose it is would be several.
        let entry = |(id, state, story)| Entry::new(WorkloadKey { id, workload: None }, state, story, self.0.name);
        states.into_iter().map(entry).collect()
    }

    fn stats(&self) -> Stats {
        self.0.scheduler().stats()
    }
}

/// Makes the requests. See [`Driver::run`].
#[derive(Debug)]
pub struct Driver<I> {
    shared: Arc<Shared>,
    issuer: Arc<I>,
    config: Config,
}

type Done = Result<Arc<Credentials>, Failure>;

impl<I: Issuer> Driver<I> {
    /// Runs until `shutdown`; requests under way are dropped then. Credentials handed out stay usable.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut requests = JoinSet::new();
        let mut jobs = HashMap::new();
        loop {
            let wake = self.start_due(&mut requests, &mut jobs);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep_until(wake) => {}
                Some(done) = requests.join_next_with_id() => self.finish(&mut jobs, done),
            }
        }
    }

    fn start_due(&self, requests: &mut JoinSet<Done>, jobs: &mut HashMap<task::Id, Job>) -> Instant {
        let now = self.shared.now();
        let mut scheduler = self.shared.scheduler();
        scheduler.tick(now);
        while let Some(job) = scheduler.start(now) {
            let request = request(self.issuer.clone(), self.config.clone(), job.id.clone());
            jobs.insert(requests.spawn(request).id(), job);
        }
        scheduler.next_wake(now)
    }

    fn finish(&self, jobs: &mut HashMap<task::Id, Job>, done: Result<(task::Id, Done), JoinError>) {
        let (task, result) = match done {
            Ok((task, result)) => (task, result),
            // A bug in an issuer costs this attempt, not the identity.
            Err(error) => (error.id(), Err(Failure::new("internal", format!("the request ended abnormally: {error}")))),
        };
        let job = jobs.remove(&task).expect("every request has a job");
        self.shared.scheduler().finish(job, result, self.shared.now());
    }
}

/// One attempt, within its time, checked.
async fn request<I: Issuer>(issuer: Arc<I>, config: Config, id: SpiffeId) -> Done {
    let deadline = config.limits.deadline;
    let late = || Failure::new("timeout", format!("no answer within {} s", deadline.as_secs()));
    let svid = timeout(deadline, issuer.issue(&id)).await.map_err(|_| late())??;
    if svid.id != id {
        return Err(Failure::new("wrong_identity", format!("the answer is for {}", svid.id)));
    }
    let credentials = Credentials::new(svid, &config.policy, &config.clock);
    let refuse = |e: crate::Invalid| Failure::new(e.label(), format!("the certificate that came back is refused: {e}"));
    credentials.map(Arc::new).map_err(refuse)
}
