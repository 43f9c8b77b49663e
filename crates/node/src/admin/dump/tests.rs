//! The dump beside one that a real ztunnel gave for the same mesh (`tests/golden`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;
use zspire_identity::{Entry, State, Story, WorkloadKey};
use zspire_model::Store;

use super::*;
use crate::config::options::Values;

const RECORDED: &str = include_str!("../../../tests/golden/config_dump.json");
const MESH: &str = include_str!("../../../tests/golden/local.yaml");

fn build() -> BuildInfo {
    BuildInfo { version: "1.2.3", revision: "abc", rustc: "1.95.0", profile: "release" }
}

/// Our dump for these variables and the recorded mesh.
fn dump(variables: &[(&str, &str)], identities: Vec<Entry>, workload_state: BTreeMap<String, PodState>) -> String {
    let config = Config::from_values(Values::from_pairs(variables.iter().copied())).unwrap();
    let domain = "cluster.local".parse().unwrap();
    let (mut store, reader) = Store::new();
    store.apply(zspire_xds::file::parse_in(MESH, "local.yaml", &domain).unwrap().iter().map(zspire_xds::Resource::put));
    let snapshot = reader.load();
    render(&Sources {
        config: &config,
        build: &build(),
        snapshot: &snapshot,
        local: Some(&snapshot),
        identities,
        workload_state,
        discovery: Discovery::default(),
    })
}

fn ours() -> Value {
    let info = Info {
        name: "client".into(),
        namespace: "default".into(),
        service_account: "client".into(),
        trust_domain: "cluster.local".into(),
    };
    let connection = Connection {
        src: "10.77.0.1:30168".into(),
        original_dst: Some("10.77.0.2:8080".into()),
        actual_dst: "10.77.0.2:15008".into(),
        protocol: "HBONE",
    };
    let connections = Connections { inbound: Vec::new(), outbound: vec![connection] };
    let state = PodState { state: "Up", why: None, connections, info };
    let key = WorkloadKey { id: "spiffe://cluster.local/ns/default/sa/client".parse().unwrap(), workload: None };
    let pending = State::Pending { why: "not asked yet".into() };
    let entry = Entry::new(key, pending, Story::new(std::time::SystemTime::now()), "local");
    let text = dump(&[("FAKE_CA", "true")], vec![entry], [("uid-client".to_owned(), state)].into());
    serde_json::from_str(&text).unwrap()
}

fn recorded() -> Value {
    serde_json::from_str(RECORDED).unwrap()
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().into_iter().flat_map(|object| object.keys()).map(String::as_str).collect()
}

/// The entry of a list with this value.
fn entry<'a>(list: &'a Value, key: &str, value: &str) -> &'a Value {
    list.as_array().unwrap().iter().find(|entry| entry[key] == value).unwrap_or_else(|| panic!("no {value} in {list}"))
}

/// Fails unless everything that was recorded is there with the same value; `fill` are differences that are meant.
fn check_same(ours: &Value, recorded: &Value, fill: &[&str]) {
    for (key, value) in recorded.as_object().unwrap() {
        if !fill.contains(&key.as_str()) {
            assert_eq!(&ours[key], value, "{key} of {recorded}");
        }
    }
}

#[test]
fn every_part_that_was_recorded_is_there() {
    let (ours, recorded) = (ours(), recorded());
    assert_eq!(keys(&recorded).difference(&keys(&ours)).count(), 0, "{:?}", keys(&ours));
    for part in ["version", "staticConfig"] {
        assert_eq!(keys(&recorded[part]), keys(&ours[part]), "{part}");
    }
}

#[test]
fn workloads_services_and_policies_are_as_recorded() {
    let (ours, recorded) = (ours(), recorded());
    for workload in recorded["workloads"].as_array().unwrap() {
        let uid = workload["uid"].as_str().unwrap();
        // One that names no trust domain is of the mesh's own here, of none there; the cluster likewise.
        check_same(entry(&ours["workloads"], "uid", uid), workload, &["trustDomain", "clusterId"]);
    }
    for service in recorded["services"].as_array().unwrap() {
        check_same(entry(&ours["services"], "hostname", service["hostname"].as_str().unwrap()), service, &[]);
    }
    for policy in recorded["policies"].as_array().unwrap() {
        check_same(entry(&ours["policies"], "name", policy["name"].as_str().unwrap()), policy, &[]);
    }
}

#[test]
fn certificates_connections_and_settings_have_the_recorded_keys() {
    let (ours, recorded) = (ours(), recorded());
    let certificate = &recorded["certificates"][0];
    assert_eq!(keys(certificate).difference(&keys(&ours["certificates"][0])).count(), 0);
    let (state, was) = (&ours["workloadState"]["uid-client"], &recorded["workloadState"]["uid-client"]);
    assert_eq!(state["connections"], was["connections"]);
    assert_eq!(state["state"], was["state"]);
    check_same(&state["info"], &was["info"], &[]);
    // What has no meaning here: a resolver, revocation lists, the socket of the node agent, the proxy's own identity.
    let elsewhere = [
        "crlPath",
        "dnsProxy",
        "dnsProxyAddr",
        "dnsResolverCfg",
        "dnsResolverOpts",
        "fakeSelfInbound",
        "inpodPortReuse",
        "inpodUds",
        "proxyArgs",
        "ztunnelIdentity",
        "ztunnelWorkload",
    ];
    let shown = keys(&ours["config"]);
    let missing: Vec<_> =
        keys(&recorded["config"]).into_iter().filter(|key| !shown.contains(key) && !elsewhere.contains(key)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn secrets_are_never_shown() {
    let text = dump(
        &[
            ("AUTH_TOKEN", "literal-token-0123456789"),
            ("CA_HEADER_x-api-key", "header-value-0123456789"),
            ("XDS_HEADER_x-tenant", "tenant-value-0123456789"),
            ("ZSPIRE_JOIN_TOKEN", "join-token-0123456789"),
            ("PROXY_CONFIG", "proxyMetadata: {SECRET_THING: metadata-0123456789}"),
        ],
        Vec::new(),
        BTreeMap::new(),
    );
    assert!(text.contains("x-api-key") && text.contains("x-tenant"), "names are shown");
    assert!(!text.contains("0123456789"), "{text}");
}

#[test]
fn a_certificate_is_shown_with_its_public_parts() {
    let directory = std::env::temp_dir().join(format!("zspire-dump-{}", std::process::id()));
    let config = zspire_identity::local::Config {
        in_kubernetes: false,
        directory: directory.clone(),
        ttl: std::time::Duration::from_secs(3600),
        clock: Arc::new(zspire_identity::SystemClock),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let entries = runtime.block_on(async {
        use zspire_identity::{Priority, Source as _, WorkloadKey};
        let (source, driver) = zspire_identity::local::source(config, Default::default()).unwrap();
        let driver = tokio::spawn(driver.run(tokio_util::sync::CancellationToken::new()));
        let id = "spiffe://cluster.local/ns/default/sa/client".parse().unwrap();
        let watch = source.watch(&WorkloadKey { id, workload: None }, Priority::OnDemand);
        watch.ready(tokio::time::Instant::now() + std::time::Duration::from_secs(20)).await.unwrap();
        driver.abort();
        source.entries()
    });
    std::fs::remove_dir_all(&directory).unwrap();
    let text = dump(&[("FAKE_CA", "true")], entries, BTreeMap::new());
    let dump: Value = serde_json::from_str(&text).unwrap();
    let (ours, recorded) = (&dump["certificates"][0], &recorded()["certificates"][0]);
    assert_eq!(ours["identity"], recorded["identity"]);
    assert_eq!(ours["state"], "Available");
    for part in ["certChain", "rootCerts"] {
        assert_eq!(keys(&ours[part][0]), keys(&recorded[part][0]), "{part}");
        let pem = ours[part][0]["pem"].as_str().unwrap();
        let pem = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, pem).unwrap();
        assert!(String::from_utf8(pem).unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
        assert!(ours[part][0]["serialNumber"].as_str().unwrap().bytes().all(|digit| digit.is_ascii_digit()));
    }
    assert!(!text.contains("PRIVATE KEY") && !text.contains("UFJJVkFURSBLRVk"), "neither as PEM nor as base64 of it");
}
