//! Settings of the control plane: what the command line or the environment says, checked.
//!
//! The only place that reads the environment. A flag wins over its variable, a variable over the default.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use zspire_model::TrustDomain;
use zspire_sys::supervisor::Supervisor;

/// One setting: how it is named in the environment, and what it is for.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The variable.
    pub name: &'static str,
    /// Its value if it is not set; empty for none.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
}

/// Every setting, in the order of [`Options`].
pub const SETTINGS: &[Setting] = &[
    Setting {
        name: "ZSPIRE_CP_ADDRESS",
        default: "0.0.0.0:15012",
        help: "where certificates and discovery are served",
    },
    Setting { name: "ZSPIRE_CP_ADMIN", default: "127.0.0.1:15014", help: "where metrics and status are served" },
    Setting { name: "ZSPIRE_CP_MESH", default: "./mesh.d", help: "file or folder of workloads, services and policies" },
    Setting { name: "ZSPIRE_CP_STATE", default: "./zspire-state", help: "folder of the CA's key and its records" },
    Setting { name: "ZSPIRE_CP_TRUST_DOMAIN", default: "cluster.local", help: "trust domain of every identity" },
    Setting {
        name: "ZSPIRE_CP_HOSTNAMES",
        default: "",
        help: "further names and addresses of the serving certificate, by commas",
    },
    Setting { name: "ZSPIRE_CP_CACERTS", default: "", help: "folder with a CA of your own, as Istio's cacerts" },
    Setting { name: "ZSPIRE_CP_JWT_ISSUER", default: "", help: "issuer whose tokens are accepted" },
    Setting { name: "ZSPIRE_CP_JWT_AUDIENCE", default: "istio-ca", help: "audience that its tokens must have" },
    Setting { name: "ZSPIRE_CP_JWT_JWKS", default: "", help: "its keys: a file or an https URL" },
    Setting { name: "ZSPIRE_CP_JWT_JWKS_ROOT", default: "SYSTEM", help: "roots for that URL: a PEM file or SYSTEM" },
    Setting {
        name: "ZSPIRE_CP_TRUSTED_NODE_ACCOUNTS",
        default: "istio-system/ztunnel",
        help: "service accounts of node proxies, namespace/name by commas",
    },
    Setting { name: "ZSPIRE_CP_DEFAULT_TTL", default: "24h", help: "lifetime of certificates that ask for none" },
    Setting { name: "ZSPIRE_CP_MAX_TTL", default: "90d", help: "longest lifetime that may be asked for" },
    Setting { name: "ZSPIRE_CP_LOG", default: "info", help: "log level or filter" },
];

/// What was given on the command line, as text; `None` leaves it to the environment.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `ZSPIRE_CP_ADDRESS`
    pub address: Option<String>,
    /// `ZSPIRE_CP_ADMIN`
    pub admin: Option<String>,
    /// `ZSPIRE_CP_MESH`
    pub mesh: Option<String>,
    /// `ZSPIRE_CP_STATE`
    pub state: Option<String>,
    /// `ZSPIRE_CP_TRUST_DOMAIN`
    pub trust_domain: Option<String>,
    /// `ZSPIRE_CP_HOSTNAMES`
    pub hostnames: Option<String>,
    /// `ZSPIRE_CP_CACERTS`
    pub cacerts: Option<String>,
    /// `ZSPIRE_CP_JWT_ISSUER`
    pub jwt_issuer: Option<String>,
    /// `ZSPIRE_CP_JWT_AUDIENCE`
    pub jwt_audience: Option<String>,
    /// `ZSPIRE_CP_JWT_JWKS`
    pub jwt_jwks: Option<String>,
    /// `ZSPIRE_CP_JWT_JWKS_ROOT`
    pub jwt_jwks_root: Option<String>,
    /// `ZSPIRE_CP_TRUSTED_NODE_ACCOUNTS`
    pub trusted_node_accounts: Option<String>,
    /// `ZSPIRE_CP_DEFAULT_TTL`
    pub default_ttl: Option<String>,
    /// `ZSPIRE_CP_MAX_TTL`
    pub max_ttl: Option<String>,
    /// `ZSPIRE_CP_LOG`
    pub log: Option<String>,
}

/// Settings that can be used.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where certificates and discovery are served.
    pub address: SocketAddr,
    /// Where metrics and status are served.
    pub admin: SocketAddr,
    /// The mesh: a file or a folder.
    pub mesh: PathBuf,
    /// State of the CA.
    pub state: PathBuf,
    /// Trust domain of every identity.
    pub trust_domain: TrustDomain,
    /// Names and addresses of the serving certificate.
    pub hostnames: Vec<String>,
    /// A CA of the operator's own.
    pub cacerts: Option<PathBuf>,
    /// The issuer of tokens, if tokens are accepted.
    pub jwt: Option<Jwt>,
    /// Service accounts of node proxies.
    pub node_accounts: Vec<ServiceAccount>,
    /// Bounds of lifetimes.
    pub ttl: Ttl,
    /// Filter of the log.
    pub log: String,
    /// The service manager, if there is one.
    pub supervisor: Supervisor,
}

/// Whose tokens are accepted.
#[derive(Debug, Clone)]
pub struct Jwt {
    /// `iss`
    pub issuer: String,
    /// `aud`
    pub audience: String,
    /// Where the keys are.
    pub keys: KeySource,
}

/// Where the keys of a token issuer come from.
#[derive(Debug, Clone)]
pub enum KeySource {
    /// A file, followed.
    File(PathBuf),
    /// A URL, asked again every few minutes.
    Url {
        /// `https://…`
        url: String,
        /// Roots for it: a PEM file or `SYSTEM`.
        roots: String,
    },
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Bounds of lifetimes.
#[derive(Debug, Clone, Copy)]
pub struct Ttl {
    /// For requests that name none.
    pub default: Duration,
    /// What more than is refused.
    pub max: Duration,
}

impl Default for Ttl {
    fn default() -> Self {
        Self { default: Duration::from_secs(24 * 3600), max: Duration::from_secs(90 * 24 * 3600) }
    }
}

impl Config {
    /// From the command line, the environment and the defaults.
    pub fn load(options: Options) -> Result<Self, Error> {
        Self::build(options, |name| std::env::var(name).ok())
    }

    /// The same with an environment of one's own.
    pub fn build(options: Options, environment: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let text = |given: Option<String>, name: &'static str| {
            let value = given.or_else(|| environment(name)).filter(|value| !value.trim().is_empty());
            value.map_or_else(|| default(name).to_owned(), |value| value.trim().to_owned())
        };
        let path = |text: String| (!text.is_empty()).then(|| PathBuf::from(text));
        let address = parse("ZSPIRE_CP_ADDRESS", &text(options.address, "ZSPIRE_CP_ADDRESS"), socket_address)?;
        let jwt = jwt(
            text(options.jwt_issuer, "ZSPIRE_CP_JWT_ISSUER"),
            text(options.jwt_audience, "ZSPIRE_CP_JWT_AUDIENCE"),
            text(options.jwt_jwks, "ZSPIRE_CP_JWT_JWKS"),
            text(options.jwt_jwks_root, "ZSPIRE_CP_JWT_JWKS_ROOT"),
        )?;
        let accounts = text(options.trusted_node_accounts, "ZSPIRE_CP_TRUSTED_NODE_ACCOUNTS");
        let config = Self {
            address,
            admin: parse("ZSPIRE_CP_ADMIN", &text(options.admin, "ZSPIRE_CP_ADMIN"), socket_address)?,
            mesh: text(options.mesh, "ZSPIRE_CP_MESH").into(),
            state: text(options.state, "ZSPIRE_CP_STATE").into(),
            trust_domain: parse(
                "ZSPIRE_CP_TRUST_DOMAIN",
                &text(options.trust_domain, "ZSPIRE_CP_TRUST_DOMAIN"),
                |t| t.parse().map_err(|e: zspire_model::spiffe::Error| e.to_string()),
            )?,
            hostnames: hostnames(&text(options.hostnames, "ZSPIRE_CP_HOSTNAMES"), address.ip()),
            cacerts: path(text(options.cacerts, "ZSPIRE_CP_CACERTS")),
            jwt,
            node_accounts: parse("ZSPIRE_CP_TRUSTED_NODE_ACCOUNTS", &accounts, service_accounts)?,
            ttl: Ttl {
                default: parse("ZSPIRE_CP_DEFAULT_TTL", &text(options.default_ttl, "ZSPIRE_CP_DEFAULT_TTL"), duration)?,
                max: parse("ZSPIRE_CP_MAX_TTL", &text(options.max_ttl, "ZSPIRE_CP_MAX_TTL"), duration)?,
            },
            log: text(options.log, "ZSPIRE_CP_LOG"),
            supervisor: supervisor(environment),
        };
        config.check()
    }

    fn check(self) -> Result<Self, Error> {
        if self.ttl.default > self.ttl.max {
            return Err(Error::new("ZSPIRE_CP_DEFAULT_TTL", "it is longer than ZSPIRE_CP_MAX_TTL"));
        }
        if tracing_subscriber::EnvFilter::builder().parse(&self.log).is_err() {
            return Err(Error::new("ZSPIRE_CP_LOG", "it is not a level (error, warn, info, debug, trace) or a filter"));
        }
        Ok(self)
    }
}

fn supervisor(environment: impl Fn(&str) -> Option<String>) -> Supervisor {
    let [socket, usec, pid] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"].map(environment);
    Supervisor::new(socket.as_deref(), usec.as_deref(), pid.as_deref())
}

fn default(name: &str) -> &'static str {
    SETTINGS.iter().find(|setting| setting.name == name).map_or("", |setting| setting.default)
}

fn parse<T>(name: &'static str, text: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<T, Error> {
    read(text).map_err(|why| Error::new(name, format!("{text:?} {why}")))
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "is not an address and port, such as 0.0.0.0:15012 or [::]:15012".to_owned())
}

fn jwt(issuer: String, audience: String, jwks: String, roots: String) -> Result<Option<Jwt>, Error> {
    if issuer.is_empty() && jwks.is_empty() {
        return Ok(None);
    }
    if issuer.is_empty() {
        return Err(Error::new("ZSPIRE_CP_JWT_ISSUER", "it is needed where ZSPIRE_CP_JWT_JWKS is set"));
    }
    let keys = match jwks.split_once("://") {
        _ if jwks.is_empty() => {
            return Err(Error::new("ZSPIRE_CP_JWT_JWKS", "it is needed where ZSPIRE_CP_JWT_ISSUER is set"));
        }
        Some(("https", _)) => KeySource::Url { url: jwks, roots },
        Some(_) => return Err(Error::new("ZSPIRE_CP_JWT_JWKS", "keys are fetched by https only, or read from a file")),
        None => KeySource::File(jwks.into()),
    };
    Ok(Some(Jwt { issuer, audience, keys }))
}

/// Names by which this machine and istiod's drop-in are called, then what the operator adds.
fn hostnames(more: &str, address: IpAddr) -> Vec<String> {
    let mut names: Vec<String> =
        ["localhost", "istiod.istio-system.svc", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    if !address.is_unspecified() {
        names.push(address.to_string());
    }
    names.extend(more.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned));
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

fn service_accounts(text: &str) -> Result<Vec<ServiceAccount>, String> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let account = |part: &str| match part.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err("is not a list of namespace/serviceaccount".to_owned()),
    };
    parts.map(account).collect()
}

/// `90d`, `24h`, `30m`, `45s`, or several of them: `1h30m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "is not a duration such as 90d, 24h, 30m or 45s".to_owned();
    let (mut total, mut digits) = (0u64, String::new());
    for character in text.chars() {
        let unit = match character {
            '0'..='9' => {
                digits.push(character);
                continue;
            }
            'd' => 24 * 3600,
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => return Err(wrong()),
        };
        let count: u64 = digits.parse().map_err(|_| wrong())?;
        digits.clear();
        total = count.checked_mul(unit).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
    }
    // Ten years are far beyond any certificate here, and far below where times overflow.
    if !digits.is_empty() || total == 0 || total > 3660 * 24 * 3600 {
        return Err(wrong());
    }
    Ok(Duration::from_secs(total))
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} cannot be used: {why}")]
pub struct Error {
    name: &'static str,
    why: String,
}

impl Error {
    fn new(name: &'static str, why: impl Into<String>) -> Self {
        Self { name, why: why.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(options: Options, environment: &[(&str, &str)]) -> Result<Config, Error> {
        Config::build(options, |name| environment.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn defaults_are_istiods() {
        let config = load(Options::default(), &[]).unwrap();
        assert_eq!(config.address.to_string(), "0.0.0.0:15012");
        assert_eq!(config.admin.to_string(), "127.0.0.1:15014");
        assert_eq!(config.trust_domain.as_str(), "cluster.local");
        assert_eq!(config.ttl.default, Duration::from_secs(86_400));
        assert_eq!(config.ttl.max, Duration::from_secs(90 * 86_400));
        assert!(config.jwt.is_none());
        assert_eq!(config.hostnames, ["localhost", "istiod.istio-system.svc", "127.0.0.1", "::1"]);
    }

    #[test]
    fn flag_before_variable_before_default() {
        let environment =
            [("ZSPIRE_CP_MAX_TTL", "48h"), ("ZSPIRE_CP_TRUST_DOMAIN", "a.example"), ("ZSPIRE_CP_LOG", "")];
        let options = Options { trust_domain: Some("b.example".into()), ..Options::default() };
        let config = load(options, &environment).unwrap();
        assert_eq!(config.trust_domain.as_str(), "b.example");
        assert_eq!(config.ttl.max, Duration::from_secs(48 * 3600));
        assert_eq!(config.log, "info");
    }

    #[test]
    fn refusals_name_the_setting_and_the_next_step() {
        let cases = [
            (
                &[("ZSPIRE_CP_ADDRESS", "15012")][..],
                "ZSPIRE_CP_ADDRESS cannot be used: \"15012\" is not an address and port, such as 0.0.0.0:15012 or [::]:15012",
            ),
            (
                &[("ZSPIRE_CP_MAX_TTL", "1h")],
                "ZSPIRE_CP_DEFAULT_TTL cannot be used: it is longer than ZSPIRE_CP_MAX_TTL",
            ),
            (
                &[("ZSPIRE_CP_MAX_TTL", "soon")],
                "ZSPIRE_CP_MAX_TTL cannot be used: \"soon\" is not a duration such as 90d, 24h, 30m or 45s",
            ),
            (
                &[("ZSPIRE_CP_JWT_ISSUER", "x")],
                "ZSPIRE_CP_JWT_JWKS cannot be used: it is needed where ZSPIRE_CP_JWT_ISSUER is set",
            ),
            (
                &[("ZSPIRE_CP_JWT_ISSUER", "x"), ("ZSPIRE_CP_JWT_JWKS", "http://x/y")],
                "ZSPIRE_CP_JWT_JWKS cannot be used: keys are fetched by https only, or read from a file",
            ),
            (
                &[("ZSPIRE_CP_TRUSTED_NODE_ACCOUNTS", "ztunnel")],
                "ZSPIRE_CP_TRUSTED_NODE_ACCOUNTS cannot be used: \"ztunnel\" is not a list of namespace/serviceaccount",
            ),
        ];
        for (environment, expected) in cases {
            assert_eq!(load(Options::default(), environment).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1h30m").unwrap(), Duration::from_secs(5400));
        for wrong in ["", "5", "h", "0s", "99999999999999999999d", "1w", "400000d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
