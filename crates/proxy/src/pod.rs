//! What a pod's proxy knows of its pod: the workload, as discovery has it, and the workload's credentials.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use zspire_identity::{Credentials, Watch};
use zspire_model::{Snapshot, Str, Workload};

use crate::config::Listeners;
use crate::connect::Sockets;
use crate::flow::{About, Failure, Flow};
use crate::live::Registry;
use crate::metrics::Flag;
use crate::proxy::Shared;
use crate::tasks::Tasks;
use crate::tunnels::Tunnels;

/// A pod to serve.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// What it is called in views: unique in this process.
    pub uid: Str,
    /// The pod as it is now; none while discovery does not know it.
    pub local: watch::Receiver<Option<Arc<Local>>>,
    /// Where its proxy listens.
    pub listeners: Listeners,
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
    local: watch::Receiver<Option<Arc<Local>>>,
    sockets: Sockets,
    tunnels: Tunnels,
    live: Rc<Registry>,
    connections: Tasks,
    handshakes: RefCell<usize>,
    drain: CancellationToken,
}

impl Pod {
    pub(crate) fn new(shared: Arc<Shared>, spec: &PodSpec, sockets: Sockets, drain: CancellationToken) -> Self {
        let tunnels = Tunnels::new(&shared, sockets.clone());
        Self(Rc::new(Inner {
            shared,
            uid: spec.uid.clone(),
            local: spec.local.clone(),
            sockets,
            tunnels,
            live: Rc::default(),
            connections: Tasks::default(),
            handshakes: RefCell::new(0),
            drain,
        }))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
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
    pub(crate) async fn local(&self) -> Result<Arc<Local>, NotKnown> {
        if let Some(local) = self.known() {
            return Ok(local);
        }
        let limit = self.0.shared.config.workload_timeout;
        let mut changes = self.0.local.clone();
        let known = timeout_at(Instant::now() + limit, changes.wait_for(Option::is_some)).await;
        match known {
            Ok(Ok(known)) => known.clone().ok_or_else(|| self.not_known(limit)),
            _ => Err(self.not_known(limit)),
        }
    }

    /// The pod as discovery knows it now.
    pub(crate) fn known(&self) -> Option<Arc<Local>> {
        self.0.local.borrow().clone()
    }

    fn not_known(&self, after: Duration) -> NotKnown {
        NotKnown { pod: self.0.uid.clone(), after }
    }

    /// The pod's credentials; waited for.
    pub(crate) async fn credentials(&self, local: &Local) -> Result<Arc<Credentials>, Failure> {
        let deadline = Instant::now() + self.0.shared.config.handshake_timeout;
        local.credentials.ready(deadline).await.map_err(|error| Failure::new(Flag::IdentityError, error))
    }

    /// Leave for one more handshake; none if too many are under way.
    pub(crate) fn handshake(&self) -> Option<Handshake> {
        let mut under_way = self.0.handshakes.borrow_mut();
        if *under_way >= self.0.shared.config.handshakes {
            return None;
        }
        *under_way += 1;
        Some(Handshake(self.clone()))
    }

    /// Cuts what the newest policies deny and what runs on credentials that were taken away; runs until dropped.
    pub(crate) async fn keep_watch(&self) {
        let mut authorization = self.0.shared.authorization.clone();
        let mut local = self.0.local.clone();
        loop {
            let credentials = self.known().map(|local| local.credentials.clone());
            tokio::select! {
                changed = authorization.changed() => if changed.is_err() { return },
                changed = local.changed() => if changed.is_err() { return },
                why = revoked(credentials) => {
                    self.0.tunnels.retire_all();
                    self.0.live.revoke(&why);
                    // The next look is at the next change: it stays revoked until then.
                    if local.changed().await.is_err() { return }
                }
            }
            if let Some(local) = self.known() {
                self.mesh(|snapshot| self.0.live.ask_again(snapshot, &local.workload));
            }
        }
    }
}

/// Completes when credentials are taken away, with the reason.
async fn revoked(credentials: Option<Watch>) -> Str {
    use zspire_identity::State;
    if let Some(mut credentials) = credentials {
        let mut state = Some(credentials.state());
        while let Some(now) = state {
            if let State::Revoked { why } = now {
                return why;
            }
            state = credentials.changed().await;
        }
    }
    std::future::pending().await
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pod").field(&self.0.uid).finish()
    }
}

/// Discovery does not know the pod.
#[derive(Debug, thiserror::Error)]
#[error("timed out after {after:?} waiting for workload {pod} from discovery")]
pub(crate) struct NotKnown {
    pod: Str,
    after: Duration,
}

/// A TLS handshake under way.
#[derive(Debug)]
pub(crate) struct Handshake(Pod);

impl Drop for Handshake {
    fn drop(&mut self) {
        *self.0.0.handshakes.borrow_mut() -= 1;
    }
}
