//! The tunnels of a pod on one worker, and what their ends have proved to each other.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::SystemTime;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zspire_identity::Peer;
use zspire_model::SpiffeId;

use super::{Registry, Verdict};
use crate::metrics::Reporter;

/// What the ends of a tunnel have proved to each other.
#[derive(Debug)]
pub(crate) struct Proof {
    pub(crate) reporter: Reporter,
    /// The pod's identity then.
    pub(crate) own: SpiffeId,
    /// Where the peer is.
    pub(crate) address: IpAddr,
    /// The peer; a newer certificate of it takes the place of one that expires.
    pub(crate) peer: RefCell<Peer>,
    pub(super) users: Cell<usize>,
    /// Since when nobody who is trusted vouches for the peer any more, while it may still show another certificate.
    pub(crate) doubted: Cell<Option<Instant>>,
    withdrawn: RefCell<Option<Verdict>>,
    told: CancellationToken,
}

impl Proof {
    /// Whether connections rest on it.
    pub(crate) fn is_used(&self) -> bool {
        self.users.get() > 0
    }

    /// Until when the peer's certificate is valid.
    pub(crate) fn not_after(&self) -> SystemTime {
        self.peer.borrow().not_after
    }

    /// Why it is not valid any more, if so.
    pub(crate) fn withdrawn(&self) -> Option<Verdict> {
        self.withdrawn.borrow().clone()
    }

    /// Completes when it is not valid any more. Safe to cancel.
    pub(crate) async fn is_withdrawn(&self) {
        self.told.cancelled().await;
    }

    pub(super) fn withdraw(&self, verdict: Verdict) {
        self.withdrawn.borrow_mut().get_or_insert(verdict);
        self.told.cancel();
    }
}

/// A tunnel in the registry; it leaves when this is dropped.
pub(crate) struct Proved {
    registry: Rc<Registry>,
    proof: Rc<Proof>,
    key: usize,
}

impl Proved {
    pub(crate) fn proof(&self) -> &Rc<Proof> {
        &self.proof
    }
}

impl Drop for Proved {
    fn drop(&mut self) {
        let mut proofs = self.registry.proofs.borrow_mut();
        proofs.try_remove(self.key);
        if proofs.is_empty() {
            proofs.shrink_to_fit();
        }
    }
}

impl Registry {
    /// Enters a tunnel whose ends have proved who they are.
    pub(crate) fn prove(self: &Rc<Self>, reporter: Reporter, own: SpiffeId, peer: Peer, address: IpAddr) -> Proved {
        let first = self.proofs.borrow().iter().all(|(_, proof)| proof.peer.borrow().not_after > peer.not_after);
        let proof = Rc::new(Proof {
            reporter,
            own,
            address,
            peer: RefCell::new(peer),
            users: Cell::new(0),
            doubted: Cell::default(),
            withdrawn: RefCell::default(),
            told: CancellationToken::new(),
        });
        let key = self.proofs.borrow_mut().insert(proof.clone());
        if first {
            self.sooner.notify_one();
        }
        Proved { registry: self.clone(), proof, key }
    }

    /// The tunnels that there are.
    pub(crate) fn proofs(&self) -> Vec<Rc<Proof>> {
        let proofs = self.proofs.borrow();
        proofs.iter().filter(|(_, proof)| proof.withdrawn.borrow().is_none()).map(|(_, proof)| proof.clone()).collect()
    }

    /// Something has to be done sooner than was thought.
    pub(crate) fn look_again(&self) {
        self.sooner.notify_one();
    }

    /// Completes when a tunnel's certificate ends sooner than all before. Safe to cancel.
    pub(crate) async fn sooner(&self) {
        self.sooner.notified().await;
    }
}
