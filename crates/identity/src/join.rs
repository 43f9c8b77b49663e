//! Joining a machine without Kubernetes: a single-use token buys a node certificate, which then renews itself.
//!
//! The token names the root of the control plane by its fingerprint, so the first connection is already verified.
//! What the node gets is `spiffe://<trust domain>/zspire/node/<node>`; its control connections show it instead of a token.
//!
//! Task: [`Node::run`], which renews the certificate at half of what is left of its life.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderName, HeaderValue};
use rand::Rng as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;
use zspire_model::SpiffeId;
use zspire_wire::ca::istio_certificate_service_client::IstioCertificateServiceClient;

use crate::credentials::{Credentials, Invalid, Svid};
use crate::files::write_private;
use crate::grpc::{self, Channel, ClientIdentity, Roots, TokenSource};
use crate::istio_ca::{self, Answer};
use crate::key::{self, PrivateKey};
use crate::per_identity::Failure;
use crate::x509::Fingerprint;
use crate::{Bundles, pem};

const PREFIX: &str = "zs1";
/// Lifetime that nodes ask for.
const TTL: Duration = Duration::from_secs(24 * 3600);
/// Nothing is renewed more often than this.
const MIN_PAUSE: Duration = Duration::from_secs(5);
const MAX_PAUSE: Duration = Duration::from_secs(150);
/// Wall clocks jump; look again at least this often.
const RECHECK: Duration = Duration::from_secs(10);
const DEADLINE: Duration = Duration::from_secs(15);

/// The header by which a node says which one it is, so that a token of another node is refused without being used up.
pub const NODE_HEADER: &str = "zspire-node";

/// The path of a node's identity.
pub fn node_path(node: &str) -> String {
    format!("/zspire/node/{node}")
}

/// `zs1.<SHA-256 of the CA's root, hexadecimal>.<secret>`: what an operator carries to a new machine.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    root: Fingerprint,
    secret: Zeroizing<String>,
}

impl JoinToken {
    /// A token for the CA with this root.
    pub fn new(root: Fingerprint, secret: Zeroizing<String>) -> Self {
        Self { root, secret }
    }

    /// The root that the CA must have.
    pub fn root(&self) -> &Fingerprint {
        &self.root
    }

    /// What the CA compares.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The whole token, to be shown once.
    pub fn expose(&self) -> Zeroizing<String> {
        let root: String = self.root.iter().map(|byte| format!("{byte:02x}")).collect();
        Zeroizing::new(format!("{PREFIX}.{root}.{}", *self.secret))
    }

    /// Whether a bearer token is meant as one of these.
    pub fn is_one(text: &str) -> bool {
        text.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with('.'))
    }
}

impl FromStr for JoinToken {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let mut parts = text.trim().split('.');
        let (Some(PREFIX), Some(root), Some(secret), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(BadToken);
        };
        let fine = secret.len() >= 16 && secret.len() <= 128 && secret.bytes().all(|b| b.is_ascii_alphanumeric());
        let root = unhex(root).filter(|_| fine).ok_or(BadToken)?;
        Ok(Self { root, secret: Zeroizing::new(secret.to_owned()) })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(redacted)")
    }
}

fn unhex(text: &str) -> Option<Fingerprint> {
    let mut bytes = Fingerprint::default();
    if text.len() != 2 * bytes.len() || !text.is_ascii() {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Not a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a join token: it has the form {PREFIX}.<fingerprint>.<secret>, as `zspire control-plane token` prints it")]
pub struct BadToken;

/// Where a node belongs and keeps its certificate.
#[derive(Debug, Clone)]
pub struct Config {
    /// How to reach the CA. Token, roots and client certificate in it are replaced.
    pub ca: grpc::Config,
    /// The name of this node.
    pub node: String,
    /// Directory for key, certificate and roots; made if it is missing.
    pub state_dir: PathBuf,
}

impl Config {
    fn identity_file(&self) -> PathBuf {
        self.state_dir.join("node.pem")
    }

    /// The roots of the control plane, as a file to be given to other channels.
    pub fn roots_file(&self) -> PathBuf {
        self.state_dir.join("roots.pem")
    }
}

/// A node with its certificate.
#[derive(Debug)]
pub struct Node {
    config: Config,
    current: watch::Sender<Option<Arc<ClientIdentity>>>,
}

impl Node {
    /// Buys the first certificate with a token, and stores it.
    pub async fn join(config: Config, token: &JoinToken) -> Result<Self, Error> {
        let mut ca = config.ca.clone();
        ca.roots = Roots::Pinned(*token.root());
        ca.token = Some(TokenSource::Literal(token.expose()));
        ca.client = None;
        let name = HeaderValue::from_str(&config.node).map_err(|_| Error::Name(config.node.clone()))?;
        ca.headers.push((HeaderName::from_static(NODE_HEADER), name));
        let identity = obtain(&config, ca).await?;
        tracing::info!(id = %identity.id(), "joined");
        Ok(Self { config, current: watch::Sender::new(Some(Arc::new(identity))) })
    }

    /// Takes up the certificate of an earlier join; `None` if there was none or it has expired.
    pub fn load(config: Config) -> Result<Option<Self>, Error> {
        let path = config.identity_file();
        let text = match fs::read(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::io(&path, source)),
        };
        let damaged = |why: String| Error::Damaged { path: path.clone(), why };
        let key = PrivateKey::from_pem(&text).map_err(|e| damaged(e.to_string()))?;
        let chain = pem::certificates(&text).map_err(|e| damaged(e.to_string()))?;
        let identity = ClientIdentity::new(chain, &key).map_err(|e| damaged(e.to_string()))?;
        if identity.id().path() != node_path(&config.node) {
            return Err(damaged(format!("it is for {}, this is node {}", identity.id(), config.node)));
        }
        if identity.not_after() <= config.ca.clock.now() {
            return Ok(None);
        }
        Ok(Some(Self { config, current: watch::Sender::new(Some(Arc::new(identity))) }))
    }

    /// The certificate, for [`grpc::Config::client`].
    pub fn identity(&self) -> watch::Receiver<Option<Arc<ClientIdentity>>> {
        self.current.subscribe()
    }

    /// The roots of the control plane, for [`grpc::Config::roots`].
    pub fn roots(&self) -> Roots {
        Roots::File(self.config.roots_file())
    }

    /// Renews the certificate until `shutdown`. Failures are retried with back-off; an expired certificate needs a new
    /// token, which is said in the log.
    pub async fn run(self, shutdown: CancellationToken) {
        let clock = self.config.ca.clock.clone();
        let mut due = self.next_renewal(clock.now());
        let mut failures = 0;
        loop {
            let pause = due.duration_since(clock.now()).unwrap_or_default().min(RECHECK);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            let now = clock.now();
            if now < due {
                continue;
            }
            match self.renew().await {
                Ok(()) => {
                    failures = 0;
                    due = self.next_renewal(now);
                }
                Err(error) => {
                    failures += 1;
                    let pause = (MIN_PAUSE * (1 << failures.min(6))).min(MAX_PAUSE);
                    let pause = pause.mul_f64(rand::rng().random_range(0.5..=1.0));
                    tracing::warn!(error = %chain_of(&error), retry_in = ?pause, "cannot renew the certificate of this node");
                    due = now + pause;
                }
            }
        }
    }

    fn next_renewal(&self, now: SystemTime) -> SystemTime {
        let until = self.current.borrow().as_ref().map_or(now, |identity| identity.not_after());
        let left = until.duration_since(now).unwrap_or_default();
        now + left.mul_f64(0.5 * rand::rng().random_range(0.9..=1.1)).max(MIN_PAUSE)
    }

    async fn renew(&self) -> Result<(), Error> {
        let mut ca = self.config.ca.clone();
        ca.roots = self.roots();
        ca.token = None;
        ca.client = Some(self.identity());
        let identity = obtain(&self.config, ca).await?;
        self.current.send_replace(Some(Arc::new(identity)));
        Ok(())
    }
}

/// Asks for the caller's own identity, checks it and stores it.
async fn obtain(config: &Config, ca: grpc::Config) -> Result<ClientIdentity, Error> {
    let (policy, clock) = (ca.policy.clone(), ca.clock.clone());
    let mut client = IstioCertificateServiceClient::new(Channel::new(ca)?);
    let key = PrivateKey::generate();
    let asked = istio_ca::create_certificate(&mut client, key.request(None)?, TTL, None);
    let late = |_| Failure::new("timeout", format!("no answer within {} s", DEADLINE.as_secs()));
    let Answer { chain, roots } = tokio::time::timeout(DEADLINE, asked).await.map_err(late)??;
    let identity = ClientIdentity::new(chain.clone(), &key)?;
    if identity.id().path() != node_path(&config.node) {
        return Err(Error::OtherNode { given: identity.id().clone(), node: config.node.clone() });
    }
    let stored = Stored { key: key.to_pem(), chain: chain.clone(), roots: roots.clone() };
    let bundles = Arc::new(Bundles::of(identity.id().trust_domain().clone(), roots));
    // Checked as a peer would, before anything that works is overwritten.
    Credentials::new(Svid { id: identity.id().clone(), chain, key, bundles }, &policy, &clock)?;
    stored.write(config)?;
    Ok(identity)
}

struct Stored {
    key: Zeroizing<String>,
    chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    roots: crate::Bundle,
}

impl Stored {
    /// Roots first: with new roots and an old certificate a node can still connect.
    fn write(&self, config: &Config) -> Result<(), Error> {
        let directory = &config.state_dir;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|source| Error::io(directory, source))?;
        let roots: String = self.roots.roots().iter().map(|der| pem::certificate(der)).collect();
        let path = config.roots_file();
        write_private(&path, roots.as_bytes()).map_err(|source| Error::io(&path, source))?;
        let chain: String = self.chain.iter().map(|der| pem::certificate(der)).collect();
        let text = Zeroizing::new(format!("{}{chain}", *self.key));
        let path = config.identity_file();
        write_private(&path, text.as_bytes()).map_err(|source| Error::io(&path, source))
    }
}

fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// Why a node has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not usable as a name.
    #[error("{0:?} cannot be the name of a node: use letters, digits, '.', '-' and '_' in NODE_NAME")]
    Name(String),
    /// The CA's address is wrong.
    #[error(transparent)]
    Address(#[from] grpc::AddressError),
    /// The CA did not issue it.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// The certificate that came back is not usable.
    #[error("the certificate that came back cannot be used: compare the clocks of both machines")]
    Invalid(#[from] Invalid),
    /// No key.
    #[error(transparent)]
    Key(#[from] key::Unusable),
    /// A token for somebody else.
    #[error("the CA answered with {given}, this is node {node}: make a token for this node")]
    OtherNode {
        /// What came back.
        given: SpiffeId,
        /// This node.
        node: String,
    },
    /// The stored certificate is not usable.
    #[error("the node's certificate in {} cannot be used: {why}; remove it and join again with a new token", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Cannot read or write the state.
    #[error("cannot use {} for the state of this node (ZSPIRE_STATE_DIR): check its owner, its mode and the space on the disk", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether trying again with the same token is of no use: the CA has refused it, or it cannot be one.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Refused(failure) => matches!(failure.reason, "denied" | "rejected"),
            Self::Name(_) | Self::Address(_) | Self::OtherNode { .. } => true,
            Self::Invalid(_) | Self::Key(_) | Self::Damaged { .. } | Self::Io { .. } => false,
        }
    }

    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}
