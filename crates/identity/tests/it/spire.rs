//! A source that asks a SPIRE agent, against a fake agent that says what the test wants at the moment it wants.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::watch;
use tokio::time::{Instant, advance, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;
use zspire_identity::spire::{
    Agent, Config, Locate, Meaning, Offer, Process, Reference, Refusal, Subscriptions, Update, Updates, subscriptions,
};
use zspire_identity::{Clock, Priority, Source, State, Story, Svid, Watch, WorkloadKey};
use zspire_model::Str;

use crate::support::{HOUR, TestCa, TestClock, id};
use crate::tls::der_of;

const WEB: &str = "spiffe://td.one/ns/shop/sa/web";
const DB: &str = "spiffe://td.one/ns/shop/sa/db";

type Said = Result<Update, Refusal>;

/// A fake: every stream that is opened is handed to the test, which speaks on it.
struct FakeAgent {
    opened: UnboundedSender<(String, UnboundedSender<Said>)>,
    refuse: Mutex<Option<Refusal>>,
}

impl fmt::Debug for FakeAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeAgent")
    }
}

#[async_trait]
impl Agent for FakeAgent {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn subscribe(&self, reference: &Reference) -> Result<Updates, Refusal> {
        let (said, heard) = mpsc::unbounded_channel();
        self.opened.send((reference.to_string(), said)).unwrap();
        match self.refuse.lock().unwrap().clone() {
            Some(refusal) => Err(refusal),
            None => Ok(Box::pin(UnboundedReceiverStream::new(heard))),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct FakeLocate(Arc<Mutex<HashMap<Str, Reference>>>);

impl Locate for FakeLocate {
    fn locate(&self, key: &WorkloadKey, _: usize) -> Result<Reference, Str> {
        let name = key.workload.clone().unwrap();
        self.0.lock().unwrap().get(&name).cloned().ok_or_else(|| "no process yet".into())
    }
}

#[derive(Debug)]
struct FakeProcess {
    over: watch::Receiver<bool>,
    of_own_user: bool,
}

impl Process for FakeProcess {
    fn pid(&self) -> i32 {
        42
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut over = self.over.clone();
        Box::pin(async move {
            let _ = over.wait_for(|over| *over).await;
        })
    }

    fn is_alive(&self) -> bool {
        !*self.over.borrow()
    }

    fn is_of_own_user(&self) -> bool {
        self.of_own_user
    }
}

struct Rig {
    clock: Arc<TestClock>,
    ca: TestCa,
    agent: Arc<FakeAgent>,
    locate: FakeLocate,
    source: Subscriptions,
    streams: UnboundedReceiver<(String, UnboundedSender<Said>)>,
    _stop: tokio_util::sync::DropGuard,
}

impl Rig {
    fn new() -> Self {
        Self::with(Config::default())
    }

    fn with(config: Config) -> Self {
        let clock = TestClock::new();
        let ca = TestCa::new(clock.now());
        let (opened, streams) = mpsc::unbounded_channel();
        let agent = Arc::new(FakeAgent { opened, refuse: Mutex::default() });
        let locate = FakeLocate::default();
        for pod in ["pod-1", "pod-2"] {
            locate.0.lock().unwrap().insert(pod.into(), Reference::Pod { uid: pod.into() });
        }
        let config = Config { clock: clock.clone(), ..config };
        let (source, driver) = subscriptions::new(agent.clone(), Arc::new(locate.clone()), config);
        let stop = CancellationToken::new();
        tokio::spawn(driver.run(stop.clone()));
        Self { clock, ca, agent, locate, source, streams, _stop: stop.drop_guard() }
    }

    fn watch(&self, name: &str, pod: &str) -> Watch {
        self.source.watch(&key(name, pod), Priority::WarmUp)
    }

    /// The next stream that is opened, within the longest pause.
    async fn stream(&mut self) -> UnboundedSender<Said> {
        let opened = timeout(Duration::from_secs(31), self.streams.recv());
        opened.await.expect("a stream is opened").unwrap().1
    }

    async fn no_stream_for(&mut self, time: Duration) {
        assert!(timeout(time, self.streams.recv()).await.is_err(), "a stream was opened");
    }

    fn offer(&self, name: &str) -> (Offer, Update) {
        let svid = self.ca.svid(name, &[("td.one", &self.ca)], self.clock.now());
        let Svid { id, chain, key, bundles } = svid;
        let offer = Offer { id, chain, key: Arc::new(Zeroizing::new(der_of(&key))), hint: "".into() };
        (offer.clone(), Update { offers: vec![offer], bundles })
    }

    fn update(&self, name: &str) -> Said {
        Ok(self.offer(name).1)
    }

    fn story(&self) -> Story {
        self.source.entries()[0].story.clone()
    }
}

fn key(name: &str, pod: &str) -> WorkloadKey {
    WorkloadKey { id: id(name), workload: Some(pod.into()) }
}

fn empty() -> Said {
    Ok(Update::default())
}

fn refusal(meaning: Meaning, why: &str) -> Refusal {
    Refusal { meaning, code: "Test", why: why.into() }
}

async fn until(watch: &mut Watch, label: &str) -> State {
    let wait = async {
        let mut state = watch.state();
        while state.label() != label {
            state = watch.changed().await.expect("the source runs");
        }
        state
    };
    timeout(2 * HOUR, wait).await.unwrap_or_else(|_| panic!("never {label}"))
}

fn why(state: State) -> String {
    match state {
        State::Pending { why } | State::Revoked { why } | State::Failed { why, .. } => why.to_string(),
        State::Ready(_) => "ready".into(),
    }
}

#[tokio::test(start_paused = true)]
async fn svids_come_and_are_replaced_and_bad_ones_change_nothing() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    stream.send(rig.update(WEB)).unwrap();
    let first = until(&mut web, "ready").await.credentials().unwrap().fingerprint();
    stream.send(rig.update(WEB)).unwrap();
    web.changed().await.unwrap();
    let second = web.credentials().unwrap().fingerprint();
    assert_ne!(first, second, "a new generation");

    let (mut offer, update) = rig.offer(WEB);
    offer.key = rig.offer(WEB).0.key;
    stream.send(Ok(Update { offers: vec![offer], ..update })).unwrap();
    // It is a state to wait for, and no time passes before it.
    while rig.story().updates < 3 {
        tokio::task::yield_now().await;
    }
    assert_eq!(web.credentials().unwrap().fingerprint(), second, "the last good one stays");
    let trouble = rig.story().trouble.unwrap();
    assert!(trouble.lasts && trouble.code == "Unusable" && trouble.why.contains("private key"), "{trouble:?}");
}

#[tokio::test(start_paused = true)]
async fn another_identity_than_expected_is_refused_by_name() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    stream.send(rig.update(DB)).unwrap();
    let failed = why(until(&mut web, "failed").await);
    assert!(failed.contains(WEB) && failed.contains(DB), "{failed}");

    let mut rig = Rig::with(Config { accept_other_id: true, ..Config::default() });
    let mut web = rig.watch(WEB, "pod-1");
    let accepted = rig.stream().await;
    accepted.send(rig.update(DB)).unwrap();
    assert_eq!(until(&mut web, "ready").await.credentials().unwrap().id().as_str(), DB, "where that is configured");

    // To an agent that attests users alone, a process of the proxy's user is the proxy.
    let (_end, over) = watch::channel(false);
    let process = Reference::Process(Arc::new(FakeProcess { over, of_own_user: true }));
    rig.locate.0.lock().unwrap().insert("pod-2".into(), process);
    let mut web = rig.watch(WEB, "pod-2");
    let stream = rig.stream().await;
    stream.send(rig.update(DB)).unwrap();
    let failed = why(until(&mut web, "failed").await);
    assert!(failed.contains(WEB) && failed.contains(DB), "{failed}");
}

#[tokio::test(start_paused = true)]
async fn nothing_registered_is_told_and_asked_again() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    stream.send(empty()).unwrap();
    web.changed().await.unwrap();
    let told = why(web.state());
    assert!(told.contains("no entry matches this workload (pod pod-1)") && told.contains(WEB), "{told}");
    // Selectors are looked at when a stream is opened.
    let again = rig.stream().await;
    assert!(stream.is_closed());
    again.send(rig.update(WEB)).unwrap();
    until(&mut web, "ready").await;
    rig.no_stream_for(HOUR / 2).await;
}

/// What an agent says that has nothing for the workload: nothing at all, or another one's SVID, as to a process of root that is
/// also the proxy's.
fn without(rig: &Rig) -> [Said; 2] {
    [empty(), rig.update(DB)]
}

#[tokio::test(start_paused = true)]
async fn a_redaction_takes_the_key_away_as_soon_as_the_agent_confirms_it() {
    for nothing in [0, 1] {
        let mut rig = Rig::new();
        let said = |rig: &Rig| without(rig)[nothing].clone();
        let mut web = rig.watch(WEB, "pod-1");
        let stream = rig.stream().await;
        stream.send(rig.update(WEB)).unwrap();
        let held = Arc::downgrade(until(&mut web, "ready").await.credentials().unwrap());
        let before = Instant::now();
        stream.send(said(&rig)).unwrap();
        let again = rig.stream().await;
        assert!(stream.is_closed() && web.credentials().is_some(), "it is in doubt");
        again.send(said(&rig)).unwrap();
        let revoked = why(until(&mut web, "revoked").await);
        assert!(before.elapsed() < Duration::from_millis(100), "{:?}", before.elapsed());
        assert!(held.upgrade().is_none(), "the key is gone");
        assert!(revoked.contains("no entry matches"), "{revoked}");
        assert_eq!(revoked.contains(DB), nothing == 1, "{revoked}");
        // An entry that is made again is announced by another empty message.
        again.send(empty()).unwrap();
        again.send(rig.update(WEB)).unwrap();
        until(&mut web, "ready").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_gap_while_an_agent_replaces_svids_is_no_redaction() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    stream.send(rig.update(WEB)).unwrap();
    let first = until(&mut web, "ready").await.credentials().unwrap().fingerprint();
    stream.send(empty()).unwrap();
    // It waits with its answer until there is one.
    let again = rig.stream().await;
    rig.no_stream_for(Duration::from_secs(5)).await;
    assert!(web.credentials().is_some());
    again.send(rig.update(WEB)).unwrap();
    let next = web.changed().await.unwrap();
    assert_ne!(next.credentials().expect("it was never taken away").fingerprint(), first);
    rig.no_stream_for(Duration::from_secs(60)).await;
    assert!(web.credentials().is_some(), "and it is not taken away afterwards");
    // An agent that never says more is not waited for.
    let before = Instant::now();
    again.send(empty()).unwrap();
    let silent = rig.stream().await;
    until(&mut web, "revoked").await;
    assert_eq!(before.elapsed().as_secs(), 10);
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn doubt_ends_also_when_the_agent_goes_or_knows_nobody() {
    for (meaning, seconds) in [(Meaning::Outage, 10), (Meaning::Unregistered, 0)] {
        let mut rig = Rig::new();
        let mut web = rig.watch(WEB, "pod-1");
        let stream = rig.stream().await;
        stream.send(rig.update(WEB)).unwrap();
        until(&mut web, "ready").await;
        // Without doubt neither takes anything away.
        stream.send(Err(refusal(meaning, "not now"))).unwrap();
        let stream = rig.stream().await;
        assert!(web.credentials().is_some());
        *rig.agent.refuse.lock().unwrap() = Some(refusal(meaning, "not now"));
        let before = Instant::now();
        stream.send(empty()).unwrap();
        until(&mut web, "revoked").await;
        assert_eq!(before.elapsed().as_secs(), seconds, "{meaning:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_keeps_the_svid_until_it_expires() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    stream.send(rig.update(WEB)).unwrap();
    until(&mut web, "ready").await;
    *rig.agent.refuse.lock().unwrap() = Some(refusal(Meaning::Outage, "connection refused"));
    stream.send(Err(refusal(Meaning::Outage, "error reading from server: EOF"))).unwrap();
    let begun = Instant::now();
    rig.stream().await;
    assert!(web.credentials().is_some(), "it works until it expires");
    let failed = why(until(&mut web, "failed").await);
    assert!(begun.elapsed() > HOUR - Duration::from_secs(60), "after {:?}", begun.elapsed());
    assert!(failed.contains("expired") && failed.contains("connection refused"), "{failed}");
    // And when the agent is there again, so is the SVID.
    *rig.agent.refuse.lock().unwrap() = None;
    while rig.streams.try_recv().is_ok() {}
    rig.stream().await.send(rig.update(WEB)).unwrap();
    until(&mut web, "ready").await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_serves_an_expired_svid_is_not_believed() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    let update = rig.update(WEB);
    stream.send(update.clone()).unwrap();
    until(&mut web, "ready").await;
    rig.clock.jump(2 * HOUR);
    let jumped = Instant::now();
    until(&mut web, "failed").await;
    assert!(jumped.elapsed() <= Duration::from_secs(10), "a jump of the clock is noticed");
    stream.send(update).unwrap();
    web.changed().await.unwrap();
    let failed = why(web.state());
    assert!(failed.contains("expired"), "{failed}");
}

#[tokio::test(start_paused = true)]
async fn a_workload_that_is_gone_loses_its_key() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    stream.send(rig.update(WEB)).unwrap();
    until(&mut web, "ready").await;
    stream.send(Err(refusal(Meaning::Gone, "pod not found on agent node"))).unwrap();
    let revoked = why(until(&mut web, "revoked").await);
    assert!(revoked.contains("not found"), "{revoked}");

    let (end, over) = watch::channel(false);
    let process = Reference::Process(Arc::new(FakeProcess { over, of_own_user: false }));
    rig.locate.0.lock().unwrap().insert("pod-2".into(), process);
    let mut db = rig.watch(DB, "pod-2");
    let (reference, stream) = rig.streams.recv().await.unwrap();
    let stream = if reference == "process 42" { stream } else { rig.stream().await };
    stream.send(rig.update(DB)).unwrap();
    until(&mut db, "ready").await;
    end.send(true).unwrap();
    let revoked = why(until(&mut db, "revoked").await);
    assert!(revoked.contains("ended"), "the agent does not notice: {revoked}");
}

#[tokio::test(start_paused = true)]
async fn a_process_that_ends_loses_its_identity_also_while_the_agent_is_away() {
    let mut rig = Rig::new();
    let (end, over) = watch::channel(false);
    let process = Reference::Process(Arc::new(FakeProcess { over, of_own_user: false }));
    rig.locate.0.lock().unwrap().insert("pod-1".into(), process);
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    stream.send(rig.update(WEB)).unwrap();
    until(&mut web, "ready").await;
    *rig.agent.refuse.lock().unwrap() = Some(refusal(Meaning::Outage, "away"));
    drop(stream);
    for _ in 0..3 {
        rig.stream().await;
    }
    assert!(web.credentials().is_some(), "an outage is none of the workload's");
    end.send(true).unwrap();
    let revoked = why(until(&mut web, "revoked").await);
    assert!(revoked.contains("ended"), "{revoked}");
}

#[tokio::test(start_paused = true)]
async fn an_svid_is_not_taken_for_a_process_that_has_ended() {
    let mut rig = Rig::new();
    let (end, over) = watch::channel(false);
    let process = FakeProcess { over, of_own_user: false };
    rig.locate.0.lock().unwrap().insert("pod-1".into(), Reference::Process(Arc::new(process)));
    let mut web = rig.watch(WEB, "pod-1");
    let stream = rig.stream().await;
    // Both are there when the source looks.
    end.send(true).unwrap();
    stream.send(rig.update(WEB)).unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(web.credentials().is_none());
    assert!(why(web.changed().await.unwrap()).contains("ended"));
}

#[tokio::test(start_paused = true)]
async fn what_is_asked_wrongly_is_not_asked_again() {
    let mut rig = Rig::new();
    *rig.agent.refuse.lock().unwrap() = Some(refusal(Meaning::Mistake, "security header missing"));
    let mut web = rig.watch(WEB, "pod-1");
    rig.stream().await;
    until(&mut web, "failed").await;
    rig.no_stream_for(Duration::from_secs(500)).await;
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_ends_the_pause_but_not_more_than_once_a_second() {
    let mut rig = Rig::new();
    *rig.agent.refuse.lock().unwrap() = Some(refusal(Meaning::Outage, "away"));
    let mut web = rig.watch(WEB, "pod-1");
    rig.stream().await;
    until(&mut web, "failed").await;
    // Let the pauses become long.
    advance(Duration::from_secs(120)).await;
    while rig.streams.try_recv().is_ok() {}
    for _ in 0..3 {
        let asked = Instant::now();
        let waiting = web.clone();
        let waiter = tokio::spawn(async move { waiting.ready(Instant::now() + Duration::from_secs(20)).await });
        rig.stream().await;
        assert!(asked.elapsed() <= Duration::from_secs(1), "{:?}", asked.elapsed());
        waiter.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn workloads_never_share_a_key_and_forgetting_one_leaves_the_other() {
    let mut rig = Rig::new();
    let (mut one, mut two) = (rig.watch(WEB, "pod-1"), rig.watch(WEB, "pod-2"));
    let streams = [rig.streams.recv().await.unwrap(), rig.streams.recv().await.unwrap()];
    for (_, stream) in &streams {
        stream.send(rig.update(WEB)).unwrap();
    }
    let fingerprint = |state: State| state.credentials().unwrap().fingerprint();
    let (a, b) = (fingerprint(until(&mut one, "ready").await), fingerprint(until(&mut two, "ready").await));
    assert_ne!(a, b);
    assert_eq!(rig.source.entries().len(), 2);
    rig.source.forget(&key(WEB, "pod-1"));
    until(&mut one, "revoked").await;
    let gone = streams.iter().find(|(reference, _)| reference == "pod pod-1").unwrap();
    gone.1.closed().await;
    assert!(two.credentials().is_some());
    assert_eq!(rig.source.entries().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_found_yet_is_looked_for_again() {
    let mut rig = Rig::new();
    let mut web = rig.watch(WEB, "pod-3");
    let told = loop {
        let told = why(web.state());
        if told == "no process yet" {
            break told;
        }
        web.changed().await.unwrap();
    };
    assert_eq!(told, "no process yet");
    rig.locate.0.lock().unwrap().insert("pod-3".into(), Reference::Pod { uid: "pod-3".into() });
    rig.stream().await.send(rig.update(WEB)).unwrap();
    until(&mut web, "ready").await;
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_not_sent_away_by_the_first_refusal() {
    let mut rig = Rig::new();
    *rig.agent.refuse.lock().unwrap() = Some(refusal(Meaning::Unregistered, "no identity issued"));
    let web = rig.watch(WEB, "pod-1");
    let waiting = {
        let web = web.clone();
        tokio::spawn(async move { web.ready(Instant::now() + Duration::from_secs(5)).await.map(|it| it.id().clone()) })
    };
    rig.stream().await;
    rig.stream().await;
    *rig.agent.refuse.lock().unwrap() = None;
    rig.stream().await.send(rig.update(WEB)).unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().as_str(), WEB);

    // The wait has an end, with the reason.
    *rig.agent.refuse.lock().unwrap() = Some(refusal(Meaning::Outage, "away"));
    let db = rig.watch(DB, "pod-2");
    let before = Instant::now();
    let late = db.ready(Instant::now() + Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(
        (before.elapsed().as_secs(), late.to_string()),
        (5, "the identity is not ready in time: away".to_owned())
    );
}
