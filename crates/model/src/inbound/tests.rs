//! Tunnels that come in, and where they end.

use expect_test::{Expect, expect};

use super::*;
use crate::fixture::{Mesh, With, cidr, entry, gateway, gateway_at, pod, port, service, weighted};
use crate::workload::ApplicationProtocol;

fn ask(mesh: &Mesh, local: &Workload, authority: &Authority) -> Result<Inbound, Reject> {
    let request = InboundRequest {
        local,
        local_address: local.addresses[0],
        authority,
        only: None,
        settings: &Settings::default(),
    };
    resolve(&mesh.snapshot(), &request)
}

fn show(result: &Result<Inbound, Reject>) -> String {
    match result {
        Err(reject) => format!("rejected: {reject}"),
        Ok(Inbound { destination, tunnel, service }) => {
            let service = service.as_ref().map(|service| format!(", service {}", service.key())).unwrap_or_default();
            let tunnel = tunnel.map(|tunnel| format!(", by {:?} to {:?}", tunnel.protocol, tunnel.port));
            format!("{destination}{service}{}", tunnel.unwrap_or_default())
        }
    }
}

fn check(authority: &str, local: &Workload, mesh: &Mesh, expected: &Expect) {
    expected.assert_eq(&show(&ask(mesh, local, &authority.parse().unwrap())));
}

fn server() -> Workload {
    pod("server", "10.0.0.2").of("svc")
}

fn waypoint() -> Workload {
    pod("way", "10.0.0.9").of("way")
}

fn mesh() -> Mesh {
    Mesh::default()
        .and(server())
        .and(pod("other", "10.0.0.3"))
        .and(waypoint())
        .and(service("svc", "10.1.0.1"))
        .and(service("way", "10.1.0.9"))
}

#[test]
fn a_workload_is_asked_for_by_its_address() {
    check("10.0.0.2:80", &server(), &mesh(), &expect!["10.0.0.2:80"]);
    check("[::ffff:10.0.0.2]:80", &server(), &mesh(), &expect!["10.0.0.2:80"]);
    check(
        "10.0.0.3:80",
        &server(),
        &mesh(),
        &expect![
            "rejected: 10.0.0.3 was asked for at 10.0.0.2, and workload c1//Pod/ns/server is not a waypoint for it"
        ],
    );
    check(
        "10.1.0.1:80",
        &server(),
        &mesh(),
        &expect![
            "rejected: 10.1.0.1 was asked for at 10.0.0.2, and workload c1//Pod/ns/server is not a waypoint for it"
        ],
    );
    check(
        "127.0.0.1:80",
        &server(),
        &mesh(),
        &expect![
            "rejected: 127.0.0.1 was asked for at 10.0.0.2, and workload c1//Pod/ns/server is not a waypoint for it"
        ],
    );
    check(
        "192.0.2.1:80",
        &server(),
        &mesh(),
        &expect![
            "rejected: 192.0.2.1 was asked for at 10.0.0.2, and workload c1//Pod/ns/server is not a waypoint for it"
        ],
    );
}

#[test]
fn another_address_of_the_workload_is_not_where_it_was_asked_for() {
    let dual = server().with(|it| it.addresses.push("fd00::2".parse().unwrap()));
    check(
        "[fd00::2]:80",
        &dual,
        &mesh().and(dual.clone()),
        &expect![
            "rejected: fd00::2 was asked for at 10.0.0.2, and workload c1//Pod/ns/server is not a waypoint for it"
        ],
    );
}

#[test]
fn a_service_is_asked_for_by_its_name() {
    check("svc.test:80", &server(), &mesh(), &expect!["10.0.0.2:8080, service ns/svc.test"]);
    check("svc.test:81", &server(), &mesh(), &expect!["rejected: service ns/svc.test has no port 81 at this endpoint"]);
    check(
        "svc.test:80",
        &pod("other", "10.0.0.3"),
        &mesh(),
        &expect!["rejected: workload c1//Pod/ns/other is not an endpoint of a service svc.test"],
    );
    check(
        "nothing.test:80",
        &server(),
        &mesh(),
        &expect!["rejected: workload c1//Pod/ns/server is not an endpoint of a service nothing.test"],
    );
    let own = pod("server", "10.0.0.2").of_ports("svc", &[(80, 9090)]);
    check("svc.test:80", &own, &mesh().and(own.clone()), &expect!["10.0.0.2:9090, service ns/svc.test"]);
    let named = service("svc", "10.1.0.1").with(|it| it.ports = vec![port(80, None)]);
    check(
        "svc.test:80",
        &server(),
        &mesh().and(named),
        &expect!["rejected: service ns/svc.test has no port 80 at this endpoint"],
    );
    // Of several services with the name, the one that the workload is an endpoint of is meant.
    let twice = mesh().and(service("a/svc", "10.1.0.7").with(|it| it.ports = vec![port(80, Some(1))]));
    check("svc.test:80", &server(), &twice, &expect!["10.0.0.2:8080, service ns/svc.test"]);
    // A service that is not known yet cannot be asked for, even by its endpoint.
    let staged = server().of("later");
    check(
        "later.test:80",
        &staged,
        &mesh().and(staged.clone()),
        &expect!["rejected: workload c1//Pod/ns/server is not an endpoint of a service later.test"],
    );
}

#[test]
fn a_waypoint_is_asked_for_what_is_behind_it() {
    let by = |change: fn(&mut Service)| mesh().and(service("svc", "10.1.0.1").with(change));
    let direct = by(|it| it.waypoint = Some(gateway("way")));
    check("10.1.0.1:80", &waypoint(), &direct, &expect!["10.1.0.1:80"]);
    check(
        "10.1.0.1:80",
        &server(),
        &direct,
        &expect![
            "rejected: 10.1.0.1 was asked for at 10.0.0.2, and workload c1//Pod/ns/server is not a waypoint for it"
        ],
    );
    // Its endpoints are not behind it: only the service is.
    check(
        "10.0.0.2:80",
        &waypoint(),
        &direct,
        &expect!["rejected: 10.0.0.2 was asked for at 10.0.0.9, and workload c1//Pod/ns/way is not a waypoint for it"],
    );
    let weights = by(|it| it.weighted_waypoints = vec![weighted("blue", 1), weighted("way", 1)]);
    check("10.1.0.1:80", &waypoint(), &weights, &expect!["10.1.0.1:80"]);
    let by_vip = by(|it| it.waypoint = Some(gateway_at("", "10.1.0.9")));
    check("10.1.0.1:80", &waypoint(), &by_vip, &expect!["10.1.0.1:80"]);
    let by_address = by(|it| it.waypoint = Some(gateway_at("", "10.0.0.9")));
    check("10.1.0.1:80", &waypoint(), &by_address, &expect!["10.1.0.1:80"]);
    let elsewhere = by(|it| it.waypoint = Some(gateway_at("west", "10.0.0.9")));
    check(
        "10.1.0.1:80",
        &waypoint(),
        &elsewhere,
        &expect!["rejected: 10.1.0.1 was asked for at 10.0.0.9, and workload c1//Pod/ns/way is not a waypoint for it"],
    );
    let workload = mesh().and(server().behind(gateway("way")));
    check("10.0.0.2:80", &waypoint(), &workload, &expect!["10.0.0.2:80"]);
    check(
        "10.0.0.3:80",
        &waypoint(),
        &workload,
        &expect!["rejected: 10.0.0.3 was asked for at 10.0.0.9, and workload c1//Pod/ns/way is not a waypoint for it"],
    );
}

#[test]
fn a_range_behind_a_waypoint() {
    let ranged = service("wide", "").with(|it| {
        it.cidr_vips = vec![cidr("", "10.7.0.0/16")];
        it.waypoint = Some(gateway("way"));
    });
    let mesh = mesh().and(ranged);
    check("10.7.1.1:80", &waypoint(), &mesh, &expect!["10.7.1.1:80"]);
    check(
        "10.7.1.1:80",
        &server(),
        &mesh,
        &expect![
            "rejected: 10.7.1.1 was asked for at 10.0.0.2, and workload c1//Pod/ns/server is not a waypoint for it"
        ],
    );
    // A workload in the range is not behind it.
    check(
        "10.7.1.1:80",
        &waypoint(),
        &mesh.and(pod("inside", "10.7.1.1")),
        &expect!["rejected: 10.7.1.1 was asked for at 10.0.0.9, and workload c1//Pod/ns/way is not a waypoint for it"],
    );
}

#[test]
fn an_application_tunnel_takes_what_was_asked_for_to_its_own_port() {
    let tunnel =
        |protocol, port| waypoint().with(|it| it.application_tunnel = Some(ApplicationTunnel { protocol, port }));
    let proxy = tunnel(ApplicationProtocol::Proxy, Some(15088));
    check("192.0.2.1:443", &proxy, &mesh(), &expect!["192.0.2.1:443, by Proxy to Some(15088)"]);
    check("way.test:80", &proxy, &mesh(), &expect!["10.0.0.9:8080, service ns/way.test, by Proxy to Some(15088)"]);
    check(
        "192.0.2.1:443",
        &tunnel(ApplicationProtocol::None, None),
        &mesh(),
        &expect!["192.0.2.1:443, by None to None"],
    );
    // What counts is where it ends.
    check("192.0.2.1:15008", &proxy, &mesh(), &expect!["192.0.2.1:15008, by Proxy to Some(15088)"]);
    check(
        "192.0.2.1:443",
        &tunnel(ApplicationProtocol::Proxy, Some(15008)),
        &mesh(),
        &expect!["rejected: port 15008 belongs to the proxy itself"],
    );
}

#[test]
fn the_proxys_own_ports_are_refused() {
    for port in [15001, 15006, 15008, 15080] {
        let asked = Authority::Address((server().addresses[0], port).into());
        assert_eq!(ask(&mesh(), &server(), &asked), Err(Reject::OwnPort(port)));
    }
    let sneaky = service("svc", "10.1.0.1").with(|it| it.ports = vec![port(80, Some(15006))]);
    check("svc.test:80", &server(), &mesh().and(sneaky), &expect!["rejected: port 15006 belongs to the proxy itself"]);
}

#[test]
fn of_the_proxy_itself_one_port_is_offered() {
    let ask = |authority: &str, local: &Workload| {
        let authority = authority.parse().unwrap();
        let (local_address, settings) = (local.addresses[0], &Settings::default());
        let request = InboundRequest { local, local_address, authority: &authority, only: Some(15020), settings };
        show(&resolve(&mesh().snapshot(), &request))
    };
    let own = server().addresses[0];
    assert_eq!(ask(&format!("{own}:15020"), &server()), format!("{own}:15020"));
    for port in [22, 15000, 15008] {
        let refused = format!("rejected: the proxy offers port 15020 to the mesh, not {port}");
        assert_eq!(ask(&format!("{own}:{port}"), &server()), refused);
    }
    // Whatever discovery says of it.
    let tunnel = ApplicationTunnel { protocol: ApplicationProtocol::None, port: Some(15000) };
    let sneaky = server().with(|it| it.application_tunnel = Some(tunnel));
    assert_eq!(ask(&format!("{own}:15020"), &sneaky), format!("{own}:15020"));
    for elsewhere in [&sneaky, &waypoint()] {
        assert!(ask("10.7.1.1:15020", elsewhere).contains("10.7.1.1 was asked for at"));
    }
}

#[test]
fn a_workload_without_identity_is_asked_for_like_any_other() {
    let plain = entry("plain", "10.0.0.4");
    check("10.0.0.4:80", &plain, &mesh(), &expect!["10.0.0.4:80"]);
}

#[test]
fn authorities() {
    for good in ["10.0.0.1:80", "[fd00::1]:1", "svc.ns.svc.cluster.local:65535", "a_b:80"] {
        assert_eq!(good.parse::<Authority>().unwrap().to_string(), good);
    }
    let long = format!("{}a:80", "a.".repeat(127));
    let label = format!("{}:80", "a".repeat(64));
    for bad in [
        "",
        ":",
        ":80",
        "host",
        "host:",
        "host:0",
        "host:+1",
        "host:65536",
        "host: 80",
        "10.0.0.1",
        "10.0.0.1:0",
        "127.1:80",
        "1.2.3.4.5:80",
        "[fe80::1%1]:80",
        "[fe80::1%eth0]:80",
        "fd00::1:80",
        "[::1:80",
        "user@host:80",
        "a..b:80",
        ".:80",
        "ho st:80",
        "host:80:80",
        "h\u{f6}st:80",
        "host\0:80",
        &long,
        &label,
    ] {
        assert_eq!(bad.parse::<Authority>(), Err(BadAuthority), "{bad:?}");
    }
}
