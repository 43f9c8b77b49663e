//! What a discovery client must be told.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use zspire_wire::discovery::Node;

/// Configuration of a client.
#[derive(Debug, Clone)]
pub struct Config {
    /// The server, for the log.
    pub server: String,
    /// How the client names itself; see [`Config::node_id`].
    pub node_id: String,
    /// What it says of itself besides: `NAME`, `NAMESPACE`, `INSTANCE_IPS`, `NODE_NAME`, `CLUSTER_ID`…
    pub node_metadata: BTreeMap<String, serde_json::Value>,
    /// Workloads and services only when asked for, by the [`Demand`](super::Demand) handle; policies are discovered all the same.
    pub on_demand: bool,
    /// Longest wait before the second attempt; it doubles with each that fails.
    pub backoff_min: Duration,
    /// Longest wait of all.
    pub backoff_max: Duration,
    /// Longest message to accept, in bytes.
    pub max_message: usize,
    /// Longest message to send, in bytes. Istio's server takes 4 MiB: what does not fit of the known versions is left out, and
    /// the server then sends everything anew.
    pub max_request: usize,
    /// How long the server may take for the first answer of a stream.
    pub answer_timeout: Duration,
}

impl Config {
    /// A client with a name, and the defaults for all else.
    pub fn new(node_id: impl Into<String>) -> Self {
        Self {
            server: "the discovery server".into(),
            node_id: node_id.into(),
            node_metadata: BTreeMap::new(),
            on_demand: false,
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_secs(15),
            max_message: 200 << 20,
            max_request: 3 << 20,
            answer_timeout: Duration::from_secs(120),
        }
    }

    /// The name by which Istio's server knows a node proxy.
    pub fn node_id(ip: IpAddr, pod: &str, namespace: &str, domain: &str) -> String {
        format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.{domain}")
    }

    pub(super) fn node(&self) -> Node {
        let fields = self.node_metadata.iter().map(|(name, value)| (name.clone(), protobuf(value))).collect();
        Node {
            id: self.node_id.clone(),
            metadata: Some(Struct { fields }),
            user_agent_name: "zspire".into(),
            user_agent_version: env!("CARGO_PKG_VERSION").into(),
            ..Node::default()
        }
    }
}

fn protobuf(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(flag) => Kind::BoolValue(*flag),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(values) => Kind::ListValue(ListValue { values: values.iter().map(protobuf).collect() }),
        Json::Object(fields) => {
            let fields = fields.iter().map(|(name, value)| (name.clone(), protobuf(value))).collect();
            Kind::StructValue(Struct { fields })
        }
    };
    Value { kind: Some(kind) }
}
