//! Policies and what they say about connections.

use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::*;
use crate::ServiceAccountMatch;
use crate::fixture::{Mesh, With, join, pod, policy_key};
use crate::policy::{Match, Scope, StringMatch};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn connection<'a>(destination: &'a Workload, peer: Option<&'a SpiffeId>) -> Connection<'a> {
    Connection {
        destination,
        destination_address: "10.0.0.1:8080".parse().unwrap(),
        peer,
        peer_address: "10.0.9.9".parse().unwrap(),
    }
}

fn ask(policies: &[Policy], workload: &Workload, peer: Option<&str>) -> Verdict {
    let mesh = policies.iter().cloned().fold(Mesh::default(), Mesh::and);
    let peer = peer.map(|peer| peer.parse().unwrap());
    authorize(&mesh.snapshot(), &connection(workload, peer.as_ref()))
}

fn check(policies: &[Policy], workload: &Workload, expected: &Expect) {
    let verdict = ask(policies, workload, Some(CLIENT));
    let dry_run = verdict.dry_run.iter().map(|(policy, action)| format!("\n(dry run) {action:?} by {policy}"));
    expected.assert_eq(&format!("{}{}", verdict.decision, join(dry_run, "")));
}

fn server() -> Workload {
    pod("server", "10.0.0.1")
}

/// A global policy of one group with one rule with one match.
fn policy(name: &str, action: Action, conditions: Match) -> Policy {
    Policy {
        namespace: "ns".into(),
        name: name.into(),
        action,
        groups: vec![vec![vec![conditions]]],
        ..Policy::default()
    }
}

/// A match of every connection to the port that the tests use, or of none.
fn here(matches: bool) -> Match {
    Match { destination_ports: vec![if matches { 8080 } else { 1 }], ..Match::default() }
}

fn allow(name: &str, matches: bool) -> Policy {
    policy(name, Action::Allow, here(matches))
}

fn deny(name: &str, matches: bool) -> Policy {
    policy(name, Action::Deny, here(matches))
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn account(namespace: &str, name: &str) -> ServiceAccountMatch {
    ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() }
}

/// Whether a match matches: with the client's identity, and without any.
fn matches(conditions: Match) -> (bool, bool) {
    let policies = [policy("p", Action::Allow, conditions)];
    (ask(&policies, &server(), Some(CLIENT)).is_allowed(), ask(&policies, &server(), None).is_allowed())
}

/// A field with values that match and values that do not; identity: whether it asks for the peer's identity.
fn check_field<T: Clone>(
    name: &str,
    identity: bool,
    field: fn(&mut Match) -> &mut Vec<T>,
    not_field: fn(&mut Match) -> &mut Vec<T>,
    good: &[T],
    bad: &[T],
) {
    let set = |field: fn(&mut Match) -> &mut Vec<T>, values: &[T]| {
        let mut conditions = Match::default();
        field(&mut conditions).extend(values.iter().cloned());
        matches(conditions)
    };
    for (i, value) in good.iter().enumerate() {
        let value = std::slice::from_ref(value);
        assert_eq!(set(field, value), (true, !identity), "{name} {i}");
        assert_eq!(set(not_field, value), (false, identity), "not_{name} {i}");
    }
    for (i, value) in bad.iter().enumerate() {
        let value = std::slice::from_ref(value);
        assert_eq!(set(field, value), (false, false), "{name}, bad {i}");
        assert_eq!(set(not_field, value), (true, true), "not_{name}, bad {i}");
    }
    let mixed: Vec<T> = bad.iter().chain(good).cloned().collect();
    assert_eq!(set(field, &mixed), (true, !identity), "{name}: any of them is enough");
    assert_eq!(set(not_field, &mixed), (false, identity), "not_{name}: any of them is too many");
}

#[test]
fn every_field_and_its_inverse() {
    use StringMatch::{Prefix, Presence, Suffix};
    check_field(
        "namespaces",
        true,
        |m| &mut m.namespaces,
        |m| &mut m.not_namespaces,
        &[exact("shop"), Prefix("sh".into()), Suffix("op".into()), Presence],
        &[exact("sho"), exact("Shop"), exact("sh*"), Prefix("op".into()), Suffix("sh".into())],
    );
    check_field(
        "service_accounts",
        true,
        |m| &mut m.service_accounts,
        |m| &mut m.not_service_accounts,
        &[account("shop", "cart")],
        &[account("shop", "car"), account("ns", "cart"), account("shop", ""), account("", "cart")],
    );
    check_field(
        "principals",
        true,
        |m| &mut m.principals,
        |m| &mut m.not_principals,
        &[
            exact("cluster.local/ns/shop/sa/cart"),
            exact(CLIENT),
            Prefix("cluster.local/ns/shop/".into()),
            Prefix("spiffe://cluster.local/".into()),
            Suffix("/sa/cart".into()),
            Presence,
        ],
        &[
            exact("cluster.local/ns/shop/sa/car"),
            exact("other/ns/shop/sa/cart"),
            exact("*"),
            Prefix("ns/".into()),
            Suffix("cluster.local".into()),
        ],
    );
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
    check_field(
        "source_ips",
        false,
        |m| &mut m.source_ips,
        |m| &mut m.not_source_ips,
        &nets(&["10.0.9.9/32", "10.0.0.0/16", "0.0.0.0/0"]),
        &nets(&["10.0.0.1/32", "10.1.0.0/16", "::/0"]),
    );
    check_field(
        "destination_ips",
        false,
        |m| &mut m.destination_ips,
        |m| &mut m.not_destination_ips,
        &nets(&["10.0.0.1/32", "10.0.0.0/30"]),
        &nets(&["10.0.9.9/32", "fd00::/8"]),
    );
    check_field(
        "destination_ports",
        false,
        |m| &mut m.destination_ports,
        |m| &mut m.not_destination_ports,
        &[8080],
        &[80, 0, 15008],
    );
}

#[test]
fn an_address_in_an_ipv6_disguise_is_the_same_address() {
    let workload = server();
    let mesh = Mesh::default().and(policy(
        "p",
        Action::Deny,
        Match {
            source_ips: vec!["10.0.9.9/32".parse().unwrap()],
            destination_ips: vec!["10.0.0.1/32".parse().unwrap()],
            ..Match::default()
        },
    ));
    let connection = Connection {
        destination_address: "[::ffff:10.0.0.1]:80".parse().unwrap(),
        peer_address: "::ffff:10.0.9.9".parse().unwrap(),
        ..connection(&workload, None)
    };
    assert!(!authorize(&mesh.snapshot(), &connection).is_allowed());
}

#[test]
fn an_identity_without_istios_form_has_no_namespace() {
    let policies = |conditions| [policy("p", Action::Allow, conditions)];
    let spire = Some("spiffe://example.org/db/primary");
    let by_principal = Match { principals: vec![exact("example.org/db/primary")], ..Match::default() };
    assert!(ask(&policies(by_principal), &server(), spire).is_allowed());
    for conditions in [
        Match { namespaces: vec![StringMatch::Presence], ..Match::default() },
        Match { namespaces: vec![StringMatch::Prefix("".into())], ..Match::default() },
        Match { service_accounts: vec![account("db", "primary")], ..Match::default() },
        Match { service_accounts: vec![account("", "")], ..Match::default() },
    ] {
        assert!(!ask(&policies(conditions.clone()), &server(), spire).is_allowed(), "{conditions:?}");
    }
}

#[test]
fn all_fields_of_a_match_must_match() {
    let both = Match { namespaces: vec![exact("shop")], ..here(true) };
    assert!(matches(both.clone()).0);
    assert!(!matches(Match { destination_ports: vec![1], ..both.clone() }).0);
    assert!(!matches(Match { not_source_ips: vec!["10.0.0.0/8".parse().unwrap()], ..both }).0);
}

#[test]
fn groups_rules_and_matches() {
    let (yes, no, empty) = (here(true), here(false), Match::default());
    let cases: [(&str, Vec<Group>, bool); 12] = [
        ("no group", vec![], false),
        ("a group without rules", vec![vec![]], true),
        ("a rule without matches", vec![vec![vec![]]], false),
        ("a match without values", vec![vec![vec![empty.clone()]]], false),
        ("a match without values beside one that matches", vec![vec![vec![empty.clone(), yes.clone()]]], true),
        ("one match", vec![vec![vec![yes.clone()]]], true),
        ("any match of a rule", vec![vec![vec![no.clone(), yes.clone()]]], true),
        ("no match of a rule", vec![vec![vec![no.clone(), no.clone()]]], false),
        ("all rules of a group", vec![vec![vec![yes.clone()], vec![yes.clone()]]], true),
        ("not all rules of a group", vec![vec![vec![yes.clone()], vec![no.clone()]]], false),
        ("an empty rule beside one that matches", vec![vec![vec![yes.clone()], vec![]]], false),
        ("any group", vec![vec![vec![no]], vec![vec![yes]]], true),
    ];
    for (name, groups, expected) in cases {
        for action in [Action::Allow, Action::Deny] {
            let policy = Policy { action, groups: groups.clone(), ..allow("p", true) };
            let allowed = ask(&[policy], &server(), None).is_allowed();
            assert_eq!(allowed, (action == Action::Allow) == expected, "{name}, {action:?}");
        }
    }
}

#[test]
fn deny_comes_before_allow() {
    let it = server();
    check(&[], &it, &expect!["allowed: no allow policy applies"]);
    check(&[allow("a", true)], &it, &expect!["allowed by: ns/a"]);
    check(&[allow("a", false)], &it, &expect!["allow policies exist, but none allowed: ns/a"]);
    check(&[allow("a", false), allow("b", true)], &it, &expect!["allowed by: ns/b"]);
    check(&[deny("a", false)], &it, &expect!["allowed: no allow policy applies"]);
    check(&[deny("a", true)], &it, &expect!["explicitly denied by: ns/a"]);
    check(&[allow("a", true), deny("z", true)], &it, &expect!["explicitly denied by: ns/z"]);
    check(&[allow("a", true), deny("z", false)], &it, &expect!["allowed by: ns/a"]);
    check(&[allow("a", false), deny("z", false)], &it, &expect!["allow policies exist, but none allowed: ns/a"]);
    let many: Vec<_> = ["a", "b", "c", "d", "e"].map(|name| allow(name, false)).into();
    check(&many, &it, &expect!["allow policies exist, but none allowed: ns/a, ns/b, ns/c and 2 more"]);
}

#[test]
fn dry_run_is_reported_and_not_enforced() {
    let dry = |policy: Policy| policy.with(|policy| policy.dry_run = true);
    let it = server();
    check(
        &[dry(deny("d", true))],
        &it,
        &expect![[r#"
        allowed: no allow policy applies
        (dry run) Deny by ns/d"#]],
    );
    check(&[dry(deny("d", false))], &it, &expect!["allowed: no allow policy applies"]);
    check(
        &[dry(allow("a", true)), allow("b", false)],
        &it,
        &expect![[r#"
        allow policies exist, but none allowed: ns/b
        (dry run) Allow by ns/a"#]],
    );
    check(&[dry(allow("a", false))], &it, &expect!["allowed: no allow policy applies"]);
    check(
        &[dry(deny("d", true)), deny("e", true)],
        &it,
        &expect![[r#"
        explicitly denied by: ns/e
        (dry run) Deny by ns/d"#]],
    );
    let unsupported = allow("u", false).with(|policy| policy.unsupported = Some("field 99".into()));
    check(
        &[dry(unsupported)],
        &it,
        &expect![[r#"
        allowed: no allow policy applies
        (dry run) Deny by ns/u"#]],
    );
}

#[test]
fn what_cannot_be_evaluated_denies() {
    let it = server();
    let unknown = |policy: Policy| policy.with(|policy| policy.unsupported = Some("field 99".into()));
    check(&[unknown(allow("u", true))], &it, &expect!["policy ns/u cannot be evaluated: field 99"]);
    check(&[unknown(deny("u", false)), allow("a", true)], &it, &expect!["policy ns/u cannot be evaluated: field 99"]);
    check(&[unknown(deny("a", false)), deny("z", true)], &it, &expect!["explicitly denied by: ns/z"]);
    let extension = crate::Extension { name: "x".into(), type_url: "t".into(), value: [1].into() };
    let extended = allow("x", true).with(|policy| policy.extensions.push(extension.clone()));
    check(&[extended], &it, &expect!["policy ns/x cannot be evaluated: unknown extension x"]);
    let inner = Match { extensions: vec![extension], ..here(true) };
    check(&[policy("x", Action::Allow, inner)], &it, &expect!["policy ns/x cannot be evaluated: unknown extension x"]);
}

#[test]
fn the_scope_says_to_whom_a_policy_applies() {
    let it = server();
    let scoped = |policy: Policy, scope| policy.with(|policy| policy.scope = scope);
    let elsewhere = |policy: Policy| policy.with(|policy| policy.namespace = "other".into());
    let naming = |names: &[&str]| {
        server().with(|it| it.authorization_policies = names.iter().map(|name| policy_key(name)).collect())
    };
    check(&[elsewhere(deny("d", true))], &it, &expect!["explicitly denied by: other/d"]);
    check(&[scoped(deny("d", true), Scope::Namespace)], &it, &expect!["explicitly denied by: ns/d"]);
    check(&[elsewhere(scoped(deny("d", true), Scope::Namespace))], &it, &expect!["allowed: no allow policy applies"]);
    check(&[scoped(deny("d", true), Scope::WorkloadSelector)], &it, &expect!["allowed: no allow policy applies"]);
    check(&[scoped(deny("d", true), Scope::WorkloadSelector)], &naming(&["d"]), &expect!["explicitly denied by: ns/d"]);
    // Being named changes nothing for the other scopes.
    let other = NamespacedName { namespace: "other".into(), name: "d".into() };
    let naming_other = server().with(|it| it.authorization_policies = [other].into());
    check(
        &[elsewhere(scoped(deny("d", true), Scope::Namespace))],
        &naming_other,
        &expect!["allowed: no allow policy applies"],
    );
    check(&[scoped(allow("a", true), Scope::WorkloadSelector)], &naming(&["a"]), &expect!["allowed by: ns/a"]);
}

#[test]
fn a_policy_that_is_named_and_not_known_denies() {
    let naming = server().with(|it| it.authorization_policies = [policy_key("gone")].into());
    check(&[], &naming, &expect!["policy ns/gone applies to the workload and is not known"]);
    check(&[allow("a", true)], &naming, &expect!["policy ns/gone applies to the workload and is not known"]);
    check(&[deny("d", true)], &naming, &expect!["explicitly denied by: ns/d"]);
}

/// What can become of a policy between two snapshots.
#[derive(Debug, Clone)]
struct Fate {
    before: Option<Policy>,
    after: Option<Policy>,
    named: (bool, bool),
}

fn any_policy(number: usize) -> impl Strategy<Value = Option<Policy>> {
    let kind = (0..3usize, any::<bool>(), 0..3usize, any::<bool>(), any::<bool>());
    prop::option::weighted(0.7, kind).prop_map(move |kind| {
        let (scope, denies, matches, dry_run, broken) = kind?;
        let scope = [Scope::Global, Scope::Namespace, Scope::WorkloadSelector][scope];
        let action = if denies { Action::Deny } else { Action::Allow };
        Some(policy(&format!("p{number}"), action, here(matches == 0)).with(|it| {
            it.scope = scope;
            it.dry_run = dry_run && matches == 1;
            it.unsupported = (broken && matches == 2 && scope != Scope::Global).then(|| "a field of tomorrow".into());
        }))
    })
}

fn any_fate(number: usize) -> impl Strategy<Value = Fate> {
    let kept = any::<bool>();
    let fate = (any_policy(number), any_policy(number), kept, any::<bool>(), any::<bool>());
    fate.prop_map(|(before, after, kept, was_named, is_named)| {
        let after = if kept { before.clone() } else { after };
        Fate { before, after, named: (was_named, is_named) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// What only the difference says is what all policies say.
    #[test]
    fn the_difference_decides_as_all_policies_would(
        fates in (any_fate(0), any_fate(1), any_fate(2), any_fate(3)),
    ) {
        let fates = [fates.0, fates.1, fates.2, fates.3];
        let names = |named: fn(&Fate) -> bool| {
            let named = fates.iter().enumerate().filter(|(_, fate)| named(fate));
            named.map(|(number, _)| policy_key(&format!("p{number}"))).collect::<Vec<_>>()
        };
        // A policy that is named and not there denies everything, which would hide the rest: only some runs have that.
        let before = server().with(|it| it.authorization_policies = names(|fate| fate.named.0 && fate.before.is_some()).into());
        let after = server().with(|it| it.authorization_policies = names(|fate| fate.named.1).into());
        let (mut store, reader) = crate::Store::new();
        store.apply(fates.iter().filter_map(|fate| fate.before.clone()).map(crate::Change::from));
        let older = PolicySet::of(&reader.load(), &before);
        store.apply(fates.iter().enumerate().map(|(number, fate)| match fate.after.clone() {
            Some(policy) => policy.into(),
            None => crate::Change::RemovePolicy(policy_key(&format!("p{number}"))),
        }));
        let newer = PolicySet::of(&reader.load(), &after);
        let difference = older.until(&newer);
        let peer = CLIENT.parse().unwrap();
        let Decision::Allowed { by } = older.authorize(&connection(&before, Some(&peer))).decision else {
            return Ok(());
        };
        let all = newer.authorize(&connection(&after, Some(&peer))).decision;
        let is_allowed = |decision: &Decision| matches!(decision, Decision::Allowed { .. });
        let asked = authorize(&reader.load(), &connection(&after, Some(&peer)));
        prop_assert_eq!(is_allowed(&all), asked.is_allowed());
        if difference.is_empty() {
            prop_assert!(is_allowed(&all));
        }
        match difference.recheck(&connection(&after, Some(&peer)), by.as_ref()) {
            Recheck::AskAll => {}
            Recheck::Same => {
                prop_assert!(is_allowed(&all));
                // It can be relied on the next time: there is such a policy, or there is none that allows.
                let allows = newer.known.iter().filter(|policy| policy.action == Action::Allow && !policy.dry_run);
                let allows: Vec<_> = allows.map(|policy| policy.key()).collect();
                match &by {
                    Some(by) => prop_assert!(allows.contains(by)),
                    None => prop_assert!(allows.is_empty()),
                }
            }
            Recheck::Decided(decision) => prop_assert_eq!(is_allowed(&decision), is_allowed(&all), "{:?} {:?}", decision, all),
        }
    }
}

/// What a change costs for live connections: each asks the policies that differ, and nobody asks where none does.
#[test]
fn a_difference_has_only_what_differs() {
    let (mut store, reader) = crate::Store::new();
    store.apply((0..1000).map(|number| crate::Change::from(allow(&format!("p{number}"), number % 2 == 0))));
    let before = PolicySet::of(&reader.load(), &server());
    assert_eq!(before.known.len(), 1000);
    let elsewhere = deny("elsewhere", true).with(|it| {
        it.namespace = "other".into();
        it.scope = Scope::Namespace;
    });
    store.apply([crate::Change::from(elsewhere)]);
    let untouched = PolicySet::of(&reader.load(), &server());
    assert!(before.until(&untouched).is_empty());
    store.apply([crate::Change::from(deny("p7", false)), crate::Change::RemovePolicy(policy_key("p8"))]);
    let difference = untouched.until(&PolicySet::of(&reader.load(), &server()));
    assert_eq!(difference.new.len(), 1);
    assert_eq!(difference.old, [policy_key("p7"), policy_key("p8")].into());
    // Whoever was allowed by another one is not asked about anything else; whoever was by that one has to be.
    let server = server();
    let asked = |by: &str| difference.recheck(&connection(&server, None), Some(&policy_key(by)));
    assert_eq!((asked("p2"), asked("p8")), (Recheck::Same, Recheck::AskAll));
}

#[test]
fn a_name_that_was_unknown_before_is_no_news() {
    let (mut store, reader) = crate::Store::new();
    let of = |names: &[&str]| {
        let names = names.iter().map(|name| policy_key(name)).collect();
        PolicySet::of(&reader.load(), &server().with(|it| it.authorization_policies = names))
    };
    let (none, gone) = (of(&[]), of(&["gone"]));
    assert!(gone.misses_more_than(&none) && !gone.misses_more_than(&gone) && !none.misses_more_than(&gone));
    assert!(of(&["gone", "late"]).misses_more_than(&gone));
    let late = allow("late", true).with(|it| it.scope = Scope::WorkloadSelector);
    store.apply([crate::Change::from(late)]);
    assert!(!of(&["gone", "late"]).misses_more_than(&gone), "it is known by now");
}

/// A connection that is allowed costs no allocation where a few policies apply; a walk through many needs one for its path.
#[test]
fn allowing_allocates_nothing() {
    let principals = |list: &[&str]| list.iter().map(|it| StringMatch::Exact((*it).into())).collect();
    let cart = Match { principals: principals(&["cluster.local/ns/shop/sa/cart"]), ..Match::default() };
    let others = (0..6).map(|n| allow(&format!("not-{n}"), false));
    let foes = (0..6).map(|n| deny(&format!("foe-{n}"), false));
    let policies = others.chain(foes).chain([policy("cart", Action::Allow, cart)]);
    let (mesh, server) = (policies.fold(Mesh::default(), Mesh::and).snapshot(), server());
    let peer = CLIENT.parse().unwrap();
    let mut verdict = None;
    let count = allocation_counter::measure(|| verdict = Some(authorize(&mesh, &connection(&server, Some(&peer)))));
    assert_eq!(verdict.unwrap().decision, Decision::Allowed { by: Some(policy_key("cart")) });
    assert_eq!(count.count_total, 0);
}
