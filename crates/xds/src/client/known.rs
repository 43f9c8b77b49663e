//! What the client knows of one type: names and versions, and what that means at the beginning of a stream.

use std::collections::{BTreeMap, HashMap};

use zspire_model::{Change, Str};

use crate::resource::Kind;

/// The resources of one type that were applied.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) type_url: &'static str,
    /// Whether all resources are subscribed to.
    pub(super) wildcard: bool,
    resources: HashMap<Str, Version>,
    /// Number of the stream.
    stream: u32,
    /// Whether this stream has brought an answer.
    answered: bool,
    /// Whether the server was told all versions at the beginning of this stream.
    told: bool,
    /// Whether the server sent something again although it was told that it is known.
    resent: bool,
}

#[derive(Debug)]
struct Version {
    kind: Kind,
    version: Box<str>,
    /// The stream that brought it last.
    stream: u32,
}

impl Known {
    pub(super) fn new(type_url: &'static str, wildcard: bool) -> Self {
        let resources = HashMap::new();
        Self { type_url, wildcard, resources, stream: 0, answered: false, told: false, resent: false }
    }

    /// A stream begins. What to tell the server of what is known: everything, if that is not too long. A server that is
    /// told nothing sends everything.
    pub(super) fn begin_stream(&mut self, max_bytes: usize) -> BTreeMap<String, String> {
        self.stream += 1;
        self.answered = false;
        self.resent = false;
        // Tag and length of the entry, of the name and of the version.
        let bytes: usize = self.resources.iter().map(|(name, it)| name.len() + it.version.len() + 12).sum();
        self.told = bytes <= max_bytes;
        if !self.told {
            return BTreeMap::new();
        }
        self.resources.iter().map(|(name, it)| (name.to_string(), it.version.to_string())).collect()
    }

    pub(super) fn answered(&self) -> bool {
        self.answered
    }

    /// A resource was applied. If a resource of another kind had its name, that one is gone: the change to apply before.
    pub(super) fn put(&mut self, name: Str, kind: Kind, version: &str) -> Option<Change> {
        let new = Version { kind, version: version.into(), stream: self.stream };
        let old = self.resources.insert(name.clone(), new)?;
        self.resent |= !self.answered && old.stream != self.stream && !version.is_empty() && *old.version == *version;
        (old.kind != kind).then(|| old.kind.remove(&name)).flatten()
    }

    /// A resource was sent and cannot be applied: what was known of it stays. Whether something was.
    pub(super) fn keep(&mut self, name: &str) -> bool {
        let stream = self.stream;
        self.resources.get_mut(name).map(|it| it.stream = stream).is_some()
    }

    /// A resource is gone.
    pub(super) fn remove(&mut self, name: &str) -> Option<Change> {
        let (name, it) = self.resources.remove_entry(name)?;
        it.kind.remove(&name)
    }

    /// An answer is complete. After the first one of a stream, what vanished while there was none is found: servers name it,
    /// if they compare with what they were told. A server that does not compare sends everything, and shows it by sending
    /// again what is known in the same version; and what has no version cannot have been left out because it is known.
    pub(super) fn end_of_answer(&mut self, changes: &mut Vec<Change>) {
        if std::mem::replace(&mut self.answered, true) || !self.wildcard {
            return;
        }
        let (everything, stream) = (!self.told || self.resent, self.stream);
        self.resources.retain(|name, it| {
            let vanished = it.stream != stream && (everything || it.version.is_empty());
            if vanished {
                changes.extend(it.kind.remove(name));
            }
            !vanished
        });
    }
}
