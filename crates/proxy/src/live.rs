//! The connections of a pod on one worker that may have to be cut, and what each rests on. What was proved for the tunnels under
//! them is in [`proof`], what is asked of policies and why connections are cut in [`verdict`]. [`crate::watch`] says when something
//! of that is no longer so.

mod proof;
mod verdict;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use slab::Slab;
use smallvec::SmallVec;
use tokio::sync::Notify;
use zspire_model::authorize::{Decision, Difference, PolicySet, Recheck};
use zspire_model::{NamespacedName, SpiffeId, Workload};

pub(crate) use proof::{Proof, Proved};
pub(crate) use verdict::{Question, Reason, Verdict};

use crate::flow::Failure;
use crate::metrics::{Flag, Metrics, Reporter};

/// Live connections and tunnels.
pub(crate) struct Registry {
    entries: RefCell<Slab<Rc<Entry>>>,
    proofs: RefCell<Slab<Rc<Proof>>>,
    /// There is a proof that ends sooner than all before.
    sooner: Notify,
    metrics: Metrics,
}

struct Entry {
    reporter: Reporter,
    /// None for a connection that this end has opened: its policies are the other end's.
    asked: Option<Asked>,
    /// The identity under which it is carried; none if it is not in a tunnel.
    own: Option<SpiffeId>,
    proofs: RefCell<SmallVec<[Rc<Proof>; 1]>>,
    cut: RefCell<Cut>,
}

/// What policies said, and of what: the answer depends on the snapshot, and on the workload, which may be a little older.
struct Asked {
    question: Question,
    by: RefCell<Option<NamespacedName>>,
    version: Cell<u64>,
    workload: RefCell<Arc<Workload>>,
}

/// The policies that apply to a workload.
pub(crate) struct Applying<'a> {
    pub(crate) policies: &'a PolicySet,
    pub(crate) workload: &'a Arc<Workload>,
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
    pub(crate) fn new(metrics: Metrics) -> Rc<Self> {
        Rc::new(Self { entries: RefCell::default(), proofs: RefCell::default(), sooner: Notify::new(), metrics })
    }

    /// Enters a connection that policies allow: `by` one of them, in the snapshot of this version, to the workload.
    pub(crate) fn enter_allowed(
        self: &Rc<Self>,
        question: Question,
        by: Option<NamespacedName>,
        version: u64,
        workload: &Arc<Workload>,
        own: Option<SpiffeId>,
    ) -> Place {
        let (by, version, workload) = (RefCell::new(by), Cell::new(version), RefCell::new(workload.clone()));
        let asked = Asked { question, by, version, workload };
        self.enter(Reporter::Destination, Some(asked), own)
    }

    /// Enters a connection that the pod opens; `own` is the identity that is shown for it.
    pub(crate) fn enter_opened(self: &Rc<Self>, own: Option<SpiffeId>) -> Place {
        self.enter(Reporter::Source, None, own)
    }

    fn enter(self: &Rc<Self>, reporter: Reporter, asked: Option<Asked>, own: Option<SpiffeId>) -> Place {
        let (proofs, cut) = (RefCell::default(), RefCell::default());
        let entry = Rc::new(Entry { reporter, asked, own, proofs, cut });
        let key = self.entries.borrow_mut().insert(entry.clone());
        Place { registry: self.clone(), entry, key }
    }

    /// How many places there may be: every one in use is below.
    pub(crate) fn end(&self) -> usize {
        self.entries.borrow().capacity()
    }

    /// Cuts what policies now deny, among the places in `range`. What was not asked before just what applied last, but later or
    /// about another state of the workload, is asked anew.
    pub(crate) fn ask_again(
        &self,
        range: std::ops::Range<usize>,
        last: Option<&Applying<'_>>,
        now: &Applying<'_>,
        difference: &Difference,
    ) {
        let Applying { policies, workload } = now;
        for key in range {
            let Some(entry) = self.entries.borrow().get(key).cloned() else { continue };
            let Some(asked) = &entry.asked else { continue };
            let of = asked.workload.replace(Arc::clone(workload));
            if asked.version.get() >= policies.version() && Arc::ptr_eq(&of, workload) {
                continue;
            }
            let as_last = |last: &&Applying<'_>| {
                asked.version.get() <= last.policies.version() && Arc::ptr_eq(&of, last.workload)
            };
            let connection = asked.question.about(workload);
            let recheck = match last.filter(as_last) {
                Some(_) if difference.is_empty() => Recheck::Same,
                Some(_) => difference.recheck(&connection, asked.by.borrow().as_ref()),
                None => Recheck::AskAll,
            };
            let decision = match recheck {
                Recheck::Same => None,
                Recheck::Decided(decision) => Some(decision),
                Recheck::AskAll => Some(policies.authorize(&connection).decision),
            };
            asked.version.set(policies.version());
            match decision {
                None => {}
                Some(Decision::Allowed { by }) => *asked.by.borrow_mut() = by,
                Some(Decision::Denied(denied)) => {
                    let why =
                        Failure::new(Flag::Deny, format_args!("connection closed due to policy change: {denied}"));
                    self.cut(&entry, &Verdict { reason: Reason::Policy, failure: why });
                }
            }
        }
    }

    /// Cuts all of them.
    pub(crate) fn cut_all(&self, verdict: &Verdict) {
        self.cut_those(verdict, |_| true);
    }

    /// Cuts what is in tunnels.
    pub(crate) fn cut_tunnelled(&self, verdict: &Verdict) {
        self.cut_those(verdict, |entry| entry.own.is_some());
    }

    /// Cuts what is carried under another identity than this, and withdraws what was proved with it.
    pub(crate) fn cut_other_identities(&self, own: Option<&SpiffeId>, verdict: &Verdict) {
        self.cut_those(verdict, |entry| entry.own.is_some() && entry.own.as_ref() != own);
        for proof in self.proofs().iter().filter(|proof| Some(&proof.own) != own) {
            proof.withdraw(verdict.clone());
        }
    }

    /// Withdraws proofs, with the connections that rest on them.
    pub(crate) fn withdraw(&self, proofs: &[(Rc<Proof>, Verdict)]) {
        for (proof, verdict) in proofs {
            proof.withdraw(verdict.clone());
        }
        let entries: Vec<_> = self.entries.borrow().iter().map(|(_, entry)| entry.clone()).collect();
        for entry in entries {
            let verdict = entry.proofs.borrow().iter().find_map(|proof| proof.withdrawn());
            if let Some(verdict) = verdict {
                self.cut(&entry, &verdict);
            }
        }
    }

    fn cut_those(&self, verdict: &Verdict, which: impl Fn(&Entry) -> bool) {
        let entries: Vec<_> = self.entries.borrow().iter().map(|(_, entry)| entry.clone()).collect();
        for entry in entries.iter().filter(|entry| which(entry)) {
            self.cut(entry, verdict);
        }
    }

    fn cut(&self, entry: &Entry, verdict: &Verdict) {
        let mut cut = entry.cut.borrow_mut();
        if cut.why.is_some() {
            return;
        }
        cut.why = Some(verdict.failure.clone());
        self.metrics.cut(entry.reporter, verdict.reason.as_str());
        if verdict.reason == Reason::PeerRevoked {
            self.metrics.revoked(entry.reporter);
        }
        if let Some(waker) = cut.waker.take() {
            waker.wake();
        }
    }
}

impl Place {
    /// The connection is in this tunnel.
    pub(crate) fn rests_on(&self, proof: &Rc<Proof>) {
        proof.users.set(proof.users.get() + 1);
        self.entry.proofs.borrow_mut().push(proof.clone());
        if let Some(verdict) = proof.withdrawn() {
            self.registry.cut(&self.entry, &verdict);
        }
    }

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

    /// Does `work`, unless the connection is cut first.
    pub(crate) async fn unless_cut<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            () = self.cut() => Err(self.why().unwrap_or_else(|| Failure::new(Flag::None, "connection closed"))),
            done = work => done,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for proof in self.entry.proofs.take() {
            proof.users.set(proof.users.get() - 1);
        }
        let mut entries = self.registry.entries.borrow_mut();
        entries.try_remove(self.key);
        if entries.is_empty() {
            entries.shrink_to_fit();
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("live", &self.entries.borrow().len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use zspire_identity::Peer;
    use zspire_model::policy::{Action, Match, Scope};
    use zspire_model::{Change, Policy, Store, StringMatch};

    use super::*;

    fn policy(name: &str, action: Action, account: &str) -> Change {
        let principal = StringMatch::Exact(format!("cluster.local/ns/shop/sa/{account}").into());
        let conditions = Match { principals: vec![principal], ..Match::default() };
        Change::PutPolicy(Arc::new(Policy {
            namespace: "shop".into(),
            name: name.into(),
            action,
            groups: vec![vec![vec![conditions]]],
            ..Policy::default()
        }))
    }

    fn id(account: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap()
    }

    /// A registry, the mesh that its connections are asked about in, and the workload that they go to.
    struct World {
        store: Store,
        live: Rc<Registry>,
        seen: PolicySet,
        /// Whose policies were seen.
        seen_for: Option<Arc<Workload>>,
        workload: Arc<Workload>,
    }

    impl World {
        fn new() -> Self {
            let (store, _) = Store::new();
            let workload = Arc::new(Workload { namespace: "shop".into(), ..Workload::default() });
            let (live, seen) = (Registry::new(Metrics::default()), PolicySet::default());
            Self { store, live, seen, seen_for: None, workload }
        }

        fn connect(&self, account: &str) -> Place {
            let destination = "10.0.0.1:80".parse().unwrap();
            let peer_address = "10.0.0.2".parse().unwrap();
            let question = Question { destination, peer: Some(id(account)), peer_address };
            let snapshot = self.store.snapshot();
            let Decision::Allowed { by } = question.ask(snapshot, &self.workload).decision else {
                panic!("{account} is denied");
            };
            self.live.enter_allowed(question, by, snapshot.version(), &self.workload, Some(id("server")))
        }

        /// As [`crate::watch`] does it.
        fn look(&mut self) {
            let newer = PolicySet::of(self.store.snapshot(), &self.workload);
            let difference = self.seen.until(&newer);
            let last = self.seen_for.as_ref().map(|workload| Applying { policies: &self.seen, workload });
            let now = Applying { policies: &newer, workload: &self.workload };
            self.live.ask_again(0..self.live.end(), last.as_ref(), &now, &difference);
            (self.seen, self.seen_for) = (newer, Some(self.workload.clone()));
        }

        fn change(&mut self, change: Change) {
            self.store.apply([change]);
        }
    }

    fn fate(place: &Place) -> String {
        place.why().map_or_else(|| "lives".into(), |why| why.why)
    }

    #[test]
    fn a_change_of_policies_cuts_whom_it_concerns() {
        let mut world = World::new();
        let (web, cart) = (world.connect("web"), world.connect("cart"));
        world.look();
        world.change(policy("no-web", Action::Deny, "web"));
        world.look();
        assert!(fate(&web).contains("explicitly denied by: shop/no-web"));
        assert_eq!(fate(&cart), "lives");
        world.change(policy("cart", Action::Allow, "cart"));
        world.look();
        assert_eq!(fate(&cart), "lives");
        // From now on that policy is what it lives by.
        world.change(policy("other", Action::Allow, "other"));
        world.look();
        assert_eq!(fate(&cart), "lives");
        world.change(policy("cart", Action::Allow, "nobody"));
        world.look();
        assert!(fate(&cart).contains("none allowed"));
    }

    /// Several changes may come between two looks, and connections between them.
    #[test]
    fn a_connection_is_judged_by_what_it_was_not_asked_about() {
        let mut world = World::new();
        world.look();
        world.change(policy("no-web", Action::Deny, "web"));
        world.look();
        // Gone, and back with the next change: for the look nothing but the policy's place in memory tells.
        world.change(Change::RemovePolicy(NamespacedName { namespace: "shop".into(), name: "no-web".into() }));
        let web = world.connect("web");
        world.change(policy("no-web", Action::Deny, "web"));
        let cart = world.connect("cart");
        world.look();
        assert!(fate(&web).contains("shop/no-web"));
        assert_eq!(fate(&cart), "lives");
    }

    /// The snapshot is there before the pod learns what its workload is now.
    #[test]
    fn a_policy_that_selects_the_workload_is_asked_when_the_workload_is_told() {
        let select = |world: &World, names: &[&str]| {
            let key = |name: &&str| NamespacedName { namespace: "shop".into(), name: (*name).into() };
            let policies = names.iter().map(key).collect::<Vec<_>>().into();
            Arc::new(Workload { authorization_policies: policies, ..(*world.workload).clone() })
        };
        let selecting = |name: &str, account: &str| {
            let Change::PutPolicy(policy) = policy(name, Action::Deny, account) else { unreachable!() };
            Change::PutPolicy(Arc::new(Policy { scope: Scope::WorkloadSelector, ..(*policy).clone() }))
        };
        let mut world = World::new();
        let early = world.connect("web");
        world.look();
        world.change(selecting("no-web", "web"));
        // One change of the policies of its namespace is enough for a look in between, by which all that lives is judged.
        world.change(policy("no-other", Action::Deny, "other"));
        let late = world.connect("web");
        let bystander = world.connect("cart");
        world.look();
        assert_eq!((fate(&early), fate(&late)), ("lives".into(), "lives".into()));
        world.workload = select(&world, &["no-web"]);
        world.look();
        for place in [&early, &late] {
            assert!(fate(place).contains("shop/no-web"), "{}", fate(place));
        }
        assert_eq!(fate(&bystander), "lives");
        // And without that look: it was asked in the newest snapshot, of the older workload.
        let mut world = World::new();
        world.look();
        world.change(selecting("no-web", "web"));
        let late = world.connect("web");
        world.workload = select(&world, &["no-web"]);
        world.look();
        assert!(fate(&late).contains("shop/no-web"), "{}", fate(&late));
    }

    fn peer(account: &str, not_after: u64) -> Peer {
        let not_after = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(not_after);
        Peer { id: id(account), not_after, fingerprint: [0; 32], evidence: Default::default() }
    }

    #[test]
    fn what_rests_on_a_tunnel_ends_with_the_trust_in_it() {
        let world = World::new();
        let at = "10.0.0.2".parse().unwrap();
        let lost = world.live.prove(Reporter::Destination, id("server"), peer("web", 10), at);
        let kept = world.live.prove(Reporter::Destination, id("server"), peer("cart", 20), at);
        let (web, cart) = (world.connect("web"), world.connect("cart"));
        web.rests_on(lost.proof());
        cart.rests_on(kept.proof());
        assert!(lost.proof().is_used());
        let verdict = Verdict::new(Reason::PeerRevoked, "the certificate is revoked");
        world.live.withdraw(&[(lost.proof().clone(), verdict)]);
        assert_eq!((fate(&web), fate(&cart)), ("connection closed: the certificate is revoked".into(), "lives".into()));
        // A connection that comes into that tunnel afterwards lives no longer.
        let late = world.connect("web");
        late.rests_on(lost.proof());
        assert_eq!(late.why().map(|why| why.flag), Some(Flag::CertRevoked));
        assert_eq!(world.live.proofs().len(), 1);
        drop((web, late));
        assert!(!lost.proof().is_used() && kept.proof().is_used());
    }

    #[test]
    fn another_identity_ends_what_was_carried_under_the_old_one() {
        let world = World::new();
        let (inbound, outbound, plain) =
            (world.connect("web"), world.live.enter_opened(Some(id("server"))), world.live.enter_opened(None));
        let newer = world.live.enter_opened(Some(id("renamed")));
        world.live.cut_other_identities(Some(&id("renamed")), &Verdict::new(Reason::Identity, "renamed"));
        for place in [&inbound, &outbound] {
            assert_eq!(place.why().map(|why| why.flag), Some(Flag::IdentityError));
        }
        assert_eq!((fate(&plain), fate(&newer)), ("lives".into(), "lives".into()));
    }
}
