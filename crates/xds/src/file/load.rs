//! Files and folders.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use zspire_model::TrustDomain;

use super::builder::Builder;
use super::{Error, Mesh, references};

/// Longest file, in bytes.
const MAX_FILE: u64 = 256 << 20;
/// Files in a folder.
const MAX_FILES: usize = 10_000;

/// Reads a file, or all `.yaml`, `.yml` and `.json` files of a folder as one mesh. Workloads that name no trust domain are of
/// `cluster.local`.
pub fn load(path: impl AsRef<Path>) -> Result<Mesh, Error> {
    load_in(path, &TrustDomain::default())
}

/// Reads a file or a folder; workloads that name no trust domain are of the one given.
pub fn load_in(path: impl AsRef<Path>, trust_domain: &TrustDomain) -> Result<Mesh, Error> {
    load_all(&[path], trust_domain)
}

/// Reads several files and folders as one mesh.
pub fn load_all(paths: &[impl AsRef<Path>], trust_domain: &TrustDomain) -> Result<Mesh, Error> {
    let mut builder = Builder::new(trust_domain.clone());
    for path in paths.iter().map(AsRef::as_ref) {
        for file in files(path).map_err(|error| unreadable(path, error))? {
            let text = read(&file).map_err(|error| unreadable(&file, error))?;
            builder.file(&file.display().to_string(), &text)?;
        }
    }
    Ok(finish(builder))
}

pub(super) fn finish(builder: Builder) -> Mesh {
    let built = builder.finish();
    let findings = references::check(&built);
    Mesh { resources: built.resources, findings }
}

/// The files that a path stands for, in order. Hidden ones are not among them: that is where the parts of a mounted
/// ConfigMap, and what editors leave behind, are.
pub(super) fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let known = path.extension().is_some_and(|it| it == "yaml" || it == "yml" || it == "json");
        if known && !hidden && fs::metadata(&path)?.is_file() {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(io::Error::other(format!("more than {MAX_FILES} files")));
        }
    }
    files.sort();
    Ok(files)
}

pub(super) fn read(path: &Path) -> io::Result<String> {
    let file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    if length > MAX_FILE {
        return Err(io::Error::other(format!("longer than {MAX_FILE} bytes, split it")));
    }
    let mut text = String::with_capacity(usize::try_from(length).unwrap_or_default());
    // It may be growing while it is read.
    file.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

fn unreadable(path: &Path, error: io::Error) -> Error {
    let why = "cannot be read: check that it exists and that its permissions let this process read it".to_owned();
    Error { file: path.display().to_string(), place: None, why, source: Some(error) }
}
