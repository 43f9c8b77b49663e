//! When to read the files again.
//!
//! They are looked at once a second: that notices whatever replaces a file or a folder, be it an editor, a rename or the
//! symbolic links of a mounted ConfigMap, on every file system. What has changed is read when it has come to rest: editors and
//! scripts empty a file before they fill it, and half a mesh may lack just the policies that deny.

use std::collections::HashSet;
use std::fs;
use std::hash::Hasher as _;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::task::spawn_blocking;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use twox_hash::XxHash64;
use zspire_model::TrustDomain;

use super::load::{files, load_in};
use super::{Error, Mesh};

const EVERY: Duration = Duration::from_secs(1);
/// A file may change once more within one tick of the file system's clock: one that was written so recently is read again.
const CLOCK_TICK: Duration = Duration::from_secs(2);
/// How long files must stay the same before they are read.
const SETTLE: Duration = Duration::from_millis(250);
/// The same where a file that had content is empty: somebody is about to write it.
const SETTLE_EMPTIED: Duration = Duration::from_secs(2);
/// Files that go on changing for longer than this are reported.
const RESTLESS: Duration = Duration::from_secs(15);

/// Watches a file or a folder. Make it before you load for the first time: what changes from then on is noticed.
#[derive(Debug)]
pub struct Watcher {
    path: PathBuf,
    trust_domain: TrustDomain,
    seen: Seen,
    /// The files that had content when the mesh was good last.
    filled: HashSet<PathBuf>,
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
        let Look { seen, filled, .. } = look(&path);
        Self { seen, path, filled, trust_domain: TrustDomain::default() }
    }

    /// Workloads that name no trust domain are of this one.
    #[must_use]
    pub fn trust_domain(mut self, trust_domain: TrustDomain) -> Self {
        self.trust_domain = trust_domain;
        self
    }

    /// Waits for a change, and reads the mesh once it has come to rest; keep the last good one if that is an error. A file that
    /// had content and has none is an error: nobody empties a mesh by leaving nothing where it was. Dropping the future loses
    /// nothing.
    pub async fn changed(&mut self) -> Result<Mesh, Error> {
        let mut tick = interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let path = self.path.clone();
            let Ok(now) = spawn_blocking(move || glance(&path)).await else { continue };
            if !now.differs(self.seen) {
                self.seen = now;
            } else if let Some(read) = self.read().await {
                return read;
            }
        }
    }

    /// Reads what has come to rest. None if reading was interrupted, which the next look finds.
    async fn read(&mut self) -> Option<Result<Mesh, Error>> {
        let mut rest = Rest::new(self.look().await?, Instant::now());
        loop {
            sleep(SETTLE).await;
            match rest.step(self.look().await?, Instant::now(), &self.filled) {
                Step::Wait => {}
                Step::Restless(seen) => {
                    self.seen = seen;
                    return Some(Err(self.refuse(
                        &self.path,
                        format!("it has kept changing for {RESTLESS:?}: write it beside and rename it into place"),
                    )));
                }
                Step::Emptied(file, seen) => {
                    self.seen = seen;
                    let why = "it is empty and had content before: restore it, remove it, or write \"workloads: []\" into \
                               it if nothing is meant";
                    return Some(Err(self.refuse(&file, why)));
                }
                Step::Read => {
                    let (path, domain) = (self.path.clone(), self.trust_domain.clone());
                    let (mesh, after) = spawn_blocking(move || (load_in(&path, &domain), look(&path))).await.ok()?;
                    // Only what looked the same before and after was read in one piece.
                    if after.seen != rest.last.seen {
                        rest.step(after, Instant::now(), &self.filled);
                        continue;
                    }
                    self.seen = after.seen;
                    if mesh.is_ok() {
                        self.filled = after.filled;
                    }
                    return Some(mesh);
                }
            }
        }
    }

    async fn look(&self) -> Option<Look> {
        let path = self.path.clone();
        spawn_blocking(move || look(&path)).await.ok()
    }

    fn refuse(&self, file: &Path, why: impl Into<String>) -> Error {
        Error::at(&file.display().to_string(), None, why)
    }
}

/// Files that have changed, until they have come to rest.
#[derive(Debug)]
struct Rest {
    begin: Instant,
    last: Look,
    /// Since when they look the same.
    since: Instant,
}

#[derive(Debug, PartialEq)]
enum Step {
    Wait,
    Read,
    /// A file that had content has none.
    Emptied(PathBuf, Seen),
    Restless(Seen),
}

impl Rest {
    fn new(first: Look, now: Instant) -> Self {
        Self { begin: now, last: first, since: now }
    }

    fn step(&mut self, look: Look, now: Instant, filled: &HashSet<PathBuf>) -> Step {
        if look.seen != self.last.seen {
            (self.last, self.since) = (look, now);
            let restless = now - self.begin >= RESTLESS;
            return if restless { Step::Restless(self.last.seen) } else { Step::Wait };
        }
        match (self.last.emptied(filled), now - self.since) {
            (None, same) if same >= SETTLE => Step::Read,
            (Some(file), same) if same >= SETTLE_EMPTIED => Step::Emptied(file, self.last.seen),
            _ => Step::Wait,
        }
    }
}

impl Seen {
    fn differs(self, before: Self) -> bool {
        self.outside != before.outside
            || (before.inside.is_some() && self.inside.is_some() && self.inside != before.inside)
    }
}

/// A look that has read the content too.
#[derive(Debug, Clone)]
struct Look {
    seen: Seen,
    /// The files that say anything.
    filled: HashSet<PathBuf>,
    /// The files that say nothing.
    blank: Vec<PathBuf>,
    /// A folder in which there is no file.
    vacant: Option<PathBuf>,
}

impl Look {
    /// What had content and has none: a file, or the folder that all of them are gone from, as when it is not mounted.
    fn emptied(&self, filled: &HashSet<PathBuf>) -> Option<PathBuf> {
        let vacant = self.vacant.as_ref().filter(|_| !filled.is_empty());
        vacant.or_else(|| self.blank.iter().find(|file| filled.contains(*file))).cloned()
    }
}

/// A look at the outside, and at the inside where the outside may not tell.
fn glance(path: &Path) -> Seen {
    let (outside, newest) = outside(path, &files(path));
    // A time in the future counts as recent too.
    let recent = SystemTime::now().duration_since(newest).map_or(true, |age| age < CLOCK_TICK);
    if recent { look(path).seen } else { Seen { outside, inside: None } }
}

fn look(path: &Path) -> Look {
    let paths = files(path);
    let (outside, _) = outside(path, &paths);
    let mut look = Look {
        seen: Seen { outside, inside: None },
        filled: HashSet::new(),
        blank: Vec::new(),
        vacant: paths.as_ref().is_ok_and(Vec::is_empty).then(|| path.to_owned()),
    };
    if let Ok(paths) = paths {
        let mut inside = XxHash64::default();
        for path in paths {
            match content(&path, &mut inside) {
                Ok(true) => drop(look.filled.insert(path)),
                Ok(false) => look.blank.push(path),
                // Reading the mesh says why.
                Err(error) => inside.write(error.kind().to_string().as_bytes()),
            }
        }
        look.seen.inside = Some(inside.finish());
    }
    look
}

fn outside(path: &Path, paths: &io::Result<Vec<PathBuf>>) -> (u64, SystemTime) {
    let mut outside = XxHash64::default();
    let mut newest = SystemTime::UNIX_EPOCH;
    match paths {
        Ok(paths) => paths.iter().for_each(|path| look_at(path, &mut outside, &mut newest)),
        Err(error) => {
            outside.write(path.as_os_str().as_encoded_bytes());
            outside.write(error.kind().to_string().as_bytes());
        }
    }
    (outside.finish(), newest)
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

/// Adds a file's content to a hash. Whether it says anything: comments and marks of documents do not.
fn content(path: &Path, hash: &mut XxHash64) -> io::Result<bool> {
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; 64 << 10];
    let (mut filled, mut comment, mut fresh) = (false, false, true);
    loop {
        let bytes = match file.read(&mut buffer)? {
            0 => return Ok(filled),
            read => &buffer[..read],
        };
        hash.write(bytes);
        for byte in bytes {
            match byte {
                _ if filled => break,
                b'\n' => (comment, fresh) = (false, true),
                b' ' | b'\t' | b'\r' => {}
                b'#' if fresh => comment = true,
                b'-' => fresh = false,
                _ => {
                    fresh = false;
                    filled = !comment;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(content: u64) -> Seen {
        Seen { outside: content, inside: Some(content) }
    }

    fn full(content: u64) -> Look {
        Look { seen: seen(content), filled: [PathBuf::from("f")].into(), blank: Vec::new(), vacant: None }
    }

    fn blank(content: u64) -> Look {
        Look { seen: seen(content), filled: HashSet::new(), blank: vec!["f".into()], vacant: None }
    }

    /// What is done at each look, given as milliseconds and what is seen then.
    fn steps(first: Look, looks: &[(u64, Look)]) -> Vec<Step> {
        let begin = Instant::now();
        let mut rest = Rest::new(first, begin);
        let filled = HashSet::from([PathBuf::from("f")]);
        let step = |(at, look): &(u64, Look)| rest.step(look.clone(), begin + Duration::from_millis(*at), &filled);
        looks.iter().map(step).collect()
    }

    #[test]
    fn what_has_come_to_rest_is_read() {
        use Step::{Read, Wait};
        assert_eq!(steps(full(1), &[(250, full(1))]), [Read]);
        assert_eq!(steps(full(1), &[(250, full(2)), (400, full(2)), (500, full(2))]), [Wait, Wait, Read]);
        let writing: Vec<_> = (1..=60).map(|n| (n * 250, full(n + 1))).collect();
        let steps = steps(full(1), &writing);
        assert!(steps[..59].iter().all(|step| *step == Wait));
        assert_eq!(steps[59], Step::Restless(seen(61)));
    }

    #[test]
    fn an_emptied_file_is_waited_for_and_then_refused() {
        use Step::{Emptied, Read, Wait};
        assert_eq!(steps(blank(1), &[(250, blank(1)), (1900, full(2)), (2150, full(2))]), [Wait, Wait, Read]);
        let emptied = Emptied("f".into(), seen(1));
        assert_eq!(steps(blank(1), &[(1990, blank(1)), (2000, blank(1))]), [Wait, emptied]);
        let vacant = Look { seen: seen(1), filled: HashSet::new(), blank: Vec::new(), vacant: Some("d".into()) };
        assert_eq!(steps(vacant.clone(), &[(2000, vacant)]), [Emptied("d".into(), seen(1))]);
    }

    #[test]
    fn comments_are_no_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        for (text, filled) in [
            ("", false),
            (" \n\t\r\n", false),
            ("---\n# workloads: []\n", false),
            ("  # one\n#\n", false),
            ("workloads: []", true),
            ("# one\n---\nworkloads:\n", true),
            ("{}", true),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(content(&path, &mut XxHash64::default()).unwrap(), filled, "{text:?}");
        }
    }
}
