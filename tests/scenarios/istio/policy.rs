//! PeerAuthentication and AuthorizationPolicy, as istiod sends them.

use zspire_testkit::{Mesh, Pod, mesh, uncaptured, until};

use super::{comes_to_be_refused, comes_to_reach};
use crate::traffic::{connect, connect_to, told};

/// A policy of the namespace, with this specification.
fn policy(name: &str, spec: &str) -> String {
    format!(
        r#"{{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{{"namespace":"test","name":"{name}"}},"spec":{spec}}}"#
    )
}

/// Rules about one service account of the namespace.
fn principal(action: &str, account: &str) -> String {
    format!(
        r#"{{"action":"{action}","rules":[{{"from":[{{"source":{{"principals":["cluster.local/ns/test/sa/{account}"]}}}}]}}]}}"#
    )
}

fn peer_authentication(name: &str, spec: &str) -> String {
    format!(
        r#"{{"apiVersion":"security.istio.io/v1","kind":"PeerAuthentication","metadata":{{"namespace":"test","name":"{name}"}},"spec":{spec}}}"#
    )
}

fn remove(mesh: &Mesh, kind: &str, name: &str) {
    mesh.istio().cluster().delete(&["-n", "test", kind, name]);
}

/// Two clients in the mesh, one outside, and a server on another node.
fn three() -> (Mesh, Pod) {
    let mesh = mesh()
        .istio()
        .node("a")
        .pod("one")
        .pod("other")
        .pod(uncaptured("stranger"))
        .node("b")
        .pod("server")
        .pod("bystander")
        .start();
    let server = mesh.pod("server");
    (mesh, server)
}

#[test]
fn peer_authentication_decides_whether_plaintext_is_taken() {
    crate::scenario(|| {
        let (mesh, server) = three();
        let (one, stranger, bystander) = (mesh.pod("one"), mesh.pod("stranger"), mesh.pod("bystander"));
        let _apps = [server.greet(), server.greet_at(9090), bystander.greet()];
        let istio = mesh.istio();
        let listener = server.listen_at(7070);
        let [plaintext, tunnelled] = [&stranger, &one].map(|pod| connect_to(pod, server.at(7070), &listener));
        istio.cluster().apply(&peer_authentication("all", r#"{"mtls":{"mode":"STRICT"}}"#));
        plaintext.is_cut();
        tunnelled.goes_on();
        comes_to_be_refused(&stranger, server.app());
        istio.cluster().apply(&peer_authentication("all", r#"{"mtls":{"mode":"PERMISSIVE"}}"#));
        comes_to_reach(&stranger, server.app());
        istio.cluster().apply(&peer_authentication("all", r#"{"mtls":{"mode":"STRICT"}}"#));
        comes_to_be_refused(&stranger, server.app());
        comes_to_be_refused(&stranger, bystander.app());
        server.refusal("inbound", "istio-system/istio_converted_static_strict");
        one.reaches(server.app());

        // One port of one workload is an exception.
        let ports = r#"{"selector":{"matchLabels":{"app":"server"}},"mtls":{"mode":"STRICT"},"portLevelMtls":{"9090":{"mode":"PERMISSIVE"}}}"#;
        istio.cluster().apply(&peer_authentication("port", ports));
        comes_to_reach(&stranger, server.at(9090));
        stranger.is_refused(server.app());
        stranger.is_refused(bystander.app());
        one.reaches(server.app());
        one.reaches(server.at(9090));

        // The reverse: all but one port takes plaintext.
        let ports = r#"{"selector":{"matchLabels":{"app":"server"}},"mtls":{"mode":"PERMISSIVE"},"portLevelMtls":{"9090":{"mode":"STRICT"}}}"#;
        istio.cluster().apply(&peer_authentication("port", ports));
        comes_to_reach(&stranger, server.app());
        comes_to_be_refused(&stranger, server.at(9090));
        one.reaches(server.at(9090));

        remove(&mesh, "peerauthentication", "port");
        remove(&mesh, "peerauthentication", "all");
        comes_to_reach(&stranger, server.at(9090));
        comes_to_reach(&stranger, bystander.app());
    });
}

/// By principal, namespace, address and port; whoever a change is about is cut, and nobody else.
#[test]
fn authorization_policies_are_enforced_and_live_connections_follow_them() {
    crate::scenario(|| {
        let (mesh, server) = three();
        let app = server.listen();
        let live = ["one", "other", "stranger"].map(|name| connect(&mesh.pod(name), &server, &app));
        let [one, other, stranger] = live;
        let cluster = mesh.istio().cluster();
        cluster.apply(&policy("deny-one", &principal("DENY", "one")));
        one.is_cut();
        told(&server, "inbound", "policy change: explicitly denied by: test/deny-one", "DENY", "policy");
        other.goes_on();
        stranger.goes_on();
        cluster.apply(&policy("allow-other", &principal("ALLOW", "other")));
        stranger.is_cut();
        other.goes_on();
        drop(app);
        let _apps = [server.greet(), server.greet_at(9090)];
        let [one, other, stranger] = ["one", "other", "stranger"].map(|name| mesh.pod(name));
        other.reaches(server.app());
        one.is_refused(server.app());
        stranger.is_refused(server.app());

        // Plaintext has an address, but is of no namespace.
        let rules = format!(
            r#"{{"rules":[{{"from":[{{"source":{{"namespaces":["test"]}}}},{{"source":{{"ipBlocks":["{}"]}}}}],"to":[{{"operation":{{"ports":["8080"]}}}}]}}]}}"#,
            stranger.address()
        );
        remove(&mesh, "authorizationpolicy", "deny-one");
        remove(&mesh, "authorizationpolicy", "allow-other");
        cluster.apply(&policy("rules", &rules));
        comes_to_be_refused(&stranger, server.at(9090));
        for pod in [&one, &other, &stranger] {
            comes_to_reach(pod, server.app());
            pod.is_refused(server.at(9090));
        }
        let denied = |source: String| format!(r#"{{"action":"DENY","rules":[{{"from":[{{"source":{source}}}]}}]}}"#);
        cluster.apply(&policy("deny", &denied(format!(r#"{{"ipBlocks":["{}"]}}"#, other.address()))));
        comes_to_be_refused(&other, server.app());
        one.reaches(server.app());
        cluster.apply(&policy("deny", &denied(r#"{"namespaces":["test"]}"#.into())));
        comes_to_be_refused(&one, server.app());
        stranger.reaches(server.app());
        remove(&mesh, "authorizationpolicy", "deny");
        comes_to_reach(&other, server.app());
        let nowhere = rules.replace(r#""test""#, r#""elsewhere""#);
        cluster.apply(&policy("rules", &nowhere));
        comes_to_be_refused(&one, server.app());
        stranger.reaches(server.app());
    });
}

/// What only a waypoint could decide is not decided here: an ALLOW allows nothing, a DENY without what it cannot see denies more.
#[test]
fn policy_that_needs_http_fails_closed() {
    crate::scenario(|| {
        let (mesh, server) = three();
        let _apps = [server.greet(), server.greet_at(9090)];
        let one = mesh.pod("one");
        let cluster = mesh.istio().cluster();
        one.reaches(server.app());
        cluster.apply(&policy("http", r#"{"action":"ALLOW","rules":[{"to":[{"operation":{"methods":["GET"]}}]}]}"#));
        comes_to_be_refused(&one, server.app());
        server.refusal("inbound", "none allowed: test/http");

        cluster.apply(&policy(
            "http",
            r#"{"action":"DENY","rules":[{"to":[{"operation":{"methods":["GET"],"ports":["9090"]}}]}]}"#,
        ));
        comes_to_reach(&one, server.app());
        comes_to_be_refused(&one, server.at(9090));
    });
}

/// istiod leaves out what it cannot read of a policy, and a match without conditions matches nothing.
#[test]
fn policy_of_which_istiod_leaves_nothing_matches_nobody() {
    crate::scenario(|| {
        let (mesh, server) = three();
        let _app = server.greet();
        let (one, other) = (mesh.pod("one"), mesh.pod("other"));
        let cluster = mesh.istio().cluster();
        // Nothing checks objects here: there is no webhook.
        cluster.apply(&policy("odd", r#"{"action":"DENY","rules":[{"to":[{"operation":{"ports":["99999"]}}]}]}"#));
        cluster.apply(&policy("deny-other", &principal("DENY", "other")));
        comes_to_be_refused(&other, server.app());
        until("both policies to be known", || {
            let dump = server.dump();
            let all = dump["policies"].as_array().map(Vec::len);
            if all == Some(2) { Ok(()) } else { Err(dump["policies"].to_string()) }
        });
        one.reaches(server.app());
    });
}
