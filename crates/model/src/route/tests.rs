//! Meshes, connections, and where they go.

mod endpoints;
mod gateways;

use std::collections::BTreeMap;

use expect_test::{Expect, expect};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::fixture::{
    Mesh, With, address as at, cidr, entry, gateway, gateway_at, join, key, pod, port, service, weighted,
};
use crate::service::{HealthPolicy, IpFamilies, LoadBalancer, Scope, Visibility};
use crate::workload::{Health, NetworkMode};
use crate::{ApplicationTunnel, Locality};

/// The client of most tests.
fn client() -> Workload {
    pod("client", "10.0.0.1")
}

/// The client, a server and a service of the two.
fn small() -> Mesh {
    Mesh::default()
        .and(client())
        .and(pod("server", "10.0.0.2").of("svc"))
        .and(service("svc", "10.1.0.1"))
        .and(entry("plain", "10.0.0.3"))
}

/// A waypoint with its service.
fn with_waypoint(mesh: Mesh) -> Mesh {
    let ports = |it: Service| it.with(|it| it.ports = vec![port(HBONE_PORT, Some(HBONE_PORT))]);
    mesh.and(pod("way", "10.0.0.9").of("way")).and(ports(service("way", "10.1.0.9")))
}

fn destination(text: &str) -> Destination<'_> {
    match text.parse() {
        Ok(address) => Destination::Address(address),
        Err(_) => {
            let (host, port) = text.rsplit_once(':').unwrap();
            Destination::Hostname(host, port.parse().unwrap())
        }
    }
}

fn go_with(mesh: &Mesh, source: &Workload, to: &str, settings: &Settings, rng: &mut SmallRng) -> Route {
    let request = RouteRequest {
        source,
        source_address: source.addresses.first().copied().unwrap_or(IpAddr::from([127, 0, 0, 6])),
        destination: destination(to),
        excluded: &[],
        settings,
    };
    route(&mesh.snapshot(), &request, rng)
}

fn go(mesh: &Mesh, source: &Workload, to: &str) -> Route {
    go_with(mesh, source, to, &Settings::default(), &mut SmallRng::seed_from_u64(1))
}

fn tunnel(tunnel: &Tunnel) -> String {
    format!("CONNECT {} expecting {}", tunnel.authority, join(&tunnel.expected, " or "))
}

fn show(route: &Route) -> String {
    let mut lines = match &route.decision {
        Err(reject) => vec![format!("rejected: {reject}")],
        Ok(upstream) => {
            let path = match &upstream.path {
                Path::Tcp => "TCP".to_owned(),
                Path::Hbone(it) => tunnel(it),
                Path::DoubleHbone { outer, inner } => format!("{}\n{}", tunnel(outer), tunnel(inner)),
            };
            vec![format!("to {}", upstream.connect), path]
        }
    };
    lines.extend(route.why.iter().map(|step| format!("- {step}")));
    join(lines, "\n")
}

fn check_from(source: &Workload, mesh: &Mesh, to: &str, expected: &Expect) {
    expected.assert_eq(&show(&go(mesh, source, to)));
}

fn check(to: &str, mesh: &Mesh, expected: &Expect) {
    check_from(&client(), mesh, to, expected);
}

/// How often each endpoint is chosen in many connections.
fn spread(mesh: &Mesh, to: &str) -> BTreeMap<String, usize> {
    let mut rng = SmallRng::seed_from_u64(7);
    let mut counts = BTreeMap::new();
    for _ in 0..1000 {
        let route = go_with(mesh, &client(), to, &Settings::default(), &mut rng);
        let name = match route.decision {
            Ok(upstream) => upstream.workload.map_or("unknown".into(), |workload| workload.name.to_string()),
            Err(reject) => reject.to_string(),
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

fn chosen(mesh: &Mesh, to: &str) -> String {
    join(spread(mesh, to).into_keys(), " ")
}

#[test]
fn services_and_workloads_by_address() {
    check(
        "10.1.0.1:80",
        &small(),
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/server was drawn by weight
        - it takes HBONE"#]],
    );
    check(
        "10.0.0.2:8080",
        &small(),
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is workload c1//Pod/ns/server
        - it takes HBONE"#]],
    );
    check(
        "10.0.0.3:22",
        &small(),
        &expect![[r#"
        to 10.0.0.3:22
        TCP
        - the destination is workload plain
        - it does not take HBONE: plain TCP"#]],
    );
    check(
        "192.0.2.1:443",
        &small(),
        &expect![[r#"
        to 192.0.2.1:443
        TCP
        - the mesh does not know the destination: the connection passes through"#]],
    );
    check(
        "[::ffff:10.1.0.1]:80",
        &small(),
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/server was drawn by weight
        - it takes HBONE"#]],
    );
    check(
        "10.1.0.1:81",
        &small(),
        &expect![[r#"
        rejected: service ns/svc.test has no port 81
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
}

#[test]
fn services_and_workloads_by_hostname() {
    check(
        "svc.test:80",
        &small(),
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is service ns/svc.test, by its hostname
        - endpoint c1//Pod/ns/server was drawn by weight
        - it takes HBONE"#]],
    );
    check("nothing.test:80", &small(), &expect!["rejected: no service or workload has the hostname nothing.test"]);
    let named = entry("named", "10.0.0.4").with(|it| {
        it.hostname = "named.example".into();
        it.addresses.clear();
    });
    check(
        "named.example:443",
        &small().and(named.clone()),
        &expect![[r#"
        to named.example:443
        TCP
        - the destination is workload named
        - it does not take HBONE: plain TCP"#]],
    );
    let in_mesh = named.with(|it| {
        it.protocol = Protocol::Hbone;
        it.service_account = "named".into();
    });
    check(
        "named.example:443",
        &small().and(in_mesh),
        &expect![[r#"
        to named.example:15008
        CONNECT <resolved>:443 expecting spiffe://cluster.local/ns/ns/sa/named
        - the destination is workload named
        - it takes HBONE"#]],
    );
}

#[test]
fn ranges_come_after_workloads_and_the_longest_first() {
    let ranged = |name: &str, net: &str| service(name, "").with(|it| it.cidr_vips = vec![cidr("", net)]);
    let mesh = small()
        .and(ranged("wide", "10.0.0.0/8"))
        .and(ranged("narrow", "10.5.0.0/16"))
        .and(pod("behind-wide", "10.2.0.1").of("wide"))
        .and(pod("behind-narrow", "10.2.0.2").of("narrow"));
    check(
        "10.5.1.1:80",
        &mesh,
        &expect![[r#"
        to 10.2.0.2:15008
        CONNECT 10.2.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/behind-narrow
        - the destination is service ns/narrow.test, by its virtual address range
        - endpoint c1//Pod/ns/behind-narrow was drawn by weight
        - it takes HBONE"#]],
    );
    check(
        "10.4.1.1:80",
        &mesh,
        &expect![[r#"
        to 10.2.0.1:15008
        CONNECT 10.2.0.1:8080 expecting spiffe://cluster.local/ns/ns/sa/behind-wide
        - the destination is service ns/wide.test, by its virtual address range
        - endpoint c1//Pod/ns/behind-wide was drawn by weight
        - it takes HBONE"#]],
    );
    check(
        "10.0.0.3:22",
        &mesh,
        &expect![[r#"
        to 10.0.0.3:22
        TCP
        - the destination is workload plain
        - it does not take HBONE: plain TCP"#]],
    );
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/server was drawn by weight
        - it takes HBONE"#]],
    );
    let hidden = ranged("narrow", "10.5.0.0/16").with(|it| {
        it.namespace = "other".into();
        it.visibility = Visibility::Namespace;
    });
    let mesh = small().and(ranged("wide", "10.0.0.0/8")).and(pod("behind-wide", "10.2.0.1").of("wide")).and(hidden);
    assert_eq!(chosen(&mesh, "10.5.1.1:80"), "behind-wide", "the longer range cannot be seen");
}

/// Namespace of a service, whether it is canonical, and who sees it.
type Contender = (&'static str, bool, Visibility);

/// Several services with one address; the names of the endpoints are the namespaces of the services.
fn contested(services: &[Contender]) -> Mesh {
    services.iter().enumerate().fold(Mesh::default().and(client()), |mesh, (i, (namespace, canonical, visibility))| {
        let service = service(&format!("{namespace}/shared"), "10.1.0.1").with(|it| {
            it.canonical = *canonical;
            it.visibility = *visibility;
        });
        mesh.and(service).and(pod(namespace, &format!("10.2.0.{i}")).of(&format!("{namespace}/shared")))
    })
}

#[test]
fn who_wins_an_address_that_several_services_have() {
    use Visibility::{Namespace, Public};
    let preferring = |namespace: Option<&str>| Settings {
        preferred_service_namespace: namespace.map(Into::into),
        ..Settings::default()
    };
    let cases: [(&str, &[Contender], Option<&str>, &str); 7] = [
        ("the client's namespace", &[("a", true, Public), ("ns", false, Public)], Some("a"), "ns"),
        ("the canonical one", &[("a", false, Public), ("b", true, Public)], Some("a"), "b"),
        ("the preferred namespace", &[("a", false, Public), ("b", false, Public)], Some("b"), "b"),
        ("the first by name", &[("b", false, Public), ("a", false, Public)], None, "a"),
        ("one that may be seen", &[("a", true, Namespace), ("b", false, Public)], Some("a"), "b"),
        ("one's own, that nobody else sees", &[("a", true, Public), ("ns", false, Namespace)], None, "ns"),
        ("none", &[("a", true, Namespace)], None, "unknown"),
    ];
    for (name, services, preferred, expected) in cases {
        for to in ["10.1.0.1:80", "shared.test:80"] {
            let mut rng = SmallRng::seed_from_u64(1);
            let route = go_with(&contested(services), &client(), to, &preferring(preferred), &mut rng);
            let winner = route.service.map_or("unknown".to_owned(), |service| service.namespace.to_string());
            assert_eq!(winner, expected, "{name}, {to}");
        }
    }
}

#[test]
fn the_proxys_own_ports_are_refused() {
    for to in
        ["10.0.0.1:15008", "127.0.0.1:15001", "[::1]:15006", "0.0.0.0:15080", "[::ffff:10.0.0.1]:15001", "[::]:15001"]
    {
        let route = go(&small(), &client(), to);
        assert!(matches!(route.decision, Err(Reject::OwnPort(_))), "{to}: {}", show(&route));
    }
    for to in ["10.0.0.1:80", "10.0.0.2:15008", "127.0.0.1:80", "192.0.2.1:15001"] {
        let route = go(&small(), &client(), to);
        assert!(route.decision.is_ok(), "{to}: {}", show(&route));
    }
}

#[test]
fn an_address_that_says_nothing_about_who_is_behind_it() {
    let on_host = pod("host", "10.9.9.9").of("svc").with(|it| it.network_mode = NetworkMode::HostNetwork);
    let mesh = Mesh::default().and(on_host).and(service("svc", "10.1.0.1"));
    check(
        "10.9.9.9:80",
        &mesh,
        &expect![[r#"
        to 10.9.9.9:80
        TCP
        - the mesh does not know the destination: the connection passes through"#]],
    );
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        to 10.9.9.9:15008
        CONNECT 10.9.9.9:8080 expecting spiffe://cluster.local/ns/ns/sa/host
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/host was drawn by weight
        - it takes HBONE"#]],
    );
}

#[test]
fn networks_do_not_mix() {
    let mesh = Mesh::default()
        .and(pod("here", "10.0.0.2"))
        .and(pod("there", "10.0.0.2").in_network("west").with(|it| it.protocol = Protocol::Tcp))
        .and(service("there", "").with(|it| it.vips = vec![at("west", "10.1.0.1")]));
    assert_eq!(chosen(&mesh, "10.0.0.2:80"), "here");
    assert_eq!(chosen(&mesh, "10.1.0.1:80"), "unknown");
    let in_west = client().in_network("west");
    check_from(
        &in_west,
        &mesh,
        "10.0.0.2:80",
        &expect![[r#"
        to 10.0.0.2:80
        TCP
        - the destination is workload c1//Pod/ns/there
        - it does not take HBONE: plain TCP"#]],
    );
}

/// Choosing an endpoint costs no allocation, once somebody has asked for its identity.
#[test]
fn choosing_allocates_nothing() {
    let preferences = vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster];
    let near = |mut it: Service| {
        it.load_balancer = LoadBalancer { mode: Mode::Failover, preferences, ..LoadBalancer::default() };
        it
    };
    let mesh = small().and(near(service("near", "10.1.0.2")));
    let mesh = (3..200).fold(mesh, |mesh, n| mesh.and(pod(&format!("p{n}"), &format!("10.2.0.{n}")).of("near")));
    let (snapshot, source, settings) = (mesh.snapshot(), client(), Settings::default());
    let mut rng = SmallRng::seed_from_u64(1);
    for (to, path) in [
        ("10.1.0.1:80", "Hbone"),
        ("10.1.0.2:80", "Hbone"),
        ("10.0.0.2:80", "Hbone"),
        ("10.0.0.3:80", "Tcp"),
        ("192.0.2.1:80", "Tcp"),
    ] {
        let request = RouteRequest {
            source: &source,
            source_address: source.addresses[0],
            destination: destination(to),
            excluded: &[],
            settings: &settings,
        };
        // Every endpoint has been drawn before.
        let mut go = || route(&snapshot, &request, &mut rng);
        for _ in 0..5_000 {
            go();
        }
        let mut gone = None;
        let count = allocation_counter::measure(|| gone = Some(go()));
        assert!(format!("{:?}", gone.unwrap().decision.unwrap().path).starts_with(path), "{to}");
        assert_eq!(count.count_total, 0, "{to}");
    }
}
