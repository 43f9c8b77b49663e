//! The bearer token that this process shows to the CA and the discovery server.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataValue};
use zeroize::Zeroizing;

/// A token is a few kilobytes; more than this is a wrong file.
const MAX_BYTES: usize = 64 * 1024;

/// Where the token comes from.
#[derive(Clone)]
pub enum TokenSource {
    /// A file, read again for every call: Kubernetes replaces it before it expires.
    File(PathBuf),
    /// The token itself.
    Literal(Zeroizing<String>),
}

impl TokenSource {
    /// `authorization` for one call.
    pub(crate) async fn header(&self) -> Result<MetadataValue<Ascii>, Error> {
        let token = match self {
            Self::Literal(token) => token.clone(),
            Self::File(path) => read(path).await?,
        };
        let bearer = Zeroizing::new(format!("Bearer {}", token.trim()));
        let mut header: MetadataValue<Ascii> = bearer.parse().map_err(|_| match self {
            Self::File(path) => Error::Malformed { path: path.clone() },
            Self::Literal(_) => Error::MalformedLiteral,
        })?;
        // Kept out of logs and of HPACK's table.
        header.set_sensitive(true);
        Ok(header)
    }
}

async fn read(path: &Path) -> Result<Zeroizing<String>, Error> {
    let content = Zeroizing::new(tokio::fs::read(path).await.map_err(|source| Error::read(path, source))?);
    if content.len() > MAX_BYTES {
        return Err(Error::Malformed { path: path.to_owned() });
    }
    let text = std::str::from_utf8(&content).map_err(|_| Error::Malformed { path: path.to_owned() })?;
    if text.trim().is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    Ok(Zeroizing::new(text.to_owned()))
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal(redacted)"),
        }
    }
}

/// Why there is no token to send. Every message names the file and the next step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such file.
    #[error("the token file {} does not exist: mount the service account token there or point AUTH_TOKEN at it", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("the token file {} is empty: check what writes it (kubelet, or the join command)", .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A directory.
    #[error("the token path {} is a directory: AUTH_TOKEN must name the file in it", .path.display())]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// Permissions and the like.
    #[error("the token file {} cannot be read: check its owner and mode", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Binary, several lines, or far too long.
    #[error("the file {} does not hold a token (one line of ASCII): point AUTH_TOKEN at the right file", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The same for a literal.
    #[error("AUTH_TOKEN is neither the path of a file nor a token (one line of ASCII)")]
    MalformedLiteral,
}

impl Error {
    fn read(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { path },
            io::ErrorKind::IsADirectory => Self::Directory { path },
            _ => Self::Unreadable { path, source },
        }
    }
}
