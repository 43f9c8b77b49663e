//! Hands pods to node proxies: the agent's side of ZDS, as istio-cni behaves.
//!
//! Several proxies may be connected, as while a new one takes over from an old one: a pod is added to the newest, and deleted
//! from all. Each connection is a task that compares what the proxy was told with what there is, and tells it the difference;
//! whoever changes what there is only says so. A message is answered before the next is sent.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use zspire_sys::netns::Netns;
use zspire_sys::process;
use zspire_sys::scm::{Listener, SeqPacket};
use zspire_wire::workload::zds::{
    AddWorkload, DelWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello,
    workload_request::Payload, workload_response,
};

use std::os::fd::{AsFd as _, BorrowedFd};

use super::folder::Record;
use crate::descriptor::watched;

/// How long a proxy may take to say hello, and to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest message of a proxy.
const MAX_ANSWER: usize = 4096;
/// Proxies at once; an upgrade has two.
const MAX_PROXIES: usize = 8;
/// Pauses before an add that was refused is sent again.
const AGAIN_MIN: Duration = Duration::from_millis(10);
const AGAIN_MAX: Duration = Duration::from_secs(5);
/// How long the listener rests when a connection cannot be accepted.
const REST: Duration = Duration::from_millis(100);

/// A pod to be served.
#[derive(Debug, Clone)]
pub(super) struct Pod {
    pub(super) record: Record,
    pub(super) netns: Netns,
}

/// What there is, and what each proxy was told.
#[derive(Debug, Default)]
pub(super) struct Hub {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, Pod>,
    /// The newest last.
    proxies: Vec<Told>,
    next: u64,
}

/// What a proxy was told.
#[derive(Debug)]
struct Told {
    number: u64,
    pods: BTreeMap<String, Add>,
}

/// A pod that a proxy was told of.
#[derive(Debug)]
struct Add {
    inode: u64,
    /// Its answer; none yet.
    outcome: Option<Result<(), String>>,
    tries: u32,
    again_at: Instant,
}

/// How a pod stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    Served,
    Pending(String),
}

impl Hub {
    /// There is a pod, from now on.
    pub(super) fn put(&self, pod: Pod) {
        self.lock().pods.insert(pod.record.uid.clone(), pod);
        self.changed.send_replace(());
    }

    /// There is no such pod any more.
    pub(super) fn remove(&self, uid: &str) {
        self.lock().pods.remove(uid);
        self.changed.send_replace(());
    }

    /// How a pod stands with the newest proxy.
    pub(super) fn standing(&self, uid: &str) -> Standing {
        let state = self.lock();
        let Some(newest) = state.proxies.last() else {
            return Standing::Pending("no node proxy is connected to the node agent".into());
        };
        let inode = state.pods.get(uid).map(|pod| pod.record.inode);
        match newest.pods.get(uid).filter(|add| Some(add.inode) == inode).and_then(|add| add.outcome.as_ref()) {
            Some(Ok(())) => Standing::Served,
            Some(Err(why)) => Standing::Pending(format!("the node proxy cannot serve it yet: {why}")),
            None => Standing::Pending("the node proxy has not answered yet".into()),
        }
    }

    /// Waits until a pod is served, for a time; how it stands then.
    pub(super) async fn served(&self, uid: &str, time: Duration) -> Standing {
        let mut changed = self.changed.subscribe();
        let served = async { while self.standing(uid) != Standing::Served && changed.changed().await.is_ok() {} };
        let _ = timeout(time, served).await;
        self.standing(uid)
    }

    /// Waits until no proxy that is connected has a pod any more. One that does not answer is disconnected.
    pub(super) async fn left(&self, uid: &str) {
        let mut changed = self.changed.subscribe();
        while self.lock().proxies.iter().any(|told| told.pods.contains_key(uid)) {
            // It cannot fail: the sender is ours.
            let _ = changed.changed().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>) -> Option<Proxy> {
        let mut state = self.lock();
        if state.proxies.len() >= MAX_PROXIES {
            return None;
        }
        let number = state.next;
        state.next += 1;
        state.proxies.push(Told { number, pods: BTreeMap::new() });
        Some(Proxy { hub: self.clone(), number })
    }
}

/// What is to be said next.
enum Next {
    Add(Box<Pod>),
    Delete(String),
    /// Nothing, until something changes or this time has come.
    Wait(Option<Instant>),
}

impl State {
    fn next(&self, number: u64, now: Instant) -> Next {
        let Some(told) = self.proxies.iter().find(|told| told.number == number) else { return Next::Wait(None) };
        if let Some(uid) = told.pods.keys().find(|uid| !self.pods.contains_key(*uid)) {
            return Next::Delete(uid.clone());
        }
        if self.proxies.last().is_none_or(|newest| newest.number != number) {
            return Next::Wait(None);
        }
        let mut soonest = None;
        for (uid, pod) in &self.pods {
            match told.pods.get(uid) {
                Some(add) if add.inode == pod.record.inode => match &add.outcome {
                    Some(Ok(())) => continue,
                    _ if add.again_at > now => {
                        soonest = Some(soonest.map_or(add.again_at, |at: Instant| at.min(add.again_at)));
                        continue;
                    }
                    _ => return Next::Add(Box::new(pod.clone())),
                },
                _ => return Next::Add(Box::new(pod.clone())),
            }
        }
        Next::Wait(soonest)
    }
}

/// A proxy that is connected; it is forgotten with the value.
struct Proxy {
    hub: Arc<Hub>,
    number: u64,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.hub.lock().proxies.retain(|told| told.number != self.number);
        self.hub.changed.send_replace(());
    }
}

impl Proxy {
    fn change(&self, f: impl FnOnce(&mut Told)) {
        if let Some(told) = self.hub.lock().proxies.iter_mut().find(|told| told.number == self.number) {
            f(told);
        }
        self.hub.changed.send_replace(());
    }

    /// Serves the proxy until the connection ends; why it has ended.
    async fn serve(&self, socket: AsyncFd<SeqPacket>) -> io::Result<()> {
        let mut changed = self.hub.changed.subscribe();
        let snapshot: Vec<Pod> = self.hub.lock().pods.values().cloned().collect();
        for pod in snapshot {
            self.add(&socket, pod).await?;
        }
        ask(&socket, Payload::SnapshotSent(SnapshotSent {}), &[]).await?.ok();
        loop {
            changed.mark_unchanged();
            let next = self.hub.lock().next(self.number, Instant::now());
            match next {
                Next::Add(pod) => self.add(&socket, *pod).await?,
                Next::Delete(uid) => {
                    // A refusal changes nothing: the pod is gone.
                    ask(&socket, Payload::Del(DelWorkload { uid: uid.clone() }), &[]).await?.ok();
                    self.change(|told| drop(told.pods.remove(&uid)));
                }
                Next::Wait(until) => tokio::select! {
                    _ = changed.changed() => {}
                    () = due(until) => {}
                    // A proxy that speaks unasked, or is gone.
                    said = receive(&socket) => {
                        let said = said?;
                        let message = if said.is_empty() { "it is gone" } else { "it speaks without having been asked" };
                        return Err(io::Error::new(io::ErrorKind::ConnectionAborted, message));
                    }
                },
            }
        }
    }

    async fn add(&self, socket: &AsyncFd<SeqPacket>, pod: Pod) -> io::Result<()> {
        let Pod { record, netns } = pod;
        let (uid, inode) = (record.uid.clone(), record.inode);
        self.change(|told| {
            let tries = told.pods.get(&uid).map_or(0, |add| add.tries);
            told.pods.insert(uid.clone(), Add { inode, outcome: None, tries, again_at: Instant::now() });
        });
        let info =
            WorkloadInfo { name: record.name, namespace: record.namespace, service_account: record.service_account };
        let add = AddWorkload { uid: record.uid, workload_info: Some(info) };
        let answer = ask(socket, Payload::Add(add), &[netns.as_fd()]).await?;
        if let Err(error) = &answer {
            tracing::warn!(uid, error, "the node proxy refuses a pod, which is told it again");
        }
        self.change(|told| {
            let Some(add) = told.pods.get_mut(&uid) else { return };
            let pause = AGAIN_MIN.saturating_mul(1 << add.tries.min(16)).min(AGAIN_MAX);
            add.tries = if answer.is_ok() { 0 } else { add.tries + 1 };
            add.again_at = Instant::now() + pause;
            add.outcome = Some(answer);
        });
        Ok(())
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Sends a request and waits for its answer: an error of the proxy, or none.
async fn ask(
    socket: &AsyncFd<SeqPacket>,
    payload: Payload,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<Result<(), String>> {
    let message = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    let asked = async {
        socket.async_io(Interest::WRITABLE, |socket| socket.send(&message, descriptors)).await?;
        receive(socket).await
    };
    let answer = timeout(ANSWER, asked).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("it has not answered in {ANSWER:?}")))
    })?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it is gone"));
    }
    let malformed = |error: prost::DecodeError| io::Error::new(io::ErrorKind::InvalidData, error);
    match WorkloadResponse::decode(&answer[..]).map_err(malformed)?.payload {
        Some(workload_response::Payload::Ack(ack)) if ack.error.is_empty() => Ok(Ok(())),
        Some(workload_response::Payload::Ack(ack)) => Ok(Err(ack.error)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "its answer is none")),
    }
}

/// The next message; an empty one is the end.
async fn receive(socket: &AsyncFd<SeqPacket>) -> io::Result<Vec<u8>> {
    Ok(socket.async_io(Interest::READABLE, |socket| socket.recv(MAX_ANSWER)).await?.bytes)
}

/// Accepts proxies until told to stop.
pub(super) async fn accept(listener: Listener, hub: Arc<Hub>, stop: CancellationToken) {
    let listener = match watched(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot wait for node proxies"),
    };
    let mut proxies = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = proxies.join_next() => {}
            accepted = listener.async_io(Interest::READABLE, Listener::accept) => match accepted {
                Ok(socket) => {
                    let hub = hub.clone();
                    proxies.spawn(async move {
                        match greet(socket, &hub).await {
                            Ok(()) => {}
                            Err(error) => tracing::info!(%error, "a node proxy is no longer connected"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a node proxy");
                    sleep(REST).await;
                }
            },
        }
    }
}

async fn greet(socket: SeqPacket, hub: &Arc<Hub>) -> io::Result<()> {
    let user = socket.peer_user()?;
    if user != 0 && user != process::user() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("it is of user {user}")));
    }
    socket.set_nonblocking(true)?;
    let socket = watched(socket)?;
    let hello = timeout(ANSWER, receive(&socket)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    ZdsHello::decode(&hello[..]).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let Some(proxy) = hub.enter() else {
        return Err(io::Error::other(format!("{MAX_PROXIES} node proxies are connected already")));
    };
    tracing::info!("a node proxy has connected");
    proxy.serve(socket).await
}
