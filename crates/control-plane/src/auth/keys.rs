//! The keys of the token issuer (JWKS), from a file that is followed or a URL that is asked again.
//!
//! Keys of a failed refresh are never replaced by anything but older keys of the same source, and those of a URL are
//! dropped after [`MAX_AGE`] without an answer: then every token is refused.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zspire_identity::files::Watched;
use zspire_identity::grpc::Roots;
use zspire_identity::https;

use crate::config::KeySource;

/// Longest document read.
const MAX_DOCUMENT: usize = 256 * 1024;
/// Keys in it.
const MAX_KEYS: usize = 128;
/// How often a URL is asked.
const REFRESH: Duration = Duration::from_secs(300);
/// How often at most, when a token names an unknown key or the last answer failed.
const PAUSE: Duration = Duration::from_secs(10);
/// How long keys are used without an answer from their URL.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);
const DEADLINE: Duration = Duration::from_secs(10);

/// One key, and the algorithms that it may be used with.
pub(super) struct Key {
    pub(super) id: Option<String>,
    pub(super) key: DecodingKey,
    /// Never empty.
    pub(super) algorithms: Vec<Algorithm>,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("id", &self.id).field("algorithms", &self.algorithms).finish_non_exhaustive()
    }
}

/// The keys in force.
#[derive(Debug)]
pub(crate) struct Keys {
    current: ArcSwap<Vec<Key>>,
    unknown: Notify,
}

impl Keys {
    fn new(keys: Vec<Key>) -> Self {
        Self { current: ArcSwap::from_pointee(keys), unknown: Notify::new() }
    }

    /// The keys of a document, for good.
    #[cfg(test)]
    pub(super) fn of(document: &[u8]) -> Result<Self, Error> {
        parse(document).map(Self::new)
    }

    pub(super) fn current(&self) -> Arc<Vec<Key>> {
        self.current.load_full()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.current.load().len()
    }

    /// A token names a key that is not there: perhaps it is new.
    pub(super) fn ask_again(&self) {
        self.unknown.notify_one();
    }

    /// The keys at the start. A file must be there and good; a URL may be down.
    pub(crate) async fn load(source: &KeySource) -> Result<Self, Error> {
        match source {
            KeySource::File(path) => read(path).map(Self::new),
            KeySource::Url { url, roots } => {
                let keys = fetch(url, roots).await.unwrap_or_else(|error| {
                    say(&error, url);
                    Vec::new()
                });
                Ok(Self::new(keys))
            }
        }
    }

    /// Keeps them current until `stop`.
    pub(crate) async fn follow(self: Arc<Self>, source: KeySource, stop: CancellationToken) {
        let following = async {
            match source {
                KeySource::File(path) => self.follow_file(path).await,
                KeySource::Url { url, roots } => self.follow_url(&url, &roots).await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = following => {}
        }
    }

    async fn follow_file(&self, path: PathBuf) {
        let watched = Watched::new([path.clone()]);
        loop {
            watched.changed().await;
            match read(&path) {
                Ok(keys) => self.replace(keys),
                Err(error) => say(&error, &path.display().to_string()),
            }
        }
    }

    async fn follow_url(&self, url: &str, roots: &str) {
        let mut answered = Instant::now();
        let mut wait = if self.count() == 0 { PAUSE } else { REFRESH };
        loop {
            let asked = async {
                // Not more often than this, however many unknown keys are named.
                tokio::time::sleep(PAUSE).await;
                self.unknown.notified().await;
            };
            drop(tokio::time::timeout(wait, asked).await);
            match fetch(url, roots).await {
                Ok(keys) => {
                    self.replace(keys);
                    (answered, wait) = (Instant::now(), REFRESH);
                }
                Err(error) => {
                    say(&error, url);
                    wait = PAUSE;
                    if answered.elapsed() > MAX_AGE && self.count() > 0 {
                        tracing::error!(
                            url,
                            "the token issuer's keys are too old, no token is accepted until it answers"
                        );
                        self.current.store(Arc::default());
                    }
                }
            }
        }
    }

    fn replace(&self, keys: Vec<Key>) {
        tracing::debug!(keys = keys.len(), "read the token issuer's keys");
        self.current.store(Arc::new(keys));
    }
}

fn say(error: &Error, source: &str) {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    tracing::warn!(%error, cause, source, "cannot read the token issuer's keys, those before stay in force");
}

fn read(path: &Path) -> Result<Vec<Key>, Error> {
    let fail = |source| Error::Read { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(fail)?.len();
    if length > MAX_DOCUMENT as u64 {
        return Err(Error::Long);
    }
    parse(&std::fs::read(path).map_err(fail)?)
}

async fn fetch(url: &str, roots: &str) -> Result<Vec<Key>, Error> {
    parse(&https::get(url, Roots::parse(roots), MAX_DOCUMENT, DEADLINE).await?)
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

/// The usable keys of a document. Others, such as kinds of the future, are passed over.
fn parse(document: &[u8]) -> Result<Vec<Key>, Error> {
    let document: Document = serde_json::from_slice(document).map_err(Error::Json)?;
    let keys: Vec<_> = document.keys.into_iter().take(MAX_KEYS).filter_map(usable).collect();
    if keys.is_empty() { Err(Error::NoKey) } else { Ok(keys) }
}

fn usable(value: serde_json::Value) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
        return None;
    }
    let mut algorithms = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => {
            use Algorithm::{PS256, PS384, PS512, RS256, RS384, RS512};
            vec![RS256, RS384, RS512, PS256, PS384, PS512]
        }
        AlgorithmParameters::EllipticCurve(curve) => match curve.curve {
            EllipticCurve::P256 => vec![Algorithm::ES256],
            EllipticCurve::P384 => vec![Algorithm::ES384],
            _ => return None,
        },
        _ => return None,
    };
    if let Some(only) = jwk.common.key_algorithm {
        algorithms.retain(|algorithm| format!("{algorithm:?}") == format!("{only:?}"));
    }
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    (!algorithms.is_empty()).then_some(Key { id: jwk.common.key_id, key, algorithms })
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot read the token issuer's keys in {}: ZSPIRE_CP_JWT_JWKS must name a JWKS file or an https URL", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The URL.
    #[error("cannot fetch the token issuer's keys")]
    Fetch(#[from] https::Error),
    /// Not a key set.
    #[error("the token issuer's keys are not a JSON Web Key Set")]
    Json(#[source] serde_json::Error),
    /// No key that is of use.
    #[error("the token issuer's key set has no RSA, P-256 or P-384 signature key")]
    NoKey,
    /// Too much.
    #[error("the token issuer's key set is longer than {MAX_DOCUMENT} bytes")]
    Long,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_without_a_usable_key() {
        for text in ["", "[]", "{}", r#"{"keys": 5}"#, r#"{"keys": []}"#, r#"{"keys": [{"kty": "oct", "k": "AAAA"}]}"#]
        {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn keys_for_encryption_and_of_other_algorithms_are_passed_over() {
        let rsa = |more: &str| format!(r#"{{"keys": [{{"kty": "RSA", "n": "AQAB", "e": "AQAB"{more}}}]}}"#);
        assert_eq!(parse(rsa("").as_bytes()).unwrap()[0].algorithms.len(), 6);
        assert_eq!(parse(rsa(r#", "alg": "RS256""#).as_bytes()).unwrap()[0].algorithms, [Algorithm::RS256]);
        assert!(parse(rsa(r#", "use": "enc""#).as_bytes()).is_err());
        assert!(parse(rsa(r#", "alg": "ES256""#).as_bytes()).is_err());
    }
}
