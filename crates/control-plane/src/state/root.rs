//! The CA's own files: the root that is made once and kept, or the folder that the operator provides.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use zeroize::Zeroizing;
use zspire_identity::authority::Parts;
use zspire_identity::files::write_private;
use zspire_identity::pem;
use zspire_model::TrustDomain;

use super::{Database, Error};

/// istiod's `CITADEL_SELF_SIGNED_CA_CERT_TTL`.
const LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);

/// The root in the state folder; the first caller makes it. A server and a command may come at the same time.
pub(crate) fn own_root(folder: &Path, domain: &TrustDomain, now: SystemTime) -> Result<Parts, Error> {
    super::prepare(folder)?;
    let lock = folder.join("ca.lock");
    let held = File::create(&lock).and_then(|file| file.lock().map(|()| file));
    // Held until the end of this function.
    let _held = held.map_err(|source| Error::io(&lock, source))?;
    let path = folder.join("ca.pem");
    match fs::read_to_string(&path).map(Zeroizing::new) {
        Ok(text) => {
            private(&path)?;
            stored(&path, &text)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            had_root(folder, &path)?;
            let parts = Parts::generate(domain.as_str(), LIFETIME, now)
                .map_err(|source| Error::Authority { path: path.clone(), source })?;
            let text = Zeroizing::new(format!("{}{}", *parts.key, parts.certificate));
            write_private(&path, text.as_bytes()).map_err(|source| Error::io(&path, source))?;
            tracing::info!(path = %path.display(), "made a new root: keep a copy of this file, without it every node has to join again");
            Ok(parts)
        }
        Err(source) => Err(Error::io(&path, source)),
    }
}

/// A CA that has issued certificates does not begin anew because its key is gone: nobody would trust what it issues.
fn had_root(folder: &Path, key: &Path) -> Result<(), Error> {
    let published = folder.join("root-cert.pem").exists();
    let remembered = folder.join("state.db").exists() && Database::durable(folder)?.recall("root")?.is_some();
    if published || remembered {
        return Err(Error::RootLost { path: key.to_owned(), folder: folder.to_owned() });
    }
    Ok(())
}

/// Refuses a key that others than its owner may read.
fn private(path: &Path) -> Result<(), Error> {
    let mode = fs::metadata(path).map_err(|source| Error::io(path, source))?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Error::Exposed { path: path.to_owned(), mode });
    }
    Ok(())
}

fn stored(path: &Path, text: &Zeroizing<String>) -> Result<Parts, Error> {
    let certificates = pem::certificates(text.as_bytes()).map_err(|source| Error::Authority {
        path: path.to_owned(),
        source: zspire_identity::authority::Error::Certificate(source),
    })?;
    let certificate: String = certificates.iter().map(|der| pem::certificate(der)).collect();
    Ok(Parts { roots: certificate.clone(), certificate, key: text.clone(), chain: String::new() })
}

/// A CA in a folder laid out as istiod's secret `cacerts`. A partial set is refused.
pub(crate) fn plugged_in(folder: &Path) -> Result<Parts, Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing { path },
            _ => Error::io(&path, error),
        })
    };
    let key = Zeroizing::new(read("ca-key.pem")?);
    private(&folder.join("ca-key.pem"))?;
    Ok(Parts { certificate: read("ca-cert.pem")?, key, chain: read("cert-chain.pem")?, roots: read("root-cert.pem")? })
}
