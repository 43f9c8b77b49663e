//! Single-use join tokens: made by an operator's command, kept as a hash, spent in one durable statement.

use std::time::{Duration, SystemTime};

use rand::Rng as _;
use rand::distr::Alphanumeric;
use rusqlite::{Connection, OptionalExtension as _, params};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;
use zspire_identity::join::{JoinToken, node_path};
use zspire_model::{SpiffeId, TrustDomain};

use super::{Database, Error};
use crate::ca::Issuing;
use crate::config::Config;
use crate::time_text::unix;

/// 43 characters of 62 are 256 bits.
const SECRET: usize = 43;
/// Unused and spent tokens are forgotten this long after they expired.
const KEEP: i64 = 30 * 24 * 3600;

/// SHA-256 of a token's secret. The secret is random and long, so it needs neither salt nor a slow hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct TokenHash([u8; 32]);

impl TokenHash {
    pub(crate) fn of(token: &JoinToken) -> Self {
        Self(Sha256::digest(token.secret().as_bytes()).into())
    }
}

impl std::fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenHash(redacted)")
    }
}

/// Why a token buys nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the join token is not known here: make one with `zspire control-plane token`")]
    Unknown,
    #[error("the join token has expired: make a new one with `zspire control-plane token`")]
    Expired,
    #[error("the join token has been used already: make a new one with `zspire control-plane token`")]
    Used,
    #[error("the join token is for another node: make one for this node with `zspire control-plane token`")]
    OtherNode,
}

impl Refusal {
    /// For metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Used => "used",
            Self::OtherNode => "other_node",
        }
    }
}

/// Whether a token would buy a certificate for `node` now; changes nothing.
pub(super) fn check(db: &Connection, hash: TokenHash, node: &str, now: i64) -> rusqlite::Result<Result<(), Refusal>> {
    let sql = "SELECT node, expires_at, used_at FROM join_tokens WHERE hash = ?1";
    let found = db
        .prepare_cached(sql)?
        .query_row([&hash.0[..]], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, Option<i64>>(2)?))
        })
        .optional()?;
    Ok(match found {
        None => Err(Refusal::Unknown),
        Some((_, _, Some(_))) => Err(Refusal::Used),
        Some((_, expires, None)) if expires <= now => Err(Refusal::Expired),
        Some((owner, ..)) if owner != node => Err(Refusal::OtherNode),
        Some(_) => Ok(()),
    })
}

/// Spends a token. Of any number of callers, in any number of processes, one gets `Ok(Ok(()))`.
pub(super) fn spend(db: &Connection, hash: TokenHash, node: &str, now: i64) -> rusqlite::Result<Result<(), Refusal>> {
    let sql = "UPDATE join_tokens SET used_at = ?1
               WHERE hash = ?2 AND node = ?3 AND used_at IS NULL AND expires_at > ?1";
    match db.execute(sql, params![now, &hash.0[..], node])? {
        1 => Ok(Ok(())),
        // It has been spent in between; the statement says only that, so ask for the reason.
        _ => Ok(check(db, hash, node, now)?.and(Err(Refusal::Used))),
    }
}

/// Makes a token that lets `node` join once within `ttl`. Works beside a running control plane, and where one has run: it makes
/// neither a CA nor a folder, since a misspelt one would only be noticed by the node that is refused.
pub fn create_token(config: &Config, node: &str, ttl: Duration) -> Result<Zeroizing<String>, Error> {
    node_id(&config.trust_domain, node).ok_or_else(|| Error::Node(node.to_owned()))?;
    let now = SystemTime::now();
    let made_by_it = if config.cacerts.is_some() { "state.db" } else { "ca.pem" };
    if !config.state.join(made_by_it).exists() {
        return Err(Error::NoControlPlane { path: config.state.clone() });
    }
    let mut database = Database::durable(&config.state)?;
    let root = root_in_force(config, &database, now)?;
    let secret: String = rand::rng().sample_iter(Alphanumeric).take(SECRET).map(char::from).collect();
    let token = JoinToken::new(root, Zeroizing::new(secret));
    let expires = unix(now + ttl);
    let insert = |db: &Connection| {
        db.execute("DELETE FROM join_tokens WHERE expires_at < ?1", [unix(now) - KEEP])?;
        let sql = "INSERT INTO join_tokens (hash, node, created_at, expires_at) VALUES (?1, ?2, ?3, ?4)";
        db.execute(sql, params![&TokenHash::of(&token).0[..], node, unix(now), expires])
    };
    let inserted = insert(database.connection());
    inserted.map_err(|e| database.error(e))?;
    Ok(token.expose())
}

/// The root that a control plane with this configuration shows.
fn root_in_force(config: &Config, database: &Database, now: SystemTime) -> Result<[u8; 32], Error> {
    let running = if config.cacerts.is_none() { database.recall("root")? } else { None };
    match running.as_deref().and_then(crate::ca::from_hex) {
        Some(root) => Ok(root),
        None => Ok(Issuing::load(config, now)?.root()),
    }
}

/// The identity of a node, if it can have that name.
pub(crate) fn node_id(domain: &TrustDomain, node: &str) -> Option<SpiffeId> {
    let one_segment = !node.is_empty() && node.len() <= 253 && !node.contains('/');
    one_segment.then(|| format!("spiffe://{domain}{}", node_path(node)).parse().ok()).flatten()
}
