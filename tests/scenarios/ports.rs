//! The proxy's own ports: nobody is connected to them through the proxy, from inside or outside, and nothing loops.

use std::io::Read as _;
use std::net::SocketAddr;

use zspire_testkit::app::greeting;
use zspire_testkit::plan::captured;
use zspire_testkit::{Pod, mesh, say, uncaptured, until};

use crate::scenario;

/// Speaks to a port; the connection must come to nothing, and soon.
#[track_caller]
fn comes_to_nothing(from: &Pod, to: SocketAddr) {
    let Ok(mut socket) = from.connect(to) else { return };
    // Neither TLS nor SOCKS: whatever listens there knows at once that it does not want it.
    let _ = std::io::Write::write_all(&mut socket, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut answer = Vec::new();
    match socket.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("{} waits for {to}", from.name()),
        // A TLS alert is no more than a refusal.
        _ => assert!(answer.len() <= 7 && answer.first().is_none_or(|kind| *kind == 21), "{to} answers {answer:?}"),
    }
}

#[test]
fn own_ports_are_refused_from_inside_and_outside() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("stranger"))
            .node("b")
            .pod(captured("server").with("UNSTABLE_ENABLE_SOCKS5", "true"))
            .start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        let _app = server.greet();
        for port in [15001, 15006, 15008, 15053, 15080] {
            comes_to_nothing(&stranger, server.at(port));
            comes_to_nothing(&client, server.at(port));
            comes_to_nothing(&server, server.at(port));
            comes_to_nothing(&server, SocketAddr::from(([127, 0, 0, 1], port)));
        }
        server.refusal("inbound", "port 15001 belongs to the proxy itself");
        server.refusal("inbound", "port 15053 belongs to the proxy itself");
        server.refusal("outbound", "belongs to the proxy itself");
        for direction in ["source", "destination"] {
            let reporter = format!("reporter=\"{direction}\"");
            server.metric(&["zspire_early_denials_total", &reporter, "reason=\"own_port\""]);
        }
        // A loop would be a chain of connections, each with a place in the table.
        for pod in [&client, &server] {
            until("nothing to be open", || {
                let page = pod.metrics();
                let open = page.lines().filter(|line| {
                    line.starts_with("istio_tcp_sockets_open") || line.starts_with("zspire_tcp_sockets_open")
                });
                match open.filter(|line| !line.ends_with(" 0")).collect::<Vec<_>>() {
                    open if open.is_empty() => Ok(()),
                    open => Err(open.join("\n")),
                }
            });
            let accesses = pod.proxy(|proxy| proxy.log().lines().filter(|line| line.contains("\"access\"")).count());
            assert!(accesses < 60, "{accesses} connections were told of");
        }
        client.reaches(server.app());
    });
}

#[test]
fn admin_port_is_for_the_pod_alone() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod(uncaptured("stranger")).node("b").pod("server").start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        for from in [&client, &stranger] {
            comes_to_nothing(from, server.at(15000));
        }
        assert_eq!(server.admin("GET /", &[]).status, 200);
    });
}

#[test]
fn application_may_use_any_other_port() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        for port in [1, 443, 15002, 65535] {
            let app = server.listen_at(port);
            let asking = client.open(server.at(port));
            let served = app.accept();
            say(&asking, "hello");
            zspire_testkit::hear(&served, "hello");
        }
    });
}

#[test]
fn source_that_is_not_the_pods_own_reaches_nobody() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .node("b")
            .pod("server")
            .pod(uncaptured("outsider"))
            .policy(zspire_testkit::policy::allow_address([10, 99, 0, 1].into()))
            .start();
        let (client, server, outsider) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("outsider"));
        let (app, _elsewhere) = (server.listen(), outsider.greet());
        // Whoever is root in a pod can give it any address.
        let given = client.command("ip", &["address", "add", "10.99.0.1/32", "dev", "lo"]).status().unwrap();
        assert!(given.success());
        // It is not what policies are asked about, and nobody sees it.
        let forged = [10, 99, 0, 1].into();
        assert_eq!(greeting(&client.open_from(forged, outsider.app()).unwrap()).unwrap().from, client.address());
        assert!(greeting(&client.open_from(forged, server.app()).unwrap()).is_err());
        server.refusal("inbound", "allow policies exist, but none allowed");
        client.access("outbound", |line| line["src.addr"].as_str().is_some_and(|from| from.starts_with("10.99.0.1:")));
        assert!(app.is_idle());
    });
}
