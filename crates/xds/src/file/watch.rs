//! When to read the files again.
//!
//! They are looked at once a second: that notices whatever replaces a file or a folder, be it an editor, a rename or the
//! symbolic links of a mounted ConfigMap, on every file system.

use std::fs;
use std::hash::Hasher as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::time::{MissedTickBehavior, interval};
use twox_hash::XxHash64;
use zspire_model::TrustDomain;

use super::load::{files, load_in};
use super::{Error, Mesh};

const EVERY: Duration = Duration::from_secs(1);
/// A file may change once more within one tick of the file system's clock: one that was written so recently is read again.
const CLOCK_TICK: Duration = Duration::from_secs(2);

/// Watches a file or a folder. Make it before you load for the first time: what changes from then on is noticed.
#[derive(Debug)]
pub struct Watcher {
    path: PathBuf,
    trust_domain: TrustDomain,
    seen: Seen,
}

/// What the files looked like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    /// Names, sizes, times, inodes; or the error.
    outside: u64,
    /// The content, where the outside alone does not tell: the files have just been written.
    inside: Option<u64>,
}

impl Watcher {
    /// Watches a path, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self { seen: look(&path), path, trust_domain: TrustDomain::default() }
    }

    /// Workloads that name no trust domain are of this one.
    #[must_use]
    pub fn trust_domain(mut self, trust_domain: TrustDomain) -> Self {
        self.trust_domain = trust_domain;
        self
    }

    /// Waits for a change, and reads the mesh; keep the last good one if that is an error. Dropping the future loses nothing.
    pub async fn changed(&mut self) -> Result<Mesh, Error> {
        let mut tick = interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let (path, trust_domain, before) = (self.path.clone(), self.trust_domain.clone(), self.seen);
            let reading = tokio::task::spawn_blocking(move || {
                let now = look(&path);
                // Looked at before it is read: a change during the reading is the next change.
                let mesh = now.differs(before).then(|| load_in(&path, &trust_domain));
                (now, mesh)
            });
            let Ok((now, mesh)) = reading.await else { continue };
            self.seen = now;
            if let Some(mesh) = mesh {
                return mesh;
            }
        }
    }
}

impl Seen {
    fn differs(self, before: Self) -> bool {
        self.outside != before.outside
            || (before.inside.is_some() && self.inside.is_some() && self.inside != before.inside)
    }
}

fn look(path: &Path) -> Seen {
    let mut outside = XxHash64::default();
    let mut newest = SystemTime::UNIX_EPOCH;
    let paths = files(path);
    match &paths {
        Ok(paths) => paths.iter().for_each(|path| look_at(path, &mut outside, &mut newest)),
        Err(error) => outside.write(error.kind().to_string().as_bytes()),
    }
    // A time in the future counts as recent too.
    let recent = SystemTime::now().duration_since(newest).map_or(true, |age| age < CLOCK_TICK);
    let inside = paths.ok().filter(|_| recent).map(|paths| {
        let mut inside = XxHash64::default();
        for path in paths {
            inside.write(&fs::read(path).unwrap_or_default());
        }
        inside.finish()
    });
    Seen { outside: outside.finish(), inside }
}

fn look_at(path: &Path, outside: &mut XxHash64, newest: &mut SystemTime) {
    outside.write(path.as_os_str().as_encoded_bytes());
    let Ok(metadata) = fs::metadata(path) else { return outside.write_u8(0) };
    for number in [metadata.dev(), metadata.ino(), metadata.size()] {
        outside.write_u64(number);
    }
    for number in [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()] {
        outside.write_i64(number);
    }
    *newest = metadata.modified().map_or(*newest, |modified| modified.max(*newest));
}
