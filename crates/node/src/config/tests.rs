//! What the environment means.

use super::*;

fn load(pairs: &[(&str, &str)]) -> Result<Config, String> {
    Config::from_values(Values::from_pairs(pairs.iter().copied())).map_err(|e| e.to_string())
}

#[test]
fn defaults_are_ztunnels() {
    let config = load(&[]).unwrap();
    assert_eq!(config.mode, Mode::Shared);
    assert_eq!(config.ca.as_ref().unwrap().address, "https://localhost:15012");
    assert_eq!(config.xds.as_ref().unwrap().address, "https://localhost:15012");
    assert_eq!(config.ca.unwrap().root, RootCert::File("./var/run/secrets/istio/root-cert.pem".into()));
    assert_eq!(config.packet_mark, Some(1337));
    assert_eq!(config.secret_ttl, Duration::from_secs(86_400));
    assert_eq!(config.termination_deadline, Duration::from_secs(5));
    assert_eq!((config.addresses.admin, config.addresses.stats, config.addresses.readiness), (15000, 15020, 15021));
    assert_eq!(config.cluster_id, "Kubernetes");
}

#[test]
fn addresses_follow_kubernetes_mesh_config_and_environment() {
    let k8s = ("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let mesh = ("PROXY_CONFIG", "discoveryAddress: istiod.mesh:15012\nproxyMetadata: {CLUSTER_ID: east}");
    let address = |pairs: &[(&str, &str)]| load(pairs).unwrap().xds.map(|s| s.address);
    assert_eq!(address(&[k8s]).unwrap(), "https://istiod.istio-system.svc:15012");
    assert_eq!(address(&[k8s, mesh]).unwrap(), "https://istiod.mesh:15012");
    assert_eq!(address(&[mesh, ("XDS_ADDRESS", "http://localhost:1")]).unwrap(), "http://localhost:1");
    assert_eq!(address(&[mesh, ("XDS_ADDRESS", "")]), None);
    assert_eq!(load(&[mesh]).unwrap().cluster_id, "east");
}

#[test]
fn revocation_and_dns() {
    let config = load(&[]).unwrap();
    assert_eq!((config.crl_path, config.crl_unknown), (None, UnknownStatus::Deny));
    assert_eq!(config.dns, Listen::on_loopback(15053, true));
    let dns = |pairs: &[(&str, &str)]| load(pairs).map(|config| config.dns);
    assert_eq!(dns(&[("ISTIO_META_DNS_CAPTURE", "false")]), Ok(Listen::OFF));
    assert_eq!(dns(&[("IPV6_ENABLED", "false")]), Ok(Listen::on_loopback(15053, false)));
    let on = |text: &str| Ok(Listen::on(text.parse().unwrap()));
    assert_eq!(dns(&[("ZSPIRE_BIND_ADDRESS", "127.0.0.7")]), on("127.0.0.7:15053"));
    assert_eq!(dns(&[("ISTIO_META_DNS_PROXY_ADDR", "[::1]:53")]), on("[::1]:53"));
    let error = dns(&[("ISTIO_META_DNS_PROXY_ADDR", "here")]).unwrap_err();
    assert_eq!(error, "ISTIO_META_DNS_PROXY_ADDR=\"here\": expected localhost:port, or address:port");
    let lists = load(&[("CRL_PATH", "/crl.pem"), ("CRL_UNKNOWN_STATUS", "allow")]).unwrap();
    assert_eq!((lists.crl_path, lists.crl_unknown), (Some("/crl.pem".into()), UnknownStatus::Allow));
    let error = load(&[("CRL_UNKNOWN_STATUS", "maybe")]).unwrap_err();
    assert_eq!(error, "CRL_UNKNOWN_STATUS=\"maybe\": expected deny or allow");
}

#[test]
fn a_local_file_replaces_the_default_discovery_server() {
    let config = load(&[("LOCAL_XDS_PATH", "mesh.yaml")]).unwrap();
    assert_eq!(config.local_xds, Some(LocalXds::Path("mesh.yaml".into())));
    assert!(config.xds.is_none());
}

#[test]
fn contradictions_and_typos_name_the_variable() {
    let cases: &[(&[(&str, &str)], &str)] = &[
        (
            &[("PROXY_MODE", "dedicated")],
            "PROXY_MODE=dedicated needs PROXY_WORKLOAD_INFO=namespace/name/service-account",
        ),
        (&[("PROXY_MODE", "sidecar")], "PROXY_MODE=\"sidecar\": expected shared or dedicated"),
        (
            &[("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "a/b")],
            "PROXY_WORKLOAD_INFO=\"a/b\": expected namespace/name/service-account",
        ),
        (&[("SECRET_TTL", "soon")], "SECRET_TTL=\"soon\": expected a duration such as 250ms, 30s, 5m or 1h30m"),
        (&[("IPV6_ENABLED", "maybe")], "IPV6_ENABLED=\"maybe\": expected true or false"),
        (&[("HTTP2_FRAME_SIZE", "1")], "HTTP2_FRAME_SIZE=\"1\": expected 16384 to 16777215"),
        (&[("CA_ADDRESS", "")], "CA_ADDRESS is empty: name a CA, or set IDENTITY_SOURCE=local for development"),
        (&[("LOCAL_XDS", "{}"), ("LOCAL_XDS_PATH", "x")], "LOCAL_XDS_PATH and LOCAL_XDS are both set: keep one"),
        (&[("LOG_FORMAT", "xml")], "LOG_FORMAT=\"xml\": expected plain or json"),
        (
            &[("FAKE_CA", "true"), ("IDENTITY_SOURCE", "istio-ca")],
            "FAKE_CA=true and IDENTITY_SOURCE=istio-ca contradict each other",
        ),
        (&[("ISTIO_METAJSON_X", "{")], "ISTIO_METAJSON_X: not JSON: EOF while parsing an object at line 1 column 1"),
        (
            &[("CA_ADDRESS", "http://ca:1"), ("AUTH_TOKEN", "abc")],
            "CA_ADDRESS is http://: a token is never sent without TLS; use https://",
        ),
    ];
    for (pairs, expected) in cases {
        assert_eq!(load(pairs).err().as_deref(), Some(*expected), "{pairs:?}");
    }
}

#[test]
fn the_development_ca_is_refused_inside_kubernetes() {
    let error = load(&[("FAKE_CA", "true"), ("KUBERNETES_SERVICE_HOST", "10.96.0.1")]).unwrap_err();
    assert!(error.contains("refused inside Kubernetes"), "{error}");
}

#[test]
fn a_broken_mesh_file_names_itself_and_the_line() {
    let error = load(&[("PROXY_CONFIG", "discoveryAddress: [1")]).unwrap_err();
    assert!(error.starts_with("PROXY_CONFIG: "), "{error}");
    let error = load(&[("MESH_CONFIG", "/nonexistent/mesh")]).unwrap_err();
    assert!(error.starts_with("/nonexistent/mesh: cannot read the mesh file"), "{error}");
}

#[test]
fn termination_deadline_is_derived_from_the_grace_period() {
    let deadline = |grace| load(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap().termination_deadline.as_secs();
    assert_eq!([deadline("30"), deadline("10"), deadline("0")], [25, 9, 0]);
}

#[test]
fn debug_output_shows_no_secret() {
    let config = load(&[
        ("AUTH_TOKEN", "hunter2"),
        ("CA_HEADER_X_KEY", "hunter3"),
        ("XDS_HEADER_X_KEY", "hunter4"),
        ("ZSPIRE_JOIN_TOKEN", "hunter5"),
    ])
    .unwrap();
    let shown = format!("{config:?}");
    assert!(!shown.contains("hunter"), "{shown}");
}

#[test]
fn misspelt_names_of_ours_are_warned_of() {
    let config = load(&[("ZSPIRE_ADMIN_PROT", "1"), ("ZSPIRE_CP_LISTEN", "x")]).unwrap();
    assert_eq!(config.warnings, ["ZSPIRE_ADMIN_PROT is set, but there is no such variable"]);
}

#[test]
fn templates_of_identities() {
    const SPIRE: [(&str, &str); 3] = [
        ("IDENTITY_SOURCE", "spire-delegated"),
        ("SPIRE_ADMIN_ENDPOINT_SOCKET", "unix:///run/admin.sock"),
        ("TRUST_DOMAIN", "example.org"),
    ];
    let with = |more: &[(&str, &str)]| load(&[&SPIRE[..], more].concat()).map(|config| config.spire.template);
    let template = |text| with(&[("SPIFFE_ID_TEMPLATE", text)]);
    assert_eq!(with(&[]), Ok(None));
    assert_eq!(template("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"), Ok(None), "as Istio's do");
    let own = template("spiffe://{trust_domain}/{namespace}/{pod}").unwrap().unwrap();
    assert_eq!(own.to_string(), "spiffe://example.org/{namespace}/{pod}");
    let why = template("spiffe://other.org/{pod}").unwrap_err();
    assert!(why.contains("SPIFFE_ID_TEMPLATE=\"spiffe://other.org/{pod}\"") && why.contains("example.org"), "{why}");
    let why = template("spiffe://{trust_domain}/{node}/{pod}").unwrap_err();
    assert!(why.contains("set NODE_NAME"), "{why}");
    let node = with(&[("SPIFFE_ID_TEMPLATE", "spiffe://{trust_domain}/{node}/{pod}"), ("NODE_NAME", "n1")]);
    assert!(node.unwrap().is_some());
    let why = load(&[("SPIFFE_ID_TEMPLATE", "spiffe://{trust_domain}/{pod}")]).unwrap_err();
    assert!(why.contains("identities from SPIRE"), "{why}");
}
