//! Who may connect, and how a refusal is told.

use zspire_testkit::policy::{allow_from, allow_identified, deny_all, deny_from};
use zspire_testkit::{Ending, ending, hear, mesh, say, uncaptured, until};

use crate::scenario;

#[test]
fn allow_policy_lets_in_whom_it_names_and_nobody_else() {
    scenario(|| {
        let mesh =
            mesh().node("a").pod("friend").pod("other").node("b").pod("server").policy(allow_from("friend")).start();
        let (friend, other, server) = (mesh.pod("friend"), mesh.pod("other"), mesh.pod("server"));
        let _app = server.greet();
        friend.reaches(server.app());
        other.is_refused(server.app());
        let line = server.refusal("inbound", "policy rejection");
        assert_eq!(line["src.identity"], other.spiffe_id());
    });
}

#[test]
fn deny_policy_is_named_in_the_access_log_and_flagged_in_metrics() {
    scenario(|| {
        let policy = deny_from("intruder");
        let mesh =
            mesh().node("a").pod("friend").pod("intruder").node("b").pod("server").policy(policy.clone()).start();
        let (friend, intruder, server) = (mesh.pod("friend"), mesh.pod("intruder"), mesh.pod("server"));
        let _app = server.greet();
        intruder.is_refused(server.app());
        let line = server.refusal("inbound", &policy.key());
        assert_eq!(line["src.identity"], intruder.spiffe_id());
        assert_eq!(line["level"], "error");
        server.metric(&[
            "istio_tcp_connections_failed_total",
            "response_flags=\"DENY\"",
            "source_workload=\"intruder\"",
        ]);
        // The client's side tells that it was refused, too.
        intruder.refusal("outbound", "401");
        friend.reaches(server.app());
    });
}

#[test]
fn peer_without_a_tunnel_has_no_identity_for_policies() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("stranger"))
            .node("b")
            .pod("server")
            .policy(allow_identified())
            .start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        let _app = server.greet();
        client.reaches(server.app());
        stranger.is_refused(server.app());
        let line = server.refusal("inbound", "policy rejection");
        assert!(line["src.identity"].is_null(), "{line}");
    });
}

#[test]
fn policy_change_cuts_live_connections_and_names_the_policy() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod(uncaptured("stranger")).node("b").pod("server").start();
        let server = mesh.pod("server");
        let app = server.listen();
        let connected = ["client", "stranger"].map(|name| {
            let client = mesh.pod(name).open(server.app());
            say(&client, "hello");
            let served = app.accept();
            hear(&served, "hello");
            (client, served)
        });
        mesh.edit(|plan| plan.add_policy(deny_all()));
        for (client, served) in &connected {
            assert_eq!((ending(client), ending(served)), (Ending::Reset, Ending::Reset));
        }
        let identity = mesh.pod("client").spiffe_id();
        for from in [serde_json::Value::from(identity), serde_json::Value::Null] {
            let line = server.access("inbound", |line| line["src.identity"] == from);
            let why = line["error"].as_str().unwrap();
            assert!(why.contains("policy change") && why.contains(&deny_all().key()), "{why}");
        }
        mesh.edit(|plan| plan.remove_policies());
        drop(app);
        let _app = server.greet();
        until("the policy to be gone", || mesh.pod("client").ask(server.app()));
    });
}
