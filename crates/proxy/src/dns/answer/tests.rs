//! What names mean, as a table.

use hickory_proto::rr::RecordType::{A as V4, AAAA as V6, ANY, HTTPS, MX, PTR, SRV as Srv, TXT};
use rand::SeedableRng as _;
use zspire_model::service::Visibility;
use zspire_model::{Change, Membership, NetworkAddress, Store};

use super::*;

fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    let vip = |text: &&str| {
        let (network, address) = text.split_once('/').unwrap_or(("", text));
        NetworkAddress { network: network.into(), address: address.parse().unwrap() }
    };
    Service {
        name: hostname.split('.').next().unwrap().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        vips: vips.iter().map(vip).collect(),
        ports: vec![
            Port { number: 80, target: Some(8080), protocol: AppProtocol::Http11 },
            Port { number: 5432, target: None, protocol: AppProtocol::Unknown },
        ],
        ..Service::default()
    }
}

fn pod(namespace: &str, name: &str, addresses: &[&str], of: &[&str]) -> Workload {
    let membership = |hostname: &&str| Membership {
        service: NamespacedHostname { namespace: namespace.into(), hostname: (*hostname).into() },
        ports: vec![Port { number: 5432, target: Some(15432), protocol: AppProtocol::Unknown }].into(),
    };
    Workload {
        uid: format!("c//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        cluster_id: "c".into(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        services: of.iter().map(membership).collect(),
        ..Workload::default()
    }
}

fn mesh() -> Snapshot {
    let headless = "db.ns.svc.cluster.local";
    let (mut store, _) = Store::new();
    let services = [
        service("ns", "web.ns.svc.cluster.local", &["10.1.0.1", "fd00::1", "far/10.9.0.1"]),
        service("other", "web.other.svc.cluster.local", &["10.1.0.2"]),
        service("ns", headless, &[]),
        service("ns", "empty.ns.svc.cluster.local", &[]),
        service("ns", "far.ns.svc.cluster.local", &["far/10.9.0.2"]),
        service("ns", "www.example.com", &["240.0.0.1"]),
        service("ns", "*.wild.example.com", &["240.0.0.2"]),
        service("ns", "*.deep.wild.example.com", &["240.0.0.3"]),
        service("ns", "exact.wild.example.com", &["240.0.0.4"]),
        service("other", "twice.example.com", &["240.0.0.5"]),
        service("ns", "twice.example.com", &["240.0.0.6"]),
        Service {
            visibility: Visibility::Namespace,
            ..service("other", "hidden.other.svc.cluster.local", &["10.1.0.3"])
        },
    ];
    let workloads = [
        pod("ns", "db-0", &["10.0.0.1", "fd00:1::1"], &[headless]),
        pod("ns", "db-1", &["10.0.0.2"], &[headless]),
        Workload { hostname: "vm.example.com".into(), ..pod("ns", "vm", &["192.0.2.7"], &[]) },
    ];
    let services = services.into_iter().map(|it| Change::PutService(Arc::new(it)));
    store.apply(services.chain(workloads.into_iter().map(|it| Change::PutWorkload(Arc::new(it)))));
    store.snapshot().clone()
}

/// What a client in a namespace is told, in words: records as `owner type data`, in order of text.
fn told(namespace: &str, name: &str, kind: RecordType) -> String {
    let zone = Zone::new("cluster.local", Some("preferred".into())).unwrap();
    let client = pod(namespace, "client", &["10.0.0.9"], &[]);
    let query = Query::query(Name::from_ascii(name).unwrap(), kind);
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    let answer = match zone.answer(&mesh(), &client, &query, &mut rng) {
        Decision::Forward => return "forward".into(),
        Decision::Refuse(code) => return format!("{code:?}"),
        Decision::Answer(answer) => answer,
    };
    assert_eq!(answer.records.is_empty(), answer.soa.is_some() && answer.records.is_empty(), "{answer:?}");
    let line = |record: &Record| format!("{} {} {}", record.name, record.record_type(), record.data);
    let mut lines: Vec<String> = answer.records.iter().map(line).collect();
    lines.sort();
    let mut additional: Vec<String> = answer.additionals.iter().map(|it| format!("+{}", line(it))).collect();
    additional.sort();
    lines.extend(additional);
    lines.extend(answer.soa.iter().map(|soa| format!("none ({} for {} s)", soa.name, soa.ttl)));
    assert!(answer.records.iter().all(|record| record.ttl == TTL));
    lines.join("; ")
}

#[test]
fn addresses() {
    for (name, kind, expected) in [
        ("web.ns.svc.cluster.local.", V4, "web.ns.svc.cluster.local. A 10.1.0.1"),
        ("web.ns.svc.cluster.local.", V6, "web.ns.svc.cluster.local. AAAA fd00::1"),
        ("WeB.ns.SVC.cluster.local.", V4, "WeB.ns.SVC.cluster.local. A 10.1.0.1"),
        // As far as it is written.
        ("web.", V4, "web. A 10.1.0.1"),
        ("web.ns.", V4, "web.ns. A 10.1.0.1"),
        ("web.other.", V4, "web.other. A 10.1.0.2"),
        ("web.other.svc.", V4, "web.other.svc. A 10.1.0.2"),
        // Headless: endpoints, and single ones.
        ("db.ns.svc.cluster.local.", V4, "db.ns.svc.cluster.local. A 10.0.0.1; db.ns.svc.cluster.local. A 10.0.0.2"),
        ("db.ns.svc.cluster.local.", V6, "db.ns.svc.cluster.local. AAAA fd00:1::1"),
        ("db-1.db.ns.svc.cluster.local.", V4, "db-1.db.ns.svc.cluster.local. A 10.0.0.2"),
        ("db-1.db.ns.svc.", V4, "db-1.db.ns.svc. A 10.0.0.2"),
        ("10-0-0-2.db.ns.svc.cluster.local.", V4, "10-0-0-2.db.ns.svc.cluster.local. A 10.0.0.2"),
        ("db-7.db.ns.svc.cluster.local.", V4, "forward"),
        ("db-0.web.ns.svc.cluster.local.", V4, "forward"),
        // Elsewhere than in the cluster.
        ("www.example.com.", V4, "www.example.com. A 240.0.0.1"),
        ("vm.example.com.", V4, "vm.example.com. A 192.0.2.7"),
        ("twice.example.com.", V4, "twice.example.com. A 240.0.0.6"),
        ("a.wild.example.com.", V4, "a.wild.example.com. A 240.0.0.2"),
        ("a.b.wild.example.com.", V4, "a.b.wild.example.com. A 240.0.0.2"),
        ("a.deep.wild.example.com.", V4, "a.deep.wild.example.com. A 240.0.0.3"),
        ("exact.wild.example.com.", V4, "exact.wild.example.com. A 240.0.0.4"),
        ("wild.example.com.", V4, "forward"),
        // Not known, or not to be seen.
        ("nobody.ns.svc.cluster.local.", V4, "forward"),
        ("example.com.", V4, "forward"),
        ("hidden.other.svc.cluster.local.", V4, "forward"),
        (".", V4, "forward"),
    ] {
        assert_eq!(told("ns", name, kind), expected, "{name}");
    }
    assert_eq!(told("other", "hidden.", V4), "hidden. A 10.1.0.3");
    assert_eq!(told("other", "twice.example.com.", V4), "twice.example.com. A 240.0.0.5");
    assert_eq!(told("third", "web.", V4), "forward");
}

#[test]
fn what_a_resolver_puts_behind_a_name_is_taken_off() {
    for (name, expected) in [
        (
            "www.example.com.ns.svc.cluster.local.",
            "www.example.com. A 240.0.0.1; www.example.com.ns.svc.cluster.local. CNAME www.example.com.",
        ),
        (
            "www.example.com.svc.cluster.local.",
            "www.example.com. A 240.0.0.1; www.example.com.svc.cluster.local. CNAME www.example.com.",
        ),
        (
            "web.ns.svc.cluster.local.ns.svc.cluster.local.",
            "web.ns.svc.cluster.local. A 10.1.0.1; web.ns.svc.cluster.local.ns.svc.cluster.local. CNAME web.ns.svc.cluster.local.",
        ),
        ("unknown.example.com.ns.svc.cluster.local.", "forward"),
        // Of another namespace's pods.
        ("www.example.com.other.svc.cluster.local.", "forward"),
    ] {
        assert_eq!(told("ns", name, V4), expected, "{name}");
    }
}

#[test]
fn a_known_name_without_the_record_is_answered_with_nothing() {
    let none = "none (cluster.local. for 5 s)";
    for (name, kind) in [
        ("web.other.svc.cluster.local.", V6),
        ("empty.ns.svc.cluster.local.", V4),
        ("far.ns.svc.cluster.local.", V4),
        ("web.ns.svc.cluster.local.", TXT),
        ("web.ns.svc.cluster.local.", MX),
        ("web.ns.svc.cluster.local.", ANY),
        ("db-1.db.ns.svc.cluster.local.", V6),
        ("_80._tcp.web.ns.svc.cluster.local.", V4),
    ] {
        assert_eq!(told("ns", name, kind), none, "{name} {kind}");
    }
    assert_eq!(told("ns", "www.example.com.", HTTPS), "none (www.example.com. for 5 s)");
    assert_eq!(
        told("ns", "www.example.com.ns.svc.cluster.local.", V6),
        "www.example.com.ns.svc.cluster.local. CNAME www.example.com.; none (www.example.com. for 5 s)"
    );
    assert_eq!(told("ns", "1.0.1.10.in-addr.arpa.", PTR), "forward");
    assert_eq!(told("ns", "web.ns.svc.cluster.local.", RecordType::AXFR), "Refused");
}

#[test]
fn ports_of_services() {
    let web = "+web.ns.svc.cluster.local. A 10.1.0.1; +web.ns.svc.cluster.local. AAAA fd00::1";
    for (name, expected) in [
        (
            "_http._tcp.web.ns.svc.cluster.local.",
            format!("_http._tcp.web.ns.svc.cluster.local. SRV 0 100 80 web.ns.svc.cluster.local.; {web}"),
        ),
        (
            "_5432._tcp.web.ns.svc.cluster.local.",
            format!("_5432._tcp.web.ns.svc.cluster.local. SRV 0 100 5432 web.ns.svc.cluster.local.; {web}"),
        ),
        (
            "web.ns.svc.cluster.local.",
            format!(
                "web.ns.svc.cluster.local. SRV 0 100 5432 web.ns.svc.cluster.local.; \
                 web.ns.svc.cluster.local. SRV 0 100 80 web.ns.svc.cluster.local.; {web}"
            ),
        ),
        // The names of ports are not known here.
        ("_admin._tcp.web.ns.svc.cluster.local.", "forward".into()),
        ("_http._udp.web.ns.svc.cluster.local.", "forward".into()),
        (
            "_5432._tcp.db.ns.svc.cluster.local.",
            "_5432._tcp.db.ns.svc.cluster.local. SRV 0 100 15432 db-0.db.ns.svc.cluster.local.; \
             _5432._tcp.db.ns.svc.cluster.local. SRV 0 100 15432 db-1.db.ns.svc.cluster.local.; \
             +db-0.db.ns.svc.cluster.local. A 10.0.0.1; +db-0.db.ns.svc.cluster.local. AAAA fd00:1::1; \
             +db-1.db.ns.svc.cluster.local. A 10.0.0.2"
                .into(),
        ),
    ] {
        assert_eq!(told("ns", name, Srv), expected, "{name}");
    }
}

#[test]
fn addresses_are_shuffled_and_bounded() {
    let headless = "many.ns.svc.cluster.local";
    let (mut store, _) = Store::new();
    store.apply([Change::PutService(Arc::new(service("ns", headless, &[])))]);
    store.apply(
        (0..200).map(|n| {
            Change::PutWorkload(Arc::new(pod("ns", &format!("p{n}"), &[&format!("10.0.1.{n}")], &[headless])))
        }),
    );
    let (zone, client) = (Zone::new("cluster.local", None).unwrap(), pod("ns", "client", &[], &[]));
    let query = Query::query(Name::from_ascii(headless).unwrap(), V4);
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    let mut ask = || match zone.answer(store.snapshot(), &client, &query, &mut rng) {
        Decision::Answer(answer) => answer.records,
        other => panic!("{other:?}"),
    };
    let (one, other) = (ask(), ask());
    assert_eq!((one.len(), other.len()), (MOST, MOST));
    assert_ne!(one, other);
}
