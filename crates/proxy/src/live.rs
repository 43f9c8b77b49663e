//! The connections of a pod on one worker that somebody may want to cut: denied by a policy that is new, because the
//! credentials under them were taken away, or because the proxy stops.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::task::{Poll, Waker};

use slab::Slab;
use zspire_model::SpiffeId;
use zspire_model::authorize::{self, Connection, Decision};
use zspire_model::{Snapshot, Workload};

use crate::flow::Failure;
use crate::metrics::Flag;

/// What a policy was asked about a connection, to ask again.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    pub(crate) destination: SocketAddr,
    pub(crate) peer: Option<SpiffeId>,
    pub(crate) peer_address: IpAddr,
}

impl Question {
    /// Asks the policies of a snapshot.
    pub(crate) fn ask(&self, snapshot: &Snapshot, workload: &Workload) -> authorize::Verdict {
        let connection = Connection {
            destination: workload,
            destination_address: self.destination,
            peer: self.peer.as_ref(),
            peer_address: self.peer_address,
        };
        authorize::authorize(snapshot, &connection)
    }
}

/// Live connections.
#[derive(Default)]
pub(crate) struct Registry(RefCell<Slab<Rc<Entry>>>);

struct Entry {
    /// None for a connection that this end has opened: its policies are the other end's.
    question: Option<Question>,
    /// Whether it depends on the pod's credentials.
    in_tunnel: bool,
    cut: RefCell<Cut>,
}

#[derive(Default)]
struct Cut {
    why: Option<Failure>,
    waker: Option<Waker>,
}

/// A connection's place in the registry; it leaves when this is dropped.
pub(crate) struct Place {
    registry: Rc<Registry>,
    entry: Rc<Entry>,
    key: usize,
}

impl Registry {
    /// Enters a connection.
    pub(crate) fn enter(self: &Rc<Self>, question: Option<Question>, in_tunnel: bool) -> Place {
        let entry = Rc::new(Entry { question, in_tunnel, cut: RefCell::default() });
        let key = self.0.borrow_mut().insert(entry.clone());
        Place { registry: self.clone(), entry, key }
    }

    /// Cuts what policies now deny.
    pub(crate) fn ask_again(&self, snapshot: &Snapshot, workload: &Workload) {
        for (_, entry) in self.0.borrow().iter() {
            let Some(question) = &entry.question else { continue };
            if let Decision::Denied(denied) = question.ask(snapshot, workload).decision {
                entry.cut(Failure::new(Flag::Deny, format_args!("connection closed due to policy change: {denied}")));
            }
        }
    }

    /// Cuts all of them: the proxy stops.
    pub(crate) fn cut_all(&self) {
        for (_, entry) in self.0.borrow().iter() {
            entry.cut(Failure::new(Flag::None, "connection closed: the proxy is shutting down"));
        }
    }

    /// Cuts all of them: the pod is not what it was taken for.
    pub(crate) fn refuse(&self, why: &str) {
        for (_, entry) in self.0.borrow().iter() {
            entry.cut(Failure::new(Flag::IdentityError, format_args!("the pod is no longer served: {why}")));
        }
    }

    /// Cuts what runs in tunnels that are no longer authenticated.
    pub(crate) fn revoke(&self, why: &str) {
        for (_, entry) in self.0.borrow().iter().filter(|(_, entry)| entry.in_tunnel) {
            entry.cut(Failure::new(Flag::IdentityError, format_args!("credentials revoked: {why}")));
        }
    }
}

impl Entry {
    fn cut(&self, why: Failure) {
        let mut cut = self.cut.borrow_mut();
        cut.why.get_or_insert(why);
        if let Some(waker) = cut.waker.take() {
            waker.wake();
        }
    }
}

impl Place {
    /// Completes when the connection is to be cut. Safe to cancel.
    pub(crate) async fn cut(&self) {
        poll_fn(|cx| {
            let mut cut = self.entry.cut.borrow_mut();
            if cut.why.is_some() {
                return Poll::Ready(());
            }
            match &cut.waker {
                Some(waker) if waker.will_wake(cx.waker()) => {}
                _ => cut.waker = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
        .await;
    }

    /// Why it was cut, if it was.
    pub(crate) fn why(&self) -> Option<Failure> {
        self.entry.cut.borrow().why.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut entries = self.registry.0.borrow_mut();
        entries.try_remove(self.key);
        if entries.is_empty() {
            entries.shrink_to_fit();
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("live", &self.0.borrow().len()).finish()
    }
}
