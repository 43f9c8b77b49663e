//! A development CA inside the process, for machines without a control plane (`FAKE_CA=true`).
//!
//! Its root is shared by all processes of the same user, so that their workloads trust each other: one file with mode
//! 0600 in a directory with mode 0700, made once under a lock. Whoever can read it can be anybody in that mesh, which
//! is why it is refused inside Kubernetes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use zeroize::Zeroizing;
use zspire_model::SpiffeId;

use crate::authority::{self, Authority, Csr, Parts, Subject};
use crate::bundle::Bundles;
use crate::clock::Clock;
use crate::credentials::Svid;
use crate::files::write_private;
use crate::key::PrivateKey;
use crate::pem;
use crate::per_identity::{self, Driver, Failure, Issuer, PerIdentity};

/// The shared root in its directory: its certificate and its key, PEM.
pub const FILE: &str = "development-ca.pem";
const ROOT_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// How the development CA is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whether this process runs in Kubernetes, where this source is refused.
    pub in_kubernetes: bool,
    /// Where the shared root is; see [`directory`].
    pub directory: PathBuf,
    /// Lifetime of certificates.
    pub ttl: Duration,
    /// The clock that they are made by.
    pub clock: Arc<dyn Clock>,
}

/// A source that issues from the development CA, and its task.
pub fn source(config: Config, schedule: per_identity::Config) -> Result<(PerIdentity, Driver<LocalCa>), Error> {
    Ok(per_identity::new(LocalCa::open(config)?, schedule))
}

/// The development CA as an issuer.
#[derive(Debug)]
pub struct LocalCa {
    authority: Authority,
    ttl: Duration,
    clock: Arc<dyn Clock>,
}

impl LocalCa {
    /// Reads the shared root, or makes it.
    pub fn open(config: Config) -> Result<Self, Error> {
        if config.in_kubernetes {
            return Err(Error::Kubernetes);
        }
        let directory = &config.directory;
        prepare(directory)?;
        let parts = shared_root(directory, config.clock.as_ref())?;
        let authority = Authority::new(&parts, config.clock.now())
            .map_err(|source| Error::Root { path: directory.join(FILE), source })?;
        Ok(Self { authority, ttl: config.ttl, clock: config.clock })
    }
}

#[async_trait]
impl Issuer for LocalCa {
    fn name(&self) -> &'static str {
        "local"
    }

    async fn issue(&self, id: &SpiffeId) -> Result<Svid, Failure> {
        let internal = |why: String| Failure::new("internal", why);
        let key = PrivateKey::generate();
        let request = key.request(Some(id)).map_err(|e| internal(e.to_string()))?;
        let csr = Csr::from_pem(&request).map_err(|e| internal(e.to_string()))?;
        let now = self.clock.now();
        let until = (now + self.ttl).min(self.authority.not_after());
        let subject = Subject::Workload { id, common_name: false };
        let issued = self.authority.sign(&csr.key, &subject, now, until).map_err(|e| internal(e.to_string()))?;
        let chain = [&[issued.der], self.authority.chain()].concat();
        let bundles = Arc::new(Bundles::of(id.trust_domain().clone(), self.authority.roots().clone()));
        Ok(Svid { id: id.clone(), chain, key, bundles })
    }
}

/// Where processes of one user find each other's root: in the user's runtime directory (`XDG_RUNTIME_DIR`), or under a
/// name of the user's own in the directory for temporary files.
pub fn directory(runtime_dir: Option<&Path>, temp_dir: &Path) -> Result<PathBuf, Error> {
    match runtime_dir.filter(|dir| dir.is_dir()) {
        Some(runtime_dir) => Ok(runtime_dir.join("zspire")),
        None => Ok(temp_dir.join(format!("zspire-{}", user()?))),
    }
}

/// The effective user, without a system call of our own.
fn user() -> Result<u32, Error> {
    let own = Path::new("/proc/self");
    fs::metadata(own).map(|meta| meta.uid()).map_err(|source| Error::io(own, source))
}

/// Makes the directory, and refuses one that others could have prepared or could write to.
fn prepare(directory: &Path) -> Result<(), Error> {
    match DirBuilder::new().recursive(true).mode(0o700).create(directory) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(Error::io(directory, source)),
    }
    let meta = fs::symlink_metadata(directory).map_err(|source| Error::io(directory, source))?;
    if !meta.is_dir() || meta.uid() != user()? || meta.permissions().mode() & 0o077 != 0 {
        return Err(Error::NotOwn { path: directory.to_owned() });
    }
    Ok(())
}

/// The root in `directory`: read if it is there and still valid, made otherwise. One process at a time.
fn shared_root(directory: &Path, clock: &dyn Clock) -> Result<Parts, Error> {
    let lock_path = directory.join("lock");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let lock = lock.map_err(|source| Error::io(&lock_path, source))?;
    lock.lock().map_err(|source| Error::io(&lock_path, source))?;
    let path = directory.join(FILE);
    match read(&path) {
        Ok(parts) if still_good(&parts, clock) => return Ok(parts),
        Ok(_) => tracing::info!(path = %path.display(), "the development root has expired, making a new one"),
        Err(Error::Io { ref source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let parts = Parts::generate("zspire development", ROOT_LIFETIME, clock.now())
        .map_err(|source| Error::Root { path: path.clone(), source })?;
    let text = Zeroizing::new(format!("{}{}", parts.certificate, *parts.key));
    write_private(&path, text.as_bytes()).map_err(|source| Error::io(&path, source))?;
    Ok(parts)
}

fn still_good(parts: &Parts, clock: &dyn Clock) -> bool {
    // With a day to spare: processes hold on to it.
    Authority::new(parts, clock.now() + Duration::from_secs(24 * 3600)).is_ok()
}

fn read(path: &Path) -> Result<Parts, Error> {
    let file = File::open(path).map_err(|source| Error::io(path, source))?;
    let meta = file.metadata().map_err(|source| Error::io(path, source))?;
    if meta.uid() != user()? || meta.permissions().mode() & 0o077 != 0 {
        return Err(Error::NotOwn { path: path.to_owned() });
    }
    let text = Zeroizing::new(io::read_to_string(file).map_err(|source| Error::io(path, source))?);
    let broken = |source| Error::Root { path: path.to_owned(), source };
    let certificates = pem::certificates(text.as_bytes()).map_err(|e| broken(authority::Error::Certificate(e)))?;
    let certificate = pem::certificate(&certificates[0]);
    Ok(Parts { roots: certificate.clone(), certificate, key: text, chain: String::new() })
}

/// Why there is no development CA.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not there.
    #[error("the development CA is refused inside Kubernetes: unset FAKE_CA and set CA_ADDRESS")]
    Kubernetes,
    /// Somebody else may have put something there.
    #[error("{} must belong to this user and be closed to others: remove it", .path.display())]
    NotOwn {
        /// The file or directory.
        path: PathBuf,
    },
    /// Unreadable, unwritable.
    #[error("cannot use {} for the development CA: check its owner, its mode and the space on the disk", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is damaged.
    #[error("the development root in {} cannot be used: remove it", .path.display())]
    Root {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: authority::Error,
    },
}

impl Error {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}
