//! What certificates say, read without trusting it: the X.509-SVID profile of a leaf, and views for operators.
//!
//! Nothing here verifies a signature; that is `tls::verify`. The same [`Leaf`] is read from the same bytes
//! by the verifier and by whoever authorizes a connection, so both see one identity.

use std::time::SystemTime;

use aws_lc_rs::digest;
use x509_parser::oid_registry::OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER;
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};
use zspire_model::SpiffeId;

use crate::clock;
use crate::tls::Rejection;

/// SHA-256 over the DER of a certificate.
pub type Fingerprint = [u8; 32];

/// Fingerprint of a DER certificate.
pub fn fingerprint(der: &[u8]) -> Fingerprint {
    let mut out = Fingerprint::default();
    out.copy_from_slice(digest::digest(&digest::SHA256, der).as_ref());
    out
}

/// Who has signed a certificate: the name and the key that it refers to. None if it cannot be read.
pub(crate) fn issuer(der: &[u8]) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let mut extensions = certificate.extensions().iter();
    let key = extensions.find(|extension| extension.oid == OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER);
    Some((certificate.issuer().as_raw().to_vec(), key.map(|extension| extension.value.to_vec())))
}

/// The leaf certificate of an SVID, conforming to the X.509-SVID profile. It has not been verified.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) id: SpiffeId,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

impl Leaf {
    /// Reads a leaf and checks the profile (X509-SVID.md §2, §4, appendix A): exactly one URI SAN, a SPIFFE ID with
    /// a path, not a CA, a key usage with `digitalSignature` and without `keyCertSign` and `cRLSign`.
    pub(crate) fn parse(der: &[u8]) -> Result<Self, Rejection> {
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| Rejection::Malformed("not X.509"))?;
        if !rest.is_empty() {
            return Err(Rejection::Malformed("bytes after the certificate"));
        }
        let id = spiffe_id(&certificate)?;
        check_profile(&certificate)?;
        let validity = certificate.validity();
        Ok(Self {
            id,
            not_before: clock::from_unix(validity.not_before.timestamp()),
            not_after: clock::from_unix(validity.not_after.timestamp()),
        })
    }
}

fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, Rejection> {
    let mut uris = Vec::new();
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(san) => {
                uris.extend(san.general_names.iter().filter_map(|name| match name {
                    GeneralName::URI(uri) => Some(*uri),
                    _ => None,
                }));
            }
            ParsedExtension::ParseError { .. } => return Err(Rejection::Malformed("an extension cannot be parsed")),
            _ => {}
        }
    }
    match uris[..] {
        [] => Err(Rejection::NoUriSan),
        [uri] => {
            let id = uri
                .parse::<SpiffeId>()
                .map_err(|e| Rejection::NotSpiffe { uri: printable(uri), why: e.to_string().into() })?;
            if id.path().is_empty() {
                return Err(Rejection::NotAWorkload { id });
            }
            Ok(id)
        }
        _ => Err(Rejection::SeveralUriSans(uris.len())),
    }
}

fn check_profile(certificate: &X509Certificate<'_>) -> Result<(), Rejection> {
    let violated = |what| Err(Rejection::Profile(what));
    let mut key_usage = None;
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return violated("it is a CA certificate");
            }
            ParsedExtension::KeyUsage(usage) => key_usage = Some(usage),
            _ => {}
        }
    }
    let Some(usage) = key_usage else { return violated("it has no key usage") };
    if !usage.digital_signature() {
        return violated("its key usage lacks digitalSignature");
    }
    if usage.key_cert_sign() || usage.crl_sign() {
        return violated("its key usage allows signing certificates");
    }
    Ok(())
}

/// What a peer sent, made safe for a log line: bounded and without control characters.
fn printable(text: &str) -> String {
    text.chars().take(256).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The public side of a certificate, for admin views.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateView {
    /// PEM with a trailing newline.
    pub pem: String,
    /// Decimal, as `istioctl` expects it.
    pub serial: String,
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
}

impl CertificateView {
    /// Reads a DER certificate; `None` if it is not one.
    pub fn parse(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        Some(Self {
            pem: crate::pem::certificate(der),
            serial: certificate.serial.to_string(),
            not_before: clock::from_unix(certificate.validity().not_before.timestamp()),
            not_after: clock::from_unix(certificate.validity().not_after.timestamp()),
        })
    }
}
