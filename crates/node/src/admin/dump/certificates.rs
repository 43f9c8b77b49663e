//! Certificates as the dump shows them: public parts, base64 of PEM, serial numbers in decimal.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use zspire_identity::x509::CertificateView;
use zspire_identity::{Entry, State};

/// One identity of this proxy.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    identity: String,
    /// `Available`, `Initializing: …`, `Unavailable: …`, `Revoked: …`.
    state: String,
    /// Which source issued it.
    source: String,
    /// The workload it was issued to, for sources that attest workloads.
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    cert_chain: Vec<Cert>,
    root_certs: Vec<Cert>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Cert {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

impl Certificate {
    pub(super) fn new(entry: &Entry) -> Self {
        Self {
            identity: entry.id.to_string(),
            state: match &entry.state {
                State::Ready(_) => "Available".into(),
                State::Pending { why } => format!("Initializing: {why}"),
                State::Failed { why, .. } => format!("Unavailable: {why}"),
                State::Revoked { why } => format!("Revoked: {why}"),
            },
            source: entry.source.to_string(),
            workload: entry.workload.as_ref().map(ToString::to_string),
            cert_chain: entry.chain.iter().map(Cert::new).collect(),
            root_certs: entry.roots.iter().map(Cert::new).collect(),
        }
    }
}

impl Cert {
    fn new(view: &CertificateView) -> Self {
        Self {
            pem: STANDARD.encode(&view.pem),
            serial_number: view.serial.clone(),
            valid_from: crate::rfc3339_seconds(view.not_before),
            expiration_time: crate::rfc3339_seconds(view.not_after),
        }
    }
}
