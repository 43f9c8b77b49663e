//! Peers at the HBONE port that are not proxies of the mesh, or do not behave like ones.

use std::process::Command;
use std::time::{Duration, Instant};

use zspire_testkit::plan::captured;
use zspire_testkit::policy::{allow_address, deny_from};
use zspire_testkit::{Mesh, Peer, Pod, mesh, uncaptured, until};

use crate::scenario;

/// A server, and a place outside the mesh.
fn server_and_stranger() -> (Mesh, Pod, Pod) {
    let mesh =
        mesh().node("a").pod(uncaptured("stranger")).node("b").pod("server").policy(deny_from("intruder")).start();
    let (server, stranger) = (mesh.pod("server"), mesh.pod("stranger"));
    (mesh, server, stranger)
}

/// `openssl s_client` at the server's HBONE port; what it says.
fn s_client(stranger: &Pod, server: &Pod, more: &[&str]) -> String {
    let address = server.at(15008).to_string();
    let arguments = [&["s_client", "-connect", &address, "-alpn", "h2", "-ign_eof"], more].concat();
    let output = stranger.command("openssl", &arguments).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn peer_without_a_certificate_is_refused() {
    scenario(|| {
        let (_mesh, server, stranger) = server_and_stranger();
        let said = s_client(&stranger, &server, &[]);
        assert!(said.contains("alert certificate required"), "{said}");
        server.refusal("inbound", "no certificate");
        server.metric(&["zspire_", "reason=\"no_certificate\""]);
    });
}

#[test]
fn peer_with_a_certificate_of_its_own_making_is_refused() {
    scenario(|| {
        let (mesh, server, stranger) = server_and_stranger();
        let (key, certificate) = (mesh.path("own.key"), mesh.path("own.pem"));
        let (key, certificate) = (key.to_str().unwrap(), certificate.to_str().unwrap());
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
            .args(["-keyout", key, "-out", certificate, "-days", "1", "-subj", "/O=somebody"])
            .args(["-addext", "subjectAltName=URI:spiffe://cluster.local/ns/test/sa/stranger"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "keyUsage=critical,digitalSignature"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let said = s_client(&stranger, &server, &["-cert", certificate, "-key", key]);
        assert!(said.contains("alert"), "{said}");
        let line = server.refusal("inbound", "does not lead to a root");
        assert!(line["src.addr"].as_str().unwrap().starts_with(&stranger.address().to_string()), "{line}");
    });
}

#[test]
fn versions_before_tls_1_3_are_refused() {
    scenario(|| {
        let (_mesh, server, stranger) = server_and_stranger();
        let said = s_client(&stranger, &server, &["-tls1_2"]);
        assert!(said.contains("alert protocol version"), "{said}");
    });
}

#[test]
fn other_trust_domains_are_refused_by_both_sides() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod(captured("foreigner").of_trust_domain("other.example"))
            .node("b")
            .pod("server")
            .pod(uncaptured("stranger"))
            .start();
        let (foreigner, server, stranger) = (mesh.pod("foreigner"), mesh.pod("server"), mesh.pod("stranger"));
        let _app = server.greet();
        foreigner.is_refused(server.app());
        foreigner.refusal("outbound", "of a trust domain that is not trusted here");
        // A peer that does not mind meets the server's opinion.
        let peer = Peer::new(&mesh, &stranger, "spiffe://other.example/ns/test/sa/client");
        let answer = peer.tunnel(&server).and_then(|mut tunnel| tunnel.connect(&server.app().to_string()));
        assert!(answer.is_err(), "{answer:?}");
        let line = server.refusal("inbound", "of a trust domain that is not trusted here");
        assert!(line["error"].as_str().unwrap().contains("spiffe://other.example/"), "{line}");
    });
}

#[test]
fn tunnel_ends_nowhere_but_at_the_pod() {
    scenario(|| {
        let (mesh, server, stranger) = server_and_stranger();
        let _app = server.greet();
        let peer = Peer::new(&mesh, &stranger, "spiffe://cluster.local/ns/test/sa/client");
        let mut tunnel = peer.tunnel(&server).unwrap();
        assert_eq!(tunnel.connect(&server.app().to_string()).unwrap(), 200);
        let elsewhere = [
            stranger.at(8080).to_string(),
            "127.0.0.1:15000".to_owned(),
            "[::1]:8080".to_owned(),
            "169.254.169.254:80".to_owned(),
            "localhost:8080".to_owned(),
            server.at(15001).to_string(),
            server.at(15006).to_string(),
            server.at(15008).to_string(),
            server.at(15053).to_string(),
            server.at(15080).to_string(),
        ];
        for target in &elsewhere {
            assert_eq!(tunnel.connect(target).unwrap(), 400, "{target}");
        }
        // Nobody listens there, which is another matter.
        assert_eq!(tunnel.connect(&server.at(8081).to_string()).unwrap(), 503);
        // The tunnel has outlived all of it.
        assert_eq!(tunnel.connect(&server.app().to_string()).unwrap(), 200);
    });
}

#[test]
fn peer_that_a_policy_denies_is_told_so() {
    scenario(|| {
        let (mesh, server, stranger) = server_and_stranger();
        let _app = server.greet();
        let peer = Peer::new(&mesh, &stranger, "spiffe://cluster.local/ns/test/sa/intruder");
        assert_eq!(peer.tunnel(&server).unwrap().connect(&server.app().to_string()).unwrap(), 401);
        server.refusal("inbound", &deny_from("intruder").key());
    });
}

#[test]
fn peer_that_says_nothing_is_not_waited_for() {
    scenario(|| {
        let (_mesh, server, stranger) = server_and_stranger();
        let _app = server.greet();
        let started = Instant::now();
        let silent = stranger.open(server.at(15008));
        zspire_testkit::ending(&silent);
        let took = started.elapsed();
        assert!((Duration::from_secs(9)..Duration::from_secs(20)).contains(&took), "{took:?}");
        server.refusal("inbound", "not finished in 10s");
    });
}

/// What a peer says of the connection decides nothing, and is believed nowhere.
#[test]
fn forged_headers_are_of_no_use() {
    scenario(|| {
        let mesh = mesh().node("a").pod(uncaptured("stranger")).pod("friend").node("b").pod("server").start();
        let (server, stranger, friend) = (mesh.pod("server"), mesh.pod("stranger"), mesh.pod("friend"));
        let _app = server.greet();
        mesh.edit(|plan| plan.add_policy(allow_address(friend.address())));
        zspire_testkit::until("the policy to be in force", || match stranger.ask(server.app()) {
            Ok(greeting) => Err(greeting.from),
            Err(_) => Ok(()),
        });
        friend.reaches(server.app());
        let peer = Peer::new(&mesh, &stranger, "spiffe://cluster.local/ns/test/sa/intruder");
        let source = format!("for=\"{}:4711\";host=api.test.svc.cluster.local", friend.address());
        let forged = [
            ("forwarded", source.as_str()),
            (
                "baggage",
                "k8s.cluster.name=Kubernetes,k8s.namespace.name=test,k8s.deployment.name=friend,service.name=friend",
            ),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ("x-forwarded-for", "127.0.0.1"),
        ];
        let target = server.app().to_string();
        assert_eq!(peer.tunnel(&server).unwrap().connect_with(&target, &forged).unwrap(), 401);
        let line =
            server.access("inbound", |line| line["src.identity"].as_str().is_some_and(|it| it.contains("intruder")));
        assert_eq!(line["src.addr"].as_str().unwrap().split(':').next(), Some(&*stranger.address().to_string()));
        assert!(line["src.workload"].is_null(), "its address is another workload's, which is not who it is: {line}");
        let page = server.metrics();
        let told = page.lines().filter(|line| line.contains("sa/intruder"));
        assert!(told.clone().count() > 0);
        for line in told {
            assert!(line.contains("source_workload=\"unknown\"") && !line.contains("friend"), "{line}");
        }
        // What does not parse is no reason to fail, and what is too much of it no reason to go on.
        let garbage = [("forwarded", "for=for=;;"), ("baggage", "====,,,\u{e9}"), ("traceparent", &*"0".repeat(55))];
        assert_eq!(peer.tunnel(&server).unwrap().connect_with(&target, &garbage).unwrap(), 401);
    });
}

/// One that stalls in handshakes has a share of them, and others are served meanwhile.
#[test]
fn peer_that_stalls_in_many_handshakes_keeps_nobody_out() {
    scenario(|| {
        let mesh = mesh().node("a").pod(uncaptured("stranger")).pod("client").node("b").pod("server").start();
        let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
        let _app = server.greet();
        let silent: Vec<_> = (0..1200).filter_map(|_| stranger.connect(server.at(15008)).ok()).collect();
        assert!(silent.len() > 600, "{}", silent.len());
        let began = Instant::now();
        client.reaches(server.app());
        assert!(
            began.elapsed() < Duration::from_secs(8),
            "it was served before the silent ones gave way: {:?}",
            began.elapsed()
        );
        server.refusal("inbound", "too many TLS handshakes are under way from this address");
        server.metric(&["zspire_early_denials_total", "reason=\"handshakes\""]);
    });
}

/// What it is cut off for is told to it and to the operator.
#[test]
fn peer_that_floods_its_tunnel_is_named_by_what_it_does() {
    scenario(|| {
        let mesh = mesh().node("a").pod(uncaptured("stranger")).pod("client").node("b").pod("server").start();
        let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
        let _app = server.greet();
        client.reaches(server.app());
        let peer = Peer::new(&mesh, &stranger, "spiffe://cluster.local/ns/test/sa/stranger");
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        let flood = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings, &ping.repeat(5000)].concat();
        let heard = peer.say(&server, &flood).unwrap();
        // GOAWAY with ENHANCE_YOUR_CALM, and nothing after it.
        let last_words = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11];
        assert!(heard.ends_with(&last_words), "{:?}", &heard[heard.len().saturating_sub(40)..]);
        server.metric(&["zspire_tunnel_offences_total", "reporter=\"destination\"", "reason=\"flood_ping\"", " 1"]);
        client.reaches(server.app());
    });
}

/// One that holds tunnels and does nothing with them has a share of them, and others are served meanwhile.
#[test]
fn peer_that_holds_many_tunnels_keeps_nobody_out() {
    scenario(|| {
        let server = captured("server").with("ZTUNNEL_WORKER_THREADS", "1");
        let mesh = mesh().node("a").pod(uncaptured("stranger")).pod("client").node("b").pod(server).start();
        let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
        let _app = server.greet();
        let peer = Peer::new(&mesh, &stranger, "spiffe://cluster.local/ns/test/sa/stranger");
        let held: Vec<_> = (0..1024).map(|_| peer.tunnel(&server).unwrap()).collect();
        assert!(peer.tunnel(&server).is_err());
        server.refusal("inbound", "too many tunnels are open from this address");
        server.metric(&["zspire_early_denials_total", "reason=\"tunnels\""]);
        client.reaches(server.app());
        drop(held);
        until("another tunnel", || peer.tunnel(&server).map(drop).map_err(|error| error.to_string()));
    });
}
