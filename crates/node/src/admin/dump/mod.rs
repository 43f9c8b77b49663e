//! The JSON of `/config_dump`, in ztunnel's shape: what `istioctl ztunnel-config` and our own commands read.
//!
//! Views are separate structs: what is not written down here is never shown. They hold no private key, no token and
//! no value of a configured header.

mod certificates;
mod config;
mod mesh;

use std::collections::BTreeMap;

use serde::Serialize;
use zspire_identity::Entry;
use zspire_model::Snapshot;

use crate::BuildInfo;
use crate::config::Config;

pub use certificates::Certificate;

/// What is dumped.
#[derive(Debug)]
pub struct Sources<'a> {
    pub config: &'a Config,
    pub build: &'a BuildInfo,
    pub snapshot: &'a Snapshot,
    /// What `LOCAL_XDS` gave.
    pub local: Option<&'a Snapshot>,
    pub identities: Vec<Entry>,
    pub workload_state: BTreeMap<String, PodState>,
    /// Workload discovery, as it stands.
    pub discovery: Discovery,
}

/// One pod of this proxy.
#[derive(Debug, Serialize)]
pub struct PodState {
    /// `Up`, or `Pending` with a reason.
    pub state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    pub connections: Connections,
    pub info: Info,
}

/// A pod's live connections.
#[derive(Debug, Default, Serialize)]
pub struct Connections {
    pub inbound: Vec<Connection>,
    pub outbound: Vec<Connection>,
}

/// One live connection.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    pub src: String,
    pub original_dst: Option<String>,
    pub actual_dst: String,
    pub protocol: &'static str,
}

/// A pod by name.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Info {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub trust_domain: String,
}

/// Where workloads come from and how fresh they are.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Discovery {
    pub source: String,
    pub connected: bool,
    /// What was wrong last: a refused resource, a file that was not taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Dump<'a> {
    workloads: Vec<mesh::Workload<'a>>,
    services: Vec<mesh::Service<'a>>,
    policies: Vec<mesh::Policy<'a>>,
    staged_services: BTreeMap<(), ()>,
    static_config: StaticConfig<'a>,
    version: config::Version<'a>,
    config: config::View<'a>,
    certificates: Vec<Certificate>,
    workload_state: &'a BTreeMap<String, PodState>,
    discovery: &'a Discovery,
}

#[derive(Default, Serialize)]
struct StaticConfig<'a> {
    workloads: Vec<mesh::Workload<'a>>,
    policies: Vec<mesh::Policy<'a>>,
    services: Vec<mesh::Service<'a>>,
}

/// The settings alone, on one line: what may be logged of them is what may be shown.
pub fn settings(config: &Config) -> String {
    serde_json::to_string(&config::View::new(config)).unwrap_or_else(|error| error.to_string())
}

/// The whole dump as indented JSON.
pub fn render(sources: &Sources<'_>) -> String {
    let snapshot = sources.snapshot;
    let dump = Dump {
        workloads: mesh::workloads(snapshot, false),
        services: mesh::services(snapshot),
        policies: mesh::policies(snapshot),
        staged_services: BTreeMap::new(),
        static_config: sources.local.map_or_else(StaticConfig::default, |local| StaticConfig {
            workloads: mesh::workloads(local, true),
            policies: mesh::policies(local),
            services: mesh::services(local),
        }),
        version: config::Version::new(sources.build, &sources.config.istio_version),
        config: config::View::new(sources.config),
        certificates: sources.identities.iter().map(Certificate::new).collect(),
        workload_state: &sources.workload_state,
        discovery: &sources.discovery,
    };
    let mut text = serde_json::to_string_pretty(&dump).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"));
    text.push('\n');
    text
}

#[cfg(test)]
mod tests;
