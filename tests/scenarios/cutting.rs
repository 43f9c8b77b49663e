//! Live connections that end because something they rest on is no longer so: exactly those, both ends told, with the reason.

use std::time::{Duration, Instant};

use zspire_testkit::plan::captured;
use zspire_testkit::policy::{allow_from, deny_from};
use zspire_testkit::{Ending, Listener, Mesh, Peer, Pod, mesh, uncaptured};

use crate::scenario;
use crate::traffic::{Live, connect, seconds_between, told};

/// Three clients of one server: two in the mesh, one outside.
fn three() -> (Mesh, Pod) {
    let mesh = mesh()
        .node("a")
        .pod("one")
        .pod("other")
        .pod(uncaptured("stranger"))
        .pod(uncaptured("elsewhere"))
        .node("b")
        .pod("server")
        .pod("bystander")
        .start();
    let server = mesh.pod("server");
    (mesh, server)
}

fn connect_all(mesh: &Mesh, server: &Pod, app: &Listener) -> [Live; 3] {
    ["one", "other", "stranger"].map(|name| connect(&mesh.pod(name), server, app))
}

#[test]
fn policy_cuts_whom_it_denies_and_nobody_else() {
    scenario(|| {
        let (mesh, server) = three();
        let app = server.listen();
        let [one, other, stranger] = connect_all(&mesh, &server, &app);
        mesh.edit(|plan| plan.add_policy(deny_from("one")));
        one.is_cut();
        let line = told(&server, "inbound", "policy change: explicitly denied by: test/deny-one", "DENY", "policy");
        assert_eq!(line["src.identity"], mesh.pod("one").spiffe_id());
        other.goes_on();
        stranger.goes_on();
        // An allow policy that is new means that nobody else is allowed.
        mesh.edit(|plan| plan.add_policy(allow_from("other")));
        stranger.is_cut();
        other.goes_on();
        // The policy that allows it goes, and another one is there that does not.
        mesh.edit(|plan| {
            plan.remove_policies();
            plan.add_policy(allow_from("one"));
        });
        other.is_cut();
        told(&server, "inbound", "none allowed: test/allow-one", "DENY", "policy");
    });
}

#[test]
fn policy_cuts_within_a_tenth_of_a_second_of_its_receipt() {
    scenario(|| {
        let (mesh, server) = three();
        let app = server.listen();
        let [one, ..] = connect_all(&mesh, &server, &app);
        mesh.edit(|plan| plan.add_policy(deny_from("one")));
        one.is_cut();
        let cut = server.refusal("inbound", "policy change");
        let read = server.proxy(|proxy| {
            proxy.line("the new mesh file", |line| line["message"].as_str() == Some("mesh file read again"))
        });
        // The line about the file comes before it is applied.
        let took = seconds_between(&read, &cut);
        assert!(took < 0.1, "{took} s");
    });
}

#[test]
fn policy_that_selects_a_pod_from_now_on_cuts_there() {
    scenario(|| {
        let (mesh, server) = three();
        let app = server.listen();
        let policy = deny_from("one").for_selected();
        mesh.edit(|plan| plan.add_policy(policy.clone()));
        let [one, other, stranger] = connect_all(&mesh, &server, &app);
        let bystander = mesh.pod("bystander");
        let elsewhere = bystander.listen();
        let untouched = connect(&mesh.pod("one"), &bystander, &elsewhere);
        mesh.edit(|plan| plan.select("server", &policy));
        one.is_cut();
        told(&server, "inbound", &policy.key(), "DENY", "policy");
        for live in [&other, &stranger, &untouched] {
            live.goes_on();
        }
    });
}

#[test]
fn workload_that_is_gone_has_no_connections() {
    scenario(|| {
        let (mesh, server) = three();
        let (app, outside) = (server.listen(), mesh.pod("stranger").listen());
        let live = connect_all(&mesh, &server, &app);
        let opened = connect(&server, &mesh.pod("stranger"), &outside);
        mesh.edit(|plan| plan.forget("server"));
        for live in live.iter().chain([&opened]) {
            live.is_cut();
        }
        let why = "discovery no longer knows workload";
        told(&server, "inbound", why, "IDENTITY_ERROR", "workload_gone");
        told(&server, "outbound", why, "IDENTITY_ERROR", "workload_gone");
        mesh.pod("one").is_refused(server.app());
    });
}

#[test]
fn workload_that_is_somebody_else_keeps_what_has_no_identity() {
    scenario(|| {
        let (mesh, server) = three();
        let bystander = mesh.pod("bystander");
        let (app, elsewhere) = (server.listen(), bystander.listen());
        let [one, other, stranger] = connect_all(&mesh, &server, &app);
        let opened = connect(&server, &bystander, &elsewhere);
        mesh.edit(|plan| plan.move_to_trust_domain("server", "other.example"));
        for live in [&one, &other, &opened] {
            live.is_cut();
        }
        let why = "the workload is now spiffe://other.example/ns/test/sa/server";
        told(&server, "inbound", why, "IDENTITY_ERROR", "identity_changed");
        told(&server, "outbound", why, "IDENTITY_ERROR", "identity_changed");
        stranger.goes_on();
    });
}

#[test]
fn peer_whose_certificate_expires_is_cut() {
    scenario(|| {
        let (mesh, server) = three();
        let (_app, stranger) = (server.greet(), mesh.pod("stranger"));
        let id = "spiffe://cluster.local/ns/test/sa/peer";
        let (short, long) = (Duration::from_secs(3), Duration::from_secs(3600));
        let (brief, lasting) = (
            Peer::for_a_while(&mesh, &stranger, id, short),
            Peer::for_a_while(&mesh, &mesh.pod("elsewhere"), id, long),
        );
        let (mut one, mut other) = (brief.tunnel(&server).unwrap(), lasting.tunnel(&server).unwrap());
        let started = Instant::now();
        let target = server.app().to_string();
        let (mut held, kept) = (one.open(&target).unwrap(), other.open(&target).unwrap());
        assert_eq!(held.ending(), Ok(Ending::Reset));
        assert!(started.elapsed() < short + Duration::from_secs(10), "{:?}", started.elapsed());
        let line =
            told(&server, "inbound", "the certificate of the client is no longer valid", "TLS_FAILURE", "peer_expired");
        assert!(line["error"].as_str().unwrap().contains("expired at"), "{line}");
        // The other has the same identity, and is elsewhere with a certificate that is still good.
        assert_eq!(other.connect(&target).unwrap(), 200);
        drop(kept);
    });
}

/// A client and a server with revocation lists of their own, which name nobody yet.
fn with_lists() -> (Mesh, Pod, Pod) {
    let listed = |name: &str| captured(name).with("CRL_PATH", &format!("{name}.crl")).not_started();
    let later = |name: &str| captured(name).not_started();
    let mesh = mesh()
        .node("a")
        .pod(listed("client"))
        .pod(later("other"))
        .node("b")
        .pod(listed("server"))
        .pod(later("another"))
        .node("c")
        // With the first proxy there is the CA that signs the lists.
        .pod("first")
        .start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    for pod in [&client, &server] {
        mesh.revoke(&format!("{}.crl", pod.name()), &[]);
    }
    for pod in [&client, &server, &mesh.pod("other"), &mesh.pod("another")] {
        mesh.start_pod(pod);
        pod.wait_until_ready();
    }
    (mesh, client, server)
}

const REVOKED: &str = "was revoked (serial number";

#[test]
fn client_whose_certificate_is_revoked_is_cut_and_refused() {
    scenario(|| {
        let (mesh, client, server) = with_lists();
        let app = server.listen();
        let (live, other) = (connect(&client, &server, &app), connect(&mesh.pod("other"), &server, &app));
        mesh.revoke("server.crl", &[&client]);
        live.is_cut();
        told(&server, "inbound", REVOKED, "CERT_REVOKED", "peer_revoked");
        client.is_refused(server.app());
        server.refusal("inbound", "TLS handshake: refused the peer's certificate");
        // The connection that was cut, and at least one handshake.
        let counted = server.metric(&["istio_crl_policy_rejections_total", "reporter=\"destination\""]);
        assert!(counted.rsplit(' ').next().unwrap().parse::<u32>().unwrap() >= 2, "{counted}");
        other.goes_on();
        assert!(server.metrics().contains("istio_crl_untracked_connections_total{reporter=\"destination\"} 0"));
    });
}

#[test]
fn server_whose_certificate_is_revoked_is_cut_and_refused() {
    scenario(|| {
        let (mesh, client, server) = with_lists();
        let another = mesh.pod("another");
        let (app, elsewhere) = (server.listen(), another.listen());
        let (live, other) = (connect(&client, &server, &app), connect(&client, &another, &elsewhere));
        mesh.revoke("client.crl", &[&server]);
        live.is_cut();
        told(&client, "outbound", REVOKED, "CERT_REVOKED", "peer_revoked");
        client.is_refused(server.app());
        client.refusal("outbound", "TLS handshake with");
        client.metric(&[
            "istio_tcp_connections_failed_total",
            "reporter=\"source\"",
            "response_flags=\"CERT_REVOKED\"",
        ]);
        client.metric(&["istio_crl_policy_rejections_total", "reporter=\"source\""]);
        other.goes_on();
    });
}
