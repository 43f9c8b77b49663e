//! Changes, and what they leave: however they come, the same end is the same state.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use ipnet::IpNet;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::fixture::{With, address, cidr, entry, join, key, pod, policy_key, service};
use crate::policy::{Action, Scope as PolicyScope};
use crate::service::{HealthPolicy, LoadBalancer, Mode, Scope};
use crate::workload::{Health, NetworkMode};
use crate::{Locality, Protocol};

fn store(changes: impl IntoIterator<Item = Change>) -> Store {
    let (mut store, _) = Store::new();
    store.apply(changes);
    store.snapshot().check_endpoints();
    store
}

fn uid(name: &str) -> Str {
    format!("c1//Pod/ns/{name}").into()
}

#[test]
fn what_does_not_change_anything_is_no_change() {
    let all: [Change; 3] = [
        pod("a", "10.0.0.1").of("svc").into(),
        service("svc", "10.1.0.1").into(),
        Policy { namespace: "ns".into(), name: "p".into(), ..Policy::default() }.into(),
    ];
    let (mut store, reader) = Store::new();
    assert_eq!((reader.version(), store.apply(Vec::new()).version), (0, 0));
    let applied = store.apply(all.clone());
    assert_eq!((applied.workloads.len(), applied.services.len(), applied.policies.len()), (1, 1, 1));
    assert_eq!((applied.version, reader.version(), reader.load().version()), (1, 1, 1));
    let before = reader.load();
    // The same again, and the removal of what is not there.
    let nothing = [
        Change::RemoveWorkload("nobody".into()),
        Change::RemoveService(key("nothing")),
        Change::RemovePolicy(policy_key("none")),
    ];
    let applied = store.apply(all.into_iter().chain(nothing));
    assert!(applied.is_empty() && !applied.affects_authorization());
    assert_eq!((applied.version, reader.version()), (1, 1));
    assert!(Arc::ptr_eq(&before, &reader.load()), "nothing was published");
}

#[test]
fn a_batch_is_seen_whole_and_old_snapshots_stay() {
    let (mut store, reader) = Store::new();
    store.apply([pod("a", "10.0.0.1").into()]);
    let old = reader.load();
    store.apply([Change::RemoveWorkload(uid("a")), pod("b", "10.0.0.1").into()]);
    let at = |snapshot: &Snapshot| snapshot.workload_at("", "10.0.0.1".parse().unwrap()).map(|it| it.name.to_string());
    assert_eq!((at(&old), reader.with(at)), (Some("a".into()), Some("b".into())));
    assert_eq!(store.reader().version(), 2);
}

#[test]
fn a_change_says_what_was_before() {
    let mut store = store([pod("a", "10.0.0.1").into()]);
    let applied = store.apply([pod("a", "10.0.0.2").into(), Change::RemoveWorkload(uid("a"))]);
    let shown = applied.workloads.iter().map(|WorkloadChange { old, new }| {
        let show = |it: &Option<Arc<Workload>>| it.as_ref().map_or("-".to_owned(), |it| join(&it.addresses, " "));
        format!("{} -> {}", show(old), show(new))
    });
    assert_eq!(join(shown, ", "), "10.0.0.1 -> 10.0.0.2, 10.0.0.2 -> -");
    assert_eq!(store.snapshot().workloads().len(), 0);
}

#[test]
fn which_changes_may_deny_what_was_allowed() {
    let mut store = store([pod("a", "10.0.0.1").into()]);
    let mut affects = |change: Change| store.apply([change]).affects_authorization();
    assert!(!affects(pod("a", "10.0.0.2").into()));
    assert!(!affects(service("svc", "10.1.0.1").into()));
    assert!(affects(pod("a", "10.0.0.2").with(|it| it.authorization_policies = [policy_key("p")].into()).into()));
    assert!(affects(Policy { namespace: "ns".into(), name: "p".into(), ..Policy::default() }.into()));
    assert!(affects(Change::RemovePolicy(policy_key("p"))));
    assert!(!affects(pod("new", "10.0.0.9").into()), "nothing was connected to it");
}

#[test]
fn endpoints_wait_for_their_service() {
    let mut store = store([pod("a", "10.0.0.1").of("svc").into(), pod("b", "10.0.0.2").of("svc").into()]);
    let names = |store: &Store| {
        let endpoints = store.snapshot().endpoints(&key("svc"));
        let names = endpoints.map(|it| it.iter().map(|it| it.name.to_string()).collect::<BTreeSet<_>>());
        join(names.unwrap_or_default(), " ")
    };
    let staged = |store: &Store| join(store.snapshot().staged().map(|(name, it)| format!("{name}:{}", it.len())), " ");
    assert_eq!((names(&store), staged(&store)), ("".into(), "ns/svc.test:2".into()));
    store.apply([service("svc", "10.1.0.1").into()]);
    assert_eq!((names(&store), staged(&store)), ("a b".into(), "".into()));
    store.apply([Change::RemoveService(key("svc"))]);
    assert_eq!((names(&store), staged(&store)), ("".into(), "ns/svc.test:2".into()));
    store.apply([service("svc", "10.1.0.1").into(), Change::RemoveWorkload(uid("a"))]);
    assert_eq!((names(&store), staged(&store)), ("b".into(), "".into()));
    store.apply([Change::RemoveWorkload(uid("b")), Change::RemoveService(key("svc"))]);
    assert!(store.snapshot().endpoints(&key("svc")).is_none(), "nothing is left behind");
    store.snapshot().check_endpoints();
}

#[test]
fn who_is_believed_when_several_claim_an_address() {
    let it = entry("c1/networking/WorkloadEntry/ns/vm", "10.0.0.1");
    let in_mesh = entry("c1/networking/WorkloadEntry/ns/zz", "10.0.0.1").with(|it| it.protocol = Protocol::Hbone);
    let plain_pod = pod("z", "10.0.0.1").with(|it| it.protocol = Protocol::Tcp);
    let all = [it, in_mesh, plain_pod, pod("y", "10.0.0.1"), pod("x", "10.0.0.1")];
    let expected = "x y z c1/networking/WorkloadEntry/ns/zz c1/networking/WorkloadEntry/ns/vm";
    for turn in 0..all.len() {
        let mut changes = all.to_vec();
        changes.rotate_left(turn);
        let store = store(changes.into_iter().map(Change::from));
        let found = store.snapshot().workloads_at("", "10.0.0.1".parse().unwrap());
        assert_eq!(join(found.iter().map(|it| it.name.clone()), " "), expected);
    }
}

/// Endpoints of one service, all alike but for their capacity.
fn crowd(capacities: impl IntoIterator<Item = u32>) -> Store {
    let endpoints = capacities.into_iter().enumerate().map(|(i, capacity)| {
        let address = format!("10.{}.{}.{}", 100 + (i >> 16), (i >> 8) & 255, i & 255);
        pod(&format!("e{i}"), &address).of("svc").with(|it| it.capacity = capacity).into()
    });
    // The service comes first, so that the arrangement does not depend on the order of a hash map.
    store(std::iter::once(service("svc", "10.1.0.1").into()).chain(endpoints))
}

#[test]
fn choosing_among_many_does_not_scan_them() {
    let store = crowd(std::iter::repeat_n(1, 10_000));
    let endpoints = store.snapshot().endpoints(&key("svc")).unwrap();
    let (client, mut rng, asked) = (pod("client", "10.0.0.1"), SmallRng::seed_from_u64(1), Cell::new(0));
    let mut seen = BTreeSet::new();
    for _ in 0..1000 {
        let eligible = |_: &Workload| {
            asked.set(asked.get() + 1);
            true
        };
        seen.insert(endpoints.choose(&client, &mut rng, eligible).unwrap().workload.name.clone());
    }
    assert_eq!(asked.get(), 1000, "each was drawn at once");
    assert!(seen.len() > 900, "and hardly one twice: {}", seen.len());
    asked.set(0);
    for _ in 0..1000 {
        let half = |it: &Workload| {
            asked.set(asked.get() + 1);
            it.name.ends_with(['0', '2', '4', '6', '8'])
        };
        assert!(endpoints.choose(&client, &mut rng, half).is_some());
    }
    assert!(asked.get() < 3000, "{} for half of them", asked.get());
}

#[test]
fn the_only_eligible_one_is_found_and_none_is_said() {
    let store = crowd(std::iter::repeat_n(1, 1000));
    let endpoints = store.snapshot().endpoints(&key("svc")).unwrap();
    let (client, mut rng) = (pod("client", "10.0.0.1"), SmallRng::seed_from_u64(1));
    let found = endpoints.choose(&client, &mut rng, |it| &*it.name == "e777").unwrap();
    assert_eq!(&*found.workload.name, "e777");
    assert!(endpoints.choose(&client, &mut rng, |_| false).is_none());
}

#[test]
fn capacity_is_the_weight() {
    let capacities = [1, 2, 3, 10, 100, 0];
    let total: u32 = capacities.iter().sum();
    let store = crowd(capacities);
    let endpoints = store.snapshot().endpoints(&key("svc")).unwrap();
    let (client, mut rng) = (pod("client", "10.0.0.1"), SmallRng::seed_from_u64(2));
    let mut counts = BTreeMap::<_, u32>::new();
    let draws = 58_000;
    for _ in 0..draws {
        *counts.entry(endpoints.choose(&client, &mut rng, |_| true).unwrap().workload.capacity).or_default() += 1;
    }
    assert!(!counts.contains_key(&0));
    for (capacity, count) in counts {
        let wanted = f64::from(draws * capacity / total);
        // Five standard deviations, with a seed that never changes.
        assert!((f64::from(count) - wanted).abs() < 5.0 * wanted.sqrt(), "{capacity}: {count} for {wanted}");
    }
}

#[test]
fn great_capacities_do_not_overflow() {
    let store = crowd([u32::MAX, u32::MAX, 1]);
    let endpoints = store.snapshot().endpoints(&key("svc")).unwrap();
    let (client, mut rng) = (pod("client", "10.0.0.1"), SmallRng::seed_from_u64(3));
    for _ in 0..100 {
        assert_eq!(endpoints.choose(&client, &mut rng, |_| true).unwrap().workload.capacity, u32::MAX);
    }
}

#[test]
fn a_service_that_a_workload_names_twice_counts_once() {
    let twice = pod("a", "10.0.0.1").of("svc").of_ports("svc", &[(80, 1)]).with(|it| {
        it.addresses.push(it.addresses[0]);
    });
    let mut store = store([service("svc", "10.1.0.1").into(), twice.into()]);
    store.apply([Change::RemoveWorkload(uid("a"))]);
    assert!(store.snapshot().endpoints(&key("svc")).is_none());
    assert!(store.snapshot().workload_at("", "10.0.0.1".parse().unwrap()).is_none());
}

// The equivalence of all ways to the same state.

const ADDRESSES: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.7.0.1", "fd00::1"];
const NETWORKS: [&str; 2] = ["", "west"];
const SERVICES: [&str; 3] = ["a", "b", "other/a"];
const POLICIES: [&str; 3] = ["p", "q", "r"];

fn some<T: Clone + std::fmt::Debug + 'static>(all: &[T]) -> impl Strategy<Value = Vec<T>> + use<T> {
    proptest::sample::subsequence(all.to_vec(), 0..=all.len())
}

fn one<T: Clone + std::fmt::Debug + 'static>(all: &[T]) -> impl Strategy<Value = T> + use<T> {
    proptest::sample::select(all.to_vec())
}

fn any_workload() -> impl Strategy<Value = Change> {
    let place = (one(&["a", "b", "c", "d"]), some(&ADDRESSES), one(&NETWORKS), any::<bool>());
    let nature = (0u32..4, any::<bool>(), any::<bool>(), one(&["", "x.example"]), one(&["eu", "us"]));
    (place, nature, some(&SERVICES), some(&POLICIES)).prop_map(|(place, nature, services, policies)| {
        let (name, addresses, network, host_network) = place;
        let (capacity, healthy, hbone, hostname, region) = nature;
        let it = services.iter().fold(pod(name, "10.0.0.1"), |it, service| it.of(service));
        it.in_network(network)
            .with(|it| {
                it.addresses = addresses.iter().map(|it| it.parse().unwrap()).collect();
                it.network_mode = if host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard };
                it.capacity = capacity;
                it.status = if healthy { Health::Healthy } else { Health::Unhealthy };
                it.protocol = if hbone { Protocol::Hbone } else { Protocol::Tcp };
                it.hostname = hostname.into();
                it.locality = Arc::new(Locality { region: region.into(), ..Locality::default() });
                it.authorization_policies = policies.iter().map(|it| policy_key(it)).collect();
            })
            .into()
    })
}

fn any_service() -> impl Strategy<Value = Change> {
    let modes = [Mode::Standard, Mode::Strict, Mode::Failover, Mode::Passthrough];
    let balancer = (some(&[Scope::Region, Scope::Zone]), one(&modes), any::<bool>());
    let ranges = some(&["10.0.0.0/8", "10.7.0.0/16", "0.0.0.0/0", "fd00::/8"]);
    (one(&SERVICES), some(&ADDRESSES), one(&NETWORKS), ranges, balancer).prop_map(
        |(name, vips, network, ranges, (preferences, mode, all))| {
            let health = if all { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
            service(name, "")
                .with(|it| {
                    it.vips = vips.iter().map(|vip| address(network, vip)).collect();
                    it.cidr_vips = ranges.iter().map(|range| cidr(network, range)).collect();
                    it.load_balancer = LoadBalancer { preferences, mode, health };
                })
                .into()
        },
    )
}

fn any_policy() -> impl Strategy<Value = Change> {
    let scopes = [PolicyScope::Global, PolicyScope::Namespace, PolicyScope::WorkloadSelector];
    (one(&POLICIES), one(&scopes), one(&[Action::Allow, Action::Deny])).prop_map(|(name, scope, action)| {
        Policy { namespace: "ns".into(), name: name.into(), scope, action, ..Policy::default() }.into()
    })
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => any_workload(),
        2 => one(&["a", "b", "c", "d"]).prop_map(|name| Change::RemoveWorkload(uid(name))),
        3 => any_service(),
        1 => one(&SERVICES).prop_map(|name| Change::RemoveService(key(name))),
        2 => any_policy(),
        1 => one(&POLICIES).prop_map(|name| Change::RemovePolicy(policy_key(name))),
    ]
}

fn sorted<T: ToString>(all: impl IntoIterator<Item = T>) -> String {
    let all: BTreeSet<_> = all.into_iter().map(|it| it.to_string()).collect();
    join(all, " ")
}

fn by_uid(snapshot: &Snapshot) -> Vec<&Workload> {
    let mut all: Vec<_> = snapshot.workloads().map(Arc::as_ref).collect();
    all.sort_by(|a, b| a.uid.cmp(&b.uid));
    all
}

/// All that can be seen of a state, in an order that does not depend on its history.
fn describe(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name}: {value}").unwrap();
    for it in by_uid(snapshot) {
        let policies = snapshot.policies_for(it).map(|applying| match applying {
            Applying::Known(policy) => format!("{} {:?}", policy.name, policy.scope),
            Applying::Missing(name) => format!("({name})"),
        });
        line("workload", format!("{it:?}, policies {}", join(policies, " ")));
    }
    for it in snapshot.services().map(|it| format!("{it:?}")).collect::<BTreeSet<_>>() {
        line("service", it);
    }
    line("policies", join(snapshot.policies().map(|it| format!("{it:?}")), " "));
    for network in NETWORKS {
        for text in ADDRESSES {
            let address = text.parse().unwrap();
            let services = |all: &[Arc<Service>]| join(all.iter().map(|it| it.key()), " ");
            line("at", join(snapshot.workloads_at(network, address).iter().map(|it| &it.uid), " "));
            line("vip", services(snapshot.services_at(network, address)));
            line("around", join(snapshot.services_around(network, address).map(services), " | "));
        }
    }
    line("named", join(snapshot.workloads_named("x.example").iter().map(|it| &it.uid), " "));
    for name in ["a.test", "b.test"] {
        line("named", join(snapshot.services_named(name).iter().map(|it| it.key()), " "));
    }
    for name in SERVICES.map(key) {
        let Some(endpoints) = snapshot.endpoints(&name) else { continue };
        line("members", sorted(endpoints.members().map(|it| it.uid.clone())));
        line("endpoints", sorted(endpoints.iter().map(|it| it.uid.clone())));
    }
    line("staged", sorted(snapshot.staged().map(|(name, endpoints)| format!("{name}:{}", endpoints.len()))));
    text
}

/// A state made of what another one holds, in another order.
fn rebuilt(snapshot: &Snapshot) -> Store {
    let workloads = snapshot.workloads().cloned().map(Change::PutWorkload);
    let services = snapshot.services().cloned().map(Change::PutService);
    let policies = snapshot.policies().cloned().map(Change::PutPolicy);
    let mut all: Vec<_> = workloads.chain(policies).chain(services).collect();
    all.reverse();
    store(all)
}

proptest! {
    #[test]
    fn every_way_to_a_state_leads_to_the_same(changes in proptest::collection::vec(any_change(), 0..40)) {
        let (mut stepwise, reader) = Store::new();
        for change in &changes {
            stepwise.apply([change.clone()]);
            stepwise.snapshot().check_endpoints();
        }
        let wanted = describe(stepwise.snapshot());
        prop_assert_eq!(&describe(&reader.load()), &wanted, "what readers see");
        prop_assert_eq!(&describe(store(changes.clone()).snapshot()), &wanted, "in one batch");
        prop_assert_eq!(&describe(rebuilt(stepwise.snapshot()).snapshot()), &wanted, "from scratch");
    }

    #[test]
    fn after_all_is_removed_nothing_is_left(changes in proptest::collection::vec(any_change(), 0..20)) {
        let mut store = store(changes);
        let snapshot = store.snapshot().clone();
        let workloads = snapshot.workloads().map(|it| Change::RemoveWorkload(it.uid.clone()));
        let services = snapshot.services().map(|it| Change::RemoveService(it.key()));
        let policies = snapshot.policies().map(|it| Change::RemovePolicy(it.key()));
        store.apply(services.chain(workloads).chain(policies).collect::<Vec<_>>());
        prop_assert_eq!(describe(store.snapshot()), describe(&Snapshot::default()));
        prop_assert!(store.snapshot().is_bare());
    }

    #[test]
    fn a_range_holds_what_ipnet_says(bits in any::<u32>(), length in 0u8..=32, asked in any::<u32>()) {
        let net = IpNet::new(std::net::IpAddr::from(bits.to_be_bytes()), length).unwrap().trunc();
        let store = store([service("a", "").with(|it| it.cidr_vips = vec![cidr("", &net.to_string())]).into()]);
        let asked = std::net::IpAddr::from(asked.to_be_bytes());
        prop_assert_eq!(store.snapshot().services_around("", asked).count() == 1, net.contains(&asked));
    }
}
