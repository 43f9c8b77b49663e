//! The file of revocation lists: PEM or DER, followed.
//!
//! A file that cannot be used as a whole changes nothing; that is reported, and tried again. One task, [`Follower::run`].

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::list::{List, value};
use super::{Revocation, Shared, Unknown};
use crate::clock::Clock;
use crate::files::Watched;

/// Longest file, in bytes: some 800,000 revoked certificates.
const MAX_FILE: u64 = 32 << 20;
/// Lists in a file.
const MAX_LISTS: usize = 256;
/// How long a file must have stayed the same: one that is being written may lack lists.
const QUIET: Duration = Duration::from_secs(2);
/// A file that never stays the same is read all the same after this many changes.
const RESTLESS: usize = 15;
/// How often the dates of the lists are looked at, and a file that was not taken is tried again.
const RECHECK: Duration = Duration::from_secs(10);

/// Reads the lists of a file (`CRL_PATH`), and returns what follows it. What is wrong with the file is not an error: see
/// [`Revocation::problem`].
pub fn follow(path: impl Into<PathBuf>, unknown: Unknown, clock: Arc<dyn Clock>) -> (Revocation, Follower) {
    let path = path.into();
    // First, so that a change while it is read is not missed.
    let watched = Watched::new([path.clone()]);
    let revocation = Revocation::new(path.clone(), unknown);
    let shared = revocation.0.clone().expect("it has a file");
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
    let follower = Follower { shared, watched, path, clock, algorithms };
    let read = read(&follower.path, follower.algorithms);
    follower.take(read);
    (revocation, follower)
}

/// Keeps a [`Revocation`] current.
#[derive(Debug)]
pub struct Follower {
    shared: Arc<Shared>,
    watched: Watched,
    path: PathBuf,
    clock: Arc<dyn Clock>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Follower {
    /// Follows the file, and the dates of its lists, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            let changed = tokio::select! {
                () = stop.cancelled() => return,
                () = self.quiet_again() => true,
                () = sleep(RECHECK) => false,
            };
            let rejected = self.shared.record().rejected.is_some();
            if changed || rejected {
                let (path, algorithms) = (self.path.clone(), self.algorithms);
                let Ok(read) = tokio::task::spawn_blocking(move || read(&path, algorithms)).await else { continue };
                self.take(read);
            } else {
                self.look_at_dates();
            }
        }
    }

    /// Waits for a change and until there is no other.
    async fn quiet_again(&self) {
        self.watched.changed().await;
        for _ in 0..RESTLESS {
            if timeout(QUIET, self.watched.changed()).await.is_err() {
                return;
            }
        }
    }

    fn take(&self, read: Result<Vec<List>, String>) {
        let file = self.path.display();
        let error = match read.and_then(|lists| self.shared.take(lists, self.clock.now())) {
            Ok(()) => {
                tracing::info!(%file, "revocation lists read");
                for expired in &self.shared.record().expired {
                    tracing::warn!(%file, "{expired}: what it does not name is of unknown status");
                }
                return self.shared.announce();
            }
            Err(error) => format!("{file}: {error}"),
        };
        let mut record = self.shared.record();
        // Said once, not at every attempt.
        if record.rejected.as_ref() != Some(&error) {
            record.failures += 1;
            tracing::error!(error, "the revocation lists are not used, those before stay in force");
            record.rejected = Some(error);
        }
    }

    /// Lists expire without anybody touching the file.
    fn look_at_dates(&self) {
        let now = self.clock.now();
        let expired = self.shared.lists.load().as_ref().map(|lists| lists.expired(now)).unwrap_or_default();
        let mut record = self.shared.record();
        if record.expired != expired {
            for expired in expired.iter().filter(|it| !record.expired.contains(it)) {
                tracing::warn!(file = %self.path.display(), "{expired}: what it does not name is of unknown status");
            }
            record.expired = expired;
            drop(record);
            self.shared.announce();
        }
    }
}

fn read(path: &Path, algorithms: WebPkiSupportedAlgorithms) -> Result<Vec<List>, String> {
    let bytes = bytes(path).map_err(|error| {
        format!("cannot be read: {error}: check that it exists and that its permissions let this process read it")
    })?;
    let lists = if bytes.first() == Some(&0x30) { der(&bytes) } else { pem(&bytes) }?;
    if lists.len() > MAX_LISTS {
        return Err(format!("it has more than {MAX_LISTS} revocation lists"));
    }
    let parse = |(n, der): (usize, &Vec<u8>)| {
        List::parse(der, algorithms).map_err(|error| format!("list {}: {error}: get a new one from the CA", n + 1))
    };
    lists.iter().enumerate().map(parse).collect()
}

fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it is longer than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

fn pem(text: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let lists: Vec<Vec<u8>> = CertificateRevocationListDer::pem_slice_iter(text)
        .take(MAX_LISTS + 1)
        .map(|list| list.map(|list| list.as_ref().to_vec()))
        .collect::<Result<_, _>>()
        .map_err(|error| format!("it is not valid PEM: {error}"))?;
    if lists.is_empty() {
        return Err("there is no X509 CRL block in it: it holds revocation lists as PEM or DER".into());
    }
    Ok(lists)
}

/// One after the other.
fn der(mut bytes: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut lists = Vec::new();
    while !bytes.is_empty() && lists.len() <= MAX_LISTS {
        let (_, rest) = value(0x30, bytes).ok_or("it ends in the middle of a revocation list")?;
        lists.push(bytes[..bytes.len() - rest.len()].to_vec());
        bytes = rest;
    }
    Ok(lists)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(bytes: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        let (revocation, _) = follow(file.path(), Unknown::Deny, Arc::new(crate::SystemClock));
        assert!(revocation.refuses_everybody());
        assert_eq!(revocation.stats().unwrap().failures, 1);
        revocation.problem().unwrap()
    }

    #[test]
    fn what_is_no_list_is_refused_and_never_panics() {
        for (bytes, why) in [
            (&b""[..], "no X509 CRL block"),
            (b"hello", "no X509 CRL block"),
            (b"-----BEGIN X509 CRL-----\nMA==\n", "not valid PEM"),
            (b"-----BEGIN X509 CRL-----\n!!\n-----END X509 CRL-----\n", "not valid PEM"),
            (b"-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n", "list 1: not a usable list"),
            (&[0x30, 0x82], "middle of a revocation list"),
            (&[0x30, 0x00], "list 1: not a usable list"),
            (&[0x30, 0x03, 0x30, 0x01, 0x00], "list 1: not a usable list"),
        ] {
            let problem = refused(bytes);
            assert!(problem.contains(why), "{bytes:?}: {problem}");
        }
        let (revocation, _) = follow("/nowhere/crl.pem", Unknown::Allow, Arc::new(crate::SystemClock));
        assert!(!revocation.refuses_everybody());
        assert!(revocation.problem().unwrap().contains("/nowhere/crl.pem: cannot be read"));
    }
}
