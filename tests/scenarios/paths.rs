//! The ways that a connection can take.

use std::collections::BTreeSet;
use std::io::Read as _;

use zspire_testkit::plan::captured;
use zspire_testkit::{hear, mesh, say, uncaptured, until};

use crate::scenario;

#[test]
fn pod_to_pod_on_one_node() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        assert_eq!(client.reaches(server.app()).from, client.address());
        let line = server.access("inbound", |line| line["error"].is_null());
        assert_eq!(line["src.identity"], client.spiffe_id());
        assert_eq!(line["dst.hbone_addr"], server.app().to_string());
    });
}

#[test]
fn pod_to_pod_across_nodes_with_certificates_of_a_control_plane() {
    scenario(|| {
        let mesh = mesh().control_plane().node("a").pod("client").node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        assert_eq!(client.reaches(server.app()).from, client.address());
        let line = client.access("outbound", |line| line["error"].is_null());
        assert_eq!(line["dst.identity"], server.spiffe_id());
        assert_eq!(line["dst.addr"], server.at(15008).to_string());
    });
}

#[test]
fn client_outside_the_mesh_has_no_identity() {
    scenario(|| {
        let mesh = mesh().node("a").pod(uncaptured("client")).node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        assert_eq!(client.reaches(server.app()).from, client.address());
        let line = server.access("inbound", |line| line["error"].is_null());
        assert!(line["src.identity"].is_null() && line["dst.hbone_addr"].is_null(), "{line}");
        assert_eq!(line["src.workload"], "client");
    });
}

#[test]
fn server_outside_the_mesh_gets_plain_tcp() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod(uncaptured("server")).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        assert_eq!(client.reaches(server.app()).from, client.address());
        let line = client.access("outbound", |line| line["error"].is_null());
        assert_eq!(line["dst.addr"], server.app().to_string());
        assert!(line["dst.hbone_addr"].is_null(), "{line}");
    });
}

#[test]
fn service_spreads_over_its_endpoints() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod("server-1")
            .node("b")
            .pod("server-2")
            .service("api", &["server-1", "server-2"])
            .start();
        let (client, first, second) = (mesh.pod("client"), mesh.pod("server-1"), mesh.pod("server-2"));
        let _apps = (first.greet(), second.greet());
        let mut answered = BTreeSet::new();
        // With two choices that are equally likely, a fair choice misses one of them in none of a billion runs.
        for _ in 0..30 {
            answered.insert(client.reaches(mesh.service("api")).by);
        }
        assert_eq!(answered, BTreeSet::from(["server-1".to_owned(), "server-2".to_owned()]));
        let line = client.access("outbound", |line| line["error"].is_null());
        assert_eq!(line["dst.service"], "api.test.svc.cluster.local");
    });
}

#[test]
fn server_sees_the_clients_own_addresses() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod(captured("client").dual_stack())
            .pod(uncaptured("stranger").dual_stack())
            .node("b")
            .pod(captured("server").dual_stack())
            .start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        let _app = server.greet();
        for from in [&client, &stranger] {
            assert_eq!(from.reaches(server.app()).from, from.address());
            assert_eq!(from.reaches((server.v6(), server.app().port()).into()).from, from.v6());
        }
        // By a tunnel from the one and plainly from the other.
        let tunnelled = |line: &serde_json::Value| line["src.identity"] == client.spiffe_id();
        server.access("inbound", |line| {
            tunnelled(line) && line["dst.hbone_addr"].as_str().is_some_and(|to| to.starts_with('['))
        });
    });
}

#[test]
fn service_without_endpoints_is_refused_and_gets_them() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("server").service("api", &[]).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        client.is_refused(mesh.service("api"));
        mesh.edit(|plan| plan.give_endpoint("api", "server"));
        until("the service to have an endpoint", || client.ask(mesh.service("api")));
    });
}

#[test]
fn pod_reaches_itself() {
    scenario(|| {
        let mesh = mesh().node("a").pod("server").service("api", &["server"]).start();
        let server = mesh.pod("server");
        let _app = server.greet();
        assert_eq!(server.reaches(server.app()).from, server.address());
        assert_eq!(server.reaches(mesh.service("api")).from, server.address());
    });
}

#[test]
fn port_that_nobody_serves_is_refused() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod(uncaptured("stranger")).node("b").pod("server").start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        for from in [&client, &stranger] {
            from.is_refused(server.app());
        }
        server.access("inbound", |line| line["src.identity"] == client.spiffe_id() && line["error"].is_string());
        server.access("inbound", |line| line["src.identity"].is_null() && line["error"].is_string());
        client.refusal("outbound", "503");
    });
}

/// The waypoint is an application behind a proxy of its own, as Istio's are in their sandwiched form.
#[test]
fn service_behind_a_waypoint_is_asked_for_there() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod("server")
            .node("b")
            .pod(captured("waypoint").taking_tunnels(15088))
            .service("api", &["server"])
            .behind("waypoint")
            .start();
        let (client, waypoint) = (mesh.pod("client"), mesh.pod("waypoint"));
        let app = waypoint.listen_at(15088);
        let asking = client.open(mesh.service("api"));
        let mut taken = app.accept();
        // PROXY protocol, version 2: the signature, a command and a family, a length, then addresses and more.
        let mut header = [0; 16];
        taken.read_exact(&mut header).unwrap();
        assert_eq!(&header[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        let mut rest = vec![0; u16::from_be_bytes([header[14], header[15]]).into()];
        taken.read_exact(&mut rest).unwrap();
        let address = |at: usize| std::net::IpAddr::from(<[u8; 4]>::try_from(&rest[at..at + 4]).unwrap());
        assert_eq!(address(0), client.address());
        assert_eq!((address(4), u16::from_be_bytes([rest[10], rest[11]])), (mesh.service("api").ip(), 80));
        let identity = client.spiffe_id();
        assert!(rest.windows(identity.len()).any(|window| window == identity.as_bytes()), "{rest:?}");
        say(&asking, "hello");
        hear(&taken, "hello");
        drop((taken, app, asking));
        let line = client.access("outbound", |line| line["dst.workload"] == "waypoint");
        assert_eq!(line["dst.hbone_addr"], mesh.service("api").to_string());
        assert_eq!(line["dst.identity"], waypoint.spiffe_id());
    });
}
