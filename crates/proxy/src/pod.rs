//! What a pod's proxy knows of its pod: the workload, as discovery has it, and the workload's credentials.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch::Receiver;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use zspire_identity::{Credentials, Watch};
use zspire_model::{Snapshot, Str, Workload};
use zspire_sys::netns::Visit;

use crate::config::Listeners;
use crate::connect::Sockets;
use crate::flow::{About, Failure, Flow};
use crate::live::Registry;
use crate::metrics::Flag;
use crate::proxy::Shared;
use crate::tasks::Tasks;
use crate::tunnels::Tunnels;
use crate::verdicts::Verdicts;
use crate::watch::{self, Newest, Seen};

/// A pod to serve.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// What it is called in views: unique in this process.
    pub uid: Str,
    /// The pod as it is now.
    pub local: Receiver<Known>,
    /// Where its proxy listens.
    pub listeners: Listeners,
    /// Its network namespace, where its sockets are made; none: that of this process.
    pub place: Option<Visit>,
    /// Whether a proxy that serves the pod already is joined at its ports, to take over from it.
    pub overlap: bool,
    /// Where the pod is this process itself: the one port of it that tunnels may lead to.
    pub only: Option<u16>,
}

/// What is known of a pod.
#[derive(Debug, Clone)]
pub enum Known {
    /// Discovery does not know it, or not yet.
    Waiting,
    /// This is the pod.
    Here(Arc<Local>),
    /// It must not be served as the workload that it is said to be.
    Refused(Str),
}

impl Known {
    /// The pod, if it may be served.
    pub fn here(&self) -> Option<&Arc<Local>> {
        match self {
            Self::Here(local) => Some(local),
            Self::Waiting | Self::Refused(_) => None,
        }
    }
}

/// A pod that discovery knows.
#[derive(Debug)]
pub struct Local {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its credentials, present and future.
    pub credentials: Watch,
}

/// A pod on one worker: everything that its connections there need. Clones are the same pod.
#[derive(Clone)]
pub(crate) struct Pod(Rc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    uid: Str,
    local: Receiver<Known>,
    only: Option<u16>,
    sockets: Sockets,
    tunnels: Tunnels,
    live: Rc<Registry>,
    verdicts: Verdicts,
    newest: Newest,
    seen: RefCell<Seen>,
    connections: Tasks,
    /// What [`Shared::discovered`] was last seen to say: it never turns back.
    discovered: Cell<bool>,
    handshakes: RefCell<BySource>,
    tunnels_in: RefCell<BySource>,
    drain: CancellationToken,
}

impl Pod {
    pub(crate) fn new(
        shared: Arc<Shared>,
        spec: &PodSpec,
        worker: usize,
        sockets: Sockets,
        newest: Newest,
        drain: CancellationToken,
    ) -> Self {
        let live = Registry::new(shared.metrics.clone());
        let tunnels = Tunnels::new(&shared, worker, sockets.clone(), live.clone(), newest.clone());
        Self(Rc::new(Inner {
            shared,
            uid: spec.uid.clone(),
            local: spec.local.clone(),
            only: spec.only,
            sockets,
            tunnels,
            live,
            verdicts: Verdicts::default(),
            newest,
            seen: RefCell::default(),
            connections: Tasks::default(),
            discovered: Cell::new(false),
            handshakes: RefCell::default(),
            tunnels_in: RefCell::default(),
            drain,
        }))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }

    /// The one port that tunnels may lead to; none if there is no such restriction.
    pub(crate) fn only(&self) -> Option<u16> {
        self.0.only
    }

    pub(crate) fn sockets(&self) -> &Sockets {
        &self.0.sockets
    }

    pub(crate) fn tunnels(&self) -> &Tunnels {
        &self.0.tunnels
    }

    pub(crate) fn live(&self) -> &Rc<Registry> {
        &self.0.live
    }

    /// What policies have said.
    pub(crate) fn verdicts(&self) -> &Verdicts {
        &self.0.verdicts
    }

    /// The newest certificates of peers, of all workers.
    pub(crate) fn newest(&self) -> &Newest {
        &self.0.newest
    }

    /// Tells when the pod as discovery knows it changes.
    pub(crate) fn local_changes(&self) -> Receiver<Known> {
        self.0.local.clone()
    }

    pub(crate) fn connections(&self) -> &Tasks {
        &self.0.connections
    }

    /// Cancelled when the pod takes no new connections.
    pub(crate) fn drain(&self) -> &CancellationToken {
        &self.0.drain
    }

    /// Looks at the newest state of the mesh.
    pub(crate) fn mesh<T>(&self, f: impl FnOnce(&Snapshot) -> T) -> T {
        self.0.shared.mesh.with(f)
    }

    /// Enters a connection into table and metrics.
    pub(crate) fn open(&self, about: About) -> Flow {
        Flow::open(self.0.uid.clone(), about, &self.0.shared.metrics, &self.0.shared.connections)
    }

    /// The pod as discovery knows it; waited for, since a pod may be faster than the news of it.
    ///
    /// Discovery must have told everything once before anything is decided: without the policies every connection would be
    /// allowed, and without the workloads every destination would be outside the mesh.
    pub(crate) async fn local(&self) -> Result<Arc<Local>, NotKnown> {
        let limit = self.0.shared.config.workload_timeout;
        let deadline = Instant::now() + limit;
        if !self.0.discovered.get() {
            let mut discovered = self.0.shared.discovered.clone();
            match timeout_at(deadline, discovered.wait_for(|discovered| *discovered)).await {
                Ok(Ok(_)) => self.0.discovered.set(true),
                _ => return Err(NotKnown::Mesh { pod: self.0.uid.clone(), after: limit }),
            }
        }
        if let Known::Here(local) = self.known() {
            return Ok(local);
        }
        let mut changes = self.0.local.clone();
        let known = changes.wait_for(|known| !matches!(known, Known::Waiting));
        let known = timeout_at(deadline, known).await.ok().and_then(Result::ok).map(|known| known.clone());
        match known {
            Some(Known::Here(local)) => Ok(local),
            Some(Known::Refused(why)) => Err(NotKnown::Refused { pod: self.0.uid.clone(), why }),
            Some(Known::Waiting) | None => Err(NotKnown::Workload { pod: self.0.uid.clone(), after: limit }),
        }
    }

    /// The pod as discovery knows it now.
    pub(crate) fn known(&self) -> Known {
        self.0.local.borrow().clone()
    }

    /// The pod's credentials; waited for.
    pub(crate) async fn credentials(&self, local: &Local) -> Result<Arc<Credentials>, Failure> {
        let deadline = Instant::now() + self.0.shared.config.handshake_timeout;
        local.credentials.ready(deadline).await.map_err(|error| Failure::new(Flag::IdentityError, error))
    }

    /// Leave for one more handshake with a peer at this address.
    pub(crate) fn handshake(&self, peer: IpAddr) -> Result<Leave, Crowded> {
        let config = &self.0.shared.config;
        let (all, of_one) = (config.handshakes, config.handshakes_per_source);
        self.leave(Counted::Handshakes, neighbourhood(peer), all, of_one)
    }

    /// Leave for one more tunnel of a peer at this address.
    pub(crate) fn tunnel(&self, peer: IpAddr) -> Result<Leave, Crowded> {
        let config = &self.0.shared.config;
        // The pods of a node may be neighbours, and each has tunnels of its own.
        self.leave(Counted::Tunnels, peer.to_canonical(), config.tunnels, config.tunnels_per_source)
    }

    fn leave(&self, what: Counted, of: IpAddr, all: usize, of_one: usize) -> Result<Leave, Crowded> {
        let begun = self.counted(what).borrow_mut().begin(of, all, of_one);
        begun.map_err(|full| Crowded { what, full })?;
        Ok(Leave { pod: self.clone(), what, of })
    }

    fn counted(&self, what: Counted) -> &RefCell<BySource> {
        match what {
            Counted::Handshakes => &self.0.handshakes,
            Counted::Tunnels => &self.0.tunnels_in,
        }
    }

    /// Cuts what is no longer allowed; runs until dropped.
    pub(crate) async fn keep_watch(&self) {
        watch::keep_watch(self, &self.0.seen).await;
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pod").field(&self.0.uid).finish()
    }
}

/// Discovery does not know the pod, has not told everything yet, or tells of another than this one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotKnown {
    #[error("timed out after {after:?} waiting for workload {pod} from discovery")]
    Workload { pod: Str, after: Duration },
    #[error(
        "timed out after {after:?} waiting for discovery to tell all workloads and policies, without which nothing is decided for {pod}"
    )]
    Mesh { pod: Str, after: Duration },
    #[error("pod {pod} is not served: {why}")]
    Refused { pod: Str, why: Str },
}

impl NotKnown {
    /// A short name for metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Workload { .. } => "unknown_workload",
            Self::Mesh { .. } => "no_discovery",
            Self::Refused { .. } => "wrong_namespace",
        }
    }
}

/// What peers have: all, and those of each source. The table has no more entries than there are of them.
#[derive(Debug, Default)]
struct BySource {
    all: usize,
    by_source: HashMap<IpAddr, usize>,
}

impl BySource {
    fn begin(&mut self, of: IpAddr, all: usize, of_one: usize) -> Result<(), Full> {
        if self.all >= all {
            return Err(Full::All);
        }
        let own = self.by_source.entry(of).or_default();
        if *own >= of_one {
            return Err(Full::Source);
        }
        *own += 1;
        self.all += 1;
        Ok(())
    }

    fn end(&mut self, of: IpAddr) {
        self.all -= 1;
        if let Entry::Occupied(mut own) = self.by_source.entry(of) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
        if self.by_source.is_empty() {
            self.by_source.shrink_to_fit();
        }
    }
}

/// Whose share an address has. An IPv6 host may take any address of its /64, so that is what counts.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

/// What is counted by source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counted {
    Handshakes,
    Tunnels,
}

/// Whose share is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Full {
    All,
    Source,
}

/// No leave for one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Crowded {
    what: Counted,
    full: Full,
}

impl fmt::Display for Crowded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.what {
            Counted::Handshakes => "too many TLS handshakes are under way",
            Counted::Tunnels => "too many tunnels are open",
        })?;
        f.write_str(if self.full == Full::Source { " from this address" } else { "" })
    }
}

/// A TLS handshake under way, or a tunnel that came in; it is over when this is dropped.
#[derive(Debug)]
pub(crate) struct Leave {
    pod: Pod,
    what: Counted,
    of: IpAddr,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.pod.counted(self.what).borrow_mut().end(self.of);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_cannot_take_all_handshakes() {
        let mut under_way = BySource::default();
        let at = |text: &str| neighbourhood(text.parse().unwrap());
        let (stalling, other) = (at("10.0.0.1"), at("10.0.0.2"));
        for _ in 0..2 {
            under_way.begin(stalling, 4, 2).unwrap();
        }
        assert_eq!(under_way.begin(stalling, 4, 2), Err(Full::Source));
        assert_eq!(under_way.begin(at("::ffff:10.0.0.1"), 4, 2), Err(Full::Source));
        under_way.begin(other, 4, 2).unwrap();
        under_way.end(stalling);
        under_way.begin(stalling, 4, 2).unwrap();
        under_way.begin(at("fd00::1:2:3:4"), 4, 2).unwrap();
        assert_eq!(under_way.begin(at("fd00::1"), 4, 2), Err(Full::All));
        assert_eq!(at("fd00::1"), at("fd00::1:2:3:4"));
        for of in [stalling, stalling, other, at("fd00::")] {
            under_way.end(of);
        }
        assert!(under_way.by_source.is_empty() && under_way.all == 0);
    }
}
