//! PEM in and out. What is wrong with a file is told with its label, never with its content.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use zeroize::Zeroizing;

/// One PEM block with a trailing newline.
pub(crate) fn encode(label: &str, der: &[u8]) -> String {
    let body = Zeroizing::new(STANDARD.encode(der));
    let mut text = String::with_capacity(body.len() + body.len() / 64 + 2 * label.len() + 40);
    text.push_str(&format!("-----BEGIN {label}-----\n"));
    for line in body.as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

/// A certificate as PEM.
pub fn certificate(der: &[u8]) -> String {
    encode("CERTIFICATE", der)
}

/// Every certificate of a PEM text, in order. Text around the blocks and blocks of other kinds are ignored.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found = CertificateDer::pem_slice_iter(text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| Error::Malformed(e.to_string()))?;
    if found.is_empty() { Err(Error::NoCertificate) } else { Ok(found) }
}

/// Why a PEM text cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Broken armour or base64.
    #[error("not valid PEM: {0}")]
    Malformed(String),
    /// No `CERTIFICATE` block in it.
    #[error("no CERTIFICATE block found")]
    NoCertificate,
}
