//! Collects a mesh from its files and checks what no single entry can show: names and addresses that are used twice.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use zspire_model::workload::NetworkMode;
use zspire_model::{Interner, NetworkAddress, NetworkCidr, Service, Str, TrustDomain, Workload};

use super::schema::{PolicyEntry, ServiceEntry, WorkloadEntry};
use super::{Error, read};
use crate::resource::{Kind, Resource};

pub(super) struct Builder {
    pub(super) shared: Interner,
    trust_domain: TrustDomain,
    resources: Vec<Resource>,
    files: Vec<String>,
    /// Resources of the files before the one that is being read.
    before: usize,
    /// Which file has a name.
    names: HashMap<(Kind, Str), u32>,
    /// Which service has a virtual address, and in which file.
    vips: HashMap<NetworkAddress, (Arc<Service>, u32)>,
    /// Which service has a range of virtual addresses, and in which file; by network and first address.
    ranges: BTreeMap<(Str, IpAddr), (NetworkCidr, Arc<Service>, u32)>,
    /// Which workload has an address, and in which file.
    addresses: HashMap<NetworkAddress, (Str, u32)>,
}

/// A mesh before its references are checked.
pub(super) struct Built {
    pub(super) resources: Vec<Resource>,
    names: HashMap<(Kind, Str), u32>,
    files: Vec<String>,
    vips: HashMap<NetworkAddress, (Arc<Service>, u32)>,
    addresses: HashMap<NetworkAddress, (Str, u32)>,
}

impl Built {
    /// The file that an entry stands in.
    pub(super) fn file_of(&self, kind: Kind, name: &Str) -> Option<&str> {
        let file = self.names.get(&(kind, name.clone()))?;
        self.files.get(*file as usize).map(String::as_str)
    }

    /// Whether a service or a workload has an address.
    pub(super) fn has_address(&self, address: &NetworkAddress) -> bool {
        self.vips.contains_key(address) || self.addresses.contains_key(address)
    }
}

impl Builder {
    pub(super) fn new(trust_domain: TrustDomain) -> Self {
        Self {
            shared: Interner::default(),
            trust_domain,
            resources: Vec::new(),
            files: Vec::new(),
            before: 0,
            names: HashMap::new(),
            vips: HashMap::new(),
            ranges: BTreeMap::new(),
            addresses: HashMap::new(),
        }
    }

    /// Reads one more file.
    pub(super) fn file(&mut self, name: &str, text: &str) -> Result<(), Error> {
        self.begin_file(name);
        read::read(name, text, self)
    }

    pub(super) fn begin_file(&mut self, name: &str) {
        self.files.push(name.to_owned());
        self.before = self.resources.len();
    }

    /// Takes back what came from the file that is being read: it is read again.
    pub(super) fn forget_file(&mut self) {
        let current = self.current();
        self.resources.truncate(self.before);
        self.names.retain(|_, file| *file != current);
        self.vips.retain(|_, (_, file)| *file != current);
        self.ranges.retain(|_, (.., file)| *file != current);
        self.addresses.retain(|_, (_, file)| *file != current);
    }

    pub(super) fn finish(self) -> Built {
        let Self { resources, names, files, vips, addresses, .. } = self;
        Built { resources, names, files, vips, addresses }
    }

    pub(super) fn workload(&mut self, entry: WorkloadEntry<'_>) -> Result<(), String> {
        let workload = entry.build(&mut self.shared, &self.trust_domain)?;
        self.claim(&workload)?;
        self.add(Resource::Workload(Arc::new(workload)))
    }

    pub(super) fn service(&mut self, entry: ServiceEntry<'_>) -> Result<(), String> {
        let service = Arc::new(entry.build(&mut self.shared)?);
        for vip in &service.vips {
            if let Some((other, file)) = self.vips.get(vip).filter(|(other, _)| other.hostname != service.hostname) {
                return Err(format!(
                    "vips: {vip} is an address of {} too (in {}): give one of them another address",
                    other.key(),
                    self.files[*file as usize]
                ));
            }
            let current = self.current();
            self.vips.entry(vip.clone()).or_insert_with(|| (service.clone(), current));
        }
        for range in &service.cidr_vips {
            self.claim_range(range, &service)?;
        }
        self.add(Resource::Service(service))
    }

    /// What leads to one address must be one workload; those on their node's network have none of their own.
    fn claim(&mut self, workload: &Workload) -> Result<(), String> {
        if workload.network_mode == NetworkMode::HostNetwork {
            return Ok(());
        }
        let current = self.current();
        for address in &workload.addresses {
            let address = NetworkAddress { network: workload.network.clone(), address: *address };
            match self.addresses.entry(address) {
                Entry::Vacant(entry) => drop(entry.insert((workload.uid.clone(), current))),
                // The same name twice is the clearer mistake.
                Entry::Occupied(entry) if entry.get().0 == workload.uid => {}
                Entry::Occupied(entry) => {
                    let (other, file) = entry.get();
                    return Err(format!(
                        "workloadIps: {} is an address of workload {other} too (in {}): give one of them another address, or \
                         networkMode: HostNetwork if they share their node's",
                        entry.key(),
                        self.files[*file as usize]
                    ));
                }
            }
        }
        Ok(())
    }

    /// Ranges overlap only if one is inside the other, so the neighbours in order tell.
    fn claim_range(&mut self, range: &NetworkCidr, service: &Arc<Service>) -> Result<(), String> {
        let (network, net) = (&range.network, &range.net);
        let before = self.ranges.range(..=(network.clone(), net.network())).next_back();
        let inside = self.ranges.range((network.clone(), net.network())..=(network.clone(), net.broadcast())).next();
        for (_, (other, of, file)) in before.into_iter().chain(inside) {
            let overlap = other.network == *network && (other.net.contains(net) || net.contains(&other.net));
            if overlap && of.hostname != service.hostname {
                return Err(format!(
                    "cidrVips: {range} overlaps with {other} of {} (in {}): give one of them another range",
                    of.key(),
                    self.files[*file as usize]
                ));
            }
        }
        let current = self.current();
        self.ranges
            .entry((network.clone(), net.network()))
            .or_insert_with(|| (range.clone(), service.clone(), current));
        Ok(())
    }

    pub(super) fn policy(&mut self, entry: PolicyEntry<'_>) -> Result<(), String> {
        let policy = entry.build(&mut self.shared)?;
        self.add(Resource::Policy(Arc::new(policy)))
    }

    fn add(&mut self, resource: Resource) -> Result<(), String> {
        let (kind, name) = (resource.kind(), resource.name());
        let field = match kind {
            Kind::Workload => "uid",
            Kind::Service => "hostname",
            Kind::Policy => "name",
        };
        let current = self.current();
        match self.names.entry((kind, name)) {
            Entry::Vacant(entry) => entry.insert(current),
            Entry::Occupied(entry) => {
                let (name, file) = (&entry.key().1, &self.files[*entry.get() as usize]);
                return Err(format!(
                    "{field}: {name} is defined twice (first in {file}): remove or rename one of them"
                ));
            }
        };
        self.resources.push(resource);
        Ok(())
    }

    fn current(&self) -> u32 {
        u32::try_from(self.files.len() - 1).unwrap_or(u32::MAX)
    }
}
