//! The certificate of the serving port: issued by the own CA, renewed at half its life and when the CA changes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zspire_identity::authority::{self, Csr, CsrError, Subject};
use zspire_identity::key::Unusable;
use zspire_identity::serving::Acceptor;
use zspire_identity::tls::Policy;
use zspire_identity::{Invalid, PrivateKey, SystemClock};

use crate::ca::Issuing;
use crate::config::Config;

const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
/// Wall clocks jump; look again at least this often.
const RECHECK: Duration = Duration::from_secs(60);

/// What accepts connections now.
#[derive(Debug)]
pub(crate) struct Serving {
    acceptor: ArcSwap<Current>,
    config: Arc<Config>,
}

#[derive(Debug)]
struct Current {
    acceptor: Acceptor,
    made: SystemTime,
    not_after: SystemTime,
}

impl Current {
    fn is_due(&self, now: SystemTime) -> bool {
        let life = self.not_after.duration_since(self.made).unwrap_or_default();
        // A clock that went back makes a certificate from the future: that is not one to go on with.
        now >= self.made + life / 2 || now < self.made
    }
}

impl Serving {
    pub(crate) fn new(config: Arc<Config>, issuing: &Issuing) -> Result<Self, Error> {
        let current = make(&config, issuing, SystemTime::now())?;
        Ok(Self { acceptor: ArcSwap::from_pointee(current), config })
    }

    pub(crate) fn acceptor(&self) -> Acceptor {
        self.acceptor.load().acceptor.clone()
    }

    pub(crate) fn not_after(&self) -> SystemTime {
        self.acceptor.load().not_after
    }

    /// Renews until `stop`. Connections keep what they began with.
    pub(crate) async fn follow(self: Arc<Self>, mut ca: watch::Receiver<Arc<Issuing>>, stop: CancellationToken) {
        loop {
            let changed = tokio::select! {
                () = stop.cancelled() => return,
                changed = ca.changed() => changed.is_ok(),
                () = tokio::time::sleep(RECHECK) => false,
            };
            let now = SystemTime::now();
            if !changed && !self.acceptor.load().is_due(now) {
                continue;
            }
            let issuing = ca.borrow_and_update().clone();
            match make(&self.config, &issuing, now) {
                Ok(current) => self.acceptor.store(Arc::new(current)),
                Err(error) => tracing::error!(%error, "cannot renew the serving certificate, trying again"),
            }
        }
    }
}

fn make(config: &Config, issuing: &Issuing, now: SystemTime) -> Result<Current, Error> {
    let key = PrivateKey::generate();
    let csr = Csr::from_pem(&key.request(None)?)?;
    let not_after = (now + LIFETIME).min(issuing.authority.not_after());
    let leaf = issuing.authority.sign(&csr.key, &Subject::Server(&config.hostnames), now, not_after)?;
    let mut chain = vec![leaf.der];
    chain.extend(issuing.authority.chain().iter().cloned());
    // With the roots, for nodes that know no more than the fingerprint in their join token.
    chain.extend(issuing.authority.roots().roots().iter().cloned());
    let clients = Arc::new(issuing.bundles(&config.trust_domain));
    let clock: Arc<dyn zspire_identity::Clock> = Arc::new(SystemClock);
    let acceptor = Acceptor::new(chain, &key, clients, &Policy::default(), &clock)?;
    Ok(Current { acceptor, made: now, not_after })
}

/// Why there is no serving certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key.
    #[error(transparent)]
    Key(#[from] Unusable),
    /// The own request.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// Signing, for example of an impossible host name.
    #[error("check ZSPIRE_CP_HOSTNAMES")]
    Sign(#[from] authority::Error),
    /// TLS.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}
