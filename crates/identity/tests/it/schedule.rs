//! When certificates are asked for: priorities, limits, back-off, renewal, forgetting. Time is paused throughout.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use zspire_identity::per_identity::{self, Failure, Issuer, Limits, PerIdentity};
use zspire_identity::{Clock as _, Priority, Source as _, State, Svid, WorkloadKey};
use zspire_model::SpiffeId;

use crate::support::{TestCa, TestClock, id};

/// What an attempt does.
#[derive(Debug, Clone, Copy)]
enum Act {
    Issue,
    IssueAfter(Duration),
    Fail,
    Hang,
}

/// An issuer that does as it is told, by identity, and keeps a record.
#[derive(Clone)]
struct Scripted {
    ca: Arc<TestCa>,
    clock: Arc<TestClock>,
    acts: Arc<Mutex<HashMap<SpiffeId, Act>>>,
    started: Arc<Mutex<Vec<(SpiffeId, Instant)>>>,
    running: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scripted")
    }
}

struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[async_trait]
impl Issuer for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    async fn issue(&self, id: &SpiffeId) -> Result<Svid, Failure> {
        self.started.lock().unwrap().push((id.clone(), Instant::now()));
        self.most.fetch_max(self.running.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        let _leave = Leave(self.running.clone());
        let act = self.acts.lock().unwrap().get(id).copied().unwrap_or(Act::Issue);
        match act {
            Act::Issue => {}
            Act::IssueAfter(time) => sleep(time).await,
            Act::Fail => return Err(Failure::new("unavailable", "the CA is down")),
            Act::Hang => std::future::pending().await,
        }
        Ok(self.ca.svid(id.as_str(), &[("td", &self.ca)], self.clock.now()))
    }
}

struct Rig {
    source: PerIdentity,
    issuer: Scripted,
    clock: Arc<TestClock>,
    stop: CancellationToken,
}

impl Rig {
    fn new(limits: Limits) -> Self {
        let clock = TestClock::new();
        let issuer = Scripted {
            ca: Arc::new(TestCa::new(clock.now())),
            clock: clock.clone(),
            acts: Arc::default(),
            started: Arc::default(),
            running: Arc::default(),
            most: Arc::default(),
        };
        let config = per_identity::Config { limits, clock: clock.clone(), seed: Some(1), ..Default::default() };
        let (source, driver) = per_identity::new(issuer.clone(), config);
        let stop = CancellationToken::new();
        tokio::spawn(driver.run(stop.clone()));
        Self { source, issuer, clock, stop }
    }

    fn act(&self, name: &str, act: Act) {
        self.issuer.acts.lock().unwrap().insert(id(name), act);
    }

    /// The order in which identities were asked for, and when, in seconds since `from`.
    fn started(&self, name: &str) -> Vec<Instant> {
        let started = self.issuer.started.lock().unwrap();
        started.iter().filter(|(seen, _)| *seen == id(name)).map(|(_, at)| *at).collect()
    }

    fn order(&self) -> Vec<String> {
        self.issuer.started.lock().unwrap().iter().map(|(id, _)| id.to_string()).collect()
    }
}

fn key(name: &str) -> WorkloadKey {
    WorkloadKey { id: id(name), workload: None }
}

fn user(name: &str, pod: &str) -> WorkloadKey {
    WorkloadKey { id: id(name), workload: Some(pod.into()) }
}

fn name(number: usize) -> String {
    format!("spiffe://td/ns/n/sa/s{number}")
}

fn within(time: Duration) -> Instant {
    Instant::now() + time
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn eight_at_a_time_and_the_urgent_first() {
    let rig = Rig::new(Limits::default());
    let mut watches = Vec::new();
    for number in 0..20 {
        rig.act(&name(number), Act::IssueAfter(SECOND));
        let priority = if number < 15 { Priority::Background } else { Priority::WarmUp };
        watches.push(rig.source.watch(&key(&name(number)), priority));
    }
    sleep(Duration::from_millis(1)).await;
    let first: Vec<_> = rig.order();
    assert_eq!(first.len(), 8);
    assert!((15..20).all(|number| first.contains(&name(number))), "warm-up before background: {first:?}");
    assert_eq!((rig.source.stats().in_flight, rig.source.stats().queued), (8, 12));

    // One that was in the queue for long is wanted now: it is next.
    let last = rig.source.watch(&key(&name(14)), Priority::OnDemand);
    last.ready(within(3 * SECOND)).await.unwrap();
    assert_eq!(rig.order()[8], name(14));

    for watch in watches {
        watch.ready(within(10 * SECOND)).await.unwrap();
    }
    assert_eq!(rig.issuer.most.load(Ordering::Relaxed), 8);
    assert_eq!(rig.order().len(), 20, "each once");
}

#[tokio::test(start_paused = true)]
async fn identities_that_hang_do_not_delay_others() {
    let rig = Rig::new(Limits::default());
    for number in 0..40 {
        rig.act(&name(number), Act::Hang);
        rig.source.watch(&key(&name(number)), Priority::WarmUp);
    }
    sleep(Duration::from_millis(1)).await;
    let begin = Instant::now();
    let good = rig.source.watch(&key("spiffe://td/ns/n/sa/good"), Priority::OnDemand);
    good.ready(within(10 * SECOND)).await.unwrap();
    assert!(begin.elapsed() <= 2 * SECOND, "{:?}", begin.elapsed());

    // The ones that hang end by their deadline, with a reason.
    let error = rig.source.watch(&key(&name(0)), Priority::WarmUp).ready(within(11 * SECOND)).await.unwrap_err();
    assert!(error.why.contains("no answer within 10 s"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn back_off_doubles_with_jitter_up_to_its_limit() {
    let rig = Rig::new(Limits::default());
    let down = "spiffe://td/ns/n/sa/down";
    rig.act(down, Act::Fail);
    rig.source.watch(&key(down), Priority::WarmUp);
    sleep(Duration::from_secs(3600)).await;
    let attempts = rig.started(down);
    let pauses: Vec<_> = attempts.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    for (number, pause) in pauses.iter().enumerate() {
        let full = f64::from(1_u32 << number.min(10)).min(150.0);
        assert!((full * 0.5 - 0.01..=full + 0.01).contains(pause), "pause {number} is {pause} s of {full}");
    }
    assert!(pauses.len() > 24, "{pauses:?}");
    let last = &pauses[pauses.len() - 5..];
    assert!(last.iter().any(|pause| (pause - last[0]).abs() > 1.0), "no jitter: {last:?}");
}

#[tokio::test(start_paused = true)]
async fn on_demand_ends_the_back_off_but_not_more_than_once_a_second() {
    let rig = Rig::new(Limits::default());
    let down = "spiffe://td/ns/n/sa/down";
    rig.act(down, Act::Fail);
    let watch = rig.source.watch(&key(down), Priority::WarmUp);
    // Deep in the back-off.
    sleep(Duration::from_secs(600)).await;
    let before = rig.started(down).len();
    let State::Failed { retry_at, .. } = watch.state() else { panic!("{watch:?}") };
    assert!(retry_at > rig.clock.now());

    let begin = Instant::now();
    let error = watch.ready(within(10 * SECOND)).await.unwrap_err();
    assert!(error.why.contains("the CA is down") && begin.elapsed() < SECOND / 10, "{error}");
    assert_eq!(rig.started(down).len(), before + 1);

    // A hundred impatient connections within ten seconds make ten attempts, not a hundred.
    let begin = Instant::now();
    while begin.elapsed() < 10 * SECOND {
        drop(watch.ready(within(SECOND / 10)).await);
    }
    let more = rig.started(down).len() - before - 1;
    assert!((9..=11).contains(&more), "{more}");

    // And when it works again, the next one has it.
    rig.act(down, Act::Issue);
    watch.ready(within(2 * SECOND)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn renewal_is_at_half_life_give_or_take_a_tenth() {
    let rig = Rig::new(Limits::default());
    let mut watches = Vec::new();
    for number in 0..50 {
        let watch = rig.source.watch(&key(&name(number)), Priority::WarmUp);
        watch.ready(within(SECOND)).await.unwrap();
        watches.push(watch);
    }
    let begin = Instant::now();
    sleep(Duration::from_secs(3600 * 45 / 100) - SECOND).await;
    assert_eq!(rig.order().len(), 50, "none before 45 %");
    sleep(Duration::from_secs(3600 / 10) + 2 * SECOND).await;
    assert_eq!(rig.order().len(), 100, "all at 55 %");
    let moments: Vec<_> = (0..50).map(|n| (rig.started(&name(n))[1] - begin).as_secs()).collect();
    let spread = moments.iter().max().unwrap() - moments.iter().min().unwrap();
    assert!(spread > 200, "spread over {spread} s");
    for watch in &watches {
        assert!(watch.credentials().is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn forgetting_the_last_user_drops_the_key() {
    let rig = Rig::new(Limits::default());
    let shared = "spiffe://td/ns/n/sa/shared";
    let first = rig.source.watch(&user(shared, "pod-1"), Priority::WarmUp);
    let second = rig.source.watch(&user(shared, "pod-2"), Priority::WarmUp);
    let credentials = first.ready(within(SECOND)).await.unwrap();
    let same = second.ready(within(SECOND)).await.unwrap();
    assert!(Arc::ptr_eq(&credentials, &same), "one certificate for one identity");
    assert_eq!(rig.order().len(), 1);
    let weak = Arc::downgrade(&credentials);
    drop((credentials, same));

    rig.source.forget(&user(shared, "pod-1"));
    assert!(second.credentials().is_some());
    rig.source.forget(&user(shared, "pod-2"));
    assert!(matches!(first.state(), State::Revoked { .. }), "{first:?}");
    assert!(weak.upgrade().is_none(), "somebody still holds the key");
    assert!(rig.source.entries().is_empty() && rig.source.stats().expiry.is_empty());

    // Nothing is renewed for nobody, and an old watch does not bring it back.
    drop(first.ready(within(SECOND)).await);
    sleep(Duration::from_secs(7200)).await;
    assert_eq!(rig.order().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn forgetting_works_in_every_phase_and_late_answers_are_ignored() {
    let rig = Rig::new(Limits { concurrent: 1, ..Limits::default() });
    let (flying, queued, failing) = (name(1), name(2), name(3));
    rig.act(&flying, Act::IssueAfter(SECOND));
    rig.act(&failing, Act::Fail);
    let watch = rig.source.watch(&key(&flying), Priority::WarmUp);
    rig.source.watch(&key(&queued), Priority::WarmUp);
    sleep(Duration::from_millis(1)).await;
    rig.source.forget(&key(&flying));
    rig.source.forget(&key(&queued));
    rig.source.watch(&key(&failing), Priority::WarmUp);
    sleep(SECOND * 2).await;
    rig.source.forget(&key(&failing));
    assert!(matches!(watch.state(), State::Revoked { .. }));
    sleep(SECOND * 300).await;
    assert!(rig.source.entries().is_empty());
    assert!(!rig.order().contains(&queued));

    // Asked for anew, it starts afresh.
    rig.source.watch(&key(&flying), Priority::WarmUp).ready(within(SECOND * 2)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_turns_prefetches_away_but_nobody_who_waits() {
    let rig = Rig::new(Limits { concurrent: 1, queue: 10, ..Limits::default() });
    rig.act(&name(0), Act::IssueAfter(SECOND));
    let watches: Vec<_> = (0..30).map(|n| rig.source.watch(&key(&name(n)), Priority::WarmUp)).collect();
    assert!(rig.source.stats().turned_away >= 19, "{:?}", rig.source.stats());
    let State::Pending { why } = watches[29].state() else { panic!("{:?}", watches[29]) };
    assert!(why.contains("too many"), "{why}");
    watches[29].ready(within(3 * SECOND)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_source_that_stops_says_so() {
    let rig = Rig::new(Limits::default());
    let hang = "spiffe://td/ns/n/sa/hang";
    rig.act(hang, Act::Hang);
    let watch = rig.source.watch(&key(hang), Priority::OnDemand);
    let error = watch.ready(within(SECOND)).await.unwrap_err();
    assert!(error.timed_out && error.to_string().contains("in time"), "{error}");
    rig.stop.cancel();
    let Rig { source, .. } = rig;
    drop(source);
    sleep(SECOND).await;
    let error = watch.ready(within(SECOND)).await.unwrap_err();
    assert!(!error.why.is_empty());
}
