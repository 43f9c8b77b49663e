//! Connections that lead through something else first: waypoints and the gateways of other networks, however they are named;
//! and services that are asked for by name.

use std::io::Read as _;

use zspire_testkit::plan::{Plan, PodPlan, Reference, captured, hostname};
use zspire_testkit::{Gateway, Mesh, Pod, hear, mesh, say, uncaptured};

use crate::scenario;

/// Where a waypoint's application takes what its proxy hands it.
const TUNNEL: u16 = 15088;
/// Where proxies take tunnels.
const HBONE: u16 = 15008;

/// Opens a connection, and takes it at the waypoint; the two can talk.
fn arrives_at_the_waypoint(mesh: &Mesh, to: std::net::SocketAddr) -> serde_json::Value {
    let (client, waypoint) = (mesh.pod("client"), mesh.pod("waypoint"));
    let app = waypoint.listen_at(TUNNEL);
    let asking = client.open(to);
    let taken = app.accept();
    say(&asking, "hello");
    hear(&taken, "hello");
    say(&taken, "goodbye");
    hear(&asking, "goodbye");
    drop((asking, taken, app));
    let line = client.access("outbound", |line| line["dst.workload"] == "waypoint");
    assert_eq!(line["dst.hbone_addr"], to.to_string());
    assert_eq!(line["dst.identity"], waypoint.spiffe_id());
    waypoint.access("inbound", |line| line["src.identity"] == client.spiffe_id() && line["error"].is_null());
    line
}

#[test]
fn workload_behind_a_waypoint() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(captured("server").behind_waypoint("waypoint"))
            .node("b")
            .pod(captured("waypoint").taking_bare_tunnels(TUNNEL))
            .start();
        arrives_at_the_waypoint(&mesh, mesh.pod("server").app());
    });
}

#[test]
fn service_behind_a_waypoint_that_is_named_by_address() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod("server")
            .node("b")
            .pod(captured("waypoint").taking_bare_tunnels(TUNNEL))
            .service("api", &["server"])
            .behind("waypoint")
            .start();
        let line = arrives_at_the_waypoint(&mesh, mesh.service("api"));
        assert_eq!(line["dst.service"], hostname("api"));
    });
}

#[test]
fn service_behind_a_waypoint_that_is_named_by_its_hostname() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod("server")
            .node("b")
            .pod(captured("waypoint").taking_bare_tunnels(TUNNEL))
            .service("gateway", &["waypoint"])
            .service("api", &["server"])
            .behind_named(Reference::Service("gateway".into()))
            .start();
        arrives_at_the_waypoint(&mesh, mesh.service("api"));
    });
}

/// A service behind a waypoint that the mesh knows by a hostname alone.
fn behind_a_hostname(client: PodPlan) -> Plan {
    mesh()
        .node("a")
        .pod(client)
        .pod("server")
        .node("b")
        .pod(captured("waypoint").known_by_hostname("waypoint.test").taking_bare_tunnels(TUNNEL))
        .service("api", &["server"])
        .behind_named(Reference::Hostname("waypoint.test".into()))
}

#[test]
fn service_behind_a_waypoint_that_is_named_by_a_workloads_hostname() {
    scenario(|| {
        // A node's proxy does not serve a pod that has no address to be known by.
        let mesh = behind_a_hostname(captured("client").resolving_pods()).dedicated().start();
        let (client, waypoint) = (mesh.pod("client"), mesh.pod("waypoint"));
        // The waypoint's own proxy finds its workload by name, and takes a tunnel to whatever address it was reached at.
        let app = waypoint.listen_at(TUNNEL);
        for _ in 0..3 {
            let asking = client.open(mesh.service("api"));
            let taken = app.accept();
            say(&asking, "hello");
            hear(&taken, "hello");
        }
        let line = client.access("outbound", |line| line["error"].is_null());
        assert_eq!(line["dst.addr"], waypoint.at(HBONE).to_string());
        let counted = client.metric(&["istio_on_demand_dns_total", "hostname=\"waypoint.test\""]);
        assert!(counted.ends_with(" 3"), "{counted}");
    });
}

#[test]
fn waypoint_that_cannot_be_resolved_is_not_passed_by() {
    scenario(|| {
        let mesh = behind_a_hostname(captured("client")).start();
        let (client, app) = (mesh.pod("client"), mesh.pod("server").listen());
        client.is_refused(mesh.service("api"));
        client.refusal("outbound", "cannot resolve waypoint.test");
        client.metric(&["zspire_early_denials_total", "reason=\"unresolved\""]);
        assert!(app.is_idle());
    });
}

/// The waypoint's own connections do not go through it again.
#[test]
fn waypoint_reaches_what_is_behind_it() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("server")
            .node("b")
            .pod(captured("waypoint").taking_tunnels(TUNNEL))
            .service("api", &["server"])
            .behind("waypoint")
            .start();
        let (waypoint, server) = (mesh.pod("waypoint"), mesh.pod("server"));
        let _app = server.greet();
        assert_eq!(waypoint.reaches(mesh.service("api")).by, "server");
        let line = server.access("inbound", |line| line["error"].is_null());
        assert_eq!(line["src.identity"], waypoint.spiffe_id());
    });
}

#[test]
fn sandwiched_waypoint_is_told_whom_it_serves() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(captured("server").behind_waypoint("waypoint"))
            .node("b")
            .pod(captured("waypoint").taking_tunnels(TUNNEL))
            .start();
        let (client, waypoint, server) = (mesh.pod("client"), mesh.pod("waypoint"), mesh.pod("server"));
        let app = waypoint.listen_at(TUNNEL);
        let asking = client.open(server.app());
        let mut taken = app.accept();
        let mut header = [0; 16];
        taken.read_exact(&mut header).unwrap();
        assert_eq!(&header[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        let mut rest = vec![0; u16::from_be_bytes([header[14], header[15]]).into()];
        taken.read_exact(&mut rest).unwrap();
        // Addresses and ports, then what is said besides: one identity, and nothing else.
        let (addresses, more) = rest.split_at(12);
        assert_eq!(std::net::IpAddr::from(<[u8; 4]>::try_from(&addresses[..4]).unwrap()), client.address());
        assert_eq!(std::net::IpAddr::from(<[u8; 4]>::try_from(&addresses[4..8]).unwrap()), server.address());
        let length = u16::from_be_bytes([more[1], more[2]]);
        assert_eq!((more[0], usize::from(length)), (0xd0, more.len() - 3));
        assert_eq!(&more[3..], client.spiffe_id().as_bytes());
        say(&asking, "hello");
        hear(&taken, "hello");
        // It is reached on loopback.
        assert!(taken.local_addr().unwrap().ip().to_canonical().is_loopback());
    });
}

#[test]
fn sandwiched_waypoint_can_be_reached_at_its_own_address() {
    scenario(|| {
        let waypoint = captured("waypoint").taking_bare_tunnels(TUNNEL).with("LOCALHOST_APP_TUNNEL", "false");
        let mesh = mesh()
            .node("a")
            .pod("client")
            .node("b")
            .pod("server")
            .pod(waypoint)
            .service("api", &["server"])
            .behind("waypoint")
            .start();
        let (client, waypoint) = (mesh.pod("client"), mesh.pod("waypoint"));
        let app = waypoint.listen_at(TUNNEL);
        let asking = client.open(mesh.service("api"));
        let taken = app.accept();
        say(&asking, "hello");
        hear(&taken, "hello");
        // The one that was asked for is the service's; the application is where the proxy thinks that the tunnel ends.
        assert_eq!(taken.local_addr().unwrap().port(), TUNNEL);
        assert!(!taken.local_addr().unwrap().ip().to_canonical().is_loopback());
    });
}

/// A client, and behind a gateway a service in another network.
fn two_networks(gateway: Reference) -> Mesh {
    mesh()
        .node("a")
        .pod("client")
        .node("b")
        .pod(uncaptured("gateway").taking_tunnels_itself())
        .pod(captured("server").in_network("far", gateway))
        .service("edge", &["gateway"])
        .at_port(HBONE, HBONE)
        .service("api", &["server"])
        .start()
}

#[track_caller]
fn is_reached_by_a_tunnel_in_a_tunnel(mesh: &Mesh) {
    let (client, server, gateway) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("gateway"));
    let _app = server.greet();
    let terminating = Gateway::start(mesh, &gateway, server.at(HBONE));
    assert_eq!(client.reaches(mesh.service("api")).by, "server");
    let line = client.access("outbound", |line| line["error"].is_null());
    let asked = format!("{}:80", hostname("api"));
    assert_eq!(line["dst.hbone_addr"], asked);
    assert_eq!(line["dst.identity"], server.spiffe_id());
    assert_eq!(line["dst.workload"], "gateway");
    assert_eq!(terminating.seen(), [(client.spiffe_id(), asked.clone())]);
    // The gateway cannot speak for the client: the inner tunnel is the client's own.
    let line = server.access("inbound", |line| line["error"].is_null());
    assert_eq!(line["src.identity"], client.spiffe_id());
    assert_eq!(line["dst.service"], hostname("api"));
    assert_eq!(line["dst.hbone_addr"], asked);
}

#[test]
fn another_network_by_a_gateway_that_is_a_workload() {
    scenario(|| is_reached_by_a_tunnel_in_a_tunnel(&two_networks(Reference::Address("gateway".into()))));
}

#[test]
fn another_network_by_a_gateway_that_is_a_service() {
    scenario(|| is_reached_by_a_tunnel_in_a_tunnel(&two_networks(Reference::Service("edge".into()))));
}

#[test]
fn gateway_that_leads_elsewhere_gets_nothing() {
    scenario(|| {
        let mesh = two_networks(Reference::Address("gateway".into()));
        let (client, server, gateway) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("gateway"));
        let _app = server.greet();
        // It takes the inner tunnel to the client's own proxy, which is not the service.
        let _terminating = Gateway::start(&mesh, &gateway, client.at(HBONE));
        client.is_refused(mesh.service("api"));
        client.refusal("outbound", "expected spiffe://cluster.local/ns/test/sa/server");
    });
}

/// What a service's name leads to, asked for by a gateway of another network.
fn by_name(mesh: &Mesh, at: &Pod) -> Result<u16, String> {
    let peer = zspire_testkit::Peer::new(mesh, &mesh.pod("outside"), "spiffe://cluster.local/ns/test/sa/gateway");
    let mut tunnel = peer.tunnel(at)?;
    tunnel.connect(&format!("{}:80", hostname("api"))).map(|status| status.as_u16())
}

#[test]
fn service_is_asked_for_by_name_and_number() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod(uncaptured("outside"))
            .node("b")
            .pod("server")
            .pod("another")
            .service("api", &["server"])
            .target(9090)
            .start();
        let (server, another) = (mesh.pod("server"), mesh.pod("another"));
        let _apps = (server.greet_at(9090), another.greet_at(9090));
        assert_eq!(by_name(&mesh, &server), Ok(200));
        server.access("inbound", |line| line["dst.service"] == hostname("api"));
        assert_eq!(by_name(&mesh, &another), Ok(400), "it is not an endpoint");
        another.refusal("inbound", "is not an endpoint of a service");
    });
}

#[test]
fn service_is_asked_for_by_name_and_each_endpoint_has_its_port() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("outside"))
            .node("b")
            .pod("one")
            .pod("other")
            .pod("neither")
            .service("api", &["one", "other", "neither"])
            .target(0)
            .own_target("one", 9091)
            .own_target("other", 9092)
            .start();
        let (one, other, neither) = (mesh.pod("one"), mesh.pod("other"), mesh.pod("neither"));
        let _apps = (one.greet_at(9091), other.greet_at(9092), neither.greet());
        assert_eq!((by_name(&mesh, &one), by_name(&mesh, &other)), (Ok(200), Ok(200)));
        assert_eq!(by_name(&mesh, &neither), Ok(400));
        neither.refusal("inbound", "has no port 80 at this endpoint");
        // The client's own proxy knows the endpoints' ports too.
        let client = mesh.pod("client");
        for _ in 0..20 {
            let by = client.reaches(mesh.service("api")).by;
            assert!(by == "one" || by == "other", "{by}");
        }
    });
}
