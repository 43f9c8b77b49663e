//! Private keys of leaf certificates: made here, zeroed when dropped, never printed.
//!
//! The DER held by this type is zeroed on drop. What rustls and aws-lc keep while a key is in use is theirs: aws-lc
//! cleanses its memory when it frees a key, copies inside a running handshake are out of our reach.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rcgen::{CertificateParams, DistinguishedName, PublicKeyData, SanType, SignatureAlgorithm, SigningKey};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use zeroize::Zeroizing;
use zspire_model::SpiffeId;

use crate::pem;

/// The private key of a certificate, PKCS#8.
pub struct PrivateKey {
    pkcs8: Zeroizing<Vec<u8>>,
}

impl PrivateKey {
    /// A new P-256 key.
    pub fn generate() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("the random source works");
        let document = pair.to_pkcs8v1().expect("a P-256 key has a PKCS#8 form");
        Self { pkcs8: Zeroizing::new(document.as_ref().to_vec()) }
    }

    /// A key in PKCS#8 DER; it is looked at when it is used.
    pub fn from_pkcs8(der: Vec<u8>) -> Self {
        Self { pkcs8: Zeroizing::new(der) }
    }

    /// The first PKCS#8 key of a PEM text.
    pub fn from_pem(text: &[u8]) -> Result<Self, Unusable> {
        let key =
            PrivatePkcs8KeyDer::from_pem_slice(text).map_err(|_| Unusable("no PKCS#8 PRIVATE KEY block found"))?;
        Ok(Self::from_pkcs8(key.secret_pkcs8_der().to_vec()))
    }

    /// PEM, for a file that only its owner may read.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(pem::encode("PRIVATE KEY", &self.pkcs8))
    }

    /// A certificate signing request in PEM with an empty subject and, as a critical extension, `id` as its URI SAN.
    /// Without `id` the CA decides by who is asking.
    pub fn request(&self, id: Option<&SpiffeId>) -> Result<String, Unusable> {
        let signer = P256::new(&self.pkcs8)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(id) = id {
            let uri = id.to_string().try_into().map_err(|_| Unusable("the SPIFFE ID is not ASCII"))?;
            params.subject_alt_names = vec![SanType::URI(uri)];
        }
        let csr = params.serialize_request(&signer).map_err(|_| Unusable("it cannot sign a request"))?;
        csr.pem().map_err(|_| Unusable("the request has no PEM form"))
    }

    /// This key with its chain, for rustls. Fails if they do not belong together.
    pub(crate) fn certify(&self, chain: Vec<CertificateDer<'static>>) -> Result<Arc<SingleCertAndKey>, Unusable> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pkcs8.as_slice()));
        let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der)
            .map_err(|_| Unusable("it is of a kind that TLS here does not support"))?;
        let certified = CertifiedKey::new(chain, signing);
        certified.keys_match().map_err(|_| Unusable("it does not belong to the certificate"))?;
        Ok(Arc::new(certified.into()))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

/// Why a private key is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the private key cannot be used: {0}")]
pub struct Unusable(pub(crate) &'static str);

/// A P-256 key as rcgen wants to see one; aws-lc cleanses it when it is dropped.
struct P256(EcdsaKeyPair);

impl P256 {
    fn new(pkcs8: &[u8]) -> Result<Self, Unusable> {
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8)
            .map(Self)
            .map_err(|_| Unusable("it is not a P-256 key"))
    }
}

impl PublicKeyData for P256 {
    fn der_bytes(&self) -> &[u8] {
        self.0.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for P256 {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let random = aws_lc_rs::rand::SystemRandom::new();
        let signature = self.0.sign(&random, message).map_err(|_| rcgen::Error::RingUnspecified)?;
        Ok(signature.as_ref().to_vec())
    }
}
