//! What is enrolled, on disk: for each pod a JSON file, and beside it its network namespace, kept by a bind mount.
//!
//! Files are written whole or not at all. A namespace that is mounted here lives on when everything else has ended, so
//! that a new agent finds it again with the rules that are in it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zspire_sys::netns::{self, Netns};

/// Longest file that is read.
const MAX_FILE: u64 = 64 * 1024;

/// A pod that is enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// By which it is known when it has ended.
    #[serde(default)]
    pub until: Until,
    /// The number of its network namespace.
    pub inode: u64,
}

/// When a pod has ended by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Until {
    /// Never: it stays until it is unenrolled.
    #[default]
    Unenrolled,
    /// When this process ends.
    Process { pid: u32, start_time: u64 },
    /// When this file no longer is its network namespace.
    File(PathBuf),
}

impl Record {
    /// `namespace/name`.
    pub fn pod(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// The folder.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

/// What could not be done with the folder.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path}")]
pub(super) struct Error {
    what: &'static str,
    path: String,
    #[source]
    source: io::Error,
}

impl Folder {
    /// Opens the folder, or makes it, for this user alone.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(failed("make the folder", path))?;
        Ok(Self(path.to_owned()))
    }

    /// Keeps a pod and its namespace. When it fails, there is nothing left of the attempt.
    pub(super) fn keep(&self, record: &Record, netns: &Netns) -> Result<(), Error> {
        let mounted = self.netns_path(&record.uid);
        // Of an attempt that a crash has ended; the pod is not enrolled.
        netns::release(&mounted).map_err(failed("clear", &mounted))?;
        netns::hold(netns, &mounted).map_err(failed("keep the network namespace at", &mounted))?;
        self.write(record).inspect_err(|_| {
            // The error to tell of is the first one.
            let _ = netns::release(&mounted);
            for extension in ["new", "json"] {
                let _ = fs::remove_file(self.file(&record.uid, extension));
            }
        })
    }

    fn write(&self, record: &Record) -> Result<(), Error> {
        let (new, path) = (self.file(&record.uid, "new"), self.file(&record.uid, "json"));
        let mut text = serde_json::to_vec_pretty(record).map_err(|error| failed("write", &path)(error.into()))?;
        text.push(b'\n');
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.0)?.sync_all()
        })();
        written.map_err(failed("write", &path))
    }

    /// Forgets a pod and lets go of its namespace.
    pub(super) fn forget(&self, uid: &str) -> Result<(), Error> {
        let path = self.file(uid, "json");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &path)(error)),
            _ => {}
        }
        let mounted = self.netns_path(uid);
        netns::release(&mounted).map_err(failed("let go of the network namespace at", &mounted))
    }

    /// The pods that are there, and what could not be read.
    pub(super) fn records(&self) -> Result<(Vec<Record>, Vec<Error>), Error> {
        let (mut records, mut unreadable) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.0).map_err(failed("read", &self.0))? {
            let path = entry.map_err(failed("read", &self.0))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                match read(&path) {
                    Ok(record) => records.push(record),
                    Err(error) => unreadable.push(failed("understand", &path)(error)),
                }
            }
        }
        Ok((records, unreadable))
    }

    /// The namespace that is kept for a pod, if it still is.
    pub(super) fn netns(&self, uid: &str) -> io::Result<Netns> {
        Netns::open(self.netns_path(uid))
    }

    fn netns_path(&self, uid: &str) -> PathBuf {
        self.file(uid, "netns")
    }

    fn file(&self, uid: &str, extension: &str) -> PathBuf {
        self.0.join(format!("{uid}.{extension}"))
    }
}

fn read(path: &Path) -> io::Result<Record> {
    let file = File::open(path)?;
    let record: Record = serde_json::from_reader(io::Read::take(file, MAX_FILE))?;
    // The name says whose it is: a file that was copied is not another pod.
    match path.file_stem().and_then(|stem| stem.to_str()) {
        Some(stem) if stem == record.uid => Ok(record),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is named for another uid")),
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str) -> Record {
        Record {
            uid: uid.into(),
            name: "web".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            until: Until::Process { pid: 7, start_time: 42 },
            inode: 5,
        }
    }

    #[test]
    fn what_is_written_is_read_and_what_cannot_be_read_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::open(directory.path()).unwrap();
        folder.write(&record("a")).unwrap();
        fs::copy(folder.file("a", "json"), folder.file("b", "json")).unwrap();
        fs::write(folder.file("c", "json"), "{").unwrap();
        let (records, unreadable) = folder.records().unwrap();
        assert_eq!(records, [record("a")]);
        assert_eq!(unreadable.len(), 2);
        folder.forget("a").unwrap();
        folder.forget("a").unwrap();
        assert!(folder.records().unwrap().0.is_empty());
    }
}
