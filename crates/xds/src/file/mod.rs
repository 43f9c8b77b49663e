//! The mesh as files, in ztunnel's schema: `workloads`, `policies` and `services`, as YAML or JSON.
//!
//! A mesh is read and checked as a whole ([`load`]): one mistake anywhere refuses all of it, with the file, the line and what to
//! do, and whoever loads it keeps the last good one. Reading is one pass: a workload is turned into its shared, compact form
//! before the next one is read. What refers to nothing (a service, a waypoint, a policy) is no mistake, because the other part may
//! come later or from elsewhere, but a finding. [`Watcher`] says when to read again, [`diff`] what is different then.

mod builder;
mod load;
mod plain;
mod read;
mod references;
mod schema;
mod watch;
mod words;

use std::collections::HashMap;
use std::fmt;

use zspire_model::{Change, Str, TrustDomain};

use crate::resource::{Kind, Resource};
use builder::Builder;
pub use load::{load, load_all, load_in};
pub use watch::Watcher;

/// A whole mesh, checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mesh {
    /// Its resources, in the order of the files.
    pub resources: Vec<Resource>,
    /// What names something that is not there, with file and line: it may come later, so it is no error.
    pub findings: Vec<String>,
}

impl Mesh {
    /// The changes that make an empty mesh this one.
    pub fn changes(&self) -> Vec<Change> {
        self.resources.iter().map(Resource::put).collect()
    }
}

/// Why a mesh is refused.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    /// The file, or the folder.
    pub file: String,
    /// Line and column in it, from 1, if the mistake has a place.
    pub place: Option<(u64, u64)>,
    /// What is wrong, with the field, and what to do about it.
    pub why: String,
    /// Why it cannot be read.
    #[source]
    pub source: Option<std::io::Error>,
}

impl Error {
    fn at(file: &str, place: Option<(u64, u64)>, why: impl Into<String>) -> Self {
        Self { file: file.to_owned(), place, why: why.into(), source: None }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.why)?;
        if self.place.is_some() {
            f.write_str("; nothing of it is used until that is corrected")?;
        }
        Ok(())
    }
}

/// Reads one text; `name` stands for it in errors, and what ends in `.json` is read as JSON. Workloads that name no trust domain
/// are of `cluster.local`.
pub fn parse(text: &str, name: &str) -> Result<Vec<Resource>, Error> {
    parse_in(text, name, &TrustDomain::default())
}

/// Reads one text; workloads that name no trust domain are of the one given.
pub fn parse_in(text: &str, name: &str, trust_domain: &TrustDomain) -> Result<Vec<Resource>, Error> {
    let mut builder = Builder::new(trust_domain.clone());
    builder.file(name, text)?;
    Ok(builder.finish().resources)
}

/// The changes that make one mesh another.
pub fn diff(old: &Mesh, new: &Mesh) -> Vec<Change> {
    let mut gone: HashMap<(Kind, Str), &Resource> =
        old.resources.iter().map(|resource| ((resource.kind(), resource.name()), resource)).collect();
    let mut changes = Vec::new();
    for resource in &new.resources {
        let before = gone.remove(&(resource.kind(), resource.name()));
        if before != Some(resource) {
            changes.push(resource.put());
        }
    }
    changes.extend(gone.into_values().map(Resource::remove));
    changes
}
