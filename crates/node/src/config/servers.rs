//! The CA and the discovery server: where they are, what they are verified against, what they are shown. And the file that stands
//! in for the discovery server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::options::{self as opt, Values, Variable};
use super::{Error, value};

/// The CA or the discovery server.
#[derive(Debug, Clone)]
pub struct Server {
    /// `https://host:port`, or `http://…` for a plaintext port.
    pub address: String,
    pub root: RootCert,
    pub alt_hostname: Option<String>,
    pub headers: Headers,
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

/// Where workloads come from when there is no discovery server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalXds {
    Path(PathBuf),
    Text(String),
}

pub(super) fn discovery_source(
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

/// The variables of one of the two servers.
pub(super) struct ServerVariables {
    address: Variable,
    root: Variable,
    alt_hostname: Variable,
    headers: &'static str,
}

pub(super) const CA: ServerVariables = ServerVariables {
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

pub(super) fn server(
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

pub(super) fn token(v: &Values) -> Option<Token> {
    const DEFAULT: &str = "./var/run/secrets/tokens/istio-token";
    match v.get(&opt::AUTH_TOKEN) {
        Some(given) => Some(file_or_literal(given)),
        None => Path::new(DEFAULT).exists().then(|| Token::File(DEFAULT.into())),
    }
}

/// A path looks like one; everything else is the token itself. Tokens hold no slash: JWTs are base64url.
pub(super) fn file_or_literal(given: &str) -> Token {
    if given.contains('/') { Token::File(given.into()) } else { Token::Literal(given.trim().to_owned()) }
}
