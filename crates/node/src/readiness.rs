//! Readiness: which parts of the proxy are still waited for, and why.
//!
//! A part takes a [`Blocker`] when it starts and gives it up when it is ready; while it waits it says what
//! for. A part whose state comes and goes is observed: it is asked whenever the page is. `GET :15021/healthz/ready` answers 200
//! when nothing blocks, else 503, with a line for each part that blocks, and for each that needs an operator though it does not.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zspire_identity::State as Certificate;
use zspire_proxy::Known;

/// The parts that are not ready.
#[derive(Debug, Clone)]
pub struct Readiness {
    pending: Arc<Mutex<BTreeMap<&'static str, String>>>,
    observed: Arc<Mutex<Vec<Observed>>>,
    started: Instant,
}

/// A part, and what is to be said of it.
pub type Told = (&'static str, String);

/// Something that an operator has to mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Whether the proxy is not ready because of it.
    blocks: bool,
    why: String,
}

impl Problem {
    /// The proxy cannot serve.
    pub fn blocks(why: impl Into<String>) -> Self {
        Self { blocks: true, why: why.into() }
    }

    /// The proxy serves all the same.
    pub fn note(why: impl Into<String>) -> Self {
        Self { blocks: false, why: why.into() }
    }
}

struct Observed {
    part: &'static str,
    ask: Box<dyn Fn() -> Option<Problem> + Send + Sync>,
}

impl std::fmt::Debug for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Observed").field(&self.part).finish()
    }
}

impl Readiness {
    /// Nothing blocks yet. `started` is when the process began.
    pub fn new(started: Instant) -> Self {
        Self { pending: Arc::default(), observed: Arc::default(), started }
    }

    /// The proxy is not ready until the returned value is told so; a part that fails leaves it unready.
    pub fn block(&self, part: &'static str, why: impl Into<String>) -> Blocker {
        self.lock().insert(part, why.into());
        Blocker { part, readiness: self.clone() }
    }

    /// From now on `ask` says how a part is, whenever somebody wants to know. It must not block.
    pub fn observe(&self, part: &'static str, ask: impl Fn() -> Option<Problem> + Send + Sync + 'static) {
        let mut observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        observed.push(Observed { part, ask: Box::new(ask) });
    }

    /// What keeps the proxy from being ready, part and reason; and what else an operator has to mend.
    pub fn told(&self) -> (Vec<Told>, Vec<Told>) {
        let (mut blocking, mut notes) = (self.pending(), Vec::new());
        let observed = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        for (part, problem) in observed.iter().filter_map(|it| Some((it.part, (it.ask)()?))) {
            let list = if problem.blocks { &mut blocking } else { &mut notes };
            list.push((part, problem.why));
        }
        (blocking, notes)
    }

    /// What is waited for: part and reason. Empty: ready.
    pub fn pending(&self) -> Vec<Told> {
        self.lock().iter().map(|(part, why)| (*part, why.clone())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, String>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, part: &'static str) {
        let mut pending = self.lock();
        pending.remove(part);
        let after: Duration = self.started.elapsed();
        if pending.is_empty() {
            tracing::info!("{part} is ready, the proxy is ready after {after:?}");
        } else {
            let rest: Vec<_> = pending.keys().collect();
            tracing::info!("{part} is ready after {after:?}, still waiting for {rest:?}");
        }
    }
}

/// One part that is not ready.
#[derive(Debug)]
pub struct Blocker {
    part: &'static str,
    readiness: Readiness,
}

impl Blocker {
    /// What the part is waiting for.
    pub fn because(&self, why: impl Into<String>) {
        self.readiness.lock().insert(self.part, why.into());
    }

    /// The part is ready.
    pub fn ready(self) {
        self.readiness.release(self.part);
    }
}

/// Keeps the proxy of one pod unready until discovery knows its workload and the workload's certificate is there.
pub async fn wait_for_certificate(
    workload: String,
    mut local: watch::Receiver<Known>,
    blocker: Blocker,
    stop: CancellationToken,
) {
    loop {
        let known = local.borrow_and_update().clone();
        let Known::Here(known) = known else {
            blocker.because(format!("waiting for discovery to know workload {workload}"));
            tokio::select! {
                () = stop.cancelled() => return,
                changed = local.changed() => if changed.is_err() { return },
            }
            continue;
        };
        let mut credentials = known.credentials.clone();
        let mut state = credentials.state();
        loop {
            let why = match state {
                Certificate::Ready(_) => return blocker.ready(),
                Certificate::Pending { why } | Certificate::Revoked { why } | Certificate::Failed { why, .. } => why,
            };
            let id = known.workload.identity().map(|id| id.to_string()).unwrap_or_default();
            blocker.because(format!("waiting for the certificate of {id}: {why}"));
            state = tokio::select! {
                () = stop.cancelled() => return,
                changed = local.changed() => if changed.is_err() { return } else { break },
                changed = credentials.changed() => match changed {
                    Some(state) => state,
                    None => return,
                },
            };
        }
    }
}

/// `/healthz/ready`.
pub fn router(readiness: Readiness) -> Router {
    Router::new().route("/healthz/ready", get(page)).with_state(readiness)
}

async fn page(State(readiness): State<Readiness>) -> (StatusCode, String) {
    let (blocking, notes) = readiness.told();
    let notes: String = notes.iter().map(|(part, why)| format!("note: {part}: {why}\n")).collect();
    if blocking.is_empty() {
        return (StatusCode::OK, format!("ready\n{notes}"));
    }
    let lines: String = blocking.iter().map(|(part, why)| format!("{part}: {why}\n")).collect();
    (StatusCode::SERVICE_UNAVAILABLE, lines + &notes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_part_is() {
        let readiness = Readiness::new(Instant::now());
        assert!(readiness.pending().is_empty());
        let xds = readiness.block("discovery", "connecting");
        let proxy = readiness.block("proxy", "starting");
        xds.because("no answer from https://localhost:15012: connection refused");
        proxy.ready();
        assert_eq!(
            readiness.pending(),
            [("discovery", "no answer from https://localhost:15012: connection refused".to_owned())]
        );
        xds.ready();
        assert!(readiness.pending().is_empty());
    }

    #[tokio::test]
    async fn what_is_observed_is_told_and_blocks_only_if_it_must() {
        let readiness = Readiness::new(Instant::now());
        let problem = Arc::new(Mutex::new(None));
        let asked = problem.clone();
        readiness.observe("lists", move || asked.lock().unwrap().clone());
        let page = async |problem_now: Option<Problem>| {
            *problem.lock().unwrap() = problem_now;
            super::page(State(readiness.clone())).await
        };
        assert_eq!(page(None).await, (StatusCode::OK, "ready\n".into()));
        let note = (StatusCode::OK, "ready\nnote: lists: old: replace them\n".into());
        assert_eq!(page(Some(Problem::note("old: replace them"))).await, note);
        let blocked = (StatusCode::SERVICE_UNAVAILABLE, "lists: none\n".into());
        assert_eq!(page(Some(Problem::blocks("none"))).await, blocked);
    }
}
