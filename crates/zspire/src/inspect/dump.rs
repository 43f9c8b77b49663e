//! The parts of `/config_dump` that the commands show. Lenient: what is missing is empty.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::View;

/// A parsed dump, with the text of its parts kept for JSON output.
#[derive(Debug)]
pub(super) struct Dump {
    raw: Value,
    pub(super) workloads: Vec<Workload>,
    pub(super) services: Vec<Service>,
    pub(super) policies: Vec<Policy>,
    pub(super) certificates: Vec<Certificate>,
    pub(super) state: BTreeMap<String, PodState>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Workload {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) workload_ips: Vec<String>,
    pub(super) hostname: String,
    pub(super) node: String,
    pub(super) waypoint: Option<Destination>,
    pub(super) protocol: String,
    pub(super) status: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Destination {
    pub(super) destination: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) vips: Vec<String>,
    pub(super) waypoint: Option<Destination>,
    pub(super) endpoints: BTreeMap<String, Endpoint>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Endpoint {
    pub(super) status: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) action: String,
    pub(super) scope: String,
    pub(super) dry_run: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Certificate {
    pub(super) identity: String,
    pub(super) state: String,
    pub(super) source: String,
    pub(super) cert_chain: Vec<Cert>,
    pub(super) root_certs: Vec<Cert>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Cert {
    pub(super) serial_number: String,
    pub(super) valid_from: String,
    pub(super) expiration_time: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodState {
    pub(super) info: PodInfo,
    pub(super) connections: Connections,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodInfo {
    pub(super) name: String,
    pub(super) namespace: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Connections {
    pub(super) inbound: Vec<Connection>,
    pub(super) outbound: Vec<Connection>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Connection {
    pub(super) src: String,
    pub(super) original_dst: Option<String>,
    pub(super) actual_dst: String,
    pub(super) protocol: String,
}

/// Reads a dump.
pub(super) fn parse(text: &str) -> Result<Dump, String> {
    let raw: Value = serde_json::from_str(text).map_err(|e| format!("not a configuration dump: {e}"))?;
    if !raw.is_object() {
        return Err("not a configuration dump: expected a JSON object".into());
    }
    Ok(Dump {
        workloads: part(&raw, "workloads")?,
        services: part(&raw, "services")?,
        policies: part(&raw, "policies")?,
        certificates: part(&raw, "certificates")?,
        state: part(&raw, "workloadState")?,
        raw,
    })
}

fn part<T: for<'de> Deserialize<'de> + Default>(raw: &Value, key: &str) -> Result<T, String> {
    match raw.get(key) {
        None | Some(Value::Null) => Ok(T::default()),
        Some(value) => T::deserialize(value).map_err(|e| format!("not a configuration dump: {key}: {e}")),
    }
}

impl Dump {
    /// One part as it stands in the dump, one namespace of it if asked.
    pub(super) fn json(&self, view: View, namespace: Option<&str>) -> String {
        let key = match view {
            View::Workloads => "workloads",
            View::Services => "services",
            View::Policies => "policies",
            View::Certificates => "certificates",
            View::Connections => "workloadState",
        };
        let mut value = self.raw.get(key).cloned().unwrap_or(Value::Array(Vec::new()));
        if let Some(namespace) = namespace {
            match &mut value {
                Value::Array(items) => items.retain(|item| in_namespace(item, namespace)),
                Value::Object(pods) => pods.retain(|_, pod| in_namespace(&pod["info"], namespace)),
                _ => {}
            }
        }
        format!("{value:#}\n")
    }
}

fn in_namespace(item: &Value, namespace: &str) -> bool {
    match (item.get("namespace").and_then(Value::as_str), item.get("identity").and_then(Value::as_str)) {
        (Some(given), _) => given == namespace,
        (None, Some(identity)) => identity_namespace(identity) == Some(namespace),
        (None, None) => false,
    }
}

/// The namespace of `spiffe://td/ns/NAMESPACE/sa/…`.
pub(super) fn identity_namespace(identity: &str) -> Option<&str> {
    identity.strip_prefix("spiffe://")?.split_once("/ns/")?.1.split('/').next()
}
