//! The configuration and the version as the dump shows them: ztunnel's keys where the setting is the same.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use crate::BuildInfo;
use crate::config::{
    Compliance, Config, IdentitySource, LocalXds, Mode, OriginalSource, RootCert, Server, Token, UnknownStatus,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Version<'a> {
    version: &'a str,
    git_revision: &'a str,
    rust_version: &'a str,
    build_profile: &'a str,
    build_status: &'a str,
    istio_version: &'a str,
    crypto_provider: &'a str,
}

impl<'a> Version<'a> {
    pub(super) fn new(build: &'a BuildInfo, istio_version: &'a str) -> Self {
        Self {
            version: build.version,
            git_revision: build.revision,
            rust_version: build.rustc,
            build_profile: build.profile,
            build_status: "Clean",
            istio_version,
            crypto_provider: "tls-aws-lc",
        }
    }
}

/// A table of settings; the keys are written here and nowhere else.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct View<'a>(BTreeMap<&'a str, Value>);

impl View<'_> {
    pub(super) fn new(c: &Config) -> Self {
        let mut all = BTreeMap::new();
        identity(c, &mut all);
        servers(c, &mut all);
        data_plane(c, &mut all);
        Self(all)
    }
}

fn identity(c: &Config, all: &mut BTreeMap<&str, Value>) {
    let (mode, workload) = match &c.mode {
        Mode::Shared => ("Shared", Value::Null),
        Mode::Dedicated(w) => {
            ("Dedicated", json!({ "name": w.name, "namespace": w.namespace, "serviceAccount": w.service_account }))
        }
    };
    all.extend([
        ("proxy", json!(c.proxy)),
        ("proxyMode", json!(mode)),
        ("proxyWorkloadInformation", workload),
        ("inpodUds", path(&c.inpod_uds)),
        ("inpodPortReuse", json!(c.inpod_port_reuse)),
        ("network", json!(c.network)),
        ("clusterId", json!(c.cluster_id)),
        ("clusterDomain", json!(c.cluster_domain)),
        ("trustDomain", json!(c.trust_domain)),
        ("localNode", json!(c.node_name)),
        ("proxyMetadata", json!(c.proxy_metadata.keys().collect::<Vec<_>>())),
    ]);
}

fn servers(c: &Config, all: &mut BTreeMap<&str, Value>) {
    let address = |s: &Option<Server>| json!(s.as_ref().map(|s| &s.address));
    let root = |s: &Option<Server>| s.as_ref().map_or(Value::Null, |s| root_cert(&s.root));
    let hostname = |s: &Option<Server>| json!(s.as_ref().and_then(|s| s.alt_hostname.as_ref()));
    // Names only: the values are secrets.
    let headers = |s: &Option<Server>| json!(s.iter().flat_map(|s| s.headers.0.keys()).collect::<Vec<_>>());
    let local = match &c.local_xds {
        None => Value::Null,
        Some(LocalXds::Path(path)) => json!({ "File": path }),
        Some(LocalXds::Text(_)) => json!("Static"),
    };
    all.extend([
        ("identitySource", json!(c.identity.name())),
        ("fakeCa", json!(c.identity == IdentitySource::Local)),
        ("caAddress", address(&c.ca)),
        ("caRootCert", root(&c.ca)),
        ("altCaHostname", hostname(&c.ca)),
        ("caHeaders", headers(&c.ca)),
        ("xdsAddress", address(&c.xds)),
        ("xdsRootCert", root(&c.xds)),
        ("altXdsHostname", hostname(&c.xds)),
        ("xdsHeaders", headers(&c.xds)),
        ("xdsOnDemand", json!(c.xds_on_demand)),
        ("localXdsPath", local),
        ("auth", token(c.token.as_ref())),
        ("joinToken", token(c.join_token.as_ref())),
        ("stateDir", path(&c.state_dir)),
        ("spiffeIdTemplate", json!(c.spire.template.as_ref().map(ToString::to_string))),
        ("secretTtl", duration(c.secret_ttl)),
        ("preferedServiceNamespace", json!(c.preferred_service_namespace)),
        ("tls12Enabled", json!(c.tls12)),
        ("crlPath", json!(c.crl_path.as_deref().map(path))),
        ("crlUnknownStatus", json!(if c.crl_unknown == UnknownStatus::Deny { "deny" } else { "allow" })),
        ("compliancePolicy", json!(matches!(c.compliance, Compliance::Pqc).then_some("pqc"))),
    ]);
}

fn data_plane(c: &Config, all: &mut BTreeMap<&str, Value>) {
    let listen = |port: u16| match c.addresses.bind {
        Some(ip) => std::net::SocketAddr::new(ip, port).to_string(),
        None if c.ipv6 => format!("[::]:{port}"),
        None => format!("0.0.0.0:{port}"),
    };
    all.extend([
        ("adminAddr", json!({ "Localhost": [c.ipv6, c.addresses.admin] })),
        ("statsAddr", json!({ "SocketAddr": format!("0.0.0.0:{}", c.addresses.stats) })),
        ("readinessAddr", json!({ "SocketAddr": format!("0.0.0.0:{}", c.addresses.readiness) })),
        ("outboundAddr", json!(listen(15001))),
        ("inboundPlaintextAddr", json!(listen(15006))),
        ("inboundAddr", json!(listen(15008))),
        ("socks5Addr", json!(c.socks5.then_some("127.0.0.1:15080"))),
        ("dnsProxyAddr", json!(c.dns.first.map(|address| address.to_string()))),
        ("dnsProxy", json!(c.dns.first.is_some())),
        ("illegalPorts", json!(zspire_proxy::ILLEGAL_PORTS)),
        ("ipv6Enabled", json!(c.ipv6)),
        ("packetMark", json!(c.packet_mark)),
        (
            "requireOriginalSource",
            json!(match c.original_source {
                OriginalSource::WhenAllowed => None,
                OriginalSource::Required => Some(true),
                OriginalSource::Off => Some(false),
            }),
        ),
        ("localhostAppTunnel", json!(c.localhost_app_tunnel)),
        ("enableEnhancedBaggage", json!(c.response_baggage)),
        ("numWorkerThreads", json!(c.workers)),
        ("windowSize", json!(c.http2.stream_window)),
        ("connectionWindowSize", json!(c.http2.connection_window)),
        ("tunnelBufferSize", json!(c.http2.buffered_cap)),
        ("frameSize", json!(c.http2.frame_size)),
        ("poolMaxStreamsPerConn", json!(c.http2.pool_max_streams)),
        ("poolUnusedReleaseTimeout", duration(c.http2.pool_unused_release)),
        ("selfTerminationDeadline", duration(c.termination_deadline)),
        (
            "socketConfig",
            json!({
                "keepaliveEnabled": c.keepalive.enabled,
                "keepaliveTime": duration(c.keepalive.time),
                "keepaliveInterval": duration(c.keepalive.interval),
                "keepaliveRetries": c.keepalive.retries,
                "userTimeoutEnabled": c.keepalive.user_timeout,
            }),
        ),
    ]);
}

/// `{"File": path}`, `"System"`, or `"Static"` for PEM in the environment.
fn root_cert(root: &RootCert) -> Value {
    match root {
        RootCert::File(path) => json!({ "File": path }),
        RootCert::System => json!("System"),
        RootCert::Pem(_) => json!("Static"),
    }
}

/// Where a token comes from, never the token.
fn token(token: Option<&Token>) -> Value {
    match token {
        None => Value::Null,
        Some(Token::File(path)) => json!({ "File": path }),
        Some(Token::Literal(_)) => json!("Static"),
    }
}

fn path(path: &Path) -> Value {
    json!(path.display().to_string())
}

fn duration(duration: Duration) -> Value {
    json!({ "secs": duration.as_secs(), "nanos": duration.subsec_nanos() })
}
