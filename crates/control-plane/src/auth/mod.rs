//! Who is asking: a client certificate, a JWT, or a join token, in this order. The first that succeeds wins, as in istiod.
//!
//! Only says who it is; what a caller may do is in `placement`. Nothing a caller sends appears in an error.

mod jwt;
mod keys;

use std::fmt;
use std::net::SocketAddr;
use std::time::SystemTime;

use tonic::Extensions;
use tonic::metadata::MetadataMap;
use zspire_identity::join::{JoinToken, NODE_HEADER, node_path};
use zspire_identity::tls::Peer;
use zspire_model::{SpiffeId, Str, TrustDomain};

pub(crate) use jwt::Tokens;
pub use keys::Error as KeysError;
pub(crate) use keys::Keys;

use crate::state::TokenHash;

/// Longest bearer token looked at.
const MAX_TOKEN: usize = 16 * 1024;

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) enum Caller {
    /// A node with a certificate of this CA.
    Node(Str),
    /// A workload with a certificate of this CA.
    Workload(SpiffeId),
    /// A service account with a token of the issuer.
    Account(Account),
    /// A node that wants to join; its token is still to be looked up.
    Joining(Join),
}

/// A service account, and what its token is bound to.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    pub(crate) id: SpiffeId,
    pub(crate) namespace: Str,
    pub(crate) name: Str,
    pub(crate) pod: Option<Str>,
    pub(crate) node: Option<Str>,
}

/// A join token and the node that shows it.
#[derive(Debug, Clone)]
pub(crate) struct Join {
    pub(crate) node: Str,
    pub(crate) hash: TokenHash,
}

impl Caller {
    /// For records.
    pub(crate) fn name(&self) -> Str {
        self.to_string().into()
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Workload(id) => write!(f, "{id}"),
            Self::Account(Account { namespace, name, pod: Some(pod), .. }) => {
                write!(f, "service account {namespace}/{name} of pod {pod}")
            }
            Self::Account(Account { namespace, name, .. }) => write!(f, "service account {namespace}/{name}"),
            Self::Joining(Join { node, .. }) => write!(f, "node {node}, joining"),
        }
    }
}

/// What is known of a connection; in the extensions of each of its requests.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub(crate) remote: SocketAddr,
    pub(crate) peer: Option<Peer>,
}

/// Finds out who is asking.
#[derive(Debug)]
pub(crate) struct Authenticator {
    pub(crate) domain: TrustDomain,
    pub(crate) tokens: Option<Tokens>,
}

impl Authenticator {
    /// The caller of one request. A join token is read but not yet looked up.
    pub(crate) fn caller(&self, metadata: &MetadataMap, extensions: &Extensions) -> Result<Caller, Unauthenticated> {
        let certificate = match extensions.get::<Connection>().and_then(|connection| connection.peer.as_ref()) {
            Some(peer) => match self.of_certificate(peer, SystemTime::now()) {
                Ok(caller) => return Ok(caller),
                Err(error) => Some(error),
            },
            None => None,
        };
        let Some(token) = bearer(metadata)? else { return Err(certificate.unwrap_or(Unauthenticated::Nothing)) };
        if JoinToken::is_one(token) {
            return joining(token, metadata);
        }
        match &self.tokens {
            Some(tokens) => tokens.verify(token, &self.domain).map(Caller::Account).map_err(Unauthenticated::Token),
            None => Err(Unauthenticated::NoIssuer),
        }
    }

    /// The handshake has verified the certificate; a connection may outlive it.
    fn of_certificate(&self, peer: &Peer, now: SystemTime) -> Result<Caller, Unauthenticated> {
        if peer.not_after <= now {
            return Err(Unauthenticated::Expired);
        }
        if *peer.id.trust_domain() != self.domain {
            return Err(Unauthenticated::TrustDomain);
        }
        let node = peer.id.path().strip_prefix(&node_path("")).filter(|name| !name.contains('/'));
        Ok(node.map_or_else(|| Caller::Workload(peer.id.clone()), |name| Caller::Node(name.into())))
    }
}

fn bearer(metadata: &MetadataMap) -> Result<Option<&str>, Unauthenticated> {
    let Some(value) = metadata.get("authorization") else { return Ok(None) };
    let text = value.to_str().map_err(|_| Unauthenticated::Header)?;
    let (scheme, token) = text.split_once(' ').ok_or(Unauthenticated::Header)?;
    let token = token.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.len() > MAX_TOKEN {
        return Err(Unauthenticated::Header);
    }
    Ok(Some(token))
}

fn joining(token: &str, metadata: &MetadataMap) -> Result<Caller, Unauthenticated> {
    let token: JoinToken = token.parse().map_err(|_| Unauthenticated::JoinToken)?;
    let node = metadata.get(NODE_HEADER).and_then(|value| value.to_str().ok());
    let node = node.filter(|node| !node.is_empty() && node.len() <= 253).ok_or(Unauthenticated::NoNode)?;
    Ok(Caller::Joining(Join { node: node.into(), hash: TokenHash::of(&token) }))
}

/// Why it is not known who asks. For the log; callers are not told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unauthenticated {
    #[error("neither a client certificate nor a token was shown")]
    Nothing,
    #[error("the client certificate has expired")]
    Expired,
    #[error("the client certificate is of another trust domain")]
    TrustDomain,
    #[error("the authorization header is not a bearer token")]
    Header,
    #[error("a token was shown, and no issuer of tokens is configured: set ZSPIRE_CP_JWT_ISSUER")]
    NoIssuer,
    #[error("the token is not accepted: {0}")]
    Token(jwt::Refused),
    #[error("the join token is malformed")]
    JoinToken,
    #[error("a join token was shown without the header {NODE_HEADER}")]
    NoNode,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use zspire_identity::Evidence;

    use super::*;

    fn authenticator() -> Authenticator {
        Authenticator { domain: "cluster.local".parse().unwrap(), tokens: None }
    }

    fn of_certificate(id: &str, age: Duration) -> Result<String, Unauthenticated> {
        let now = SystemTime::now();
        let peer = Peer {
            id: id.parse().unwrap(),
            not_after: now + Duration::from_secs(60),
            fingerprint: [0; 32],
            evidence: Evidence::default(),
        };
        let mut extensions = Extensions::new();
        let not_after = peer.not_after - age;
        let peer = Some(Peer { not_after, ..peer });
        extensions.insert(Connection { remote: ([127, 0, 0, 1], 1).into(), peer });
        authenticator().caller(&MetadataMap::new(), &extensions).map(|caller| caller.to_string())
    }

    #[test]
    fn certificates() {
        let fresh = Duration::ZERO;
        assert_eq!(of_certificate("spiffe://cluster.local/zspire/node/a", fresh).unwrap(), "node a");
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        assert_eq!(of_certificate(web, fresh).unwrap(), web);
        let deep = "spiffe://cluster.local/zspire/node/a/b";
        assert_eq!(of_certificate(deep, fresh).unwrap(), deep, "is no node");
        assert_eq!(of_certificate("spiffe://b/ns/shop/sa/web", fresh), Err(Unauthenticated::TrustDomain));
        assert_eq!(of_certificate(web, Duration::from_secs(61)), Err(Unauthenticated::Expired));
    }

    fn of_headers(headers: &[(&'static str, &str)]) -> Result<String, Unauthenticated> {
        let mut metadata = MetadataMap::new();
        for (name, value) in headers {
            metadata.insert(*name, value.parse().unwrap());
        }
        authenticator().caller(&metadata, &Extensions::new()).map(|caller| caller.to_string())
    }

    #[test]
    fn headers() {
        let join = format!("Bearer zs1.{}.{}", "0".repeat(64), "x".repeat(43));
        assert_eq!(of_headers(&[]), Err(Unauthenticated::Nothing));
        for header in ["Bearer", "Bearer ", "Basic eDp5", &format!("Bearer {}", "x".repeat(MAX_TOKEN + 1))] {
            assert_eq!(of_headers(&[("authorization", header)]), Err(Unauthenticated::Header));
        }
        assert_eq!(of_headers(&[("authorization", "bearer abc")]), Err(Unauthenticated::NoIssuer));
        assert_eq!(of_headers(&[("authorization", "Bearer zs1.x.y")]), Err(Unauthenticated::JoinToken));
        assert_eq!(of_headers(&[("authorization", &join)]), Err(Unauthenticated::NoNode));
        assert_eq!(of_headers(&[("authorization", &join), (NODE_HEADER, "a")]).unwrap(), "node a, joining");
    }

    #[test]
    fn a_token_does_not_show() {
        let secret = "s3cr3t".repeat(8);
        let text = format!("Bearer zs1.{}.{secret}", "0".repeat(64));
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", text.parse().unwrap());
        metadata.insert(NODE_HEADER, "a".parse().unwrap());
        let caller = authenticator().caller(&metadata, &Extensions::new()).unwrap();
        assert!(!format!("{caller:?} {caller}").contains("s3cr3t"));
    }
}
