//! TLS between workloads: TLS 1.3, mutual, HTTP/2 by ALPN, no server name, no resumption.
//!
//! A resumed session would skip the check of the peer's certificate, so neither side keeps or offers any
//! (rustls' server keeps 256 by default). What a policy allows is decided once per process in [`Policy`].

mod buffer;
mod error;
mod session;
mod stream;
pub(crate) mod verify;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self as provider, cipher_suite as suite, kx_group};
use rustls::pki_types::CertificateDer;
use zspire_model::{SpiffeId, TrustDomain};

pub use error::{Error, Fault, Rejection};
pub use stream::{ClientTls, ServerTls, Stream};

use crate::revocation::Revocation;
use crate::x509::Fingerprint;

/// The protocol spoken inside.
pub(crate) const ALPN: &[u8] = b"h2";

static TLS13_ONLY: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// Which key exchanges are allowed (`COMPLIANCE_POLICY`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KeyExchange {
    /// X25519MLKEM768 preferred, classical curves for peers that lack it.
    #[default]
    PreferPostQuantum,
    /// X25519MLKEM768 or nothing.
    PostQuantumOnly,
}

/// What TLS may use: built once, shared by every configuration.
#[derive(Clone)]
pub struct Policy {
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) versions: &'static [&'static rustls::SupportedProtocolVersion],
    pub(crate) revocation: Revocation,
}

impl Policy {
    /// `tls12` adds TLS 1.2 with ECDHE and AES-GCM for old peers. It has no post-quantum key exchange, so
    /// [`KeyExchange::PostQuantumOnly`] leaves it out all the same.
    pub fn new(exchange: KeyExchange, tls12: bool) -> Self {
        let tls12 = tls12 && exchange != KeyExchange::PostQuantumOnly;
        let mut suites = vec![suite::TLS13_AES_256_GCM_SHA384, suite::TLS13_AES_128_GCM_SHA256];
        if tls12 {
            suites.extend([
                suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
                suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
                suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
                suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            ]);
        }
        let groups = match exchange {
            KeyExchange::PreferPostQuantum => {
                vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1]
            }
            KeyExchange::PostQuantumOnly => vec![kx_group::X25519MLKEM768],
        };
        let provider = CryptoProvider { cipher_suites: suites, kx_groups: groups, ..provider::default_provider() };
        let versions = if tls12 { rustls::ALL_VERSIONS } else { TLS13_ONLY };
        Self { provider: Arc::new(provider), versions, revocation: Revocation::default() }
    }

    /// The same with revocation lists that peers are looked up in.
    #[must_use]
    pub fn with_revocation(self, revocation: Revocation) -> Self {
        Self { revocation, ..self }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::new(KeyExchange::default(), false)
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups: Vec<_> = self.provider.kx_groups.iter().map(|g| g.name()).collect();
        f.debug_struct("Policy").field("groups", &groups).field("versions", &self.versions.len()).finish()
    }
}

/// The identities that a server may have; nobody else is talked to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpectedPeers(Expected);

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Expected {
    /// Sorted, so equal sets are equal keys.
    These(Arc<[SpiffeId]>),
    /// All that begin with this, which ends with a slash.
    Below(Arc<str>),
}

impl ExpectedPeers {
    /// Exactly this one.
    pub fn one(id: SpiffeId) -> Self {
        Self(Expected::These(Arc::new([id])))
    }

    /// Every one of a trust domain whose path is below `folder`.
    pub fn below(domain: &TrustDomain, folder: &str) -> Self {
        Self(Expected::Below(format!("spiffe://{domain}/{}/", folder.trim_matches('/')).into()))
    }

    /// Whether `id` is among them.
    pub fn contains(&self, id: &SpiffeId) -> bool {
        match &self.0 {
            Expected::These(ids) => ids.binary_search(id).is_ok(),
            Expected::Below(prefix) => id.as_str().starts_with(&**prefix),
        }
    }

    /// Those that are named one by one, in order.
    pub fn iter(&self) -> impl Iterator<Item = &SpiffeId> {
        match &self.0 {
            Expected::These(ids) => ids.iter(),
            Expected::Below(_) => [].iter(),
        }
    }
}

impl FromIterator<SpiffeId> for ExpectedPeers {
    fn from_iter<T: IntoIterator<Item = SpiffeId>>(iter: T) -> Self {
        let mut ids: Vec<_> = iter.into_iter().collect();
        ids.sort();
        ids.dedup();
        Self(Expected::These(ids.into()))
    }
}

impl fmt::Display for ExpectedPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = match &self.0 {
            Expected::Below(prefix) => return write!(f, "one below {prefix}"),
            Expected::These(ids) => ids,
        };
        match &ids[..] {
            [] => f.write_str("nobody"),
            [one] => one.fmt(f),
            [first, rest @ ..] => {
                write!(f, "one of {first}")?;
                rest.iter().try_for_each(|id| write!(f, ", {id}"))
            }
        }
    }
}

/// The other end of a connection, verified. It was valid in the handshake; whether it is still so says
/// [`Credentials::still_valid`](crate::Credentials::still_valid).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its identity: exactly the one that was verified.
    pub id: SpiffeId,
    /// Until when its certificate is valid.
    pub not_after: SystemTime,
    /// SHA-256 of its leaf certificate.
    pub fingerprint: Fingerprint,
    /// What it proved that with.
    pub evidence: Evidence,
}

/// The certificates that a peer showed, kept to check them again. Cloning is cheap. The default is none, which is never valid.
#[derive(Clone, PartialEq, Eq)]
pub struct Evidence {
    pub(crate) chain: Arc<[CertificateDer<'static>]>,
    pub(crate) role: verify::Role,
}

impl Default for Evidence {
    fn default() -> Self {
        Self { chain: Arc::default(), role: verify::Role::Client }
    }
}

impl fmt::Debug for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evidence").field("certificates", &self.chain.len()).field("role", &self.role).finish()
    }
}
