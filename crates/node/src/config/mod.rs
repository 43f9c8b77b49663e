//! Configuration of the proxy: variables (strings) become a validated [`Config`].
//!
//! Owns which variables there are ([`options`]), the mesh file and `PROXY_CONFIG` ([`mesh_file`]), and
//! what the values mean. It is the only place of the proxy that reads the environment. It does not know
//! what the other crates do with the values: `assembly` turns them into each crate's own configuration.
//! Start at [`Config::load`].

pub mod options;

mod mesh_file;
mod spire;
mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use spire::Spire;

use options as opt;
use options::{Values, Variable};
use zspire_proxy::dns::Listen;
use zspire_sys::supervisor::Supervisor;

/// A setting that cannot be used, with the variable to mend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The value of one variable.
    #[error("{variable}={value:?}: {reason}")]
    Value { variable: &'static str, value: String, reason: String },
    /// The mesh file or `PROXY_CONFIG`.
    #[error("{place}: {reason}")]
    File { place: String, reason: String },
    /// Two settings that contradict each other, or one that is missing beside another.
    #[error("{0}")]
    Combination(String),
}

/// Whom the proxy serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// The pods of a node, handed over by a CNI node agent.
    Shared,
    /// One workload, in the network namespace of this process.
    Dedicated(WorkloadName),
}

/// A workload by name, as `PROXY_WORKLOAD_INFO` gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadName {
    pub namespace: String,
    pub name: String,
    pub service_account: String,
}

/// What a server's certificate is verified against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCert {
    File(PathBuf),
    System,
    Pem(String),
}

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    File(PathBuf),
    Literal(String),
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal(<redacted>)"),
        }
    }
}

/// Headers for a server. Their values are secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(pub BTreeMap<String, String>);

impl std::fmt::Debug for Headers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The CA or the discovery server.
#[derive(Debug, Clone)]
pub struct Server {
    /// `https://host:port`, or `http://…` for a plaintext port.
    pub address: String,
    pub root: RootCert,
    pub alt_hostname: Option<String>,
    pub headers: Headers,
}

/// Where workloads come from when there is no discovery server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalXds {
    Path(PathBuf),
    Text(String),
}

/// Which source certificates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdentitySource {
    IstioCa,
    Local,
    SpireBroker,
    SpireDelegated,
    WorkloadApi,
}

impl IdentitySource {
    /// Every workload has credentials of its own, which nobody shares.
    pub fn is_per_workload(self) -> bool {
        matches!(self, Self::SpireBroker | Self::SpireDelegated | Self::WorkloadApi)
    }

    /// As it is written in IDENTITY_SOURCE.
    pub fn name(self) -> &'static str {
        match self {
            Self::IstioCa => "istio-ca",
            Self::Local => "local",
            Self::SpireBroker => "spire-broker",
            Self::SpireDelegated => "spire-delegated",
            Self::WorkloadApi => "workload-api",
        }
    }
}

/// What is asked of key exchange beyond the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compliance {
    None,
    /// Post-quantum key exchange only.
    Pqc,
}

/// Certificates of which no current revocation list says anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownStatus {
    Deny,
    Allow,
}

/// Original source addresses: keep them?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OriginalSource {
    WhenAllowed,
    Required,
    Off,
}

/// TCP keepalive and user timeout.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    pub enabled: bool,
    pub time: Duration,
    pub interval: Duration,
    pub retries: u32,
    pub user_timeout: bool,
}

/// Limits and sizes of tunnels.
#[derive(Debug, Clone, Copy)]
pub struct Http2 {
    pub stream_window: u32,
    pub connection_window: u32,
    /// See `ZSPIRE_TUNNEL_BUFFER_SIZE`.
    pub buffered_cap: u32,
    pub frame_size: u32,
    pub pool_max_streams: usize,
    pub pool_unused_release: Duration,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Plain,
    Json,
}

/// Ports and addresses. A port of 0 asks the kernel for one.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// Data-plane listeners; `None` binds every address.
    pub bind: Option<IpAddr>,
    pub admin: u16,
    pub stats: u16,
    pub readiness: u16,
}

/// The node agent's configuration.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where proxies connect.
    pub zds: PathBuf,
    /// Where commands connect.
    pub socket: PathBuf,
    pub state_dir: PathBuf,
    /// The mark of the proxies' packets.
    pub packet_mark: u32,
    pub dns_capture: bool,
    pub log_filter: String,
    pub log_format: LogFormat,
    pub supervisor: Supervisor,
}

impl AgentConfig {
    /// Reads the environment.
    pub fn load() -> Result<Self, Error> {
        let v = &Values::from_environment();
        Ok(Self {
            zds: inpod_uds(v),
            socket: text(v, &opt::ZSPIRE_AGENT_SOCKET, "/run/zspire/agent.sock").into(),
            state_dir: text(v, &opt::ZSPIRE_AGENT_STATE_DIR, "/run/zspire/enrolled").into(),
            packet_mark: value::parsed(v, &opt::PACKET_MARK, "a number up to 4294967295")?.unwrap_or(1337),
            dns_capture: value::flag(v, &opt::AMBIENT_DNS_CAPTURE, false)?,
            log_filter: log_filter(v)?,
            log_format: log_format(v)?,
            supervisor: supervisor(v),
        })
    }
}

/// The proxy's configuration, valid as a whole.
#[derive(Debug, Clone)]
pub struct Config {
    pub proxy: bool,
    pub mode: Mode,
    pub network: String,
    pub cluster_id: String,
    pub cluster_domain: String,
    pub trust_domain: String,
    pub node_name: String,
    pub pod_name: String,
    pub pod_namespace: String,
    pub service_account: String,
    pub instance_ip: IpAddr,
    pub inpod_uds: PathBuf,
    pub inpod_port_reuse: bool,
    pub xds: Option<Server>,
    pub xds_on_demand: bool,
    pub local_xds: Option<LocalXds>,
    pub preferred_service_namespace: Option<String>,
    pub identity: IdentitySource,
    pub spire: Spire,
    pub ca: Option<Server>,
    pub token: Option<Token>,
    pub secret_ttl: Duration,
    /// How long the series of a workload that is gone are kept.
    pub series_grace: Duration,
    pub tls12: bool,
    pub compliance: Compliance,
    /// Revocation lists.
    pub crl_path: Option<PathBuf>,
    pub crl_unknown: UnknownStatus,
    pub join_token: Option<Token>,
    pub state_dir: PathBuf,
    pub ipv6: bool,
    pub socks5: bool,
    pub dns: zspire_proxy::dns::Listen,
    pub packet_mark: Option<u32>,
    pub original_source: OriginalSource,
    pub localhost_app_tunnel: bool,
    pub response_baggage: bool,
    pub policy_info_logging: bool,
    pub http2: Http2,
    pub keepalive: Keepalive,
    pub termination_deadline: Duration,
    pub workers: usize,
    pub addresses: Addresses,
    pub log_filter: String,
    pub log_format: LogFormat,
    pub proxy_metadata: BTreeMap<String, String>,
    pub node_metadata: BTreeMap<String, serde_json::Value>,
    pub istio_version: String,
    pub in_kubernetes: bool,
    pub supervisor: Supervisor,
    /// Of this user, if the system has one.
    pub runtime_dir: Option<PathBuf>,
    /// What was not understood, but is harmless: shown at start.
    pub warnings: Vec<String>,
}

impl Config {
    /// Reads the environment, the mesh file and `PROXY_CONFIG`.
    pub fn load() -> Result<Self, Error> {
        Self::from_values(Values::from_environment())
    }

    /// Reads given variables, the mesh file and `PROXY_CONFIG` they name.
    pub fn from_values(mut values: Values) -> Result<Self, Error> {
        let mesh = mesh_file::read(&values)?;
        values.metadata = mesh.proxy_metadata.clone();
        let v = &values;
        let warnings = misspelt(v);

        let in_kubernetes = v.get(&opt::KUBERNETES_SERVICE_HOST).is_some();
        let discovery = mesh.discovery_address.as_deref();
        let mode = mode(v)?;
        let identity = identity_source(v, in_kubernetes)?;
        let (local_xds, xds) = discovery_source(v, discovery, in_kubernetes)?;
        let shared = mode == Mode::Shared;

        let config = Self {
            proxy: value::flag(v, &opt::ENABLE_PROXY, true)?,
            network: text(v, &opt::NETWORK, ""),
            cluster_id: cluster_id(v),
            cluster_domain: text(v, &opt::CLUSTER_DOMAIN, "cluster.local"),
            trust_domain: trust_domain(v)?,
            node_name: text(v, &opt::NODE_NAME, ""),
            pod_name: text(v, &opt::POD_NAME, ""),
            pod_namespace: text(v, &opt::POD_NAMESPACE, ""),
            service_account: text(v, &opt::SERVICE_ACCOUNT, ""),
            instance_ip: value::parsed(v, &opt::INSTANCE_IP, "an IP address")?.unwrap_or(IpAddr::from([1, 1, 1, 1])),
            inpod_uds: inpod_uds(v),
            inpod_port_reuse: value::flag(v, &opt::INPOD_PORT_REUSE, true)?,
            xds,
            xds_on_demand: value::flag(v, &opt::XDS_ON_DEMAND, false)?,
            local_xds,
            preferred_service_namespace: v.get(&opt::PREFERED_SERVICE_NAMESPACE).map(str::to_owned),
            ca: match identity {
                IdentitySource::IstioCa => server(v, &CA, discovery, in_kubernetes)?,
                _ => None,
            },
            identity,
            spire: Spire::parse(v, identity, &trust_domain(v)?)?,
            token: token(v),
            secret_ttl: value::duration(v, &opt::SECRET_TTL, Duration::from_secs(24 * 3600))?,
            series_grace: value::duration(v, &opt::ZSPIRE_SERIES_GRACE, Duration::from_secs(300))?,
            tls12: value::flag(v, &opt::TLS12_ENABLED, false)?,
            compliance: compliance(v)?,
            crl_path: v.get(&opt::CRL_PATH).map(Into::into),
            crl_unknown: unknown_status(v)?,
            join_token: v.get(&opt::ZSPIRE_JOIN_TOKEN).map(file_or_literal),
            state_dir: text(v, &opt::ZSPIRE_STATE_DIR, "./var/lib/zspire").into(),
            ipv6: value::flag(v, &opt::IPV6_ENABLED, true)?,
            socks5: value::flag(v, &opt::UNSTABLE_ENABLE_SOCKS5, false)?,
            dns: dns(v)?,
            packet_mark: value::parsed(v, &opt::PACKET_MARK, "a number up to 4294967295")?.or(shared.then_some(1337)),
            original_source: match value::parsed::<bool>(v, &opt::ENABLE_ORIG_SRC, "true or false")? {
                None => OriginalSource::WhenAllowed,
                Some(true) => OriginalSource::Required,
                Some(false) => OriginalSource::Off,
            },
            localhost_app_tunnel: value::flag(v, &opt::LOCALHOST_APP_TUNNEL, true)?,
            response_baggage: value::flag(v, &opt::ENABLE_RESPONSE_BAGGAGE, true)?,
            policy_info_logging: value::flag(v, &opt::AUTHZ_POLICY_INFO_LOGGING, false)?,
            http2: http2(v)?,
            keepalive: keepalive(v)?,
            termination_deadline: termination_deadline(v)?,
            workers: value::workers(v, mesh.concurrency)?,
            addresses: Addresses {
                bind: value::parsed(v, &opt::ZSPIRE_BIND_ADDRESS, "an IP address")?,
                admin: port(v, &opt::ZSPIRE_ADMIN_PORT, mesh.proxy_admin_port.unwrap_or(15000))?,
                stats: port(v, &opt::ZSPIRE_STATS_PORT, mesh.stats_port.unwrap_or(15020))?,
                readiness: port(v, &opt::ZSPIRE_READINESS_PORT, 15021)?,
            },
            log_filter: log_filter(v)?,
            log_format: log_format(v)?,
            proxy_metadata: mesh.proxy_metadata,
            node_metadata: node_metadata(v)?,
            istio_version: text(v, &opt::ISTIO_META_ISTIO_VERSION, "unknown"),
            in_kubernetes,
            supervisor: supervisor(v),
            runtime_dir: v.get(&opt::XDG_RUNTIME_DIR).map(PathBuf::from),
            mode,
            warnings,
        };
        config.check()?;
        Ok(config)
    }

    /// What contradicts itself.
    fn check(&self) -> Result<(), Error> {
        let refuse = |reason: &str| Err(Error::Combination(reason.into()));
        if self.join_token.is_some() && self.ca.is_none() {
            return refuse("ZSPIRE_JOIN_TOKEN is set, but there is no CA to join: set CA_ADDRESS");
        }
        if self.identity == IdentitySource::IstioCa && self.ca.is_none() && self.proxy {
            return refuse("CA_ADDRESS is empty: name a CA, or set IDENTITY_SOURCE=local for development");
        }
        self.spire.check(self.identity, &self.mode, &self.node_name)?;
        if let Some(Server { address, .. }) = &self.ca
            && address.starts_with("http://")
            && self.token.is_some()
        {
            return refuse("CA_ADDRESS is http://: a token is never sent without TLS; use https://");
        }
        Ok(())
    }

    /// Address of the admin server: loopback only.
    pub fn admin_addresses(&self) -> Vec<SocketAddr> {
        let port = self.addresses.admin;
        let mut all = vec![SocketAddr::from(([127, 0, 0, 1], port))];
        if self.ipv6 && port != 0 {
            all.push(SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port)));
        }
        all
    }
}

fn text(v: &Values, variable: &Variable, default: &str) -> String {
    v.get(variable).unwrap_or(default).to_owned()
}

fn inpod_uds(v: &Values) -> PathBuf {
    text(v, &opt::INPOD_UDS, "/var/run/ztunnel/ztunnel.sock").into()
}

fn supervisor(v: &Values) -> Supervisor {
    let of = |variable| v.environment.get(variable).map(String::as_str);
    Supervisor::new(of(opt::NOTIFY_SOCKET.name), of(opt::WATCHDOG_USEC.name), of(opt::WATCHDOG_PID.name))
}

fn port(v: &Values, variable: &Variable, default: u16) -> Result<u16, Error> {
    Ok(value::parsed(v, variable, "a port, 0 to 65535")?.unwrap_or(default))
}

fn cluster_id(v: &Values) -> String {
    v.get(&opt::CLUSTER_ID)
        .map(str::to_owned)
        .or_else(|| v.family("ISTIO_META_").remove("CLUSTER_ID").filter(|id| !id.is_empty()))
        .unwrap_or_else(|| "Kubernetes".to_owned())
}

impl Config {
    /// The pod that a shared proxy itself is, if it is told.
    pub fn own_workload(&self) -> Option<WorkloadName> {
        let name = WorkloadName {
            namespace: self.pod_namespace.clone(),
            name: self.pod_name.clone(),
            service_account: self.service_account.clone(),
        };
        let known = [&name.namespace, &name.name, &name.service_account].iter().all(|part| !part.is_empty());
        (self.mode == Mode::Shared && known).then_some(name)
    }
}

fn mode(v: &Values) -> Result<Mode, Error> {
    match v.get(&opt::PROXY_MODE).unwrap_or("shared") {
        "shared" => Ok(Mode::Shared),
        "dedicated" => {
            let info = v.get(&opt::PROXY_WORKLOAD_INFO).ok_or_else(|| {
                Error::Combination(
                    "PROXY_MODE=dedicated needs PROXY_WORKLOAD_INFO=namespace/name/service-account".into(),
                )
            })?;
            let parts: Vec<&str> = info.split('/').collect();
            match parts[..] {
                [namespace, name, service_account] if parts.iter().all(|p| !p.is_empty()) => {
                    Ok(Mode::Dedicated(WorkloadName {
                        namespace: namespace.into(),
                        name: name.into(),
                        service_account: service_account.into(),
                    }))
                }
                _ => Err(value::error(&opt::PROXY_WORKLOAD_INFO, info, "expected namespace/name/service-account")),
            }
        }
        other => Err(value::error(&opt::PROXY_MODE, other, "expected shared or dedicated")),
    }
}

fn identity_source(v: &Values, in_kubernetes: bool) -> Result<IdentitySource, Error> {
    let fake = value::flag(v, &opt::FAKE_CA, false)?;
    let source = match v.get(&opt::IDENTITY_SOURCE) {
        None if fake => IdentitySource::Local,
        None | Some("istio-ca") if !fake => IdentitySource::IstioCa,
        Some("local") => IdentitySource::Local,
        Some("spire-broker") => IdentitySource::SpireBroker,
        Some("spire-delegated") => IdentitySource::SpireDelegated,
        Some("workload-api") => IdentitySource::WorkloadApi,
        Some("istio-ca") | None => {
            return Err(Error::Combination("FAKE_CA=true and IDENTITY_SOURCE=istio-ca contradict each other".into()));
        }
        Some(other) => {
            return Err(value::error(
                &opt::IDENTITY_SOURCE,
                other,
                "expected istio-ca, spire-broker, spire-delegated, workload-api or local",
            ));
        }
    };
    if source == IdentitySource::Local && in_kubernetes {
        return Err(Error::Combination(
            "the local development CA (FAKE_CA, IDENTITY_SOURCE=local) is refused inside Kubernetes: \
             whoever reads its key can be anyone; use istio-ca"
                .into(),
        ));
    }
    Ok(source)
}

fn discovery_source(
    v: &Values,
    discovery: Option<&str>,
    in_kubernetes: bool,
) -> Result<(Option<LocalXds>, Option<Server>), Error> {
    let local = match (v.get(&opt::LOCAL_XDS_PATH), v.get(&opt::LOCAL_XDS)) {
        (Some(_), Some(_)) => {
            return Err(Error::Combination("LOCAL_XDS_PATH and LOCAL_XDS are both set: keep one".into()));
        }
        (Some(path), None) => Some(LocalXds::Path(path.into())),
        (None, Some(text)) => Some(LocalXds::Text(text.to_owned())),
        (None, None) => None,
    };
    // A file beside an address that nobody asked for would be two writers of one state.
    let server = if local.is_some() && v.get(&opt::XDS_ADDRESS).is_none() {
        None
    } else {
        server(v, &XDS, discovery, in_kubernetes)?
    };
    if local.is_some() && server.is_some() {
        return Err(Error::Combination("LOCAL_XDS_PATH/LOCAL_XDS and XDS_ADDRESS are both set: keep one".into()));
    }
    Ok((local, server))
}

fn trust_domain(v: &Values) -> Result<String, Error> {
    let name = text(v, &opt::TRUST_DOMAIN, "cluster.local");
    match name.parse::<zspire_model::TrustDomain>() {
        Ok(_) => Ok(name),
        Err(why) => Err(value::error(&opt::TRUST_DOMAIN, &name, &why.to_string())),
    }
}

fn log_filter(v: &Values) -> Result<String, Error> {
    let filter = v.get(&opt::RUST_LOG).unwrap_or("info");
    if tracing_subscriber::EnvFilter::builder().parse(filter).is_err() {
        let expected = "expected error, warn, info, debug, trace, off, or target=level,…";
        return Err(value::error(&opt::RUST_LOG, filter, expected));
    }
    Ok(filter.to_owned())
}

/// The variables of one of the two servers.
struct ServerVariables {
    address: Variable,
    root: Variable,
    alt_hostname: Variable,
    headers: &'static str,
}

const CA: ServerVariables = ServerVariables {
    address: opt::CA_ADDRESS,
    root: opt::CA_ROOT_CA,
    alt_hostname: opt::ALT_CA_HOSTNAME,
    headers: "CA_HEADER_",
};

const XDS: ServerVariables = ServerVariables {
    address: opt::XDS_ADDRESS,
    root: opt::XDS_ROOT_CA,
    alt_hostname: opt::ALT_XDS_HOSTNAME,
    headers: "XDS_HEADER_",
};

fn server(
    v: &Values,
    variables: &ServerVariables,
    discovery: Option<&str>,
    in_kubernetes: bool,
) -> Result<Option<Server>, Error> {
    let address = match v.raw(&variables.address) {
        Some("") => return Ok(None),
        Some(address) => address.to_owned(),
        None => match discovery.filter(|d| !d.is_empty()) {
            Some(address) => address.to_owned(),
            None if in_kubernetes => "https://istiod.istio-system.svc:15012".to_owned(),
            None => "https://localhost:15012".to_owned(),
        },
    };
    let address = if address.contains("://") { address } else { format!("https://{address}") };
    let usable = address.parse().is_ok_and(|uri: http::Uri| {
        matches!(uri.scheme_str(), Some("https" | "http")) && uri.host().is_some_and(|host| !host.is_empty())
    });
    if !usable {
        return Err(value::error(&variables.address, &address, "expected https://host:port"));
    }
    let root = match v.get(&variables.root).unwrap_or("./var/run/secrets/istio/root-cert.pem") {
        "SYSTEM" => RootCert::System,
        pem if pem.contains("-----BEGIN") => RootCert::Pem(pem.to_owned()),
        path => RootCert::File(path.into()),
    };
    let headers = v.family(variables.headers);
    if let Some(name) = headers.keys().find(|name| http::HeaderName::try_from(name.as_str()).is_err()) {
        return Err(Error::Combination(format!("{}{name}: not a header name", variables.headers)));
    }
    Ok(Some(Server {
        address,
        root,
        alt_hostname: v.get(&variables.alt_hostname).map(str::to_owned),
        headers: Headers(headers),
    }))
}

fn token(v: &Values) -> Option<Token> {
    const DEFAULT: &str = "./var/run/secrets/tokens/istio-token";
    match v.get(&opt::AUTH_TOKEN) {
        Some(given) => Some(file_or_literal(given)),
        None => Path::new(DEFAULT).exists().then(|| Token::File(DEFAULT.into())),
    }
}

/// A path looks like one; everything else is the token itself. Tokens hold no slash: JWTs are base64url.
fn file_or_literal(given: &str) -> Token {
    if given.contains('/') { Token::File(given.into()) } else { Token::Literal(given.trim().to_owned()) }
}

fn dns(v: &Values) -> Result<Listen, Error> {
    if !value::flag(v, &opt::ISTIO_META_DNS_CAPTURE, true)? {
        return Ok(Listen::OFF);
    }
    let text = v.get(&opt::ISTIO_META_DNS_PROXY_ADDR).unwrap_or("localhost:15053");
    let expected = || value::error(&opt::ISTIO_META_DNS_PROXY_ADDR, text, "expected localhost:port, or address:port");
    if let Some(port) = text.strip_prefix("localhost:") {
        let port = port.parse().map_err(|_| expected())?;
        let ipv6 = value::flag(v, &opt::IPV6_ENABLED, true)?;
        // With an address of its own a proxy shares a namespace with others, and loopback with them too.
        let bind: Option<IpAddr> = value::parsed(v, &opt::ZSPIRE_BIND_ADDRESS, "an IP address")?;
        return Ok(match bind.filter(IpAddr::is_loopback) {
            Some(own) => Listen::on(SocketAddr::new(own, port)),
            None => Listen::on_loopback(port, ipv6),
        });
    }
    text.parse().map(Listen::on).map_err(|_| expected())
}

fn unknown_status(v: &Values) -> Result<UnknownStatus, Error> {
    match v.get(&opt::CRL_UNKNOWN_STATUS) {
        None | Some("deny") => Ok(UnknownStatus::Deny),
        Some("allow") => Ok(UnknownStatus::Allow),
        Some(other) => Err(value::error(&opt::CRL_UNKNOWN_STATUS, other, "expected deny or allow")),
    }
}

fn compliance(v: &Values) -> Result<Compliance, Error> {
    match v.get(&opt::COMPLIANCE_POLICY) {
        None => Ok(Compliance::None),
        Some("pqc") => Ok(Compliance::Pqc),
        Some(other) => Err(value::error(&opt::COMPLIANCE_POLICY, other, "expected pqc, or nothing")),
    }
}

fn http2(v: &Values) -> Result<Http2, Error> {
    let between = |variable: &Variable, default: u32, low: u32, high: u32| {
        let set = value::parsed::<u32>(v, variable, "a number of bytes")?.unwrap_or(default);
        if (low..=high).contains(&set) {
            Ok(set)
        } else {
            Err(value::error(variable, &set.to_string(), &format!("expected {low} to {high}")))
        }
    };
    const MAX_WINDOW: u32 = (1 << 31) - 1;
    let pool_max_streams =
        value::parsed(v, &opt::POOL_MAX_STREAMS_PER_CONNECTION, "a number of at least 1")?.unwrap_or(100usize);
    if pool_max_streams == 0 {
        return Err(value::error(&opt::POOL_MAX_STREAMS_PER_CONNECTION, "0", "expected a number of at least 1"));
    }
    Ok(Http2 {
        stream_window: between(&opt::HTTP2_STREAM_WINDOW_SIZE, 4 << 20, 65_535, MAX_WINDOW)?,
        connection_window: between(&opt::HTTP2_CONNECTION_WINDOW_SIZE, 16 << 20, 65_535, MAX_WINDOW)?,
        buffered_cap: between(&opt::ZSPIRE_TUNNEL_BUFFER_SIZE, 64 << 20, 0, MAX_WINDOW)?,
        frame_size: between(&opt::HTTP2_FRAME_SIZE, 1 << 20, 16_384, (1 << 24) - 1)?,
        pool_max_streams,
        pool_unused_release: value::duration(v, &opt::POOL_UNUSED_RELEASE_TIMEOUT, Duration::from_secs(300))?,
    })
}

fn keepalive(v: &Values) -> Result<Keepalive, Error> {
    Ok(Keepalive {
        enabled: value::flag(v, &opt::KEEPALIVE_ENABLED, true)?,
        time: value::duration(v, &opt::KEEPALIVE_TIME, Duration::from_secs(180))?,
        interval: value::duration(v, &opt::KEEPALIVE_INTERVAL, Duration::from_secs(180))?,
        retries: value::parsed(v, &opt::KEEPALIVE_RETRIES, "a number")?.unwrap_or(9),
        user_timeout: value::flag(v, &opt::USER_TIMEOUT_ENABLED, false)?,
    })
}

fn termination_deadline(v: &Values) -> Result<Duration, Error> {
    let default = match value::parsed::<u64>(v, &opt::TERMINATION_GRACE_PERIOD_SECONDS, "a number of seconds")? {
        Some(grace) if grace > 10 => grace - 5,
        Some(grace) => grace.saturating_sub(1),
        None => 5,
    };
    value::duration(v, &opt::CONNECTION_TERMINATION_DEADLINE, Duration::from_secs(default))
}

fn log_format(v: &Values) -> Result<LogFormat, Error> {
    match v.get(&opt::LOG_FORMAT).unwrap_or("plain") {
        "plain" => Ok(LogFormat::Plain),
        "json" => Ok(LogFormat::Json),
        other => Err(value::error(&opt::LOG_FORMAT, other, "expected plain or json")),
    }
}

fn node_metadata(v: &Values) -> Result<BTreeMap<String, serde_json::Value>, Error> {
    let mut all: BTreeMap<String, serde_json::Value> =
        v.family("ISTIO_META_").into_iter().map(|(k, text)| (k, text.into())).collect();
    for (name, text) in v.family("ISTIO_METAJSON_") {
        let json = serde_json::from_str(&text)
            .map_err(|e| Error::Combination(format!("ISTIO_METAJSON_{name}: not JSON: {e}")))?;
        all.insert(name, json);
    }
    Ok(all)
}

/// Names of our own that do not exist. Names of others may be for others.
fn misspelt(v: &Values) -> Vec<String> {
    let known = |name: &str| opt::TABLE.iter().any(|g| g.variables.iter().any(|o| o.name == name));
    // The control plane and the build have variables of their own.
    let elsewhere = ["ZSPIRE_CP_", "ZSPIRE_CACHE"];
    v.environment
        .keys()
        .filter(|name| name.starts_with("ZSPIRE_") && !elsewhere.iter().any(|e| name.starts_with(e)))
        .filter(|name| !known(name))
        .map(|name| format!("{name} is set, but there is no such variable"))
        .collect()
}

#[cfg(test)]
mod tests;
