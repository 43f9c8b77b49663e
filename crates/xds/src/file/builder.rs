//! Collects a mesh from its files and checks what no single entry can show: names and virtual addresses that are used twice.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use zspire_model::{Interner, NetworkAddress, Service, Str, TrustDomain};

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
    }

    pub(super) fn finish(self) -> Vec<Resource> {
        self.resources
    }

    pub(super) fn workload(&mut self, entry: WorkloadEntry<'_>) -> Result<(), String> {
        let workload = entry.build(&mut self.shared, &self.trust_domain)?;
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
        self.add(Resource::Service(service))
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
