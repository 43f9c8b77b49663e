//! Configuration of the proxy: variables (strings) become a validated [`Config`].
//!
//! Owns which variables there are ([`options`]), the mesh file and `PROXY_CONFIG` (`mesh_file`), what is made of them as a whole
//! (here), and what the values mean: whom the proxy serves (`mode`), where certificates come from (`identity`, `spire`), the
//! servers that it asks (`servers`), how connections are carried (`traffic`), and what the node agent is told as well
//! (`process`, `agent`). It is the only place of the proxy that reads the environment. It does not know what the other crates do
//! with the values: `assembly` turns them into each crate's own configuration. Start at [`Config::load`].

pub mod options;

mod agent;
mod identity;
mod mesh_file;
mod mode;
mod process;
mod servers;
mod spire;
mod traffic;
mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use agent::AgentConfig;
pub use identity::{Compliance, IdentitySource, UnknownStatus};
pub use mode::{Mode, WorkloadName};
pub use process::LogFormat;
pub use servers::{Headers, LocalXds, RootCert, Server, Token};
pub use spire::Spire;
pub use traffic::{Addresses, Http2, Keepalive, OriginalSource};

use options as opt;
use options::Values;
use value::{port, text};
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
    pub dns: Listen,
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
        let warnings = options::misspelt(v);

        let in_kubernetes = v.get(&opt::KUBERNETES_SERVICE_HOST).is_some();
        let discovery = mesh.discovery_address.as_deref();
        let mode = mode::mode(v)?;
        let identity = identity::source(v, in_kubernetes)?;
        let (local_xds, xds) = servers::discovery_source(v, discovery, in_kubernetes)?;
        let shared = mode == Mode::Shared;

        let config = Self {
            proxy: value::flag(v, &opt::ENABLE_PROXY, true)?,
            network: text(v, &opt::NETWORK, ""),
            cluster_id: cluster_id(v),
            cluster_domain: text(v, &opt::CLUSTER_DOMAIN, "cluster.local"),
            trust_domain: identity::trust_domain(v)?,
            node_name: text(v, &opt::NODE_NAME, ""),
            pod_name: text(v, &opt::POD_NAME, ""),
            pod_namespace: text(v, &opt::POD_NAMESPACE, ""),
            service_account: text(v, &opt::SERVICE_ACCOUNT, ""),
            instance_ip: value::parsed(v, &opt::INSTANCE_IP, "an IP address")?.unwrap_or(IpAddr::from([1, 1, 1, 1])),
            inpod_uds: process::inpod_uds(v),
            inpod_port_reuse: value::flag(v, &opt::INPOD_PORT_REUSE, true)?,
            xds,
            xds_on_demand: value::flag(v, &opt::XDS_ON_DEMAND, false)?,
            local_xds,
            preferred_service_namespace: v.get(&opt::PREFERED_SERVICE_NAMESPACE).map(str::to_owned),
            ca: match identity {
                IdentitySource::IstioCa => servers::server(v, &servers::CA, discovery, in_kubernetes)?,
                _ => None,
            },
            identity,
            spire: Spire::parse(v, identity, &identity::trust_domain(v)?)?,
            token: servers::token(v),
            secret_ttl: value::duration(v, &opt::SECRET_TTL, Duration::from_secs(24 * 3600))?,
            series_grace: value::duration(v, &opt::ZSPIRE_SERIES_GRACE, Duration::from_secs(300))?,
            tls12: value::flag(v, &opt::TLS12_ENABLED, false)?,
            compliance: identity::compliance(v)?,
            crl_path: v.get(&opt::CRL_PATH).map(Into::into),
            crl_unknown: identity::unknown_status(v)?,
            join_token: v.get(&opt::ZSPIRE_JOIN_TOKEN).map(servers::file_or_literal),
            state_dir: text(v, &opt::ZSPIRE_STATE_DIR, "./var/lib/zspire").into(),
            ipv6: value::flag(v, &opt::IPV6_ENABLED, true)?,
            socks5: value::flag(v, &opt::UNSTABLE_ENABLE_SOCKS5, false)?,
            dns: traffic::dns(v)?,
            packet_mark: value::parsed(v, &opt::PACKET_MARK, "a number up to 4294967295")?.or(shared.then_some(1337)),
            original_source: match value::parsed::<bool>(v, &opt::ENABLE_ORIG_SRC, "true or false")? {
                None => OriginalSource::WhenAllowed,
                Some(true) => OriginalSource::Required,
                Some(false) => OriginalSource::Off,
            },
            localhost_app_tunnel: value::flag(v, &opt::LOCALHOST_APP_TUNNEL, true)?,
            response_baggage: value::flag(v, &opt::ENABLE_RESPONSE_BAGGAGE, true)?,
            policy_info_logging: value::flag(v, &opt::AUTHZ_POLICY_INFO_LOGGING, false)?,
            http2: traffic::http2(v)?,
            keepalive: traffic::keepalive(v)?,
            termination_deadline: traffic::termination_deadline(v)?,
            workers: value::workers(v, mesh.concurrency)?,
            addresses: Addresses {
                bind: value::parsed(v, &opt::ZSPIRE_BIND_ADDRESS, "an IP address")?,
                admin: port(v, &opt::ZSPIRE_ADMIN_PORT, mesh.proxy_admin_port.unwrap_or(15000))?,
                stats: port(v, &opt::ZSPIRE_STATS_PORT, mesh.stats_port.unwrap_or(15020))?,
                readiness: port(v, &opt::ZSPIRE_READINESS_PORT, 15021)?,
            },
            log_filter: process::log_filter(v)?,
            log_format: process::log_format(v)?,
            proxy_metadata: mesh.proxy_metadata,
            node_metadata: node_metadata(v)?,
            istio_version: text(v, &opt::ISTIO_META_ISTIO_VERSION, "unknown"),
            in_kubernetes,
            supervisor: process::supervisor(v),
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

fn cluster_id(v: &Values) -> String {
    v.get(&opt::CLUSTER_ID)
        .map(str::to_owned)
        .or_else(|| v.family("ISTIO_META_").remove("CLUSTER_ID").filter(|id| !id.is_empty()))
        .unwrap_or_else(|| "Kubernetes".to_owned())
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

#[cfg(test)]
mod tests;
