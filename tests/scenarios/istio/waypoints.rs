//! A waypoint: a real Envoy behind a Gateway resource, which takes tunnels and opens others.

use std::net::SocketAddr;

use serde_json::{Value, json};
use zspire_testkit::envoy::{self, Envoy};
use zspire_testkit::{Mesh, Pod, mesh, uncaptured, until};

use super::comes_to_know;

/// The Gateway, and what Istio's deployment controller and Kubernetes' endpoint controller would make of it.
fn bind(mesh: &Mesh, waypoint: &Pod) {
    let name = json!({ "gateway.networking.k8s.io/gateway-name": "waypoint" });
    let metadata = |labels: &Value| json!({ "namespace": "test", "name": "waypoint", "labels": labels });
    let ports = json!([{ "name": "mesh", "port": 15008, "protocol": "TCP" }]);
    let objects = [
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": metadata(&json!({ "istio.io/waypoint-for": "all" })),
            "spec": { "gatewayClassName": "istio-waypoint", "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }] },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": metadata(&json!({
                "gateway.istio.io/managed": "istio.io-mesh-controller", "gateway.networking.k8s.io/gateway-name": "waypoint",
            })),
            "spec": { "clusterIP": "10.96.2.30", "selector": name, "ports": ports },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": metadata(&json!({ "kubernetes.io/service-name": "waypoint" })), "ports": ports,
            "endpoints": [{
                "addresses": [waypoint.address()], "conditions": { "ready": true }, "nodeName": "b",
                "targetRef": { "kind": "Pod", "name": "waypoint", "namespace": "test" },
            }],
        }),
    ];
    let cluster = mesh.istio().cluster();
    for object in objects {
        cluster.apply(&object.to_string());
    }
    cluster.kubectl(&["-n", "test", "label", "pod", "waypoint", "gateway.networking.k8s.io/gateway-name=waypoint"]);
}

#[test]
fn traffic_to_a_service_and_to_a_workload_goes_through_an_envoy() {
    crate::scenario(|| {
        let mesh = mesh()
            .istiod_down()
            .node("a")
            .pod("client")
            .node("b")
            .pod("server")
            .pod(uncaptured("waypoint").taking_tunnels_itself())
            .service("api", &["server"])
            .start();
        let [client, server, waypoint] = ["client", "server", "waypoint"].map(|name| mesh.pod(name));
        let istio = mesh.istio();
        let ca = istio.authority("mesh");
        istio.plug_in(&ca, &[&ca]);
        istio.start_istiod();
        client.wait_until_ready();
        let _app = server.greet();
        client.reaches(mesh.service("api"));

        // Whatever a tunnel asks for, it opens another one to the server.
        let certificate = ca.issue("waypoint", &waypoint.spiffe_id());
        let listeners = [
            envoy::takes_tunnels(&certificate, &client.spiffe_id(), "inner"),
            envoy::opens_tunnels("inner", None, server.app()),
        ];
        let clusters = [envoy::leads_within("inner", "inner"), envoy::tunnel(&certificate, &server)];
        let _envoy = Envoy::start(&mesh, &waypoint, &listeners, &clusters);
        bind(&mesh, &waypoint);
        let cluster = istio.cluster();
        // How many connections the server has had from somebody.
        let arrived = |from: &Pod, count: usize| {
            until(&format!("{count} connections from {}", from.name()), || {
                let log = server.proxy(|proxy| proxy.log());
                let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
                let arrived = lines.filter(|line| line["direction"] == "inbound" && line["error"].is_null());
                match arrived.filter(|line| line["src.identity"] == from.spiffe_id()).count() {
                    seen if seen == count => Ok(()),
                    seen => Err(format!("{seen}")),
                }
            });
        };
        let through = |to: SocketAddr| {
            let line = client.access("outbound", |line| {
                line["dst.hbone_addr"] == to.to_string() && line["dst.workload"] == "waypoint"
            });
            assert_eq!(line["dst.identity"], waypoint.spiffe_id());
        };

        cluster.kubectl(&["-n", "test", "label", "service", "api", "istio.io/use-waypoint=waypoint"]);
        comes_to_know(&client, "services", ("name", "api"), |it| !it["waypoint"].is_null());
        assert_eq!(client.reaches(mesh.service("api")).by, "server");
        through(mesh.service("api"));
        arrived(&waypoint, 1);
        // Its own address is not the service's.
        client.reaches(server.app());
        arrived(&client, 2);

        cluster.kubectl(&["-n", "test", "label", "pod", "server", "istio.io/use-waypoint=waypoint"]);
        comes_to_know(&client, "workloads", ("name", "server"), |it| !it["waypoint"].is_null());
        assert_eq!(client.reaches(server.app()).by, "server");
        through(server.app());
        arrived(&waypoint, 2);

        // Only the waypoint may speak to it from now on.
        cluster.apply(
            r#"{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"namespace":"test","name":"waypoint"},
                "spec":{"selector":{"matchLabels":{"app":"server"}},"rules":[{"from":[{"source":{"principals":["cluster.local/ns/test/sa/waypoint"]}}]}]}}"#,
        );
        comes_to_know(&server, "workloads", ("name", "server"), |it| {
            it["authorizationPolicies"] == json!(["test/waypoint"])
        });
        client.reaches(server.app());
        cluster.kubectl(&["-n", "test", "label", "pod", "server", "istio.io/use-waypoint-"]);
        comes_to_know(&client, "workloads", ("name", "server"), |it| it["waypoint"].is_null());
        client.is_refused(server.app());
    });
}
