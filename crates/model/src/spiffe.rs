//! SPIFFE ids: a trust domain and a path, valid by construction.
//!
//! The rules are those of the SPIFFE-ID specification, sections 2.1 to 2.3, in the form that go-spiffe and SPIRE enforce: lower
//! case only where the specification calls comparison case-insensitive, so that equality of ids is equality of bytes.
//! Istio's `/ns/<namespace>/sa/<service account>` is a [view](SpiffeId::istio_view) of an id and not its definition.

pub mod template;

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use crate::Str;

const SCHEME: &str = "spiffe://";
/// Longest trust domain name, in bytes (SPIFFE-ID 2.1).
pub const MAX_TRUST_DOMAIN: usize = 255;
/// Longest SPIFFE id, in bytes (SPIFFE-ID 2.3).
pub const MAX_ID: usize = 2048;

/// Why a text is not a SPIFFE id or a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The scheme is not `spiffe`, or not in lower case.
    #[error("a SPIFFE id begins with spiffe://")]
    Scheme,
    /// Nothing stands where the trust domain should.
    #[error("the trust domain is empty")]
    NoTrustDomain,
    /// A character that a trust domain cannot have; this includes user information and ports.
    #[error("{0:?} cannot stand in a trust domain (a-z, 0-9, '.', '-' and '_' can)")]
    TrustDomainCharacter(char),
    /// Longer than [`MAX_TRUST_DOMAIN`].
    #[error("the trust domain has {0} bytes, {MAX_TRUST_DOMAIN} at most")]
    TrustDomainLength(usize),
    /// Two slashes in a row, a slash at the end, or an empty namespace or service account.
    #[error("a path segment is empty")]
    EmptySegment,
    /// `.` or `..`.
    #[error("a path segment is {0:?}")]
    DotSegment(String),
    /// A character that a path segment cannot have; this includes `?`, `#` and `%`.
    #[error("{0:?} cannot stand in a path segment (a-z, A-Z, 0-9, '.', '-' and '_' can)")]
    PathCharacter(char),
    /// Longer than [`MAX_ID`].
    #[error("the SPIFFE id has {0} bytes, {MAX_ID} at most")]
    Length(usize),
}

/// The name of a trust domain: who vouches for an identity.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Str);

impl TrustDomain {
    /// A trust domain that is already shared text (an interner's), checked.
    pub fn new(name: Str) -> Result<Self, Error> {
        check_trust_domain(&name)?;
        Ok(Self(name))
    }

    /// The name, without the scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Istio's default, `cluster.local`: what its discovery leaves out of a workload.
impl Default for TrustDomain {
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

impl FromStr for TrustDomain {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::new(name.into())
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for TrustDomain {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A SPIFFE id with any path. Cloning costs two reference counts.
#[derive(Clone)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    uri: Str,
}

/// Istio's reading of an id with the path `/ns/<namespace>/sa/<service account>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IstioView<'a> {
    /// Namespace of the workload.
    pub namespace: &'a str,
    /// Service account of the workload.
    pub service_account: &'a str,
}

impl SpiffeId {
    /// The id of a trust domain and a path, which is empty or begins with a slash.
    pub fn new(trust_domain: &TrustDomain, path: &str) -> Result<Self, Error> {
        check_path(path)?;
        let uri: Str = [SCHEME, trust_domain.as_str(), path].concat().into();
        check_length(&uri)?;
        Ok(Self { trust_domain: trust_domain.clone(), uri })
    }

    /// The id that Istio gives to a service account.
    pub fn istio(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, Error> {
        // Checked apart: a slash inside either would otherwise pass as one more path segment.
        check_segment(namespace)?;
        check_segment(service_account)?;
        let uri: Str = [SCHEME, trust_domain.as_str(), "/ns/", namespace, "/sa/", service_account].concat().into();
        check_length(&uri)?;
        Ok(Self { trust_domain: trust_domain.clone(), uri })
    }

    /// Who vouches for this id.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading slash; empty for the id of the trust domain itself.
    pub fn path(&self) -> &str {
        &self.uri[SCHEME.len() + self.trust_domain.0.len()..]
    }

    /// The whole id, `spiffe://` included.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The same, shared with the id.
    pub fn text(&self) -> &Str {
        &self.uri
    }

    /// The id without `spiffe://`: the form in which policies name principals.
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }

    /// Namespace and service account, if the path has Istio's form.
    pub fn istio_view(&self) -> Option<IstioView<'_>> {
        let (namespace, rest) = self.path().strip_prefix("/ns/")?.split_once('/')?;
        let service_account = rest.strip_prefix("sa/")?;
        (!service_account.contains('/')).then_some(IstioView { namespace, service_account })
    }
}

impl FromStr for SpiffeId {
    type Err = Error;

    fn from_str(uri: &str) -> Result<Self, Error> {
        check_length(uri)?;
        let rest = uri.strip_prefix(SCHEME).ok_or(Error::Scheme)?;
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let trust_domain = domain.parse()?;
        check_path(path)?;
        Ok(Self { trust_domain, uri: uri.into() })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl AsRef<str> for SpiffeId {
    fn as_ref(&self) -> &str {
        &self.uri
    }
}

// The trust domain is a part of the text, so the text alone decides.
impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.uri == other.uri
    }
}

impl Eq for SpiffeId {}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> Ordering {
        self.uri.cmp(&other.uri)
    }
}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}

fn check_trust_domain(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::NoTrustDomain);
    }
    if name.len() > MAX_TRUST_DOMAIN {
        return Err(Error::TrustDomainLength(name.len()));
    }
    match name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_')) {
        Some(character) => Err(Error::TrustDomainCharacter(character)),
        None => Ok(()),
    }
}

fn check_path(path: &str) -> Result<(), Error> {
    if path.is_empty() {
        return Ok(());
    }
    match path.strip_prefix('/') {
        Some(segments) => segments.split('/').try_for_each(check_segment),
        None => Err(Error::PathCharacter(path.chars().next().unwrap_or_default())),
    }
}

fn check_segment(segment: &str) -> Result<(), Error> {
    match segment {
        "" => return Err(Error::EmptySegment),
        "." | ".." => return Err(Error::DotSegment(segment.to_owned())),
        _ => {}
    }
    match segment.chars().find(|c| !matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_')) {
        Some(character) => Err(Error::PathCharacter(character)),
        None => Ok(()),
    }
}

fn check_length(uri: &str) -> Result<(), Error> {
    if uri.len() > MAX_ID { Err(Error::Length(uri.len())) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
