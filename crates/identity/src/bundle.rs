//! Trust bundles: the roots of each trust domain, kept apart.
//!
//! There is no operation that gives the roots of all domains together: a certificate that claims an identity of
//! one domain can only ever be checked against the roots of that domain.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, TrustAnchor};
use zspire_model::TrustDomain;

use crate::pem;

/// The roots of one trust domain; never empty.
#[derive(Debug, Clone)]
pub struct Bundle {
    roots: Arc<[CertificateDer<'static>]>,
    anchors: Arc<[TrustAnchor<'static>]>,
}

impl Bundle {
    /// A bundle of DER roots.
    pub fn new(roots: Vec<CertificateDer<'static>>) -> Result<Self, Error> {
        if roots.is_empty() {
            return Err(Error::Empty);
        }
        let anchors = roots
            .iter()
            .map(|der| webpki::anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned()))
            .collect::<Result<Arc<[_]>, _>>()
            .map_err(|e| Error::Root(e.to_string()))?;
        Ok(Self { roots: roots.into(), anchors })
    }

    /// A bundle of every certificate in a PEM text.
    pub fn from_pem(text: &[u8]) -> Result<Self, Error> {
        Self::new(pem::certificates(text)?)
    }

    /// The roots as DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        self.roots == other.roots
    }
}

/// The bundle of each trust domain that is trusted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bundles(BTreeMap<TrustDomain, Bundle>);

impl Bundles {
    /// Trust in one domain only.
    pub fn of(domain: TrustDomain, bundle: Bundle) -> Self {
        Self(BTreeMap::from([(domain, bundle)]))
    }

    /// The bundle of `domain`, if that domain is trusted at all.
    pub fn get(&self, domain: &TrustDomain) -> Option<&Bundle> {
        self.0.get(domain)
    }

    /// Every domain with its bundle.
    pub fn iter(&self) -> impl Iterator<Item = (&TrustDomain, &Bundle)> {
        self.0.iter()
    }
}

impl FromIterator<(TrustDomain, Bundle)> for Bundles {
    fn from_iter<T: IntoIterator<Item = (TrustDomain, Bundle)>>(iter: T) -> Self {
        Self(iter.into_iter().collect())
    }
}

/// Why roots cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No root at all.
    #[error("a trust bundle needs at least one root certificate")]
    Empty,
    /// A root that is not a usable certificate.
    #[error("a root certificate cannot be used: {0}")]
    Root(String),
    /// The text is not PEM.
    #[error(transparent)]
    Pem(#[from] pem::Error),
}
