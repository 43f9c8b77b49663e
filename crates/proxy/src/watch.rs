//! What makes live connections end before their time: looks at everything that they rest on, and again whenever it changes.
//!
//! ```text
//!  a policy, or which ones apply ──▶ what is denied now is cut
//!  the pod's workload ─────────────▶ gone: all is cut; another identity: what is in tunnels of the old one is
//!  the pod's credentials ──────────▶ taken away: what is in tunnels is cut; renewed: peers are verified anew
//!  revocation lists ───────────────▶ peers are verified anew; who fails is cut
//!  a peer's certificate expires ───▶ what is in its tunnels is cut, unless it has shown a newer one in another handshake
//!  its CA is trusted no longer ────▶ the same, and it has a second for it: a new tunnel is made at once
//! ```
//! One look is from the whole state, never from the hint that woke it, so that nothing is lost when changes come faster than
//! looks.
//!
//! What it costs, on the worker and off the byte path: a change of policies that does not concern the pod, a comparison of two
//! lists of pointers and, for each live connection, of a number. One that does, for each live connection an evaluation of the policies that are different, not of all
//! (10,000 connections and 1 of 1,000 policies changed: 10,000 evaluations, a few milliseconds). Only a connection whose own allow policy
//! is gone is asked about by all; those are the ones that are mostly cut. A change of trust costs a chain verification for each
//! tunnel (some 100 µs), not for each connection. Between batches the worker turns to its connections.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout};
use zspire_identity::tls::{self, Rejection};
use zspire_identity::{Credentials, Peer, State, Watch};
use zspire_model::authorize::PolicySet;
use zspire_model::{SpiffeId, Workload};

use crate::live::{Applying, Proof, Reason, Verdict};
use crate::metrics::Reporter;
use crate::pod::{Known, Local, Pod};
use crate::tunnels::Chain;

/// Connections that are asked about before the worker turns to others.
const BATCH: usize = 256;
/// Peers that are verified before the worker turns to others.
const PEERS: usize = 8;
/// The clock of the calendar may jump: it is read again after this time at the latest.
const CLOCK: Duration = Duration::from_secs(10);
/// How long a peer may take to show a certificate of another CA when its own is trusted no longer. Where a CA is replaced, all
/// ends are told within moments, and the client's makes a new tunnel at once.
const DOUBT: Duration = Duration::from_secs(1);
/// How long a policy that a workload names may be unknown before connections that live are cut for it. Discovery tells of workloads and
/// of policies one after the other.
const NAMED_FIRST: Duration = Duration::from_millis(50);
/// Peers whose newest certificates are remembered for a pod.
const REMEMBERED: usize = 4096;

/// What was seen at the last look.
#[derive(Default)]
pub(crate) struct Seen {
    local: Option<Arc<Local>>,
    policies: PolicySet,
    /// Whose policies they are.
    asked_for: Option<Arc<Workload>>,
    credentials: Option<Arc<Credentials>>,
    trust: u64,
}

/// The newest certificate that each peer of a pod has shown, on whichever worker: live tunnels may go on with it when the one
/// that they began with expires. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Newest(Arc<Mutex<HashMap<Shown, Peer>>>);

/// Who showed a certificate, to which end of a tunnel, and where it was then.
type Shown = (Reporter, SpiffeId, IpAddr);

impl Newest {
    /// A peer has proved who it is.
    pub(crate) fn put(&self, reporter: Reporter, address: IpAddr, peer: &Peer) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (reporter, peer.id.clone(), address);
        let known = all.contains_key(&key);
        if !known && all.len() >= REMEMBERED {
            let now = SystemTime::now();
            all.retain(|_, peer| peer.not_after > now);
        }
        // One that is not remembered is only cut sooner.
        if known || all.len() < REMEMBERED {
            all.insert(key, peer.clone());
        }
    }

    fn get(&self, proof: &Proof) -> Option<Peer> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = proof.peer.borrow().id.clone();
        all.get(&(proof.reporter, id, proof.address)).cloned()
    }
}

/// Looks whenever something may have changed; runs until dropped.
pub(crate) async fn keep_watch(pod: &Pod, seen: &RefCell<Seen>) {
    let shared = pod.shared();
    let (mut authorization, mut trust) = (shared.authorization.clone(), shared.trust.clone());
    let mut local = pod.local_changes();
    let mut followed: Option<(Arc<Local>, Watch)> = None;
    loop {
        // Before the look: what changes during it is looked at again.
        authorization.borrow_and_update();
        let trust_version = *trust.borrow_and_update();
        let known = local.borrow_and_update().clone();
        if !same(followed.as_ref().map(|(local, _)| local), known.here()) {
            followed = known.here().map(|local| (local.clone(), local.credentials.clone()));
        }
        look_at_workload(pod, seen, &known);
        if let Some((local, credentials)) = &followed {
            look_at_policies(pod, seen, local).await;
            look_at_trust(pod, seen, &credentials.state(), trust_version).await;
        }
        tokio::select! {
            changed = authorization.changed() => if changed.is_err() { return },
            changed = local.changed() => if changed.is_err() { return },
            () = credentials_change(followed.as_mut().map(|(_, credentials)| credentials)) => {}
            () = changes(&mut trust) => {}
            () = pod.live().sooner() => {}
            () = until_expiry(pod) => {}
        }
    }
}

fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    one.map(Arc::as_ptr) == other.map(Arc::as_ptr)
}

async fn credentials_change(credentials: Option<&mut Watch>) {
    if let Some(credentials) = credentials
        && credentials.changed().await.is_some()
    {
        return;
    }
    std::future::pending().await
}

async fn changes(trust: &mut watch::Receiver<u64>) {
    if trust.changed().await.is_err() {
        std::future::pending().await
    }
}

/// Waits until a peer's certificate expires or the doubt about it is to end, or until a tunnel should be made that shows a newer
/// one.
async fn until_expiry(pod: &Pod) {
    let proofs = pod.live().proofs();
    let ends = proofs.iter().map(|proof| expired_at(proof)).min();
    let next = ends.into_iter().chain(pod.tunnels().next_renewal()).min();
    let Some(next) = next else { return std::future::pending().await };
    let left = next.duration_since(SystemTime::now()).unwrap_or_default();
    let doubts = proofs.iter().filter_map(|proof| proof.doubted.get()).min();
    let left = doubts.map_or(left, |since| left.min(DOUBT.saturating_sub(since.elapsed())));
    // A little later, and so never without a pause.
    tokio::time::sleep(left.min(CLOCK) + Duration::from_millis(10)).await;
}

fn look_at_workload(pod: &Pod, seen: &RefCell<Seen>, known: &Known) {
    let before = seen.borrow().local.clone();
    if same(before.as_ref(), known.here()) {
        return;
    }
    if let Some(before) = &before {
        let uid = &before.workload.uid;
        match known {
            Known::Here(now) => look_at_identity(pod, before, now),
            Known::Waiting => {
                let why = format_args!("discovery no longer knows workload {uid}");
                cut_everything(pod, &Verdict::new(Reason::WorkloadGone, why));
            }
            Known::Refused(why) => {
                let why = format_args!("the pod is no longer served as workload {uid}: {why}");
                cut_everything(pod, &Verdict::new(Reason::Refused, why));
            }
        }
    }
    seen.borrow_mut().local = known.here().cloned();
}

fn look_at_identity(pod: &Pod, before: &Local, now: &Local) {
    let own = now.workload.identity();
    if own == before.workload.identity() {
        return;
    }
    let named = |local: &Local| local.workload.identity().map_or_else(|| "nobody".into(), |id| id.to_string());
    let why = format_args!("the workload is now {}, it was {}", named(now), named(before));
    pod.live().cut_other_identities(own.as_ref(), &Verdict::new(Reason::Identity, why));
    pod.tunnels().retire_all();
}

fn cut_everything(pod: &Pod, verdict: &Verdict) {
    pod.live().cut_all(verdict);
    pod.live().cut_other_identities(None, verdict);
    pod.tunnels().retire_all();
}

async fn look_at_policies(pod: &Pod, seen: &RefCell<Seen>, local: &Local) {
    let workload = &local.workload;
    let newer = {
        let seen = seen.borrow();
        let asked = same(seen.asked_for.as_ref(), Some(workload));
        pod.mesh(|snapshot| {
            let known = asked && snapshot.version() == seen.policies.version();
            (!known).then(|| PolicySet::of(snapshot, workload))
        })
    };
    let Some(mut newer) = newer else { return };
    let (policies, asked_for) = {
        let seen = seen.borrow();
        (seen.policies.clone(), seen.asked_for.clone())
    };
    if newer.misses_more_than(&policies) {
        // Only who asks now is denied meanwhile.
        let mut authorization = pod.shared().authorization.clone();
        let of_now = || pod.mesh(|snapshot| PolicySet::of(snapshot, workload));
        let _ = timeout(NAMED_FIRST, authorization.wait_for(|_| !of_now().misses_more_than(&policies))).await;
        newer = of_now();
    }
    let difference = policies.until(&newer);
    let last = asked_for.as_ref().map(|workload| Applying { policies: &policies, workload });
    let now = Applying { policies: &newer, workload };
    let mut from = 0;
    while from < pod.live().end() {
        pod.live().ask_again(from..from + BATCH, last.as_ref(), &now, &difference);
        from += BATCH;
        yield_now().await;
    }
    // Only now: a look that was dropped midway is done again as a whole.
    let mut seen = seen.borrow_mut();
    (seen.policies, seen.asked_for) = (newer, Some(workload.clone()));
}

async fn look_at_trust(pod: &Pod, seen: &RefCell<Seen>, state: &State, trust: u64) {
    let credentials = match state {
        State::Ready(credentials) => Some(credentials),
        State::Revoked { why } => {
            let verdict = Verdict::new(Reason::CredentialsRevoked, format_args!("credentials revoked: {why}"));
            pod.tunnels().retire_all();
            pod.live().cut_tunnelled(&verdict);
            pod.live().cut_other_identities(None, &verdict);
            None
        }
        // What runs goes on, on what it began with, for as long as that is good.
        State::Pending { why } | State::Failed { why, .. } => {
            let held = seen.borrow().credentials.clone();
            if let Some(held) = held.filter(|held| held.not_after() + LAST_SECOND <= SystemTime::now()) {
                let why = format_args!("the pod's own certificate has expired: {why}");
                let verdict = Verdict::new(Reason::CredentialsExpired, why);
                pod.tunnels().retire_all();
                pod.live().cut_tunnelled(&verdict);
                pod.live().cut_other_identities(None, &verdict);
                seen.borrow_mut().credentials = None;
                drop(held);
            }
            None
        }
    };
    let (all, with) = {
        let seen = seen.borrow();
        let changed = trust != seen.trust || credentials.is_some_and(|now| !same(seen.credentials.as_ref(), Some(now)));
        (changed, credentials.or(seen.credentials.as_ref()).cloned())
    };
    if let Some(with) = &with {
        // Peers are to know a certificate of the new CA before the old one is trusted no longer.
        if seen.borrow().credentials.as_ref().is_some_and(|before| !with.has_issuer_of(before)) {
            pod.tunnels().hasten(|_| true);
        }
        verify_peers(pod, with, all).await;
        pod.tunnels().renew(with);
    }
    let mut seen = seen.borrow_mut();
    (seen.credentials, seen.trust) = (with, trust);
}

/// A certificate is valid to the end of its last second.
const LAST_SECOND: Duration = Duration::from_secs(1);

fn expired_at(proof: &Proof) -> SystemTime {
    proof.not_after() + LAST_SECOND
}

/// Verifies peers anew: all, or those whose certificates have expired or are in doubt.
async fn verify_peers(pod: &Pod, credentials: &Credentials, all: bool) {
    let now = SystemTime::now();
    let is_due = |proof: &Rc<Proof>| all || expired_at(proof) <= now || proof.doubted.get().is_some();
    let due = pod.live().proofs().into_iter().filter(is_due);
    let mut lost: Vec<(Rc<Proof>, Verdict)> = Vec::new();
    for (n, proof) in due.enumerate() {
        if n % PEERS == PEERS - 1 {
            // Whoever is lost by now does not wait for the others to be looked at.
            withdraw(pod, &mut lost);
            yield_now().await;
        }
        let peer = proof.peer.borrow().clone();
        let Err(first) = credentials.still_valid(&peer) else {
            proof.doubted.set(None);
            continue;
        };
        let newest = pod.newest().get(&proof).filter(|newest| newest.fingerprint != peer.fingerprint);
        let newest = newest.filter(|newest| can_be_mended(&first) && credentials.still_valid(newest).is_ok());
        if let Some(newest) = newest {
            *proof.peer.borrow_mut() = newest;
            proof.doubted.set(None);
            pod.tunnels().renewed(&proof, credentials);
        } else if !remains_in_doubt(pod, &proof, &first) {
            lost.push((proof.clone(), judgement(&proof, &first)));
        }
    }
    withdraw(pod, &mut lost);
}

fn withdraw(pod: &Pod, lost: &mut Vec<(Rc<Proof>, Verdict)>) {
    if !lost.is_empty() {
        pod.live().withdraw(lost);
        pod.tunnels().retire_withdrawn();
        lost.clear();
    }
}

/// Whether a peer whose CA is trusted no longer has time left to show a certificate of another.
fn remains_in_doubt(pod: &Pod, proof: &Rc<Proof>, error: &tls::Error) -> bool {
    if !is_about_issuer(error) {
        return false;
    }
    match proof.doubted.get() {
        Some(since) => since.elapsed() < DOUBT,
        None => {
            proof.doubted.set(Some(Instant::now()));
            pod.tunnels().hasten(|of| Rc::ptr_eq(of, proof));
            true
        }
    }
}

/// Age and issuer are mended by another certificate that the peer shows from the same place. A revocation is of the one that it
/// has, and a trust domain that is trusted no longer has no other.
fn can_be_mended(error: &tls::Error) -> bool {
    matches!(error, tls::Error::Rejected(Rejection::Expired { .. })) || is_about_issuer(error)
}

fn is_about_issuer(error: &tls::Error) -> bool {
    matches!(error, tls::Error::Rejected(Rejection::Untrusted { .. }))
}

fn judgement(proof: &Proof, error: &tls::Error) -> Verdict {
    let reason = match error {
        tls::Error::Rejected(Rejection::Revoked { .. } | Rejection::RevocationUnknown { .. }) => Reason::PeerRevoked,
        tls::Error::Rejected(Rejection::Expired { .. }) => Reason::PeerExpired,
        _ => Reason::PeerUntrusted,
    };
    let end = match proof.reporter {
        Reporter::Source => "server",
        Reporter::Destination => "client",
    };
    Verdict::new(reason, format_args!("the certificate of the {end} is no longer valid: {}", Chain(error)))
}
