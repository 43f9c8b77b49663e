//! Routes through waypoints and network gateways.

use super::*;

#[test]
fn the_waypoint_of_a_service() {
    let svc = service("svc", "10.1.0.1").with(|it| it.waypoint = Some(gateway("way")));
    let mesh = with_waypoint(small()).and(svc.clone());
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        to 10.0.0.9:15008
        CONNECT 10.1.0.1:80 expecting spiffe://cluster.local/ns/ns/sa/way
        - the destination is service ns/svc.test, by its virtual address
        - a waypoint has to be passed: c1//Pod/ns/way"#]],
    );
    check(
        "svc.test:80",
        &mesh,
        &expect![[r#"
        to 10.0.0.9:15008
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/way
        - the destination is service ns/svc.test, by its hostname
        - a waypoint has to be passed: c1//Pod/ns/way"#]],
    );
    // The waypoint is of the service: whoever asks for the workload does not pass it.
    check(
        "10.0.0.2:8080",
        &mesh,
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is workload c1//Pod/ns/server
        - it takes HBONE"#]],
    );
    check_from(
        &pod("way", "10.0.0.9").of("way"),
        &mesh,
        "10.1.0.1:80",
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is service ns/svc.test, by its virtual address
        - the client is the waypoint itself: it is not passed again
        - endpoint c1//Pod/ns/server was drawn by weight
        - it takes HBONE"#]],
    );
    check(
        "10.1.0.1:80",
        &small().and(svc.clone()),
        &expect![[r#"
        rejected: waypoint ns/way.test port 15008 is unknown or has no healthy endpoint
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
    let sick =
        with_waypoint(small()).and(svc).and(pod("way", "10.0.0.9").of("way").with(|it| it.status = Health::Unhealthy));
    check(
        "10.1.0.1:80",
        &sick,
        &expect![[r#"
        rejected: waypoint ns/way.test port 15008 is unknown or has no healthy endpoint
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
}

#[test]
fn the_waypoint_of_a_workload() {
    let server = pod("server", "10.0.0.2").of("svc").behind(gateway("way"));
    let mesh = with_waypoint(small()).and(server.clone());
    check(
        "10.0.0.2:8080",
        &mesh,
        &expect![[r#"
        to 10.0.0.9:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/way
        - the destination is workload c1//Pod/ns/server
        - a waypoint has to be passed: c1//Pod/ns/way"#]],
    );
    // Whoever asks for the service gets what the service says.
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
    check_from(
        &pod("way", "10.0.0.9").of("way"),
        &mesh,
        "10.0.0.2:8080",
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is workload c1//Pod/ns/server
        - the client is the waypoint itself: it is not passed again
        - it takes HBONE"#]],
    );
    check(
        "10.0.0.2:8080",
        &small().and(server),
        &expect![[r#"
        rejected: waypoint ns/way.test port 15008 is unknown or has no healthy endpoint
        - the destination is workload c1//Pod/ns/server"#]],
    );
}

#[test]
fn waypoints_by_address() {
    let by = |gateway| service("svc", "10.1.0.1").with(|it| it.waypoint = Some(gateway));
    let by_service = with_waypoint(small()).and(by(gateway_at("", "10.1.0.9")));
    check(
        "10.1.0.1:80",
        &by_service,
        &expect![[r#"
        to 10.0.0.9:15008
        CONNECT 10.1.0.1:80 expecting spiffe://cluster.local/ns/ns/sa/way
        - the destination is service ns/svc.test, by its virtual address
        - a waypoint has to be passed: c1//Pod/ns/way"#]],
    );
    let by_workload = with_waypoint(small()).and(by(gateway_at("", "10.0.0.9")));
    check(
        "10.1.0.1:80",
        &by_workload,
        &expect![[r#"
        to 10.0.0.9:15008
        CONNECT 10.1.0.1:80 expecting spiffe://cluster.local/ns/ns/sa/way
        - the destination is service ns/svc.test, by its virtual address
        - a waypoint has to be passed: c1//Pod/ns/way"#]],
    );
    for mesh in [by_service, by_workload] {
        let route = go(&mesh, &pod("way", "10.0.0.9").of("way"), "10.1.0.1:80");
        assert!(route.why.contains(&Step::FromWaypoint), "{}", show(&route));
    }
    let nowhere = small().and(by(gateway_at("", "10.0.0.200")));
    check(
        "10.1.0.1:80",
        &nowhere,
        &expect![[r#"
        rejected: waypoint /10.0.0.200 port 15008 is unknown or has no healthy endpoint
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
}

#[test]
fn a_waypoint_without_identity_is_not_trusted() {
    let way = pod("way", "10.0.0.9").of("way").with(|it| it.service_account = "".into());
    let svc = service("svc", "10.1.0.1").with(|it| it.waypoint = Some(gateway("way")));
    check(
        "10.1.0.1:80",
        &with_waypoint(small()).and(way).and(svc),
        &expect![[r#"
        rejected: workload c1//Pod/ns/way has no identity, so that nobody could prove to be it
        - the destination is service ns/svc.test, by its virtual address
        - a waypoint has to be passed: c1//Pod/ns/way"#]],
    );
}

#[test]
fn a_waypoint_behind_a_node_proxy_is_reached_at_that_proxys_port() {
    let tunnel = ApplicationTunnel { protocol: Default::default(), port: Some(15088) };
    let mesh = small()
        .and(service("way", "10.1.0.9").with(|it| it.ports = vec![]))
        .and(pod("way", "10.0.0.9").of("way").with(|it| it.application_tunnel = Some(tunnel)))
        .and(service("svc", "10.1.0.1").with(|it| it.waypoint = Some(gateway("way"))));
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        to 10.0.0.9:15008
        CONNECT 10.1.0.1:80 expecting spiffe://cluster.local/ns/ns/sa/way
        - the destination is service ns/svc.test, by its virtual address
        - a waypoint has to be passed: c1//Pod/ns/way"#]],
    );
}

#[test]
fn several_waypoints_share_by_weight() {
    let ways = ["blue", "green", "off"].iter().zip(1..).fold(small(), |mesh, (name, i)| {
        let ports = service(name, "").with(|it| it.ports = vec![port(HBONE_PORT, Some(HBONE_PORT))]);
        mesh.and(pod(name, &format!("10.0.1.{i}")).of(name)).and(ports)
    });
    let weights = |weights: &[(&str, u32)]| {
        ways.clone().and(service("svc", "10.1.0.1").with(|it| {
            it.waypoint = Some(gateway("off"));
            it.weighted_waypoints = weights.iter().map(|(name, weight)| weighted(name, *weight)).collect();
        }))
    };
    let counts = spread(&weights(&[("blue", 3), ("off", 0), ("green", 1)]), "10.1.0.1:80");
    assert_eq!(counts.len(), 2, "{counts:?}");
    assert!((700..800).contains(&counts["blue"]), "{counts:?}");
    assert_eq!(chosen(&weights(&[("blue", 0)]), "10.1.0.1:80"), "off", "without weights the other one counts");
    assert_eq!(chosen(&weights(&[]), "10.1.0.1:80"), "off");
    assert_eq!(chosen(&weights(&[("green", u32::MAX), ("blue", 0)]), "10.1.0.1:80"), "green");
}

/// A server in another network, behind its gateway.
fn remote() -> Mesh {
    let far = pod("far", "10.0.0.2")
        .in_network("west")
        .of("svc")
        .with(|it| it.network_gateway = Some(Arc::new(gateway_at("west", "192.0.2.9"))));
    let east_west = pod("east-west", "192.0.2.9").in_network("west");
    Mesh::default().and(client()).and(far).and(east_west).and(service("svc", "10.1.0.1"))
}

#[test]
fn an_endpoint_in_another_network_is_reached_by_a_tunnel_in_a_tunnel() {
    check(
        "10.1.0.1:80",
        &remote(),
        &expect![[r#"
        to 192.0.2.9:15008
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/east-west
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/far
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/far was drawn by weight
        - the endpoint is in network "west", behind gateway c1//Pod/ns/east-west"#]],
    );
    check(
        "svc.test:80",
        &remote(),
        &expect![[r#"
        to 192.0.2.9:15008
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/east-west
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/far
        - the destination is service ns/svc.test, by its hostname
        - endpoint c1//Pod/ns/far was drawn by weight
        - the endpoint is in network "west", behind gateway c1//Pod/ns/east-west"#]],
    );
    let named = service("svc", "10.1.0.1")
        .with(|it| it.subject_alt_names = vec!["spiffe://cluster.local/ns/ns/sa/other".into()]);
    check(
        "10.1.0.1:80",
        &remote().and(named),
        &expect![[r#"
        to 192.0.2.9:15008
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/east-west
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/far or spiffe://cluster.local/ns/ns/sa/other
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/far was drawn by weight
        - the endpoint is in network "west", behind gateway c1//Pod/ns/east-west"#]],
    );
    // The address is one of this network, where nobody has it.
    check(
        "10.0.0.2:8080",
        &remote(),
        &expect![[r#"
        to 10.0.0.2:8080
        TCP
        - the mesh does not know the destination: the connection passes through"#]],
    );
    let without = Mesh::default().and(client()).and(service("svc", "10.1.0.1")).and(
        pod("far", "10.0.0.2").in_network("west").of("svc").with(|it| {
            it.network_gateway = Some(Arc::new(gateway_at("west", "192.0.2.9")));
        }),
    );
    check(
        "10.1.0.1:80",
        &without,
        &expect![[r#"
        rejected: gateway west/192.0.2.9 port 15008 of network "west" is unknown or has no healthy endpoint
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/far was drawn by weight"#]],
    );
}

#[test]
fn a_waypoint_in_another_network() {
    let far = pod("way", "10.0.0.9")
        .in_network("west")
        .of("way")
        .with(|it| it.network_gateway = Some(Arc::new(gateway_at("west", "192.0.2.9"))));
    let mesh =
        with_waypoint(remote()).and(far).and(service("svc", "10.1.0.1").with(|it| it.waypoint = Some(gateway("way"))));
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        to 192.0.2.9:15008
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/east-west
        CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/way
        - the destination is service ns/svc.test, by its virtual address
        - a waypoint has to be passed: c1//Pod/ns/way
        - the endpoint is in network "west", behind gateway c1//Pod/ns/east-west"#]],
    );
}

#[test]
fn another_network_without_a_gateway_is_reached_directly() {
    let mesh = Mesh::default()
        .and(client())
        .and(service("svc", "10.1.0.1"))
        .and(pod("far", "10.0.0.2").in_network("west").of("svc"));
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:8080 expecting spiffe://cluster.local/ns/ns/sa/far
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/far was drawn by weight
        - it takes HBONE"#]],
    );
}

/// What a control plane tells of endpoints in another network: how many there are, and nothing of each.
#[test]
fn endpoints_without_addresses_are_reached_through_their_gateway_alone() {
    let nameless = |network: &str| {
        pod("many", "10.9.0.1").of("svc").in_network(network).with(|it| {
            it.addresses.clear();
            it.service_account = "".into();
            it.capacity = 7;
            it.network_gateway = Some(Arc::new(gateway_at("", "10.0.0.8")));
        })
    };
    let named = service("svc", "10.1.0.1").with(|it| it.subject_alt_names = vec!["spiffe://far/ns/ns/sa/svc".into()]);
    let mesh = |it: Workload| Mesh::default().and(named.clone()).and(pod("gate", "10.0.0.8")).and(it);
    check(
        "10.1.0.1:80",
        &mesh(nameless("far")),
        &expect![[r#"
            to 10.0.0.8:15008
            CONNECT svc.test:80 expecting spiffe://cluster.local/ns/ns/sa/gate
            CONNECT svc.test:80 expecting spiffe://far/ns/ns/sa/svc
            - the destination is service ns/svc.test, by its virtual address
            - endpoint c1//Pod/ns/many was drawn by weight
            - the endpoint is in network "far", behind gateway c1//Pod/ns/gate"#]],
    );
    // In the client's own network nothing leads to it.
    check(
        "10.1.0.1:80",
        &mesh(nameless("")),
        &expect![[r#"
            rejected: no healthy upstream: service ns/svc.test has no endpoint for port 80
            - the destination is service ns/svc.test, by its virtual address"#]],
    );
}
