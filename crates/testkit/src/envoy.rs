//! Envoy in a pod: as what opens tunnels, as what takes them, or as both. Its configuration is put together of the parts here.

use std::fs;
use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::http::Answer;
use crate::mesh::Mesh;
use crate::openssl::Certificate;
use crate::peers::installed;
use crate::pod::Pod;
use crate::process::Process;
use crate::wait::until;

/// Where it says that it is ready.
const ADMIN: u16 = 16000;
/// Where it takes tunnels.
const HBONE: u16 = 15008;

/// An Envoy that runs; it ends with its value.
#[derive(Debug)]
pub struct Envoy {
    process: Process,
    pod: Pod,
}

impl Envoy {
    /// Starts one in a pod that has no proxy; returns when it is ready.
    #[track_caller]
    pub fn start(mesh: &Mesh, pod: &Pod, listeners: &[Value], clusters: &[Value]) -> Self {
        let config = json!({
            "admin": { "address": address(([127, 0, 0, 1], ADMIN).into()) },
            "bootstrap_extensions": [{ "name": "internal", "typed_config": typed(
                "envoy.extensions.bootstrap.internal_listener.v3.InternalListener", json!({}),
            ) }],
            "static_resources": { "listeners": listeners, "clusters": clusters },
        });
        let file = mesh.path(&format!("envoy-{}.json", pod.name()));
        fs::write(&file, config.to_string()).expect("the test's own folder");
        let program = installed("envoy");
        // One worker has one tunnel.
        let arguments = ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warn", "-c"];
        let mut command = pod.command(&program.to_string_lossy(), &arguments);
        command.arg(&file);
        let mut process = mesh.process_of(&format!("envoy-{}", pod.name()), command);
        until("Envoy to be ready", || {
            assert!(process.runs(), "it has ended:\n{}", process.log());
            match pod.ask_loopback(ADMIN, "GET /ready") {
                Ok(Answer { status: 200, .. }) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        Self { process, pod: pod.clone() }
    }

    /// Everything that it has written.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// What it has counted.
    #[track_caller]
    pub fn count(&self, name: &str) -> u64 {
        let page = self.pod.ask_loopback(ADMIN, "GET /stats").expect("Envoy answers").body;
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("Envoy does not count {name}"))
    }
}

/// Takes tunnels of a peer whose SPIFFE ID begins so, and leads all that they ask for to a cluster.
pub fn takes_tunnels(certificate: &Certificate, peer: &str, cluster: &str) -> Value {
    const HTTP: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    json!({
        "name": "hbone",
        "address": address(([0, 0, 0, 0], HBONE).into()),
        "filter_chains": [{
            "transport_socket": tls("Downstream", certificate, peer, json!({ "require_client_certificate": true })),
            "filters": [{ "name": "http", "typed_config": typed(HTTP, json!({
                "stat_prefix": "hbone", "codec_type": "HTTP2", "http2_protocol_options": { "allow_connect": true },
                "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
                "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [{
                    "match": { "connect_matcher": {} },
                    "route": { "cluster": cluster, "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }] },
                }] }] },
                "http_filters": [{ "name": "router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router", json!({})) }],
            })) }],
        }],
    })
}

/// The same listener, whose tunnels carry no more streams than that at once, and end (GOAWAY) when they were asked for so many.
pub fn with_limits(mut listener: Value, at_once: u32, in_all: u32) -> Value {
    let http = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
    http["http2_protocol_options"]["max_concurrent_streams"] = at_once.into();
    http["common_http_protocol_options"] = json!({ "max_requests_per_connection": in_all });
    listener
}

/// Asks for a target through cluster `tunnel`, for each connection to a port of the loopback; without a port, for each that is
/// led to the listener within Envoy.
pub fn opens_tunnels(name: &str, port: Option<u16>, target: SocketAddr) -> Value {
    const TCP: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
    let mut listener = json!({
        "name": name,
        "filter_chains": [{ "filters": [{ "name": "tcp", "typed_config": typed(TCP, json!({
            "stat_prefix": name, "cluster": "tunnel", "tunneling_config": { "hostname": target.to_string() },
        })) }] }],
    });
    match port {
        Some(port) => listener["address"] = address(([127, 0, 0, 1], port).into()),
        None => listener["internal_listener"] = json!({}),
    }
    listener
}

/// Cluster `tunnel`: the proxy of a pod, which has to show the pod's identity.
pub fn tunnel(certificate: &Certificate, to: &Pod) -> Value {
    const HTTP: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let mut cluster = leads_to("tunnel", to.at(HBONE));
    let http2 = json!({ "explicit_http_config": { "http2_protocol_options": {} } });
    cluster["typed_extension_protocol_options"] = json!({ HTTP: typed(HTTP, http2) });
    cluster["transport_socket"] = tls("Upstream", certificate, &to.spiffe_id(), json!({}));
    cluster
}

/// A cluster that is an address.
pub fn leads_to(name: &str, to: SocketAddr) -> Value {
    cluster(name, &address(to))
}

/// A cluster that is a listener within Envoy.
pub fn leads_within(name: &str, listener: &str) -> Value {
    cluster(name, &json!({ "envoy_internal_address": { "server_listener_name": listener } }))
}

fn cluster(name: &str, address: &Value) -> Value {
    let endpoint = json!({ "endpoint": { "address": address } });
    json!({ "name": name, "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] } })
}

fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip(), "port_value": of.port() } })
}

fn typed(name: &str, mut fields: Value) -> Value {
    fields["@type"] = format!("type.googleapis.com/{name}").into();
    fields
}

/// What Envoy shows to its peer and what it asks of it.
fn tls(side: &str, [chain, key, roots]: &Certificate, peer: &str, mut context: Value) -> Value {
    context["common_tls_context"] = json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": ["h2"],
        "tls_certificates": [{ "certificate_chain": { "filename": chain }, "private_key": { "filename": key } }],
        "validation_context": {
            "trusted_ca": { "filename": roots },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "prefix": peer } }],
        },
    });
    let name = format!("envoy.extensions.transport_sockets.tls.v3.{side}TlsContext");
    json!({ "name": "tls", "typed_config": typed(&name, context) })
}
