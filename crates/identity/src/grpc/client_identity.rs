//! The client certificate of a node that has joined, as its control connections show it.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use rustls::sign::SingleCertAndKey;
use zspire_model::SpiffeId;

use crate::credentials::Invalid;
use crate::key::PrivateKey;
use crate::x509::Leaf;

/// A client certificate with its key.
pub struct ClientIdentity {
    id: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    key: Arc<SingleCertAndKey>,
}

impl ClientIdentity {
    /// From a chain, leaf first, and the key of the leaf.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: &PrivateKey) -> Result<Self, Invalid> {
        let leaf = Leaf::parse(chain.first().ok_or(Invalid::Empty)?)?;
        let key = key.certify(chain)?;
        Ok(Self { id: leaf.id, not_before: leaf.not_before, not_after: leaf.not_after, key })
    }

    /// Who it says this is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// First moment of validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Last moment of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub(crate) fn resolver(&self) -> Arc<SingleCertAndKey> {
        self.key.clone()
    }
}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientIdentity")
            .field("id", &self.id)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}
