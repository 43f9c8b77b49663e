//! What istiod says of workloads and services, as Kubernetes and Istio objects change.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};
use zspire_testkit::plan::captured;
use zspire_testkit::{Mesh, Pod, mesh, uncaptured, until};

use super::{comes_to_be_refused, comes_to_know, comes_to_reach, known, wait_for_state};
use crate::names::{A, over_udp, query};

#[track_caller]
fn comes_to_forget(pod: &Pod, list: &str, (field, value): (&str, &str)) {
    until(&format!("{value} to go from {list}"), || match known(pod, list, field, value) {
        None => Ok(()),
        Some(it) => Err(it.to_string()),
    });
}

fn has_endpoints(service: &Value) -> bool {
    service["endpoints"].as_object().is_some_and(|all| !all.is_empty())
}

fn kubectl(mesh: &Mesh, arguments: &[&str]) {
    mesh.istio().cluster().kubectl(&[&["-n", "test"], arguments].concat());
}

#[test]
fn pods_that_come_change_and_go() {
    crate::scenario(|| {
        let mesh = mesh()
            .istio()
            .node("a")
            .pod("client")
            .pod("first")
            .node("b")
            .pod(captured("second").not_listed())
            .pod("other")
            .service("both", &["first", "second"])
            .start();
        let [client, first, second, other] = ["client", "first", "second", "other"].map(|name| mesh.pod(name));
        let (istio, both) = (mesh.istio(), mesh.service("both"));
        let _apps = [first.greet(), second.greet()];
        assert_eq!(comes_to_reach(&client, both).by, "first");

        // Added, on another node, where its certificate is asked for before anybody connects.
        istio.add(&second);
        wait_for_state(&other, &second.spiffe_id(), "Available");
        mesh.enroll(&second);
        comes_to_reach(&client, second.app());
        let mut seen = std::collections::BTreeSet::new();
        until("both endpoints to be chosen", || {
            seen.insert(client.reaches(both).by);
            if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}")) }
        });

        // Not ready: it is no endpoint any more, and can be reached by its address.
        istio.set_ready(&first, false);
        comes_to_know(&client, "workloads", ("name", "first"), |it| it["status"] == "Unhealthy");
        for _ in 0..8 {
            assert_eq!(client.reaches(both).by, "second");
        }
        client.reaches(first.app());
        istio.set_ready(&first, true);
        comes_to_know(&client, "workloads", ("name", "first"), |it| it["status"] == "Healthy");

        // Relabelled: it is no endpoint any more.
        kubectl(&mesh, &["label", "pod", "second", "endpoint-of-both-"]);
        until("the second to leave the service", || {
            let service = known(&client, "services", "name", "both").unwrap_or_default();
            let endpoints = service["endpoints"].as_object().map_or(0, |all| all.len());
            if endpoints == 1 { Ok(()) } else { Err(service.to_string()) }
        });
        for _ in 0..8 {
            assert_eq!(client.reaches(both).by, "first");
        }

        // Removed: nobody is left, and its certificate is let go.
        wait_for_state(&client, &first.spiffe_id(), "Available");
        istio.remove(&first);
        comes_to_be_refused(&client, both);
        comes_to_forget(&client, "workloads", ("name", "first"));
        comes_to_forget(&client, "certificates", ("identity", &first.spiffe_id()));

        // Moved: the same name on another node.
        istio.remove(&second);
        comes_to_forget(&client, "workloads", ("name", "second"));
        comes_to_forget(&other, "certificates", ("identity", &second.spiffe_id()));
        istio.add_on(&second, "a");
        let moved = comes_to_know(&client, "workloads", ("name", "second"), |it| it["node"] == "a");
        assert_eq!(moved["uid"], "Kubernetes//Pod/test/second");
        wait_for_state(&client, &second.spiffe_id(), "Available");
    });
}

/// A service by named and numbered ports, without an address, and with endpoints that are no pods.
#[test]
fn services_of_each_kind() {
    crate::scenario(|| {
        let mesh = mesh().istio().node("a").pod("client").node("b").pod("server").pod(uncaptured("legacy")).start();
        let [client, server, legacy] = ["client", "server", "legacy"].map(|name| mesh.pod(name));
        let _apps = [server.greet(), server.greet_at(9090), legacy.greet()];
        let of = |name: &str, spec: Value| {
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "test", "name": name }, "spec": spec,
            })
        };
        let selector = json!({ "app": "server" });
        let ports = json!([
            { "name": "named", "port": 80, "targetPort": "main" },
            { "name": "numbered", "port": 81, "targetPort": 9090 },
        ]);
        let named = of("named", json!({ "clusterIP": "10.96.2.1", "selector": selector, "ports": ports }));
        let headless = of("headless", json!({ "clusterIP": "None", "selector": selector, "ports": ports }));
        let ports = json!([{ "name": "main", "port": 80, "targetPort": 8443 }]);
        let without = of("legacy", json!({ "clusterIP": "10.96.2.2", "ports": ports }));
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "namespace": "test", "name": "legacy-1", "labels": { "kubernetes.io/service-name": "legacy" } },
            "endpoints": [{ "addresses": ["10.10.0.254"], "conditions": { "ready": true } }],
            "ports": [{ "name": "main", "port": 8443, "protocol": "TCP" }],
        });
        for object in [named, headless, without, slice] {
            mesh.istio().cluster().apply(&object.to_string());
        }
        let at = |ip: [u8; 4], port: u16| SocketAddr::from((ip, port));
        comes_to_know(&client, "services", ("name", "named"), has_endpoints);
        client.reaches(at([10, 96, 2, 1], 80));
        client.reaches(at([10, 96, 2, 1], 81));
        let known = comes_to_know(&client, "services", ("name", "headless"), |it| {
            it["endpoints"].as_object().is_some_and(|all| all.len() == 1)
        });
        assert_eq!(known["vips"], json!([]));
        client.redirect_dns();
        let said = over_udp(&client, server.at(53), &query("headless.test.svc.cluster.local", A));
        assert_eq!(IpAddr::from(said.last), server.address(), "{said:?}");
        // Nobody in the mesh: plaintext, to where the slice says.
        let _beyond = mesh.greet_outside(8443);
        comes_to_know(&client, "services", ("name", "legacy"), has_endpoints);
        client.reaches(at([10, 96, 2, 2], 80));
        client.access("outbound", |line| line["dst.addr"] == "10.10.0.254:8443" && line["error"].is_null());
        kubectl(&mesh, &["delete", "service", "legacy"]);
        comes_to_forget(&client, "services", ("name", "legacy"));
        comes_to_forget(
            &client,
            "workloads",
            ("uid", "Kubernetes/discovery.k8s.io/EndpointSlice/test/legacy-1/10.10.0.254"),
        );
    });
}

/// Istio's own: entries with addresses and with names, workloads that are no pods, and who may see what.
#[test]
fn service_entries_and_workload_entries() {
    crate::scenario(|| {
        let mesh = mesh()
            .istio()
            .node("a")
            .pod(captured("client").resolving_pods())
            .node("b")
            .pod(uncaptured("machine"))
            .pod(uncaptured("external"))
            .start();
        let [client, machine, external] = ["client", "machine", "external"].map(|name| mesh.pod(name));
        let _apps = [machine.greet(), external.greet()];
        let entry = |kind: &str, namespace: &str, name: &str, spec: Value| {
            json!({
                "apiVersion": "networking.istio.io/v1", "kind": kind,
                "metadata": { "namespace": namespace, "name": name, "labels": { "app": name } }, "spec": spec,
            })
            .to_string()
        };
        let cluster = mesh.istio().cluster();
        let ports = json!([{ "number": 80, "name": "tcp", "protocol": "TCP", "targetPort": 8080 }]);
        cluster.apply(&entry(
            "WorkloadEntry",
            "test",
            "machine",
            json!({
                "address": machine.address(), "serviceAccount": "machine", "labels": { "app": "machine" },
            }),
        ));
        cluster.apply(&entry(
            "ServiceEntry",
            "test",
            "machines",
            json!({
                "hosts": ["machines.example"], "addresses": ["10.96.3.1"], "ports": ports, "resolution": "STATIC",
                "workloadSelector": { "labels": { "app": "machine" } },
            }),
        ));
        cluster.apply(&entry(
            "ServiceEntry",
            "test",
            "static",
            json!({
                "hosts": ["static.example"], "addresses": ["10.96.3.2"], "ports": ports, "resolution": "STATIC",
                "endpoints": [{ "address": external.address() }],
            }),
        ));
        cluster.apply(&entry(
            "ServiceEntry",
            "test",
            "dns",
            json!({
                "hosts": ["external.test"], "addresses": ["10.96.3.3"], "ports": ports, "resolution": "DNS",
            }),
        ));
        let at = |last: u8| SocketAddr::from(([10, 96, 3, last], 80));
        for (service, last, by) in [("machines", 1, "machine"), ("static", 2, "external"), ("dns", 3, "external")] {
            comes_to_know(&client, "services", ("name", service), has_endpoints);
            assert_eq!(client.reaches(at(last)).by, by);
        }

        // Those of other namespaces are for these alone, except where the mesh says otherwise.
        let visibility = json!({ "serviceEntryVisibility": {
            "defaultVisibility": "NAMESPACE",
            "policies": [{
                "visibility": "PUBLIC",
                "matchingRules": [{ "namespaceSelector": { "matchLabels": { "entries": "public" } } }],
            }],
        } });
        let object = |kind: &str, metadata: Value, data: Value| {
            json!({ "apiVersion": "v1", "kind": kind, "metadata": metadata, "data": data }).to_string()
        };
        let metadata = json!({ "namespace": "istio-system", "name": "istio" });
        cluster.apply(&object("ConfigMap", metadata, json!({ "mesh": visibility.to_string() })));
        for (name, last) in [("private", 4), ("public", 5)] {
            cluster.apply(&json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": { "entries": name } },
            }).to_string());
            cluster.apply(&entry(
                "ServiceEntry",
                name,
                name,
                json!({
                    "hosts": [format!("{name}.example")], "addresses": [format!("10.96.3.{last}")], "ports": ports,
                    "resolution": "STATIC", "endpoints": [{ "address": external.address() }],
                }),
            ));
        }
        comes_to_know(&client, "services", ("name", "private"), |it| it["visibility"] == "Namespace");
        comes_to_know(&client, "services", ("name", "public"), has_endpoints);
        assert_eq!(client.reaches(at(5)).by, "external");
        client.is_refused(at(4));
        assert_eq!(client.reaches(at(1)).by, "machine");
    });
}

/// What cannot be used is told to istiod and to the operator, and what came with it is taken.
#[test]
fn workload_that_is_refused_beside_good_ones() {
    crate::scenario(|| {
        let mesh = mesh().istio().node("a").pod("client").node("b").pod(uncaptured("machine")).start();
        let [client, machine] = ["client", "machine"].map(|name| mesh.pod(name));
        let istio = mesh.istio();
        let entry = |name: &str, account: &str| {
            json!({
                "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
                "metadata": { "namespace": "test", "name": name, "labels": { "app": name } },
                "spec": { "address": machine.address(), "serviceAccount": account },
            })
        };
        // No webhook checks it here, and istiod passes it on.
        let both =
            json!({ "apiVersion": "v1", "kind": "List", "items": [entry("bad", "a/b"), entry("good", "machine")] });
        istio.istiod().stop();
        istio.cluster().apply(&both.to_string());
        istio.start_istiod();
        comes_to_know(&client, "workloads", ("name", "good"), |_| true);
        assert_eq!(known(&client, "workloads", "name", "bad"), None);
        let name = "Kubernetes/networking.istio.io/WorkloadEntry/test/bad";
        client.proxy(|proxy| proxy.line("what is refused", |line| line.to_string().contains(name)));
        istio.istiod().process(|istiod| {
            until("istiod to be told", || if istiod.log().contains(name) { Ok(()) } else { Err("it says nothing") });
        });
    });
}

/// Another istiod is met with the versions of what is known; what has changed meanwhile is heard of, and what is gone is forgotten.
#[test]
fn changes_while_istiod_is_away() {
    crate::scenario(|| {
        let mesh = mesh()
            .istio()
            .node("a")
            .pod("client")
            .pod("going")
            .node("b")
            .pod("server")
            .pod(captured("coming").not_listed())
            .start();
        let [client, server, going, coming] = ["client", "server", "going", "coming"].map(|name| mesh.pod(name));
        let _apps = [server.greet(), coming.greet()];
        client.reaches(server.app());
        let istio = mesh.istio();
        istio.istiod().stop();
        istio.remove(&going);
        istio.add(&coming);
        istio.set_ready(&server, false);
        client.reaches(server.app());
        istio.start_istiod();
        comes_to_forget(&client, "workloads", ("name", "going"));
        // It was told the versions of the rest, and says nothing of what is the same: two pods have changed, one is gone.
        let pushed = istio.istiod().process(|istiod| {
            let log = istiod.log();
            let first = |line: &&str| line.contains("WDS: PUSH request for node:ztunnel-a.istio-system");
            log.lines().rev().find(first).map(str::to_owned)
        });
        let pushed = pushed.expect("istiod logs what it sends");
        assert!(pushed.contains("resources:2 removed:1 "), "{pushed}");
        comes_to_know(&client, "workloads", ("name", "server"), |it| it["status"] == "Unhealthy");
        comes_to_know(&client, "workloads", ("name", "coming"), |_| true);
        mesh.enroll(&coming);
        comes_to_reach(&client, coming.app());
    });
}

/// Only what somebody needs is known.
#[test]
fn on_demand() {
    crate::scenario(|| {
        let on_demand = |name: &str| captured(name).with("XDS_ON_DEMAND", "true");
        let mesh = mesh()
            .istio()
            .node("a")
            .pod(on_demand("client"))
            .node("b")
            .pod(on_demand("server"))
            .pod(on_demand("bystander"))
            .service("api", &["server"])
            .start();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let _app = server.greet();
        assert_eq!(known(&client, "workloads", "name", "server"), None);
        client.reaches(server.app());
        comes_to_know(&client, "workloads", ("name", "server"), |_| true);
        client.reaches(mesh.service("api"));
        comes_to_know(&client, "services", ("name", "api"), |_| true);
        assert_eq!(known(&client, "workloads", "name", "bystander"), None);
        server.access("inbound", |line| line["src.identity"] == client.spiffe_id() && line["error"].is_null());
    });
}
