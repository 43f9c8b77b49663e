//! Ways of istiod that docs/istio.md tells operators to mind: here they are seen, so that the page is changed when they change.

use serde_json::{Value, json};
use zspire_testkit::{Mesh, mesh};

use super::{comes_to_know, comes_to_reach};
use crate::scenario;

/// Makes a policy that allows one kind of source.
fn allow(mesh: &Mesh, name: &str, selector: Option<Value>, source: &Value) {
    let mut policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "namespace": "test", "name": name },
        "spec": { "action": "ALLOW", "rules": [{ "from": [{ "source": source }] }] },
    });
    if let Some(selector) = selector {
        policy["spec"]["selector"] = selector;
    }
    mesh.istio().cluster().apply(&policy.to_string());
}

/// A rule by trust domain allows others too: what is told to node proxies has the rest of the rule alone.
#[test]
fn trust_domains_of_a_policy_are_not_told_to_node_proxies() {
    scenario(|| {
        let mesh = mesh().istio().node("a").pod("client").node("b").pod("server").start();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let _app = server.greet();
        let told = |name: &str, source: Value| {
            allow(&mesh, name, None, &source);
            comes_to_know(&server, "policies", ("name", name), |_| true)["rules"].clone()
        };
        assert_eq!(told("domain", json!({ "trustDomains": ["other.example"] })), json!([[[{}]]]), "it allows nobody");
        client.is_refused(server.app());
        let both = json!({ "trustDomains": ["other.example"], "namespaces": ["test"] });
        assert_eq!(told("domain-and-namespace", both), json!([[[{ "namespaces": [{ "Exact": "test" }] }]]]));
        comes_to_reach(&client, server.app());
    });
}

/// Pods have labels all the same: Kubernetes gives them those of their node's place.
#[test]
fn what_has_no_labels_gets_every_policy_with_a_selector() {
    scenario(|| {
        let mesh = mesh().istio().node("a").pod("client").start();
        let client = mesh.pod("client");
        let nobody = json!({ "matchLabels": { "app": "nobody" } });
        allow(&mesh, "for-nobody", Some(nobody), &json!({ "namespaces": ["elsewhere"] }));
        for (name, labels) in [("plain", json!({})), ("labelled", json!({ "app": "somebody" }))] {
            let entry = json!({
                "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
                "metadata": { "namespace": "test", "name": name, "labels": labels },
                "spec": { "address": "203.0.113.7", "serviceAccount": "client" },
            });
            mesh.istio().cluster().apply(&entry.to_string());
        }
        let gets = |name: &str, policies: Value| {
            comes_to_know(&client, "workloads", ("name", name), |it| it["authorizationPolicies"] == policies);
        };
        gets("plain", json!(["test/for-nobody"]));
        gets("labelled", Value::Null);
        gets("client", Value::Null);
    });
}
