//! Who is told of what when discovery says something.

use zspire_identity::{Entry, State, Stats};
use zspire_model::{Protocol, SpiffeId};

use super::*;

/// A source that only notes what it is asked for.
#[derive(Debug, Default)]
struct Noting {
    asked: Mutex<Vec<String>>,
}

impl Source for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }

    fn watch(&self, key: &WorkloadKey, priority: Priority) -> Watch {
        self.asked.lock().unwrap().push(format!("watch {} {priority:?}", key.id));
        let (_, states) = watch::channel(State::Pending { why: "never".into() });
        Watch::new(states, || {})
    }

    fn forget(&self, key: &WorkloadKey) {
        self.asked.lock().unwrap().push(format!("forget {}", key.id));
    }

    fn entries(&self) -> Vec<Entry> {
        Vec::new()
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }
}

fn workload(name: &str, account: &str, node: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: format!("c//Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: account.into(),
        trust_domain: "cluster.local".parse().unwrap(),
        node: node.into(),
        protocol: Protocol::Hbone,
        ..Workload::default()
    })
}

fn name(name: &str) -> WorkloadName {
    WorkloadName { namespace: "shop".into(), name: name.into(), service_account: "web".into() }
}

fn mesh(prefetch: Option<&str>) -> (Arc<Noting>, Mesh) {
    let source = Arc::new(Noting::default());
    let prefetch = prefetch.map(|node| Prefetch { node: node.into() });
    let mesh = Mesh::new(source.clone(), "c", prefetch, None);
    (source, mesh)
}

#[test]
fn a_pod_is_told_when_its_workload_comes_changes_and_goes() {
    let (source, mesh) = mesh(None);
    let mut local = mesh.follow(&name("web-1"), None);
    assert!(local.borrow_and_update().here().is_none());
    mesh.apply([
        Change::PutWorkload(workload("web-1", "web", "n")),
        Change::PutWorkload(workload("other", "web", "n")),
    ]);
    assert_eq!(local.borrow_and_update().here().map(|local| local.workload.name.to_string()).as_deref(), Some("web-1"));
    let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    assert_eq!(*source.asked.lock().unwrap(), [format!("watch {id} WarmUp")]);
    // Whoever follows later is told at once.
    assert!(mesh.follow(&name("web-1"), None).borrow().here().is_some());
    mesh.apply([Change::RemoveWorkload("c//Pod/shop/web-1".into())]);
    assert!(local.borrow_and_update().here().is_none());
    // Whoever passes it on comes first.
    assert_eq!(source.asked.lock().unwrap().len(), 1);
    mesh.give_up_left();
    assert_eq!(source.asked.lock().unwrap().last().unwrap(), &format!("forget {id}"));
}

#[test]
fn a_pod_is_not_told_of_a_workload_with_another_account_or_of_another_cluster() {
    let (_, mesh) = mesh(None);
    let local = mesh.follow(&name("web-1"), None);
    let mut elsewhere = Workload::clone(&workload("web-1", "web", "n"));
    elsewhere.cluster_id = "d".into();
    mesh.apply([Change::PutWorkload(workload("web-1", "admin", "n")), Change::PutWorkload(Arc::new(elsewhere))]);
    assert!(local.borrow().here().is_none());
}

#[test]
fn certificates_are_prefetched_for_this_node_and_forgotten_with_the_workload() {
    let (source, mesh) = mesh(Some("here"));
    mesh.apply([Change::PutWorkload(workload("a", "one", "here")), Change::PutWorkload(workload("b", "two", "there"))]);
    // What is used again is not given up.
    mesh.apply([Change::PutWorkload(workload("a", "two", "here"))]);
    mesh.apply([Change::PutWorkload(workload("a", "one", "here"))]);
    mesh.give_up_left();
    mesh.apply([Change::PutWorkload(workload("a", "three", "here"))]);
    mesh.give_up_left();
    mesh.apply([Change::RemoveWorkload("c//Pod/shop/a".into())]);
    mesh.give_up_left();
    let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
    assert_eq!(
        *source.asked.lock().unwrap(),
        [
            format!("watch {} WarmUp", id("one")),
            format!("watch {} WarmUp", id("two")),
            format!("watch {} WarmUp", id("one")),
            format!("forget {}", id("two")),
            format!("watch {} WarmUp", id("three")),
            format!("forget {}", id("one")),
            format!("forget {}", id("three")),
        ]
    );
}

#[test]
fn authorization_is_asked_again_only_when_its_answer_may_have_changed() {
    let (_, mesh) = mesh(None);
    let mut authorization = mesh.authorization();
    mesh.apply([Change::PutWorkload(workload("a", "one", "here"))]);
    assert!(!authorization.has_changed().unwrap());
    let policy = zspire_model::Policy { name: "p".into(), ..Default::default() };
    mesh.apply([Change::PutPolicy(Arc::new(policy))]);
    assert!(authorization.has_changed().unwrap());
    authorization.mark_unchanged();
}

#[test]
fn a_pod_is_told_when_its_workload_becomes_somebody_else() {
    let (source, mesh) = mesh(None);
    let mut local = mesh.follow(&name("web-1"), None);
    mesh.apply([Change::PutWorkload(workload("web-1", "web", "n"))]);
    let foreign = Arc::new(Workload {
        trust_domain: "other.example".parse().unwrap(),
        ..Workload::clone(&workload("web-1", "web", "n"))
    });
    mesh.apply([Change::PutWorkload(foreign)]);
    let identity = |local: &Known| local.here().and_then(|local| local.workload.identity());
    assert_eq!(identity(&local.borrow_and_update()).unwrap().trust_domain().as_str(), "other.example");
    let asked = source.asked.lock().unwrap().clone();
    assert_eq!(asked.last().unwrap(), "watch spiffe://other.example/ns/shop/sa/web WarmUp");
    mesh.apply([Change::PutWorkload(workload("web-1", "admin", "n"))]);
    assert!(local.borrow_and_update().here().is_none(), "another service account");
}

#[test]
fn peers_are_expected_by_the_template_of_our_trust_domain() {
    let template = IdTemplate::new("spiffe://{trust_domain}/{node}/{pod}", &"cluster.local".parse().unwrap()).unwrap();
    let mesh = Mesh::new(Arc::new(Noting::default()), "c", None, Some(template));
    let theirs = Workload { trust_domain: "theirs".parse().unwrap(), ..Workload::clone(&workload("b", "web", "n")) };
    mesh.apply([Change::PutWorkload(workload("a", "web", "n")), Change::PutWorkload(Arc::new(theirs))]);
    let snapshot = mesh.reader().load();
    let mut ids: Vec<_> = snapshot.workloads().map(|workload| workload.identity().unwrap().to_string()).collect();
    ids.sort();
    assert_eq!(ids, ["spiffe://cluster.local/n/a", "spiffe://theirs/ns/shop/sa/web"]);
}
