//! From an agent's messages to values: DER taken apart, names parsed, everything bounded.

use std::sync::Arc;

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;
use zspire_model::{SpiffeId, TrustDomain};

use super::{Offer, Update};
use crate::bundle::{Bundle, Bundles};

/// SVIDs of one workload that are looked at.
const MAX_OFFERS: usize = 64;
/// Certificates in a chain.
const MAX_CHAIN: usize = 16;
/// Roots of one trust domain.
const MAX_ROOTS: usize = 256;
/// Trust domains of one workload.
const MAX_DOMAINS: usize = 256;
/// Largest message of an agent, in bytes.
pub(super) const MAX_MESSAGE: usize = 4 << 20;

/// A message that is not what the specification asks for: it is reported and ignored (Workload API §5.2.1).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the agent's message is malformed: {0}")]
pub(super) struct Malformed(pub(super) String);

fn malformed(what: impl Into<String>) -> Malformed {
    Malformed(what.into())
}

/// Certificates in DER, one after the other.
pub(super) fn certificates(what: &str, mut der: &[u8], most: usize) -> Result<Vec<CertificateDer<'static>>, Malformed> {
    let mut found = Vec::new();
    while !der.is_empty() {
        if found.len() == most {
            return Err(malformed(format!("{what} has more than {most} certificates")));
        }
        let (rest, _) = X509Certificate::from_der(der).map_err(|_| malformed(format!("{what} is not X.509")))?;
        found.push(CertificateDer::from(der[..der.len() - rest.len()].to_vec()));
        der = rest;
    }
    if found.is_empty() { Err(malformed(format!("{what} is empty"))) } else { Ok(found) }
}

/// One SVID.
///
/// The buffer that the message came in is tonic's, which does not clear it.
pub(super) fn offer(id: &str, chain: Vec<CertificateDer<'static>>, key: &[u8], hint: &str) -> Result<Offer, Malformed> {
    let key = Zeroizing::new(key.to_vec());
    let id: SpiffeId = id.parse().map_err(|e| malformed(format!("a SPIFFE ID of {} bytes: {e}", id.len())))?;
    if key.is_empty() {
        return Err(malformed(format!("the SVID {id} has no key")));
    }
    if chain.is_empty() {
        return Err(malformed(format!("the SVID {id} has no certificate")));
    }
    Ok(Offer { id, chain, key: Arc::new(key), hint: hint.into() })
}

/// A chain in one piece.
pub(super) fn chain(id: &str, der: &[u8]) -> Result<Vec<CertificateDer<'static>>, Malformed> {
    certificates(&format!("the chain of {id}"), der, MAX_CHAIN)
}

/// A chain certificate by certificate.
pub(super) fn chain_of(id: &str, ders: &[Bytes]) -> Result<Vec<CertificateDer<'static>>, Malformed> {
    if ders.len() > MAX_CHAIN {
        return Err(malformed(format!("the chain of {id} has more than {MAX_CHAIN} certificates")));
    }
    Ok(ders.iter().map(|der| CertificateDer::from(der.to_vec())).collect())
}

/// Refuses a message that offers more than anybody needs.
pub(super) fn bounded(offers: usize) -> Result<(), Malformed> {
    if offers > MAX_OFFERS { Err(malformed(format!("it has more than {MAX_OFFERS} SVIDs"))) } else { Ok(()) }
}

/// A trust domain, by its name or its SPIFFE ID: SPIRE's comments say the first, its code sends the second.
pub(super) fn trust_domain(name: &str) -> Result<TrustDomain, Malformed> {
    let bare = name.strip_prefix("spiffe://").unwrap_or(name).trim_end_matches('/');
    bare.parse().map_err(|e| malformed(format!("a trust domain: {e}")))
}

/// The bundle of one trust domain.
pub(super) fn bundle(domain: &TrustDomain, der: &[u8]) -> Result<Bundle, Malformed> {
    let roots = certificates(&format!("the bundle of {domain}"), der, MAX_ROOTS)?;
    Bundle::new(roots).map_err(|e| malformed(format!("the bundle of {domain}: {e}")))
}

/// The bundles of several, each under its own name. One that cannot be used is left out, so that its trust domain is not trusted:
/// it may be another's fault, and must not take the others along.
pub(super) fn bundles<'a>(all: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Bundles {
    let mut found = Vec::new();
    for (name, der) in all {
        if found.len() == MAX_DOMAINS {
            tracing::warn!(most = MAX_DOMAINS, "the agent has bundles of more trust domains, which are left out");
            break;
        }
        match trust_domain(name).and_then(|domain| Ok((bundle(&domain, der)?, domain))) {
            Ok((bundle, domain)) => found.push((domain, bundle)),
            Err(Malformed(why)) => {
                tracing::warn!(%why, "a trust bundle cannot be used: its trust domain is not trusted")
            }
        }
    }
    found.into_iter().collect()
}

/// An SVID as the Workload API and the Broker API send it: their messages are the same, field for field.
pub(super) struct Sent {
    pub(super) id: String,
    pub(super) chain: Bytes,
    pub(super) key: Bytes,
    pub(super) bundle: Bytes,
    pub(super) hint: String,
}

/// A whole message of the Workload API or the Broker API.
pub(super) fn update<'a>(
    svids: impl ExactSizeIterator<Item = Sent>,
    federated: impl IntoIterator<Item = (&'a String, &'a Bytes)>,
) -> Result<Update, Malformed> {
    bounded(svids.len())?;
    let (mut domains, mut offers) = (Vec::new(), Vec::new());
    for Sent { id, chain: der, key, bundle: roots, hint } in svids {
        let offer = offer(&id, chain(&id, &der)?, &key, &hint)?;
        let domain = offer.id.trust_domain().clone();
        let roots = bundle(&domain, &roots)?;
        domains.push((domain, roots));
        offers.push(offer);
    }
    let federated = bundles(federated.into_iter().map(|(name, der)| (name.as_str(), &der[..])));
    let federated = federated.iter().map(|(domain, bundle)| (domain.clone(), bundle.clone()));
    // The own domain last: a federated bundle never replaces it.
    Ok(Update { offers, bundles: Arc::new(federated.chain(domains).collect()) })
}
