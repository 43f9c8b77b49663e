//! Files: noticing that one has changed, and writing one that is private.
//!
//! The directory is watched, not the file: editors replace files, and Kubernetes swaps a symbolic link next to the
//! one that is read. What counts in the end is the content, so touching a file changes nothing.
//!
//! `notify` runs one thread of its own per [`Watched`]; it only sets a flag and wakes who waits. It ends when dropped.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use crate::x509::{Fingerprint, fingerprint};

/// How long writes may go on before the content is looked at.
const SETTLE: Duration = Duration::from_millis(100);
/// How often the content is looked at where the directory cannot be watched, and as a safety net elsewhere.
const POLL: Duration = Duration::from_secs(10);

/// Files whose content is followed.
#[derive(Debug)]
pub struct Watched {
    paths: Vec<PathBuf>,
    signal: Arc<Signal>,
    seen: Mutex<Option<Fingerprint>>,
    watcher: Option<notify::RecommendedWatcher>,
}

#[derive(Debug, Default)]
struct Signal {
    dirty: AtomicBool,
    wake: Notify,
}

impl Watched {
    /// Follows the content of `paths`. A path may be a directory: then the files directly in it count.
    ///
    /// Neither the files nor their directory need to exist.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let paths: Vec<_> = paths.into_iter().collect();
        let signal = Arc::new(Signal::default());
        let watcher = watch(&paths, signal.clone())
            .inspect_err(|e| tracing::debug!(?paths, error = %e, "cannot watch for changes, polling instead"))
            .ok();
        let seen = Mutex::new(digest(&paths));
        Self { paths, signal, seen, watcher }
    }

    /// Whether the content differs from the last time this was asked. Cheap while nothing happens.
    pub fn has_changed(&self) -> bool {
        if self.watcher.is_some() && !self.signal.dirty.swap(false, Ordering::AcqRel) {
            return false;
        }
        self.compare()
    }

    /// Waits until the content differs from the last time. Safe to cancel.
    pub async fn changed(&self) {
        loop {
            tokio::select! {
                () = self.signal.wake.notified() => tokio::time::sleep(SETTLE).await,
                () = tokio::time::sleep(POLL) => {}
            }
            self.signal.dirty.store(false, Ordering::Release);
            if self.compare() {
                return;
            }
        }
    }

    fn compare(&self) -> bool {
        let now = digest(&self.paths);
        let mut seen = self.seen.lock().expect("nothing panics while holding it");
        std::mem::replace(&mut *seen, now) != now
    }
}

fn watch(paths: &[PathBuf], signal: Arc<Signal>) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| event.kind.is_access()) {
            return;
        }
        signal.dirty.store(true, Ordering::Release);
        signal.wake.notify_one();
    })?;
    for path in paths {
        let directory = if path.is_dir() { path } else { parent(path) };
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// One value for the content of all files; `None` when there is none.
fn digest(paths: &[PathBuf]) -> Option<Fingerprint> {
    let mut all = Vec::new();
    for path in paths {
        for file in files(path) {
            let Ok(content) = std::fs::read(&file) else { continue };
            all.extend(fingerprint(file.as_os_str().as_encoded_bytes()));
            all.extend(fingerprint(&content));
        }
    }
    (!all.is_empty()).then(|| fingerprint(&all))
}

fn files(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return vec![path.to_owned()] };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.sort();
    files
}

/// Writes a file that only its owner can read, whole or not at all, and on the disk when this returns.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let result = (|| {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    if result.is_err() {
        drop(fs::remove_file(&temporary));
    }
    result
}
