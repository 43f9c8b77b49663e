//! What the series of connections are told apart by: upstream's labels, and the words in them.

use std::fmt::{self, Write as _};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use zspire_model::{Service, SpiffeId, Str, Workload};

/// Which end of a connection reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's proxy.
    Destination,
}

impl Reporter {
    /// As in the `reporter` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// Why a connection ended otherwise than by itself: the `response_flags` label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    /// Nothing to report.
    None,
    /// Refused by policy.
    Deny,
    /// The destination could not be connected.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// HTTP/2 could not be set up.
    H2HandshakeFailure,
    /// No answer from the peer's HBONE port: probably a network policy.
    NetworkPolicy,
    /// No certificate.
    IdentityError,
    /// The peer's certificate is revoked.
    CertRevoked,
}

impl Flag {
    /// As in the `response_flags` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

/// Who took part in a connection, as far as it is known.
#[derive(Debug, Clone)]
pub struct Ends {
    pub reporter: Reporter,
    pub source: Option<Arc<Workload>>,
    pub source_identity: Option<SpiffeId>,
    pub destination: Option<Arc<Workload>>,
    pub destination_identity: Option<SpiffeId>,
    pub service: Option<Arc<Service>>,
    /// Whether both ends are authenticated.
    pub mutual_tls: bool,
}

/// One label set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Labels {
    reporter: Reporter,
    pub(super) source: Side,
    pub(super) destination: Side,
    service: [Str; 3],
    mutual_tls: bool,
    flag: Flag,
}

/// By what tells label sets apart nearly always: a series is looked up for each connection.
impl Hash for Labels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.source, &self.destination, &self.service[0], self.flag).hash(state);
    }
}

impl Labels {
    pub(super) fn new(ends: &Ends, flag: Flag) -> Self {
        let service = match &ends.service {
            Some(s) => [s.hostname.clone(), s.namespace.clone(), s.name.clone()],
            None => Default::default(),
        };
        Self {
            reporter: ends.reporter,
            source: Side::new(ends.source.as_deref(), ends.source_identity.as_ref()),
            destination: Side::new(ends.destination.as_deref(), ends.destination_identity.as_ref()),
            service,
            mutual_tls: ends.mutual_tls,
            flag,
        }
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let (s, d) = (&self.source, &self.destination);
        let policy = if self.mutual_tls { "mutual_tls" } else { "unknown" };
        let all: [(&str, &str); 27] = [
            ("reporter", self.reporter.as_str()),
            ("source_workload", &s.workload),
            ("source_canonical_service", &s.canonical_service),
            ("source_canonical_revision", &s.canonical_revision),
            ("source_workload_namespace", &s.namespace),
            ("source_principal", &s.principal),
            ("source_app", &s.canonical_service),
            ("source_version", &s.canonical_revision),
            ("source_cluster", &s.cluster),
            ("destination_service", &self.service[0]),
            ("destination_service_namespace", &self.service[1]),
            ("destination_service_name", &self.service[2]),
            ("destination_workload", &d.workload),
            ("destination_canonical_service", &d.canonical_service),
            ("destination_canonical_revision", &d.canonical_revision),
            ("destination_workload_namespace", &d.namespace),
            ("destination_principal", &d.principal),
            ("destination_app", &d.canonical_service),
            ("destination_version", &d.canonical_revision),
            ("destination_cluster", &d.cluster),
            ("request_protocol", "tcp"),
            ("response_flags", self.flag.as_str()),
            ("connection_security_policy", policy),
            ("source_region", &s.region),
            ("source_zone", &s.zone),
            ("destination_region", &d.region),
            ("destination_zone", &d.zone),
        ];
        encode_labels(encoder, &all)
    }
}

/// The labels of one workload. Empty texts are shown as `unknown`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Side {
    pub(super) workload: Str,
    canonical_service: Str,
    canonical_revision: Str,
    pub(super) namespace: Str,
    pub(super) principal: Str,
    cluster: Str,
    region: Str,
    zone: Str,
}

/// As for [`Labels`].
impl Hash for Side {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.workload, &self.namespace, &self.principal, &self.cluster, &self.zone).hash(state);
    }
}

impl Side {
    pub(super) fn new(workload: Option<&Workload>, identity: Option<&SpiffeId>) -> Self {
        let mut side =
            Self { principal: identity.map_or_else(Str::default, |id| id.text().clone()), ..Self::default() };
        if let Some(w) = workload {
            side.workload = w.workload_name.clone();
            side.canonical_service = w.canonical_name.clone();
            side.canonical_revision = w.canonical_revision.clone();
            side.namespace = w.namespace.clone();
            side.cluster = w.cluster_id.clone();
            side.region = w.locality.region.clone();
            side.zone = w.locality.zone.clone();
        }
        side
    }
}

/// The labels of a lookup.
pub(super) struct LookupLabels<'a>(pub(super) &'a Side, pub(super) &'a str);

impl EncodeLabelSet for LookupLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let s = self.0;
        let all: [(&str, &str); 11] = [
            ("source_workload", &s.workload),
            ("source_canonical_service", &s.canonical_service),
            ("source_canonical_revision", &s.canonical_revision),
            ("source_workload_namespace", &s.namespace),
            ("source_principal", &s.principal),
            ("source_app", &s.canonical_service),
            ("source_version", &s.canonical_revision),
            ("source_cluster", &s.cluster),
            ("source_region", &s.region),
            ("source_zone", &s.zone),
            ("hostname", self.1),
        ];
        encode_labels(encoder, &all)
    }
}

fn encode_labels(encoder: &mut LabelSetEncoder<'_>, all: &[(&str, &str)]) -> fmt::Result {
    for (name, value) in all {
        let mut label = encoder.encode_label();
        let mut key = label.encode_label_key()?;
        key.write_str(name)?;
        let mut text = key.encode_label_value()?;
        text.write_str(if value.is_empty() { "unknown" } else { value })?;
        text.finish()?;
    }
    Ok(())
}
