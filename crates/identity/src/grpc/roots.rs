//! Which roots the server of a control connection (CA, discovery) must lead to.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

use crate::pem;
use crate::x509::{self, Fingerprint};

/// Where the roots come from. They are read for every new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// A PEM file.
    File(PathBuf),
    /// The roots of the operating system.
    System,
    /// PEM text.
    Inline(Arc<str>),
    /// The root itself is not known, only its SHA-256; the server has to send it along. Used for joining.
    Pinned(Fingerprint),
}

impl Roots {
    /// As in `CA_ROOT_CA` and `XDS_ROOT_CA`: a path, `SYSTEM`, or PEM.
    pub fn parse(setting: &str) -> Self {
        match setting.trim() {
            "SYSTEM" => Self::System,
            text if text.contains("-----BEGIN ") => Self::Inline(text.into()),
            path => Self::File(path.into()),
        }
    }

    /// The file to watch, if there is one.
    pub(crate) fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::File(path) => Some(path),
            _ => None,
        }
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        match self {
            Self::Pinned(_) => Ok(Vec::new()),
            Self::System => system(),
            Self::Inline(text) => pem::certificates(text.as_bytes()).map_err(Error::Inline),
            Self::File(path) => {
                let text = std::fs::read(path).map_err(|source| Error::Read { path: path.clone(), source })?;
                pem::certificates(&text).map_err(|source| Error::Content { path: path.clone(), source })
            }
        }
    }
}

/// Roots, and what they were when they could last be read.
///
/// A file that is caught empty, cut off or missing while somebody replaces it says nothing against the roots that it had before.
#[derive(Debug)]
pub(crate) struct Remembered {
    from: Roots,
    last: Mutex<Option<Arc<RootCertStore>>>,
}

impl Remembered {
    pub(crate) fn new(from: Roots) -> Self {
        Self { from, last: Mutex::default() }
    }

    /// What checks a server against the roots as they are now, or against those before if they cannot be read.
    pub(crate) fn verifier(&self, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, Error> {
        if let Roots::Pinned(fingerprint) = &self.from {
            return Ok(Arc::new(Pinned { fingerprint: *fingerprint, provider: provider.clone() }));
        }
        let read = self.from.certificates().and_then(store);
        let mut last = self.last.lock().expect("nothing panics while holding it");
        match (read, &*last) {
            (Ok(roots), _) => *last = Some(roots),
            (Err(error), Some(_)) => {
                let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(%error, why, "keeping the roots of the control plane as they were");
            }
            (Err(error), None) => return Err(error),
        }
        let roots = last.clone().ok_or(Error::Unusable)?;
        verifier(roots, provider)
    }
}

fn system() -> Result<Vec<CertificateDer<'static>>, Error> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let why = found.errors.first().map_or_else(|| "none installed".to_owned(), ToString::to_string);
        return Err(Error::System(why));
    }
    Ok(found.certs)
}

fn store(certificates: Vec<CertificateDer<'static>>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(certificates);
    if usable == 0 {
        return Err(Error::Unusable);
    }
    Ok(Arc::new(roots))
}

fn verifier(roots: Arc<RootCertStore>, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, Error> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
    Ok(verifier.build().map_err(|_| Error::Unusable)?)
}

/// Trusts the one root with this fingerprint, which the server sends with its chain.
#[derive(Debug)]
struct Pinned {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let root = intermediates.iter().find(|der| x509::fingerprint(der) == self.fingerprint).ok_or_else(|| {
            let why = Error::WrongRoot;
            rustls::CertificateError::Other(rustls::OtherError(Arc::new(why)))
        })?;
        let verifier = store(vec![root.clone().into_owned()])
            .and_then(|roots| verifier(roots, &self.provider))
            .map_err(|e| rustls::CertificateError::Other(rustls::OtherError(Arc::new(e))))?;
        verifier.verify_server_cert(leaf, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Why there are no roots to check a server against.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error(
        "cannot read the root certificates in {}: put the root of the control plane there (for Istio the ConfigMap istio-ca-root-cert), or set SYSTEM",
        .path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It does not hold certificates.
    #[error("{} does not hold root certificates in PEM: replace it with the root of the control plane", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: pem::Error,
    },
    /// The inline PEM is broken.
    #[error(
        "the root certificates given inline cannot be used: CA_ROOT_CA and XDS_ROOT_CA take a path, SYSTEM, or PEM"
    )]
    Inline(#[source] pem::Error),
    /// The operating system has none.
    #[error("the operating system has no root certificates ({0}): install ca-certificates")]
    System(String),
    /// Parsed as PEM, but no usable certificate among them.
    #[error("none of the root certificates can be used: give those of the control plane (CA_ROOT_CA, XDS_ROOT_CA)")]
    Unusable,
    /// The server is not the one that the join token was made by.
    #[error(
        "the server does not show the root certificate that the join token names: wrong address, or a server in between"
    )]
    WrongRoot,
}
