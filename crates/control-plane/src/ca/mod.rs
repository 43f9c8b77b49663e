//! The certificate authority in force, and what it takes to issue one certificate.
//!
//! [`Ca`] follows the folder of a plugged-in CA: a new one is taken over only if it works and if it shares a root with the
//! one before, so that no node is left with roots that verify nothing. Who may have what is decided in `placement`.

pub(crate) mod pool;
pub(crate) mod service;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};
use std::{fs, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zspire_identity::authority::{self, Authority, Csr, CsrError, Issued, Parts, Subject};
use zspire_identity::files::Watched;
use zspire_identity::x509::{Fingerprint, fingerprint};
use zspire_identity::{Bundles, pem};
use zspire_model::{SpiffeId, TrustDomain};

use crate::config::{Config, Ttl};
use crate::metrics::Metrics;
use crate::state;
use crate::time_text::go;

/// A CA ready to issue, with the texts that every answer carries.
#[derive(Debug)]
pub(crate) struct Issuing {
    pub(crate) authority: Authority,
    /// Certificates after the leaf, one PEM each.
    chain: Vec<String>,
    /// Every root, in one PEM.
    roots: String,
    /// The root that its certificates lead to.
    root: Fingerprint,
}

impl Issuing {
    /// The CA that the configuration names: the operator's, or the one of the state folder.
    pub(crate) fn load(config: &Config, now: SystemTime) -> Result<Self, state::Error> {
        let (path, parts) = match &config.cacerts {
            Some(folder) => (folder.clone(), state::plugged_in(folder)?),
            None => (config.state.join("ca.pem"), state::own_root(&config.state, &config.trust_domain, now)?),
        };
        Self::new(&parts, now).map_err(|source| state::Error::Authority { path, source })
    }

    fn new(parts: &Parts, now: SystemTime) -> Result<Self, authority::Error> {
        let authority = Authority::new(parts, now)?;
        let root = signing_root(parts, &authority, now);
        let chain = authority.chain().iter().map(|der| pem::certificate(der)).collect();
        let roots = authority.roots().roots().iter().map(|der| pem::certificate(der)).collect();
        Ok(Self { authority, chain, roots, root })
    }

    /// The fingerprint that join tokens name.
    pub(crate) fn root(&self) -> Fingerprint {
        self.root
    }

    /// The roots as clients get them.
    pub(crate) fn roots_pem(&self) -> &str {
        &self.roots
    }

    /// Trust in this CA's roots for the identities of `domain` only.
    pub(crate) fn bundles(&self, domain: &TrustDomain) -> Bundles {
        Bundles::of(domain.clone(), self.authority.roots().clone())
    }

    fn shares_root(&self, other: &Self) -> bool {
        let theirs = other.authority.roots().roots();
        self.authority.roots().roots().iter().any(|root| theirs.contains(root))
    }

    /// The answer of `CreateCertificate`: leaf, each of the chain, then all roots as one element, as istiod has it.
    fn answer(&self, leaf: &Issued) -> Vec<String> {
        let mut answer = Vec::with_capacity(self.chain.len() + 2);
        answer.push(pem::certificate(&leaf.der));
        answer.extend(self.chain.iter().cloned());
        answer.push(self.roots.clone());
        answer
    }
}

/// Which of several roots the CA's certificates lead to: the one that is enough alone.
fn signing_root(parts: &Parts, authority: &Authority, now: SystemTime) -> Fingerprint {
    let roots = authority.roots().roots();
    let enough = |roots: String| {
        let key = parts.key.clone();
        let alone = Parts { certificate: parts.certificate.clone(), key, chain: parts.chain.clone(), roots };
        Authority::new(&alone, now).is_ok()
    };
    let found = (roots.len() > 1).then(|| roots.iter().find(|der| enough(pem::certificate(der)))).flatten();
    fingerprint(found.unwrap_or(&roots[0]))
}

/// 64 hexadecimal digits.
pub(crate) fn to_hex(fingerprint: &Fingerprint) -> String {
    fingerprint.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The reverse of [`to_hex`].
pub(crate) fn from_hex(text: &str) -> Option<Fingerprint> {
    let mut bytes = Fingerprint::default();
    let fine = text.len() == 2 * bytes.len() && text.is_ascii();
    let pairs = fine.then(|| text.as_bytes().chunks(2))?;
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// The CA, and what follows its files.
#[derive(Debug, Clone)]
pub(crate) struct Ca {
    current: watch::Sender<Arc<Issuing>>,
    ttl: Ttl,
}

impl Ca {
    pub(crate) fn new(issuing: Issuing, ttl: Ttl) -> Self {
        Self { current: watch::Sender::new(Arc::new(issuing)), ttl }
    }

    pub(crate) fn current(&self) -> Arc<Issuing> {
        self.current.borrow().clone()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<Arc<Issuing>> {
        self.current.subscribe()
    }

    /// Whether [`Ca::issue`] would accept a request.
    pub(crate) fn check(&self, csr: &str, seconds: i64, now: SystemTime) -> Result<(), Error> {
        self.prepare(csr, seconds, now).map(drop)
    }

    /// Checks a request and issues the certificate. `seconds` is the lifetime asked for, nothing or less for the default.
    pub(crate) fn issue(&self, csr: &str, id: &SpiffeId, seconds: i64, now: SystemTime) -> Result<Answer, Error> {
        let (csr, issuing, not_after) = self.prepare(csr, seconds, now)?;
        let subject = Subject::Workload { id, common_name: csr.has_common_name };
        let leaf = issuing.authority.sign(&csr.key, &subject, now, not_after)?;
        Ok(Answer { chain: issuing.answer(&leaf), leaf })
    }

    fn prepare(&self, csr: &str, seconds: i64, now: SystemTime) -> Result<(Csr, Arc<Issuing>, SystemTime), Error> {
        let csr = Csr::from_pem(csr)?;
        let issuing = self.current();
        let not_after = (now + self.lifetime(seconds)?).min(issuing.authority.not_after());
        if not_after <= now { Err(Error::Expired) } else { Ok((csr, issuing, not_after)) }
    }

    fn lifetime(&self, seconds: i64) -> Result<Duration, Error> {
        let Ok(seconds @ 1..) = u64::try_from(seconds) else { return Ok(self.ttl.default) };
        let asked = Duration::from_secs(seconds);
        if asked > self.ttl.max { Err(Error::Ttl { asked, max: self.ttl.max }) } else { Ok(asked) }
    }

    /// Follows the folder of a plugged-in CA until `stop`.
    pub(crate) async fn follow(self, config: Arc<Config>, metrics: Arc<Metrics>, stop: CancellationToken) {
        let Some(folder) = config.cacerts.clone() else { return };
        let watched = Watched::new([folder.clone()]);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = watched.changed() => {}
            }
            match self.reload(&config) {
                Ok(()) => {
                    metrics.ca_reloads.accepted();
                    tracing::info!(folder = %folder.display(), "took over the changed CA certificates");
                }
                Err(error) => {
                    metrics.ca_reloads.rejected();
                    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    tracing::error!(%error, cause, "the changed CA certificates are not used, the ones before stay in force");
                }
            }
        }
    }

    fn reload(&self, config: &Config) -> Result<(), ReloadError> {
        let new = Issuing::load(config, SystemTime::now())?;
        if !new.shares_root(&self.current()) {
            return Err(ReloadError::Disjoint { folder: config.cacerts.clone().unwrap_or_default() });
        }
        publish_root(config, &new)?;
        self.current.send_replace(Arc::new(new));
        Ok(())
    }
}

/// Tells operators and commands which root is in force.
pub(crate) fn publish_root(config: &Config, issuing: &Issuing) -> Result<(), state::Error> {
    state::Database::durable(&config.state)?.remember("root", &to_hex(&issuing.root()))?;
    let path = config.state.join("root-cert.pem");
    let written = zspire_identity::files::write_private(&path, issuing.roots_pem().as_bytes());
    written.map_err(|source| state::Error::io(&path, source))?;
    // Public, and meant to be copied; the folder around it stays closed.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(&path, mode).map_err(|source| state::Error::io(&path, source))
}

#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    State(#[from] state::Error),
    #[error(
        "no root in {} is one of those in force: put old and new roots into root-cert.pem first, and take the old ones out once every node has renewed", .folder.display()
    )]
    Disjoint { folder: PathBuf },
}

/// An issued certificate and how to hand it over.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) chain: Vec<String>,
    pub(crate) leaf: Issued,
}

/// Why nothing was issued; the words are istiod's where it has any.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Csr(#[from] CsrError),
    #[error("requested TTL {} is greater than the max allowed TTL {}", go(*.asked), go(*.max))]
    Ttl { asked: Duration, max: Duration },
    #[error("Istio CA is not ready: its certificate has expired")]
    Expired,
    #[error(transparent)]
    Sign(#[from] authority::Error),
}

impl Error {
    /// The label of `citadel_server_csr_sign_err_count`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Csr(_) => "CSR_ERROR",
            Self::Ttl { .. } => "TTL_ERROR",
            Self::Expired => "CA_NOT_READY",
            Self::Sign(_) => "CERT_GEN_ERROR",
        }
    }

    pub(crate) fn status(&self) -> tonic::Status {
        let message = format!("CSR signing error ({self})");
        match self {
            Self::Csr(_) | Self::Ttl { .. } => tonic::Status::invalid_argument(message),
            Self::Expired | Self::Sign(_) => tonic::Status::internal(message),
        }
    }
}

#[cfg(test)]
mod tests;
