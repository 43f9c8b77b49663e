//! What the control plane keeps on disk: the root of its CA, records of what it issued, and join tokens.
//!
//! ```text
//! <state>/ 0700
//!   ca.pem         0600  key and certificate of the CA that was made here, in one file: both or none
//!   root-cert.pem        the roots in force, for operators and clients
//!   state.db             SQLite: issued certificates, join tokens (hashed), the root in force
//!   lock                 held by the one control plane that runs
//! ```
//!
//! Two promises of different strength. A join token is spent only once that is on the disk (`synchronous=FULL`), and
//! nothing is issued for it otherwise. Records of issued certificates are written behind, many in one transaction: a crash of the
//! process loses at most the last [`writer::LINGER`], a power cut somewhat more, and when the disk is full issuing goes on while every
//! lost record is counted and the loss logged. Refusing to renew certificates for want of a log would stop the mesh.

mod database;
mod root;
mod tokens;
mod writer;

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

pub(crate) use database::Database;
pub use database::{IssuedRecord, issued};
pub(crate) use root::{own_root, plugged_in};
pub use tokens::create_token;
pub(crate) use tokens::{Refusal, TokenHash, node_id};
pub(crate) use writer::{Record, Unavailable, Writer, WriterStats};

/// The state folder, held for this process.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Makes the folder if it is missing, closes it to others, and takes it for this process.
    pub(crate) fn hold(path: &Path) -> Result<Self, Error> {
        prepare(path)?;
        let lock = path.join("lock");
        let file = File::create(&lock).map_err(|source| Error::io(&lock, source))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Held { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => Err(Error::io(&lock, source)),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes a folder that only its owner can look into.
fn prepare(path: &Path) -> Result<(), Error> {
    let result = fs::create_dir_all(path).and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o700)));
    result.map_err(|source| Error::io(path, source))
}

/// What is wrong with the state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Permissions, a full disk and the like.
    #[error("cannot use {} for the state of the control plane: check its owner, its mode and the space on the disk", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Two at once.
    #[error("another control plane uses {}: stop it, or give this one another folder with --state", .path.display())]
    Held {
        /// The folder.
        path: PathBuf,
    },
    /// SQLite refuses.
    #[error("cannot use the database {}: check that it is writable and that the disk has space", .path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// Written by a later version.
    #[error("the database {} is of a newer zspire (format {found}): use that version, or another folder with --state", .path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: i64,
    },
    /// The CA is unusable.
    #[error("the CA in {} cannot be used", .path.display())]
    Authority {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: zspire_identity::authority::Error,
    },
    /// The CA's key is gone.
    #[error(
        "{} is missing, and the CA in {} has had a root: restore the file from your copy; to begin with a new root, which every node has to join again for, remove the folder",
        .path.display(), .folder.display()
    )]
    RootLost {
        /// Where the key was.
        path: PathBuf,
        /// The state folder.
        folder: PathBuf,
    },
    /// Others may read a key.
    #[error("others than its owner may read the key {} (mode {mode:04o}): run `chmod 600 {}`", .path.display(), .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A command for a control plane that is not there.
    #[error(
        "there is no control plane in {}: name the folder that it uses (--state, ZSPIRE_CP_STATE), or start it once, which makes its CA", .path.display()
    )]
    NoControlPlane {
        /// The folder.
        path: PathBuf,
    },
    /// A file of a plugged-in CA is missing.
    #[error("{} is missing: a folder of CA certificates holds ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A node cannot have this name.
    #[error("{0:?} cannot be the name of a node: use letters, digits, '.', '-' and '_'")]
    Node(String),
}

impl Error {
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn database(path: &Path, source: rusqlite::Error) -> Self {
        Self::Database { path: path.to_owned(), source }
    }
}
