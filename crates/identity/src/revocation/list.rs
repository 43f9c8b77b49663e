//! One revocation list, and the keys that lists are signed with.
//!
//! Read by two parsers: webpki's is strict about what a list may contain and finds serial numbers, x509-parser's knows the
//! dates and the extensions. The signature is checked with the algorithms that chains are checked with.

use std::fmt;
use std::time::SystemTime;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::TrustAnchor;
use webpki::{Cert, CertRevocationList, OwnedCertRevocationList};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, ParsedExtension, X509Certificate};

use crate::clock;

const SEQUENCE: u8 = 0x30;
const BIT_STRING: u8 = 0x03;

/// A name and the key that goes with it: the public part of a CA, as far as it concerns lists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Issuer {
    /// Content of the DER name.
    pub(super) name: Vec<u8>,
    /// Content of the DER SubjectPublicKeyInfo.
    pub(super) key: Vec<u8>,
    /// Whether it may sign lists.
    signs: bool,
}

impl Issuer {
    pub(super) fn of_certificate(certificate: &Cert<'_>) -> Option<Self> {
        let info = certificate.subject_public_key_info();
        let (key, _) = value(SEQUENCE, info.as_ref())?;
        let signs = may_sign_lists(certificate.der().as_ref());
        Some(Self { name: certificate.subject().to_vec(), key: key.to_vec(), signs })
    }

    /// Roots are not asked for their key usage: what they sign is what they are trusted for.
    pub(super) fn of_anchor(anchor: &TrustAnchor<'_>) -> Self {
        let (name, key) = (anchor.subject.as_ref().to_vec(), anchor.subject_public_key_info.as_ref().to_vec());
        Self { name, key, signs: true }
    }
}

/// RFC 5280 §6.3.3 (f): a key usage, if there is one, must include cRLSign.
fn may_sign_lists(der: &[u8]) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return false };
    certificate.extensions().iter().all(|extension| match extension.parsed_extension() {
        ParsedExtension::KeyUsage(usage) => usage.crl_sign(),
        _ => true,
    })
}

pub(super) struct List {
    list: CertRevocationList<'static>,
    /// For messages.
    pub(super) issuer_name: String,
    pub(super) next_update: SystemTime,
    /// How many certificates it names.
    pub(super) revoked: usize,
    scope: Scope,
    /// Of the DER: what is signed, the algorithm, the signature.
    signed: Vec<u8>,
    algorithm: Vec<u8>,
    signature: Vec<u8>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Of which certificates a list can say that they are not revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    All,
    Leaves,
    Authorities,
    /// One of several parts of a list: what it does not name another part may.
    Part,
}

impl List {
    pub(super) fn parse(der: &[u8], algorithms: WebPkiSupportedAlgorithms) -> Result<Self, String> {
        let list = OwnedCertRevocationList::from_der(der).map_err(|error| format!("not a usable list: {error:?}"))?;
        let (_, parsed) =
            CertificateRevocationList::from_der(der).map_err(|error| format!("not a usable list: {error}"))?;
        let (signed, algorithm, signature) = parts(der).ok_or("not a usable list: malformed")?;
        let next_update = parsed.next_update().ok_or("it does not say when the next one comes")?;
        Ok(Self {
            list: list.into(),
            issuer_name: printable(&parsed.issuer().to_string()),
            next_update: clock::from_unix(next_update.timestamp()),
            revoked: parsed.iter_revoked_certificates().count(),
            scope: scope(&parsed),
            signed: signed.to_vec(),
            algorithm: algorithm.to_vec(),
            signature: signature.to_vec(),
            algorithms,
        })
    }

    pub(super) fn issuer(&self) -> &[u8] {
        self.list.issuer()
    }

    pub(super) fn is_of(&self, issuer: &[u8]) -> bool {
        self.list.issuer() == issuer
    }

    /// Whether it names a certificate. What is malformed names everything.
    pub(super) fn lists(&self, serial: &[u8]) -> bool {
        !matches!(self.list.find_serial(serial), Ok(None))
    }

    /// Whether a certificate that it does not name is not revoked.
    pub(super) fn covers(&self, leaf: bool) -> bool {
        match self.scope {
            Scope::All => true,
            Scope::Leaves => leaf,
            Scope::Authorities => !leaf,
            Scope::Part => false,
        }
    }

    pub(super) fn is_signed_by(&self, issuer: &Issuer) -> bool {
        let Some((key_algorithm, rest)) = value(SEQUENCE, &issuer.key) else { return false };
        // A key is whole bytes: no bit is unused.
        let Some(([0, key @ ..], [])) = value(BIT_STRING, rest) else { return false };
        let suitable = self.algorithms.all.iter().filter(|algorithm| {
            algorithm.signature_alg_id().as_ref() == self.algorithm
                && algorithm.public_key_alg_id().as_ref() == key_algorithm
        });
        let verified = |algorithm: &&dyn rustls::pki_types::SignatureVerificationAlgorithm| {
            algorithm.verify_signature(key, &self.signed, &self.signature).is_ok()
        };
        issuer.signs && suitable.copied().any(|algorithm| verified(&algorithm))
    }

    pub(super) fn describe(&self) -> String {
        format!("the revocation list of {}", self.issuer_name)
    }
}

impl fmt::Debug for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("List")
            .field("issuer", &self.issuer_name)
            .field("revoked", &self.revoked)
            .finish_non_exhaustive()
    }
}

fn scope(list: &CertificateRevocationList<'_>) -> Scope {
    let points = list.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::IssuingDistributionPoint(point) => Some(match point {
            point if point.distribution_point.is_some() => Scope::Part,
            point if point.only_contains_user_certs => Scope::Leaves,
            point if point.only_contains_ca_certs => Scope::Authorities,
            _ => Scope::All,
        }),
        ParsedExtension::ParseError { .. } => Some(Scope::Part),
        _ => None,
    });
    points.unwrap_or(Scope::All)
}

/// Signed part (with its header), content of the algorithm, and signature of a signed DER structure.
fn parts(der: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (content, []) = value(SEQUENCE, der)? else { return None };
    let (_, rest) = value(SEQUENCE, content)?;
    let signed = &content[..content.len() - rest.len()];
    let (algorithm, rest) = value(SEQUENCE, rest)?;
    let ([0, signature @ ..], []) = value(BIT_STRING, rest)? else { return None };
    Some((signed, algorithm, signature))
}

/// The content of the DER value that `bytes` begins with, and what follows it.
pub(super) fn value(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let [found, length, rest @ ..] = bytes else { return None };
    let (length, rest) = match length {
        0..=0x7f => (usize::from(*length), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(length & 0x7f))?;
            (digits.iter().fold(0, |length, digit| (length << 8) | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    (*found == tag).then(|| rest.split_at_checked(length)).flatten()
}

/// A name in a file, made safe for a log line.
fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_der() {
        assert_eq!(value(0x30, &[0x30, 1, 9, 8]), Some((&[9][..], &[8][..])));
        assert_eq!(value(0x30, &[0x30, 0x81, 1, 9]), Some((&[9][..], &[][..])));
        assert_eq!(value(0x30, &[0x30, 0x82, 0, 1, 9]), Some((&[9][..], &[][..])));
        for bad in [
            &[][..],
            &[0x30],
            &[0x31, 0],
            &[0x30, 2, 9],
            &[0x30, 0x80],
            &[0x30, 0x85, 0, 0, 0, 0, 0],
            &[0x30, 0x84, 255],
        ] {
            assert_eq!(value(0x30, bad), None, "{bad:?}");
        }
    }
}
