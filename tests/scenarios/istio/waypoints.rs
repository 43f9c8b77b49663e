//! A waypoint: a real Envoy behind a Gateway resource, which takes tunnels and opens others.

use std::fs;
use std::net::SocketAddr;

use serde_json::{Value, json};
use zspire_testkit::{Mesh, Pod, installed, mesh, uncaptured, until};

use super::comes_to_know;

/// Where Envoy says that it is ready.
const ENVOY_ADMIN: u16 = 16000;

fn typed(name: &str, mut fields: Value) -> Value {
    fields["@type"] = format!("type.googleapis.com/{name}").into();
    fields
}

/// What Envoy shows to proxies and what it asks of them.
fn tls([chain, key, root]: &[std::path::PathBuf; 3], peer: &str) -> Value {
    json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": ["h2"],
        "tls_certificates": [{ "certificate_chain": { "filename": chain }, "private_key": { "filename": key } }],
        "validation_context": {
            "trusted_ca": { "filename": root },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "prefix": peer } }],
        },
    })
}

/// Envoy as a waypoint: whatever a tunnel asks for, it opens another one to the server.
fn envoy(files: &[std::path::PathBuf; 3], server: &Pod) -> Value {
    const HTTP: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    const TCP: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
    let context = |side: &str| format!("envoy.extensions.transport_sockets.tls.v3.{side}TlsContext");
    let inbound = json!({
        "name": "hbone",
        "address": { "socket_address": { "address": "0.0.0.0", "port_value": 15008 } },
        "filter_chains": [{
            "transport_socket": { "name": "tls", "typed_config": typed(&context("Downstream"), json!({
                "require_client_certificate": true, "common_tls_context": tls(files, "spiffe://cluster.local/ns/test/sa/client"),
            })) },
            "filters": [{ "name": "http", "typed_config": typed(HTTP, json!({
                "stat_prefix": "hbone", "codec_type": "HTTP2", "http2_protocol_options": { "allow_connect": true },
                "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
                "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [{
                    "match": { "connect_matcher": {} },
                    "route": { "cluster": "inner", "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }] },
                }] }] },
                "http_filters": [{ "name": "router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router", json!({})) }],
            })) }],
        }],
    });
    let inner = json!({
        "name": "inner",
        "internal_listener": {},
        "filter_chains": [{ "filters": [{ "name": "tcp", "typed_config": typed(TCP, json!({
            "stat_prefix": "inner", "cluster": "tunnel", "tunneling_config": { "hostname": server.app().to_string() },
        })) }] }],
    });
    let http2 = json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        json!({ "explicit_http_config": { "http2_protocol_options": {} } }),
    ) });
    let cluster = |name: &str, address: Value, more: Value| {
        let mut cluster = json!({ "name": name, "load_assignment": { "cluster_name": name, "endpoints": [{
            "lb_endpoints": [{ "endpoint": { "address": address } }],
        }] } });
        cluster.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        cluster
    };
    let to_inner =
        cluster("inner", json!({ "envoy_internal_address": { "server_listener_name": "inner" } }), json!({}));
    let address = json!({ "socket_address": { "address": server.address(), "port_value": 15008 } });
    let tunnel = cluster(
        "tunnel",
        address,
        json!({
            "typed_extension_protocol_options": http2,
            "transport_socket": { "name": "tls", "typed_config": typed(&context("Upstream"), json!({
                "common_tls_context": tls(files, &server.spiffe_id()),
            })) },
        }),
    );
    json!({
        "admin": { "address": { "socket_address": { "address": "127.0.0.1", "port_value": ENVOY_ADMIN } } },
        "bootstrap_extensions": [{ "name": "internal", "typed_config": typed(
            "envoy.extensions.bootstrap.internal_listener.v3.InternalListener", json!({}),
        ) }],
        "static_resources": { "listeners": [inbound, inner], "clusters": [to_inner, tunnel] },
    })
}

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

        let file = mesh.path("envoy.json");
        fs::write(&file, envoy(&ca.issue("waypoint", &waypoint.spiffe_id()), &server).to_string()).unwrap();
        let program = installed("envoy").display().to_string();
        let mut envoy =
            waypoint.command(&program, &["--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warn", "-c"]);
        envoy.arg(&file);
        let mut envoy = mesh.process_of("envoy", envoy);
        until("Envoy to be ready", || {
            assert!(envoy.runs(), "{}", envoy.log());
            waypoint.connect(([127, 0, 0, 1], ENVOY_ADMIN).into()).map(drop)
        });
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
