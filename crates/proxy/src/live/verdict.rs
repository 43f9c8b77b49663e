//! What policies are asked about a connection, and why a live one is cut.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use zspire_model::authorize::{self, Connection};
use zspire_model::{Snapshot, SpiffeId, Workload};

use crate::flow::Failure;
use crate::metrics::Flag;

/// What a policy was asked about a connection, to ask again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Question {
    pub(crate) destination: SocketAddr,
    pub(crate) peer: Option<SpiffeId>,
    pub(crate) peer_address: IpAddr,
}

impl Question {
    /// Asks the policies of a snapshot.
    pub(crate) fn ask(&self, snapshot: &Snapshot, workload: &Workload) -> authorize::Verdict {
        authorize::authorize(snapshot, &self.about(workload))
    }

    pub(crate) fn about<'a>(&'a self, workload: &'a Workload) -> Connection<'a> {
        Connection {
            destination: workload,
            destination_address: self.destination,
            peer: self.peer.as_ref(),
            peer_address: self.peer_address,
        }
    }
}

/// Why connections are cut, as metrics name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// A policy denies it now.
    Policy,
    /// The pod has another identity now.
    Identity,
    /// Discovery does not know the pod any more.
    WorkloadGone,
    /// The pod must not be served as that workload any more.
    Refused,
    /// The source of identities took the pod's credentials away.
    CredentialsRevoked,
    /// The pod's own certificate has expired.
    CredentialsExpired,
    /// The peer's certificate is revoked.
    PeerRevoked,
    /// The peer's certificate has expired, and it has shown no newer one.
    PeerExpired,
    /// The peer's certificate is no longer trusted for another reason.
    PeerUntrusted,
    /// The proxy stops.
    Shutdown,
}

impl Reason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Identity => "identity_changed",
            Self::WorkloadGone => "workload_gone",
            Self::Refused => "wrong_namespace",
            Self::CredentialsRevoked => "credentials_revoked",
            Self::CredentialsExpired => "credentials_expired",
            Self::PeerRevoked => "peer_revoked",
            Self::PeerExpired => "peer_expired",
            Self::PeerUntrusted => "peer_untrusted",
            Self::Shutdown => "shutdown",
        }
    }

    fn flag(self) -> Flag {
        match self {
            Self::Policy => Flag::Deny,
            Self::Identity | Self::WorkloadGone | Self::Refused => Flag::IdentityError,
            Self::CredentialsRevoked | Self::CredentialsExpired => Flag::IdentityError,
            Self::PeerExpired | Self::PeerUntrusted => Flag::TlsFailure,
            Self::PeerRevoked => Flag::CertRevoked,
            Self::Shutdown => Flag::None,
        }
    }
}

/// An end that is imposed on a connection.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    pub(crate) reason: Reason,
    pub(crate) failure: Failure,
}

impl Verdict {
    pub(crate) fn new(reason: Reason, why: impl fmt::Display) -> Self {
        Self { reason, failure: Failure::new(reason.flag(), format_args!("connection closed: {why}")) }
    }
}
