//! Certificate revocation lists: who was trusted and is not any more.
//!
//! A [`Revocation`] is part of the TLS [`Policy`](crate::tls::Policy): whatever verifies a peer asks it, in every handshake
//! and again for live connections. The lists come from a file that the [`Follower`] follows; a generation is put in force whole.
//!
//! A list counts for the certificates of an issuer only if that issuer's key has signed it, which is checked against the issuer
//! in the verified chain, once for each list and issuer. So a forged list revokes nobody; and a file with a list that no known
//! CA of its issuer's name has signed is not taken at all.
//!
//! ```text
//!  listed by any list of the issuer, of whatever age       refused: a revocation does not expire
//!  not listed, and a list of the issuer is current         accepted
//!  else (no list of the issuer, or an expired one)         unknown: refused, or accepted if the operator says so
//! ```
//!
//! How the data plane uses it: new handshakes need nothing. For a live connection keep the [`Peer`](crate::Peer) that the
//! handshake gave, and ask [`Credentials::still_valid`](crate::Credentials::still_valid) of the workload's newest credentials
//! again whenever [`Revocation::changes`] or the workload's [`Watch`](crate::Watch) changes, and when
//! [`Peer::not_after`](crate::Peer) has come.

mod file;
mod list;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use rustls::pki_types::UnixTime;
use tokio::sync::watch;
use webpki::{Cert, VerifiedPath};
use zspire_model::SpiffeId;

pub use self::file::{Follower, follow};
use self::list::{Issuer, List};
use crate::clock::rfc3339;
use crate::tls::Rejection;
use crate::x509::{Fingerprint, fingerprint};

/// Issuers that are remembered to check new lists against; beyond that only their use checks a list.
const ISSUERS: usize = 256;

/// What is done with a certificate of which no list says anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Unknown {
    /// It is refused.
    #[default]
    Deny,
    /// It is accepted.
    Allow,
}

/// The revocation lists of this process. Clones are the same. The default one has no file and refuses nobody.
#[derive(Clone, Default)]
pub struct Revocation(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    unknown: Unknown,
    lists: ArcSwapOption<Lists>,
    /// Everybody whose certificates led a verified chain here.
    issuers: RwLock<BTreeSet<Issuer>>,
    changes: watch::Sender<u64>,
    record: Mutex<Record>,
}

/// One generation.
#[derive(Debug)]
struct Lists {
    lists: Vec<List>,
    /// Which list was signed by which issuer's key.
    signed: RwLock<HashMap<(usize, Fingerprint), bool>>,
}

#[derive(Debug, Default)]
struct Record {
    loads: u64,
    failures: u64,
    /// Why the file as it is now is not in force.
    rejected: Option<String>,
    /// Lists that were expired when they were looked at last.
    expired: Vec<String>,
}

/// Numbers for metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Files taken since the start.
    pub loads: u64,
    /// Files not taken since the start.
    pub failures: u64,
    /// Whether the file as it is now is not in force.
    pub rejected: bool,
    /// Lists in force.
    pub lists: usize,
    /// Certificates that they revoke.
    pub revoked: usize,
    /// Those of the lists that have expired.
    pub expired: usize,
    /// When the first of them expires or has expired.
    pub next_update: Option<SystemTime>,
}

impl Revocation {
    fn new(path: PathBuf, unknown: Unknown) -> Self {
        Self(Some(Arc::new(Shared {
            path,
            unknown,
            lists: ArcSwapOption::empty(),
            issuers: RwLock::default(),
            changes: watch::Sender::new(0),
            record: Mutex::default(),
        })))
    }

    /// Whether there is a file of lists at all.
    pub fn is_configured(&self) -> bool {
        self.0.is_some()
    }

    /// Changes whenever a certificate that was accepted may be refused now: other lists are in force, or one has expired. Without
    /// a file it never changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        match &self.0 {
            Some(shared) => shared.changes.subscribe(),
            None => never(),
        }
    }

    /// What an operator has to mend, in a line; none if all is well.
    pub fn problem(&self) -> Option<String> {
        let shared = self.0.as_ref()?;
        let record = shared.record();
        let rejected = record.rejected.as_ref().map(|why| match shared.lists.load().is_some() {
            true => format!("the changed file is not used, the lists before stay in force: {why}"),
            false => why.clone(),
        });
        let expired = record.expired.iter().map(|what| format!("{what}: replace it"));
        let all: Vec<String> = rejected.into_iter().chain(expired).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Whether every peer is refused because no list has been read yet.
    pub fn refuses_everybody(&self) -> bool {
        let unread = |shared: &Arc<Shared>| shared.unknown == Unknown::Deny && shared.lists.load().is_none();
        self.0.as_ref().is_some_and(unread)
    }

    /// Numbers for metrics; none without a file.
    pub fn stats(&self) -> Option<Stats> {
        let shared = self.0.as_ref()?;
        let record = shared.record();
        let lists = shared.lists.load();
        let lists = lists.as_ref().map_or(&[][..], |lists| &lists.lists);
        Some(Stats {
            loads: record.loads,
            failures: record.failures,
            rejected: record.rejected.is_some(),
            lists: lists.len(),
            revoked: lists.iter().map(|list| list.revoked).sum(),
            expired: record.expired.len(),
            next_update: lists.iter().map(|list| list.next_update).min(),
        })
    }

    /// Refuses a verified chain if one of its certificates is revoked, or its status unknown and that not allowed.
    pub(crate) fn check(&self, id: &SpiffeId, path: &VerifiedPath<'_>, now: SystemTime) -> Result<(), Rejection> {
        let Some(shared) = &self.0 else { return Ok(()) };
        let mut certificates: Vec<(&Cert<'_>, Issuer)> = Vec::new();
        let chain: Vec<&Cert<'_>> =
            std::iter::once(&**path.end_entity()).chain(path.intermediate_certificates()).collect();
        for (n, certificate) in chain.iter().enumerate() {
            let issuer = match chain.get(n + 1) {
                Some(issuer) => Issuer::of_certificate(issuer),
                None => Some(Issuer::of_anchor(path.anchor())),
            };
            let malformed = Rejection::Malformed("the key of an issuer");
            certificates.push((certificate, issuer.ok_or(malformed)?));
        }
        shared.remember(certificates.iter().map(|(_, issuer)| issuer));
        let lists = shared.lists.load();
        for (n, (certificate, issuer)) in certificates.iter().enumerate() {
            let found = match &*lists {
                Some(lists) => lists.status(certificate, n == 0, issuer, now),
                None => Status::Unknown(format!("no revocation list could be read from {}", shared.path.display())),
            };
            match found {
                Status::Good => {}
                Status::Revoked => {
                    return Err(Rejection::Revoked { id: id.clone(), serial: hex(certificate.serial()) });
                }
                Status::Unknown(why) if shared.unknown == Unknown::Deny => {
                    return Err(Rejection::RevocationUnknown { id: id.clone(), why: why.into() });
                }
                Status::Unknown(why) => tracing::debug!(%id, why, "revocation status unknown, which is allowed"),
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Revocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.0.as_ref().map(|shared| &shared.path);
        f.debug_struct("Revocation").field("path", &path).field("stats", &self.stats()).finish()
    }
}

/// A receiver of a value that does not change. Its sender lives as long as the process, so that waiting does not end.
fn never() -> watch::Receiver<u64> {
    static NEVER: std::sync::LazyLock<watch::Sender<u64>> = std::sync::LazyLock::new(|| watch::Sender::new(0));
    NEVER.subscribe()
}

#[derive(Debug, PartialEq, Eq)]
enum Status {
    Good,
    Revoked,
    Unknown(String),
}

impl Lists {
    fn new(lists: Vec<List>) -> Self {
        Self { lists, signed: RwLock::default() }
    }

    fn status(&self, certificate: &Cert<'_>, leaf: bool, issuer: &Issuer, now: SystemTime) -> Status {
        let mut good = false;
        let mut why = None;
        for (n, list) in self.lists.iter().enumerate().filter(|(_, list)| list.is_of(certificate.issuer())) {
            if !self.is_signed(n, list, issuer) {
                why.get_or_insert_with(|| format!("the list of {} is not signed by it", list.issuer_name));
                continue;
            }
            if list.lists(certificate.serial()) {
                return Status::Revoked;
            }
            if list.next_update <= now {
                why = Some(format!("{} expired at {}", list.describe(), rfc3339(list.next_update)));
            } else {
                good |= list.covers(leaf);
            }
        }
        match good {
            true => Status::Good,
            false => Status::Unknown(why.unwrap_or_else(|| "there is no revocation list of its issuer".into())),
        }
    }

    /// Asked once for each list and issuer: hashing a long list takes milliseconds.
    fn is_signed(&self, n: usize, list: &List, issuer: &Issuer) -> bool {
        let key = (n, fingerprint(&issuer.key));
        if let Some(known) = self.signed.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return *known;
        }
        let signed = list.is_signed_by(issuer);
        self.signed.write().unwrap_or_else(PoisonError::into_inner).insert(key, signed);
        signed
    }

    fn expired(&self, now: SystemTime) -> Vec<String> {
        let expired = self.lists.iter().filter(|list| list.next_update <= now);
        expired.map(|list| format!("{} expired at {}", list.describe(), rfc3339(list.next_update))).collect()
    }
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember<'a>(&self, issuers: impl Iterator<Item = &'a Issuer>) {
        let known = self.issuers.read().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<Issuer> = issuers.filter(|issuer| !known.contains(issuer)).cloned().collect();
        drop(known);
        if new.is_empty() {
            return;
        }
        let mut known = self.issuers.write().unwrap_or_else(PoisonError::into_inner);
        for issuer in new {
            if known.len() < ISSUERS {
                known.insert(issuer);
            }
        }
    }

    /// Puts lists in force that no known CA of their issuer's name disowns.
    fn take(&self, lists: Vec<List>, now: SystemTime) -> Result<(), String> {
        let mut by_name: BTreeMap<Vec<u8>, Vec<Issuer>> = BTreeMap::new();
        for issuer in self.issuers.read().unwrap_or_else(PoisonError::into_inner).iter() {
            by_name.entry(issuer.name.clone()).or_default().push(issuer.clone());
        }
        for list in &lists {
            if let Some(known) = by_name.get(list.issuer())
                && !known.iter().any(|issuer| list.is_signed_by(issuer))
            {
                return Err(format!(
                    "{} is not signed by the CA of that name: get it from the CA whose certificates are in use",
                    list.describe()
                ));
            }
        }
        let lists = Lists::new(lists);
        let expired = lists.expired(now);
        self.lists.store(Some(Arc::new(lists)));
        let mut record = self.record();
        record.loads += 1;
        record.rejected = None;
        record.expired = expired;
        Ok(())
    }

    fn announce(&self) {
        self.changes.send_modify(|generation| *generation += 1);
    }
}

/// A serial number as OpenSSL prints it, but for the case.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().skip_while(|byte| **byte == 0).take(20).map(|byte| format!("{byte:02x}")).collect()
}

/// The wall clock's time of a handshake.
pub(crate) fn moment(now: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(now.as_secs())
}
