//! What can go wrong with a TLS handshake between workloads: which check failed, and whose fault it is.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use zspire_model::{SpiffeId, Str};

use crate::clock::rfc3339;

/// A certificate of a peer that was refused, and by which check.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// Not a certificate, or one with broken extensions.
    #[error("the certificate cannot be parsed: {0}")]
    Malformed(&'static str),
    /// No identity in it.
    #[error("the certificate has no URI SAN, an SVID has exactly one")]
    NoUriSan,
    /// Ambiguous identity.
    #[error("the certificate has {0} URI SANs, an SVID has exactly one")]
    SeveralUriSans(usize),
    /// The URI SAN does not conform to the SPIFFE-ID specification.
    #[error("the URI SAN {uri:?} is not a SPIFFE ID: {why}")]
    NotSpiffe {
        /// What it says instead.
        uri: String,
        /// Which rule is broken.
        why: Str,
    },
    /// A trust domain without a path names no workload.
    #[error("{id} names a trust domain, not a workload")]
    NotAWorkload {
        /// The identity claimed.
        id: SpiffeId,
    },
    /// Against the X.509-SVID profile.
    #[error("the certificate is not an X.509-SVID: {0}")]
    Profile(&'static str),
    /// No bundle for the trust domain of the identity.
    #[error("{id} is of a trust domain that is not trusted here")]
    UnknownTrustDomain {
        /// The identity claimed.
        id: SpiffeId,
    },
    /// The chain does not lead to a root of that trust domain.
    #[error("the chain of {id} does not lead to a root of its trust domain: {why}")]
    Untrusted {
        /// The identity claimed.
        id: SpiffeId,
        /// What the path builder found.
        why: Str,
    },
    /// Expired.
    #[error("a certificate in the chain of {id} expired at {}", rfc3339(*.not_after))]
    Expired {
        /// The identity claimed.
        id: SpiffeId,
        /// Its last moment.
        not_after: SystemTime,
    },
    /// From the future.
    #[error("a certificate in the chain of {id} is not valid before {}", rfc3339(*.not_before))]
    NotYetValid {
        /// The identity claimed.
        id: SpiffeId,
        /// Its first moment.
        not_before: SystemTime,
    },
    /// The extended key usage does not allow what the peer did with it.
    #[error("the certificate of {id} is not for use as a TLS {role}")]
    WrongUsage {
        /// The identity claimed.
        id: SpiffeId,
        /// `client` or `server`.
        role: &'static str,
    },
    /// On a revocation list.
    #[error("a certificate in the chain of {id} was revoked (serial number {serial})")]
    Revoked {
        /// The identity claimed.
        id: SpiffeId,
        /// Which certificate; hexadecimal.
        serial: String,
    },
    /// No revocation list says anything of it.
    #[error(
        "it is not known whether a certificate in the chain of {id} was revoked: {why} (CRL_UNKNOWN_STATUS=allow accepts that)"
    )]
    RevocationUnknown {
        /// The identity claimed.
        id: SpiffeId,
        /// Which list is missing.
        why: Str,
    },
    /// A valid certificate of somebody else.
    #[error("the peer is {id}, expected {expected}")]
    UnexpectedPeer {
        /// Who it is.
        id: SpiffeId,
        /// Who it should be.
        expected: String,
    },
}

impl Rejection {
    /// A short name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::NoUriSan => "no_uri_san",
            Self::SeveralUriSans(_) => "several_uri_sans",
            Self::NotSpiffe { .. } | Self::NotAWorkload { .. } => "not_spiffe",
            Self::Profile(_) => "profile",
            Self::UnknownTrustDomain { .. } => "unknown_trust_domain",
            Self::Untrusted { .. } => "untrusted",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::WrongUsage { .. } => "wrong_usage",
            Self::Revoked { .. } => "revoked",
            Self::RevocationUnknown { .. } => "revocation_unknown",
            Self::UnexpectedPeer { .. } => "unexpected_peer",
        }
    }
}

/// Who has to change something for it to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The other side of the connection.
    Peer,
    /// This process or its credentials.
    Us,
    /// What is between.
    Network,
}

/// Why a handshake, or the connection after it, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// We refused the peer's certificate.
    #[error("refused the peer's certificate")]
    Rejected(#[source] Rejection),
    /// The peer sent no certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// The peer does not speak HTTP/2 on this port.
    #[error("the peer did not agree to ALPN h2")]
    NoAlpn,
    /// The peer ended it with an alert. For us this is mostly the certificate we presented.
    #[error("the peer refused the connection with the TLS alert {0}")]
    Alert(String),
    /// The peer broke the protocol, or nothing in common was found.
    #[error("TLS protocol failure")]
    Protocol(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// Our side could not do its part.
    #[error("cannot use the own credentials")]
    Own(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// The connection below broke.
    #[error("connection failed during TLS")]
    Io(#[source] io::Error),
}

impl Error {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Rejected(_) | Self::NoCertificate | Self::NoAlpn | Self::Protocol(_) => Fault::Peer,
            Self::Alert(_) | Self::Own(_) => Fault::Us,
            Self::Io(_) => Fault::Network,
        }
    }

    /// A short name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Rejected(rejection) => rejection.label(),
            Self::NoCertificate => "no_certificate",
            Self::NoAlpn => "no_alpn",
            Self::Alert(_) => "alert",
            Self::Protocol(_) => "protocol",
            Self::Own(_) => "own",
            Self::Io(_) => "io",
        }
    }

    /// Recovers what TLS had to say from an I/O error, also one that layers above have wrapped.
    ///
    /// In TLS 1.3 the client has finished its handshake before the server looks at its certificate, so a refusal
    /// reaches the client as an I/O error of its first read.
    pub fn from_io(error: io::Error) -> Self {
        match find_tls(&error) {
            Some(tls) => Self::from_tls(tls.clone()),
            None => Self::Io(error),
        }
    }

    fn from_tls(error: rustls::Error) -> Self {
        use rustls::{CertificateError, Error as Tls};
        match error {
            Tls::InvalidCertificate(CertificateError::Other(ref other)) => match other.0.downcast_ref::<Rejection>() {
                Some(rejection) => Self::Rejected(rejection.clone()),
                // What another of our verifiers has to say, without rustls' words around it.
                None => Self::Protocol(other.0.clone()),
            },
            Tls::NoCertificatesPresented => Self::NoCertificate,
            Tls::NoApplicationProtocol => Self::NoAlpn,
            Tls::AlertReceived(alert) => Self::Alert(format!("{alert:?}")),
            Tls::General(_) | Tls::FailedToGetCurrentTime | Tls::FailedToGetRandomBytes | Tls::InconsistentKeys(_) => {
                Self::Own(Arc::new(error))
            }
            _ => Self::Protocol(Arc::new(error)),
        }
    }
}

/// Follows the sources of an error down to what rustls said.
fn find_tls(error: &io::Error) -> Option<&rustls::Error> {
    let mut current: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|e| e as _);
    while let Some(cause) = current {
        if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        current = match cause.downcast_ref::<io::Error>() {
            // `io::Error::source` skips the error it wraps.
            Some(io) => io.get_ref().map(|e| e as _),
            None => cause.source(),
        };
    }
    None
}
