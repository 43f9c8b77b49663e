//! The mesh as it is served: every resource encoded once, with a version that its content decides.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use imbl::OrdMap;
use twox_hash::XxHash64;
use zspire_model::{Change, NamespacedHostname, Str};

use crate::Resource;
use crate::codec;
use crate::resource::Kind;

/// Entries by name.
pub(super) type Entries = OrdMap<Str, Arc<Entry>>;

/// An immutable set of resources. A set that is made from another by [`ResourceSet::with`] shares with it what is equal.
#[derive(Debug, Default)]
pub struct ResourceSet {
    addresses: Entries,
    policies: Entries,
    version: u64,
    index: OnceLock<Index>,
}

/// One resource of a set.
#[derive(Debug)]
pub struct Entry {
    /// The resource.
    pub resource: Resource,
    /// Its value on the wire.
    pub value: Vec<u8>,
    /// Hash of the value: equal content has an equal version, on every server and after every restart.
    pub version: u64,
}

/// Content decides.
impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version
    }
}

impl Entry {
    fn new(resource: Resource) -> Self {
        let value = codec::encode(&resource);
        let version = XxHash64::oneshot(0, &value);
        Self { resource, value, version }
    }

    /// The version as it stands on the wire, the same as Istio's.
    pub fn version_text(&self) -> String {
        format!("{:x}", self.version)
    }

    /// What this entry adds to the version of a set: combined by XOR, the order does not matter and entries can be taken out.
    fn contribution(&self, name: &str) -> u64 {
        XxHash64::oneshot(self.version, name.as_bytes())
    }
}

impl ResourceSet {
    /// A set of resources; of several with one name the last counts.
    pub fn new(resources: Vec<Resource>) -> Self {
        let mut set = Self::default();
        for resource in resources {
            set.put(resource);
        }
        set
    }

    /// This set with changes, at a cost in proportion to them.
    pub fn with(&self, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut set = Self {
            addresses: self.addresses.clone(),
            policies: self.policies.clone(),
            version: self.version,
            index: OnceLock::new(),
        };
        for change in changes {
            match change {
                Change::PutWorkload(it) => set.put(Resource::Workload(it)),
                Change::PutService(it) => set.put(Resource::Service(it)),
                Change::PutPolicy(it) => set.put(Resource::Policy(it)),
                Change::RemoveWorkload(uid) => set.remove(Kind::Workload, &uid),
                Change::RemoveService(key) => set.remove(Kind::Service, &key.to_string()),
                Change::RemovePolicy(key) => set.remove(Kind::Policy, &key.to_string()),
            }
        }
        set
    }

    /// A resource by its kind and name.
    pub fn get(&self, kind: Kind, name: &str) -> Option<&Arc<Entry>> {
        self.entries(kind.type_url())?.get(name).filter(|entry| entry.resource.kind() == kind)
    }

    /// All resources of a type, ordered by name; none for a type that is not known.
    pub fn iter(&self, type_url: &str) -> impl Iterator<Item = (&Str, &Arc<Entry>)> {
        self.entries(type_url).into_iter().flat_map(OrdMap::iter)
    }

    /// How many resources there are.
    pub fn len(&self) -> usize {
        self.addresses.len() + self.policies.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Version of the whole: equal for equal content.
    pub fn version(&self) -> String {
        format!("{:x}", self.version)
    }

    pub(super) fn entries(&self, type_url: &str) -> Option<&Entries> {
        match type_url {
            codec::ADDRESS_TYPE => Some(&self.addresses),
            codec::AUTHORIZATION_TYPE => Some(&self.policies),
            _ => None,
        }
    }

    fn entries_mut(&mut self, kind: Kind) -> &mut Entries {
        match kind {
            Kind::Workload | Kind::Service => &mut self.addresses,
            Kind::Policy => &mut self.policies,
        }
    }

    fn put(&mut self, resource: Resource) {
        let (name, kind) = (resource.name(), resource.kind());
        let entry = Arc::new(Entry::new(resource));
        let added = entry.contribution(&name);
        let old = self.entries_mut(kind).insert(name.clone(), entry);
        self.version ^= added ^ old.map_or(0, |old| old.contribution(&name));
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        if let Some(old) = self.entries_mut(kind).remove(name) {
            self.version ^= old.contribution(name);
        }
    }

    /// The names of what a key stands for: the resource with that name or address, and all endpoints of a service.
    pub(super) fn resolve(&self, type_url: &str, key: &str) -> Vec<Str> {
        let Some(entries) = self.entries(type_url) else { return Vec::new() };
        if type_url != codec::ADDRESS_TYPE {
            return entries.get_key_value(key).map(|(name, _)| name.clone()).into_iter().collect();
        }
        let index = self.index();
        let direct = entries.get_key_value(key).map(|(name, _)| name);
        let mut names: Vec<Str> =
            direct.into_iter().chain(index.addresses.get(key).into_iter().flatten()).cloned().collect();
        for at in 0..names.len() {
            if let Some(Resource::Service(service)) = entries.get(&names[at]).map(|entry| &entry.resource) {
                names.extend(index.endpoints.get(&service.key()).into_iter().flatten().cloned());
            }
        }
        names
    }

    /// The workloads that run on a node.
    pub(super) fn on_node(&self, node: &str) -> &[Str] {
        self.index().nodes.get(node).map_or(&[], Vec::as_slice)
    }

    /// Only streams that subscribe by name need it.
    fn index(&self) -> &Index {
        self.index.get_or_init(|| Index::of(&self.addresses))
    }
}

/// Other ways to find workloads and services than by name.
#[derive(Debug, Default)]
struct Index {
    /// By `network/address`.
    addresses: HashMap<String, Vec<Str>>,
    endpoints: HashMap<NamespacedHostname, Vec<Str>>,
    nodes: HashMap<Str, Vec<Str>>,
}

impl Index {
    fn of(entries: &Entries) -> Self {
        let mut index = Self::default();
        for (name, entry) in entries {
            for alias in aliases(&entry.resource) {
                index.addresses.entry(alias).or_default().push(name.clone());
            }
            if let Resource::Workload(workload) = &entry.resource {
                for membership in workload.services.iter() {
                    index.endpoints.entry(membership.service.clone()).or_default().push(name.clone());
                }
                if !workload.node.is_empty() {
                    index.nodes.entry(workload.node.clone()).or_default().push(name.clone());
                }
            }
        }
        index
    }
}

/// The other names of a resource: its addresses, as `network/address` or `network/address/length`.
pub(super) fn aliases(resource: &Resource) -> Vec<String> {
    match resource {
        Resource::Workload(it) => it.addresses.iter().map(|address| format!("{}/{address}", it.network)).collect(),
        Resource::Service(it) => {
            let ranges = it.cidr_vips.iter().map(ToString::to_string);
            it.vips.iter().map(ToString::to_string).chain(ranges).collect()
        }
        Resource::Policy(_) => Vec::new(),
    }
}
