//! Verdicts of many policies, kept for as long as they hold.
//!
//! Where thousands of policies apply to a pod, most of its connections are still between the same few peers and ports: they would
//! all be asked about by each of the policies, with the same answer.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use zspire_model::authorize::Verdict;
use zspire_model::{Snapshot, Workload};

use crate::live::Question;

/// Fewer policies are asked sooner than an answer is found.
const MANY: usize = 16;
/// Verdicts that are kept at most; then all are found anew.
const KEPT: usize = 1024;

/// The verdicts of one state of the mesh and of the pod.
#[derive(Default)]
pub(crate) struct Verdicts(RefCell<Kept>);

#[derive(Default)]
struct Kept {
    version: u64,
    workload: Option<Arc<Workload>>,
    /// Those that allow and say nothing else: a denial, and what is said of policies in dry run, may name every policy there is.
    allowed: HashMap<Question, Verdict>,
}

impl Verdicts {
    /// What the policies of a snapshot say to a connection to the workload.
    pub(crate) fn ask(&self, snapshot: &Snapshot, workload: &Arc<Workload>, question: &Question) -> Verdict {
        let mut kept = self.0.borrow_mut();
        let same = kept.workload.as_ref().is_some_and(|known| Arc::ptr_eq(known, workload));
        if !same || kept.version != snapshot.version() {
            *kept = Kept { version: snapshot.version(), workload: Some(workload.clone()), allowed: HashMap::new() };
        }
        if let Some(verdict) = kept.allowed.get(question) {
            return verdict.clone();
        }
        let verdict = question.ask(snapshot, workload);
        if verdict.asked >= MANY && verdict.is_allowed() && verdict.dry_run.is_empty() {
            if kept.allowed.len() >= KEPT {
                kept.allowed = HashMap::new();
            }
            kept.allowed.insert(question.clone(), verdict.clone());
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use zspire_model::policy::{Action, Match, Policy, Scope, StringMatch};
    use zspire_model::{Change, SpiffeId, Store};

    use super::*;

    fn policy(n: usize, action: Action, account: &str) -> Change {
        let matches =
            Match { principals: vec![StringMatch::Exact(format!("td/ns/a/sa/{account}").into())], ..Match::default() };
        Change::PutPolicy(Arc::new(Policy {
            name: format!("p{n}").into(),
            namespace: "a".into(),
            scope: Scope::Namespace,
            action,
            groups: vec![vec![vec![matches]]],
            ..Policy::default()
        }))
    }

    #[test]
    fn what_was_allowed_is_remembered_until_the_mesh_or_the_pod_is_another() {
        let ((mut store, _), verdicts) = (Store::new(), Verdicts::default());
        store.apply((0..MANY).map(|n| policy(n, Action::Allow, &format!("friend-{n}"))));
        let workload = |service: &str| Arc::new(Workload { namespace: service.into(), ..Workload::default() });
        let here = workload("a");
        let question = |account: &str| Question {
            destination: "10.0.0.1:80".parse().unwrap(),
            peer: Some(format!("spiffe://td/ns/a/sa/{account}").parse::<SpiffeId>().unwrap()),
            peer_address: "10.0.0.2".parse().unwrap(),
        };
        let remembered = |verdicts: &Verdicts| verdicts.0.borrow().allowed.len();
        let ask = |store: &Store, workload: &Arc<Workload>, account: &str| {
            verdicts.ask(store.snapshot(), workload, &question(account)).is_allowed()
        };
        for _ in 0..2 {
            assert!(ask(&store, &here, "friend-3"));
            assert!(!ask(&store, &here, "stranger"));
            assert_eq!(remembered(&verdicts), 1, "a denial is not kept");
        }
        assert!(ask(&store, &workload("b"), "stranger"), "another namespace, where no policy applies");
        assert_eq!(remembered(&verdicts), 0, "few policies are asked each time");
        assert!(ask(&store, &here, "friend-3"));
        store.apply(vec![policy(MANY, Action::Deny, "friend-3")]);
        assert!(!ask(&store, &here, "friend-3"), "the mesh has changed");
        let Change::PutPolicy(trial) = policy(MANY, Action::Deny, "friend-4") else { unreachable!() };
        store.apply(vec![Change::PutPolicy(Arc::new(Policy { dry_run: true, ..(*trial).clone() }))]);
        assert!(ask(&store, &here, "friend-4"));
        assert_eq!(remembered(&verdicts), 0, "what is in dry run has to be told each time");
    }

    #[test]
    fn no_more_are_kept_than_have_room() {
        let ((mut store, _), verdicts) = (Store::new(), Verdicts::default());
        store.apply((0..MANY).map(|n| policy(n, Action::Deny, &format!("foe-{n}"))));
        let here = Arc::new(Workload { namespace: "a".into(), ..Workload::default() });
        for port in 1..=2 * KEPT as u16 + 1 {
            let question = Question {
                destination: ([10, 0, 0, 1], port).into(),
                peer: None,
                peer_address: "10.0.0.2".parse().unwrap(),
            };
            assert!(verdicts.ask(store.snapshot(), &here, &question).is_allowed());
            assert!(verdicts.0.borrow().allowed.len() <= KEPT);
        }
        assert_eq!(verdicts.0.borrow().allowed.len(), 1);
    }
}
