//! A certificate authority: a key and a certificate that sign leaf certificates.
//!
//! Knows profiles and keys; who may have which certificate, for how long, and where the CA's own files are is decided
//! by its users: the control plane and the development source.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::SecureRandom as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::oid_registry::{OID_EC_P256, OID_NIST_EC_P384, OID_SIG_ED25519};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};
use x509_parser::public_key::PublicKey as ParsedKey;
use x509_parser::x509::SubjectPublicKeyInfo;
use zeroize::Zeroizing;
use zspire_model::SpiffeId;

use crate::bundle::{Bundle, Bundles};
use crate::clock::{self, unix};
use crate::pem;
use crate::tls::verify::{Role, Verifier};
use crate::tls::{Policy, Rejection};

/// Certificates begin this much before they are made, for clocks that are behind.
pub const BACKDATE: Duration = Duration::from_secs(120);
/// Longest request looked at; one with an RSA key of 8192 bits has half of it.
const MAX_CSR: usize = 16 * 1024;

/// A certificate authority, checked to be able to issue SVIDs that verify.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    chain: Vec<CertificateDer<'static>>,
    roots: Bundle,
    not_after: SystemTime,
}

/// What a certificate authority is made of; all PEM.
pub struct Parts {
    /// The certificate that signs.
    pub certificate: String,
    /// Its private key.
    pub key: Zeroizing<String>,
    /// Certificates between it and the root, starting with itself; empty when it is a root.
    pub chain: String,
    /// The roots that are given to everybody.
    pub roots: String,
}

impl Parts {
    /// A new root for `domain`: P-256, `O=<trust domain>`, like istiod's but for the kind of the key.
    pub fn generate(organization: &str, lifetime: Duration, now: SystemTime) -> Result<Self, Error> {
        let key = KeyPair::generate().map_err(|_| Error::Key("cannot make one"))?;
        let mut params = profile(now - BACKDATE, now + lifetime)?;
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).map_err(|e| Error::Sign(e.to_string()))?;
        let certificate = pem::certificate(certificate.der());
        let key = Zeroizing::new(key.serialize_pem());
        Ok(Self { roots: certificate.clone(), certificate, key, chain: String::new() })
    }
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl Authority {
    /// Checks that the parts belong together by issuing a certificate and verifying it as a peer would: the key fits,
    /// the chain leads to the roots, everything is valid at `now`.
    pub fn new(parts: &Parts, now: SystemTime) -> Result<Self, Error> {
        let certificate = pem::certificates(parts.certificate.as_bytes()).map_err(Error::Certificate)?.remove(0);
        let not_after = check_ca(&certificate)?;
        let key = signing_key(&parts.key)?;
        if !key_fits(&certificate, &key) {
            return Err(Error::Key("it does not belong to the CA certificate"));
        }
        let roots = Bundle::from_pem(parts.roots.as_bytes()).map_err(|e| Error::Roots(e.to_string()))?;
        let mut chain = match parts.chain.trim() {
            "" => Vec::new(),
            text => pem::certificates(text.as_bytes()).map_err(Error::Chain)?,
        };
        let is_root = roots.roots().contains(&certificate);
        if !is_root && !chain.contains(&certificate) {
            chain.insert(0, certificate.clone());
        }
        chain.retain(|der| !roots.roots().contains(der));
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|e| Error::Sign(e.to_string()))?;
        let authority = Self { issuer, chain, roots, not_after };
        authority.probe(now)?;
        Ok(authority)
    }

    fn probe(&self, now: SystemTime) -> Result<(), Error> {
        let id: SpiffeId = "spiffe://probe.invalid/ns/probe/sa/probe".parse().expect("a valid SPIFFE ID");
        let key = KeyPair::generate().map_err(|_| Error::Key("cannot make one"))?;
        let key = PublicKey { algorithm: &rcgen::PKCS_ECDSA_P256_SHA256, bytes: key.public_key_raw().to_vec() };
        let leaf =
            self.sign(&key, &Subject::Workload { id: &id, common_name: false }, now, now + Duration::from_secs(60))?;
        let bundles = Bundles::of(id.trust_domain().clone(), self.roots.clone());
        let verifier = Verifier::new(Arc::new(bundles), &Policy::default());
        verifier.check(&leaf.der, &self.chain, unix(now), Role::Server).map_err(Error::Unusable)?;
        Ok(())
    }

    /// Signs a leaf certificate for `key`, valid from [`BACKDATE`] before `now` until `not_after`.
    pub fn sign(
        &self,
        key: &PublicKey,
        subject: &Subject<'_>,
        now: SystemTime,
        not_after: SystemTime,
    ) -> Result<Issued, Error> {
        let mut params = profile(now - BACKDATE, not_after)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.is_ca = IsCa::ExplicitNoCa;
        params.subject_alt_names = subject.names()?;
        if let Some(name) = subject.common_name() {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        let serial = params.serial_number.as_ref().map(ToString::to_string).unwrap_or_default();
        let certificate = params.signed_by(key, &self.issuer).map_err(|e| Error::Sign(e.to_string()))?;
        Ok(Issued { der: certificate.der().clone(), serial: serial.replace(':', ""), not_after })
    }

    /// Certificates to send after a leaf, without the root; empty when the CA itself is the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The roots that everybody is to trust.
    pub fn roots(&self) -> &Bundle {
        &self.roots
    }

    /// Last moment of the certificate that signs: nothing it issues outlives it.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Last moment of the root that expires first.
    pub fn roots_not_after(&self) -> SystemTime {
        let all = self.roots.roots().iter().filter_map(|der| not_after(der));
        all.min().unwrap_or(self.not_after)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// What every certificate made here has in common: its validity, a random serial number, an empty subject.
fn profile(not_before: SystemTime, not_after: SystemTime) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.not_before = not_before.into();
    params.not_after = not_after.into();
    params.distinguished_name = DistinguishedName::new();
    let mut serial = [0; 16];
    aws_lc_rs::rand::SystemRandom::new().fill(&mut serial).map_err(|_| Error::Sign("no random numbers".into()))?;
    // Positive, and of full length: 126 random bits.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn signing_key(text: &str) -> Result<KeyPair, Error> {
    // PKCS#8, PKCS#1 and SEC1 are all found in the wild.
    let der = rustls::pki_types::PrivateKeyDer::from_pem_slice(text.as_bytes())
        .map_err(|_| Error::Key("no PRIVATE KEY block found"))?;
    KeyPair::try_from(&der)
        .map_err(|_| Error::Key("it is of a kind that is not supported (P-256, P-384, RSA, Ed25519)"))
}

fn key_fits(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
    parsed.public_key().raw == key.subject_public_key_info()
}

fn check_ca(der: &CertificateDer<'_>) -> Result<SystemTime, Error> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| Error::NotCa("it cannot be parsed"))?;
    let Ok(Some(constraints)) = certificate.basic_constraints() else {
        return Err(Error::NotCa("it has no basic constraints"));
    };
    if !constraints.value.ca {
        return Err(Error::NotCa("its basic constraints say that it is none"));
    }
    match certificate.key_usage() {
        Ok(Some(usage)) if !usage.value.key_cert_sign() => Err(Error::NotCa("its key usage lacks keyCertSign")),
        Err(_) => Err(Error::NotCa("its key usage cannot be parsed")),
        Ok(_) => Ok(clock::from_unix(certificate.validity().not_after.timestamp())),
    }
}

/// Last moment of a DER certificate.
fn not_after(der: &[u8]) -> Option<SystemTime> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(clock::from_unix(certificate.validity().not_after.timestamp()))
}

/// Whom a leaf certificate is for.
#[derive(Debug, Clone, Copy)]
pub enum Subject<'a> {
    /// A workload: one URI SAN.
    Workload {
        /// Its identity.
        id: &'a SpiffeId,
        /// Whether the identity is also to be the common name, where it fits.
        common_name: bool,
    },
    /// A server with host names or IP addresses.
    Server(&'a [String]),
}

impl Subject<'_> {
    fn names(&self) -> Result<Vec<SanType>, Error> {
        let wrong = |name: &str| Error::Sign(format!("{name:?} cannot be a name in a certificate"));
        match self {
            Self::Workload { id, .. } => {
                let uri = id.to_string();
                Ok(vec![SanType::URI(uri.as_str().try_into().map_err(|_| wrong(&uri))?)])
            }
            Self::Server(names) => names
                .iter()
                .map(|name| match name.parse::<IpAddr>() {
                    Ok(ip) => Ok(SanType::IpAddress(ip)),
                    Err(_) => Ok(SanType::DnsName(name.as_str().try_into().map_err(|_| wrong(name))?)),
                })
                .collect(),
        }
    }

    fn common_name(&self) -> Option<String> {
        match self {
            // RFC 5280, ub-common-name.
            Self::Workload { id, common_name: true } => Some(id.to_string()).filter(|name| name.len() <= 64),
            _ => None,
        }
    }
}

/// A certificate just made.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// Its serial number, hexadecimal.
    pub serial: String,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

/// A public key that may be certified.
#[derive(Debug, Clone)]
pub struct PublicKey {
    algorithm: &'static SignatureAlgorithm,
    bytes: Vec<u8>,
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

/// A certificate signing request, of which only the key counts.
#[derive(Debug, Clone)]
pub struct Csr {
    /// The key; the requester has proved to hold its private half.
    pub key: PublicKey,
    /// Whether the subject has a common name, for CAs that keep one.
    pub has_common_name: bool,
}

impl Csr {
    /// Reads a PEM request: its size, its form, its signature, and whether its key is strong enough.
    pub fn from_pem(text: &str) -> Result<Self, CsrError> {
        if text.len() > MAX_CSR {
            return Err(CsrError::TooLong);
        }
        let der = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(text.as_bytes())
            .map_err(|_| CsrError::Encoding)?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        let info = &request.certification_request_info;
        let key = accepted_key(&info.subject_pki)?;
        request.verify_signature().map_err(|_| CsrError::Signature)?;
        let has_common_name = info.subject.iter_common_name().next().is_some();
        Ok(Self { key, has_common_name })
    }
}

/// P-256, P-384, RSA from 2048 to 8192 bits, Ed25519.
fn accepted_key(info: &SubjectPublicKeyInfo<'_>) -> Result<PublicKey, CsrError> {
    let parsed = info.parsed().map_err(|_| CsrError::Malformed)?;
    let algorithm = match parsed {
        ParsedKey::RSA(rsa) if (2048..=8192).contains(&rsa.key_size()) => &rcgen::PKCS_RSA_SHA256,
        ParsedKey::RSA(rsa) => return Err(CsrError::Key(format!("RSA with {} bits", rsa.key_size()))),
        ParsedKey::EC(_) => {
            let curve = info.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
            match curve {
                Some(curve) if curve == OID_EC_P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
                Some(curve) if curve == OID_NIST_EC_P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
                _ => return Err(CsrError::Key("a curve other than P-256 and P-384".into())),
            }
        }
        _ if info.algorithm.algorithm == OID_SIG_ED25519 => &rcgen::PKCS_ED25519,
        _ => return Err(CsrError::Key(format!("algorithm {}", info.algorithm.algorithm))),
    };
    Ok(PublicKey { algorithm, bytes: info.subject_public_key.data.to_vec() })
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Longer than any sensible request.
    #[error("certificate signing request is longer than {MAX_CSR} bytes")]
    TooLong,
    /// Not PEM; in istiod's words.
    #[error("certificate signing request is not properly encoded")]
    Encoding,
    /// PEM, but no PKCS#10 in it.
    #[error("certificate signing request cannot be parsed")]
    Malformed,
    /// The requester does not hold the key.
    #[error("certificate signing request has an invalid signature")]
    Signature,
    /// Too weak or unknown.
    #[error(
        "key of the certificate signing request is not accepted: {0}; use P-256, P-384, Ed25519 or RSA with 2048 bits or more"
    )]
    Key(String),
}

/// Why there is no working CA.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The certificate is not PEM.
    #[error("the CA certificate cannot be used: {0}")]
    Certificate(#[source] pem::Error),
    /// A certificate that may not sign others.
    #[error("the CA certificate is not one of a CA: {0}")]
    NotCa(&'static str),
    /// Unusable key.
    #[error("the CA's private key cannot be used: {0}")]
    Key(&'static str),
    /// The chain is not PEM.
    #[error("the CA's certificate chain cannot be used: {0}")]
    Chain(#[source] pem::Error),
    /// The roots are no roots.
    #[error("the root certificates cannot be used: {0}")]
    Roots(String),
    /// What it issues does not verify.
    #[error("certificates of this CA would be refused: {0}")]
    Unusable(#[source] Rejection),
    /// Making a certificate failed.
    #[error("cannot make a certificate: {0}")]
    Sign(String),
}
