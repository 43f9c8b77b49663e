//! Pods and ZDS against a launcher that only remembers what it was told.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use prost::Message;
use tokio::time::Instant;
use zspire_wire::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    workload_request::Payload, workload_response,
};

use super::zds::{Packet, handle};
use super::{Launcher, Namespace, PodInfo, Pods};

#[derive(Clone, Default)]
struct Recorder {
    events: Rc<RefCell<Vec<String>>>,
    refuse: Rc<RefCell<Option<String>>>,
}

impl Launcher for Recorder {
    type Proxy = u64;

    fn start(&self, uid: &str, _: &PodInfo, namespace: &Namespace) -> Result<u64, anyhow::Error> {
        if let Some(why) = &*self.refuse.borrow() {
            anyhow::bail!("{why}");
        }
        self.events.borrow_mut().push(format!("start {uid}@{}", namespace.inode));
        Ok(namespace.inode)
    }

    fn drain(&self, uid: &str, proxy: u64) {
        self.events.borrow_mut().push(format!("drain {uid}@{proxy}"));
    }
}

struct Rig {
    recorder: Recorder,
    pods: Pods<Recorder>,
    now: Instant,
}

impl Rig {
    fn new() -> Self {
        let recorder = Recorder::default();
        Self { pods: Pods::new(recorder.clone()), recorder, now: Instant::now() }
    }

    /// Sends a message with so many descriptors; the answer's error.
    fn send(&mut self, payload: Payload, descriptors: usize) -> String {
        let message = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        self.packet(message, descriptors)
    }

    fn packet(&mut self, message: Vec<u8>, descriptors: usize) -> String {
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let descriptors = (0..descriptors).map(|_| file()).collect();
        let inode = |_: &OwnedFd| Ok(INODE.with(|i| *i.borrow()));
        let handled = handle(&mut self.pods, Packet { message, descriptors, truncated: false }, inode, self.now);
        let answer = WorkloadResponse::decode(&handled.answer[..]).unwrap();
        let Some(workload_response::Payload::Ack(ack)) = answer.payload else { panic!("not an ack") };
        ack.error
    }

    fn events(&self) -> Vec<String> {
        std::mem::take(&mut self.recorder.events.borrow_mut())
    }
}

thread_local! {
    static INODE: RefCell<u64> = const { RefCell::new(1) };
}

fn add(uid: &str, inode: u64) -> Payload {
    INODE.with(|i| *i.borrow_mut() = inode);
    let info = WorkloadInfo { name: uid.into(), namespace: "shop".into(), service_account: "sa".into() };
    Payload::Add(AddWorkload { uid: uid.into(), workload_info: Some(info) })
}

fn del(uid: &str) -> Payload {
    Payload::Del(DelWorkload { uid: uid.into() })
}

fn keep(uid: &str) -> Payload {
    Payload::Keep(KeepWorkload { uid: uid.into() })
}

fn sent() -> Payload {
    Payload::SnapshotSent(SnapshotSent {})
}

#[test]
fn adds_are_idempotent_and_a_new_namespace_replaces() {
    let mut rig = Rig::new();
    rig.pods.begin_snapshot();
    assert_eq!(rig.send(add("a", 1), 1), "");
    assert_eq!(rig.send(sent(), 0), "");
    assert_eq!(rig.send(add("a", 1), 1), "", "the agent repeats its adds");
    assert_eq!(rig.send(add("a", 2), 1), "", "same uid, new sandbox, no del between");
    assert_eq!(rig.events(), ["start a@1", "drain a@1", "start a@2"]);
}

#[test]
fn deletions_of_unknown_pods_are_acknowledged() {
    let mut rig = Rig::new();
    rig.send(add("a", 1), 1);
    assert_eq!(rig.send(del("a"), 0), "");
    assert_eq!(rig.send(del("a"), 0), "");
    assert_eq!(rig.send(del("never"), 0), "");
    assert_eq!(rig.events(), ["start a@1", "drain a@1"]);
}

#[test]
fn what_a_snapshot_does_not_name_is_gone() {
    let mut rig = Rig::new();
    rig.pods.begin_snapshot();
    for (uid, inode) in [("a", 1), ("b", 2), ("c", 3)] {
        rig.send(add(uid, inode), 1);
    }
    rig.send(sent(), 0);
    rig.events();
    // The agent reconnects: `a` again, `b` without a namespace, `c` is absent.
    rig.pods.begin_snapshot();
    assert_eq!(rig.send(add("a", 1), 1), "");
    assert_eq!(rig.send(keep("b"), 0), "");
    assert_eq!(rig.events(), Vec::<String>::new(), "proxies run on until the snapshot is whole");
    assert_eq!(rig.send(sent(), 0), "");
    assert_eq!(rig.events(), ["drain c@3"]);
    assert_eq!(rig.send(keep("a"), 0), "keep is for the snapshot, which has ended");
}

#[test]
fn a_failed_start_is_refused_kept_and_retried() {
    let mut rig = Rig::new();
    *rig.recorder.refuse.borrow_mut() = Some("port 15001 is taken".into());
    assert_eq!(rig.send(add("a", 1), 1), "port 15001 is taken");
    assert_eq!(rig.pods.view()[0].pending.as_deref(), Some("port 15001 is taken"));
    let due = rig.pods.next_retry().unwrap();
    assert!(due > rig.now && due <= rig.now + Duration::from_secs(5));
    rig.pods.retry(rig.now);
    assert!(rig.events().is_empty(), "not due yet");
    *rig.recorder.refuse.borrow_mut() = None;
    rig.pods.retry(due);
    assert_eq!(rig.events(), ["start a@1"]);
    assert_eq!(rig.pods.next_retry(), None);
    assert_eq!(rig.pods.view()[0].pending, None);
}

#[test]
fn pauses_between_retries_grow_to_five_seconds() {
    let mut rig = Rig::new();
    *rig.recorder.refuse.borrow_mut() = Some("no".into());
    rig.send(add("a", 1), 1);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let due = rig.pods.next_retry().unwrap();
        pauses.push((due - rig.now).as_millis());
        rig.now = due;
        rig.pods.retry(due);
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
}

#[test]
fn a_bad_message_is_answered_and_concerns_nobody_else() {
    let mut rig = Rig::new();
    rig.send(add("a", 1), 1);
    rig.events();
    let long = "x".repeat(300);
    let cases: Vec<(Vec<u8>, usize, &str)> = vec![
        (vec![0xff, 0xff], 0, "malformed message: "),
        (Vec::new(), 0, "malformed message: unknown request"),
        (WorkloadRequest { payload: Some(add("b", 9)) }.encode_to_vec(), 0, "expected 1 descriptors, got 0"),
        (WorkloadRequest { payload: Some(add("b", 9)) }.encode_to_vec(), 3, "expected 1 descriptors, got 3"),
        (WorkloadRequest { payload: Some(del("a")) }.encode_to_vec(), 1, "expected 0 descriptors, got 1"),
        (WorkloadRequest { payload: Some(add(&long, 9)) }.encode_to_vec(), 1, "name: expected 1 to 253"),
        (WorkloadRequest { payload: Some(add("", 9)) }.encode_to_vec(), 1, "name: expected 1 to 253"),
        (WorkloadRequest { payload: Some(del("../a")) }.encode_to_vec(), 0, "uid: expected 1 to 253"),
    ];
    for (message, descriptors, expected) in cases {
        let error = rig.packet(message, descriptors);
        assert!(error.starts_with(expected), "{error:?} does not begin with {expected:?}");
    }
    assert!(rig.events().is_empty());
}

#[test]
fn descriptors_that_are_not_used_are_closed() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut rig = Rig::new();
    // Other tests of this binary open descriptors too: compare many against few.
    let before = open();
    for _ in 0..500 {
        rig.packet(vec![0xff], 3);
        rig.send(add("a", 1), 5);
    }
    assert!(open() < before + 500);
}

/// Messages that a real node agent was seen to send, in its order, with repetitions.
#[test]
fn a_recorded_conversation_ends_with_its_pods() {
    let mut rig = Rig::new();
    rig.pods.begin_snapshot();
    for (uid, inode) in [("web", 11), ("db", 12)] {
        assert_eq!(rig.send(add(uid, inode), 1), "");
    }
    assert_eq!(rig.send(sent(), 0), "");
    for (uid, inode) in [("db", 12), ("web", 11), ("late", 13)] {
        assert_eq!(rig.send(add(uid, inode), 1), "");
    }
    assert_eq!(rig.send(del("late"), 0), "");
    assert_eq!(rig.send(del("late"), 0), "");
    assert_eq!(rig.send(add("web", 21), 1), "");
    let up: BTreeMap<String, Option<String>> = rig.pods.view().into_iter().map(|p| (p.uid, p.pending)).collect();
    assert_eq!(up, BTreeMap::from([("db".to_owned(), None), ("web".to_owned(), None)]));
    assert_eq!(
        rig.events(),
        ["start web@11", "start db@12", "start late@13", "drain late@13", "drain web@11", "start web@21"]
    );
}

/// Everything that Istio's node agent was recorded to say, connection by connection, replayed in order.
#[test]
fn recorded_conversations_are_answered_and_leave_the_pods_they_name() {
    for text in [include_str!("recorded/zds-full.jsonl"), include_str!("recorded/zds-extra.jsonl")] {
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let mut rig = Rig::new();
        // What the pods must be: those of the whole snapshot, and what was said since.
        let (mut expected, mut named) = (BTreeMap::new(), None::<BTreeMap<String, u64>>);
        let mut messages = 0;
        for line in lines {
            // Where two clients were connected, each heard a part of it: this is the one that heard it all.
            if line["event"] == "connected" {
                rig.pods.begin_snapshot();
                named = Some(BTreeMap::new());
            }
            let Some((kind, of)) = line["recv"].as_object().and_then(|recv| recv.iter().next()) else { continue };
            messages += 1;
            let uid = of["uid"].as_str().unwrap_or_default();
            let inode = line["netns"][0].as_u64().unwrap_or_default();
            let (payload, error) = match kind.as_str() {
                "add" => {
                    named.as_mut().unwrap_or(&mut expected).insert(uid.to_owned(), inode);
                    if named.is_some() {
                        expected.insert(uid.to_owned(), inode);
                    }
                    let info = &of["workload_info"];
                    let field = |name: &str| info[name].as_str().unwrap().to_owned();
                    INODE.with(|i| *i.borrow_mut() = inode);
                    let info = WorkloadInfo {
                        name: field("name"),
                        namespace: field("namespace"),
                        service_account: field("service_account"),
                    };
                    (Payload::Add(AddWorkload { uid: uid.into(), workload_info: Some(info) }), "")
                }
                "keep" => {
                    if let (Some(named), Some(inode)) = (&mut named, expected.get(uid)) {
                        named.insert(uid.to_owned(), *inode);
                    }
                    (keep(uid), "")
                }
                "del" => {
                    named.as_mut().map(|named| named.remove(uid));
                    expected.remove(uid);
                    (del(uid), "")
                }
                "snapshot_sent" => {
                    if let Some(named) = named.take() {
                        expected = named;
                    }
                    (sent(), "")
                }
                other => panic!("{other} was recorded"),
            };
            let descriptors = line["fds"].as_u64().unwrap() as usize;
            assert_eq!(rig.send(payload, descriptors), error, "{line}");
            let served: BTreeMap<String, u64> =
                rig.pods.pods.iter().map(|(uid, pod)| (uid.clone(), pod.namespace.inode)).collect();
            assert_eq!(served, expected, "after {line}");
        }
        assert!(messages > 10, "{messages}");
    }
}
