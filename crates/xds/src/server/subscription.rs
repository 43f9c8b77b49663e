//! What one stream knows of one type: what it wants, what it has been sent, and whether it is ready for more.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use tonic::Status;
use zspire_model::Str;
use zspire_wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource};

use super::set::{Entries, Entry, ResourceSet, aliases};

/// Longest name, in bytes, that can be subscribed to.
const MAX_NAME: usize = 4096;

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) type_url: &'static str,
    wildcard: bool,
    names: BTreeSet<Str>,
    sent: Sent,
    /// Names that were asked for since the last answer: what is not known of them is said so.
    asked: Vec<Str>,
    /// Whether an answer is due even if there is nothing to say.
    owed: bool,
    /// Whether the set has changed since it was looked at.
    stale: bool,
}

/// What the client has.
#[derive(Debug)]
enum Sent {
    /// Versions by name; none where the client said something that is no version of ours.
    Some(HashMap<Str, Option<u64>>),
    /// All of a set.
    All(Entries),
}

/// What has to be said.
#[derive(Debug, Default)]
struct Difference {
    put: Vec<Arc<Entry>>,
    removed: Vec<String>,
}

impl Subscription {
    /// The first request of a type.
    pub(super) fn new(type_url: &'static str, first: DeltaDiscoveryRequest, max: usize) -> Result<Self, Status> {
        let known = first.initial_resource_versions.iter();
        let known =
            known.map(|(name, version)| (name.as_str().into(), u64::from_str_radix(version, 16).ok())).collect();
        let mut subscription = Self {
            type_url,
            // Who asks for nothing in particular asks for everything.
            wildcard: first.resource_names_subscribe.is_empty(),
            names: BTreeSet::new(),
            sent: Sent::Some(known),
            asked: Vec::new(),
            owed: true,
            stale: true,
        };
        subscription.change(first.resource_names_subscribe, first.resource_names_unsubscribe, max)?;
        Ok(subscription)
    }

    /// Names come and go. `*` in both lists is how a client says that it wants nothing yet.
    pub(super) fn change(&mut self, more: Vec<String>, less: Vec<String>, max: usize) -> Result<(), Status> {
        self.owed |= !more.is_empty();
        self.stale |= !more.is_empty();
        for name in more {
            if name.len() > MAX_NAME {
                return Err(Status::invalid_argument("a name is too long"));
            }
            if name == "*" {
                self.wildcard = true;
                continue;
            }
            let name = Str::from(name);
            self.names.insert(name.clone());
            self.asked.push(name);
        }
        for name in less {
            if name == "*" {
                self.wildcard = false;
                continue;
            }
            self.names.remove(&*name);
            if let Sent::Some(sent) = &mut self.sent {
                sent.remove(&*name);
            }
        }
        if self.names.len().max(self.asked.len()) > max {
            return Err(Status::resource_exhausted(format!("more than {max} names are subscribed to")));
        }
        Ok(())
    }

    /// There is a new set.
    pub(super) fn set_changed(&mut self) {
        self.stale = true;
    }

    /// What to send now, if anything.
    pub(super) fn answer(&mut self, set: &ResourceSet, node: Option<&str>) -> Option<DeltaDiscoveryResponse> {
        if !std::mem::replace(&mut self.stale, false) && !self.owed {
            return None;
        }
        let entries = set.entries(self.type_url)?;
        let difference = if self.wildcard { self.all(entries) } else { self.some(entries, set, node) };
        self.asked.clear();
        let owed = std::mem::replace(&mut self.owed, false);
        if difference.put.is_empty() && difference.removed.is_empty() && !owed {
            return None;
        }
        let with_aliases = !self.wildcard;
        Some(DeltaDiscoveryResponse {
            type_url: self.type_url.into(),
            resources: difference.put.iter().map(|entry| wire(self.type_url, entry, with_aliases)).collect(),
            removed_resources: difference.removed,
            ..DeltaDiscoveryResponse::default()
        })
    }

    fn all(&mut self, entries: &Entries) -> Difference {
        let mut difference = Difference::default();
        match &self.sent {
            Sent::All(old) => {
                for item in old.diff(entries) {
                    match item {
                        DiffItem::Add(_, entry) | DiffItem::Update { new: (_, entry), .. } => {
                            difference.put.push(entry.clone());
                        }
                        DiffItem::Remove(name, _) => difference.removed.push(name.to_string()),
                    }
                }
            }
            Sent::Some(known) => {
                let unknown = entries.iter().filter(|(name, entry)| known.get(*name) != Some(&Some(entry.version)));
                difference.put.extend(unknown.map(|(_, entry)| entry.clone()));
                let gone = known.keys().filter(|name| !entries.contains_key(*name));
                difference.removed.extend(gone.map(ToString::to_string));
            }
        }
        self.sent = Sent::All(entries.clone());
        difference
    }

    fn some(&mut self, entries: &Entries, set: &ResourceSet, node: Option<&str>) -> Difference {
        let mut wanted: BTreeMap<Str, Arc<Entry>> = BTreeMap::new();
        let mut want = |name: &Str| match entries.get(name) {
            Some(entry) => wanted.insert(name.clone(), entry.clone()).is_some(),
            None => false,
        };
        let mut unknown = BTreeSet::new();
        for key in &self.names {
            let names = set.resolve(self.type_url, key);
            if names.is_empty() {
                unknown.insert(key.clone());
            }
            names.iter().for_each(|name| {
                want(name);
            });
        }
        if let Some(node) = node.filter(|_| self.type_url == crate::ADDRESS_TYPE) {
            set.on_node(node).iter().for_each(|name| {
                want(name);
            });
        }
        let known = match std::mem::replace(&mut self.sent, Sent::Some(HashMap::new())) {
            Sent::Some(known) => known,
            Sent::All(old) => old.iter().map(|(name, entry)| (name.clone(), Some(entry.version))).collect(),
        };
        let mut difference = Difference::default();
        let gone = known.keys().filter(|name| !entries.contains_key(*name)).cloned();
        let missing = self.asked.iter().filter(|key| unknown.contains(*key)).cloned();
        let removed: BTreeSet<Str> = gone.chain(missing).collect();
        difference.removed = removed.iter().map(ToString::to_string).collect();
        // What was asked for just now is sent even if it is known: an answer must name it.
        let asked: BTreeSet<Str> = self.asked.iter().flat_map(|key| set.resolve(self.type_url, key)).collect();
        let news = wanted
            .iter()
            .filter(|(name, entry)| asked.contains(*name) || known.get(*name) != Some(&Some(entry.version)));
        difference.put = news.map(|(_, entry)| entry.clone()).collect();
        let mut sent = known;
        sent.retain(|name, _| !removed.contains(name));
        sent.extend(wanted.into_iter().map(|(name, entry)| (name, Some(entry.version))));
        self.sent = Sent::Some(sent);
        difference
    }
}

fn wire(type_url: &str, entry: &Entry, with_aliases: bool) -> WireResource {
    WireResource {
        name: entry.resource.name().to_string(),
        version: entry.version_text(),
        aliases: if with_aliases { aliases(&entry.resource) } else { Vec::new() },
        resource: Some(prost_types::Any { type_url: type_url.into(), value: entry.value.clone() }),
    }
}
