//! One immutable state of the mesh, and every way to look something up in it.

use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};

use super::endpoints::Endpoints;
use super::network::{Few, Networks};
use super::{Applied, Change, WorkloadChange};
use crate::policy::Scope;
use crate::{NamespacedHostname, NamespacedName, Policy, Service, Str, Workload};

/// One immutable state of the mesh. Cloning it costs a few reference counts.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    version: u64,
    workloads: HashMap<Str, Arc<Workload>>,
    services: HashMap<NamespacedHostname, Arc<Service>>,
    policies: OrdMap<NamespacedName, Arc<Policy>>,
    networks: Networks,
    workloads_by_hostname: HashMap<Str, Few<Arc<Workload>>>,
    services_by_hostname: HashMap<Str, Few<Arc<Service>>>,
    endpoints: HashMap<NamespacedHostname, Endpoints>,
    /// The policies that apply without being named by a workload.
    global_policies: OrdMap<NamespacedName, Arc<Policy>>,
    namespace_policies: HashMap<Str, OrdMap<Str, Arc<Policy>>>,
}

/// A policy that applies to a workload.
#[derive(Debug, Clone, Copy)]
pub enum Applying<'a> {
    /// It is known.
    Known(&'a Arc<Policy>),
    /// The workload names it, and it is not known (yet).
    Missing(&'a NamespacedName),
}

impl Snapshot {
    /// Grows with every change; 0 before the first.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The workload with a UID.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload with an address. Workloads on their node's network have none of their own.
    pub fn workload_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.networks.workloads(network, address.to_canonical()).first()
    }

    /// Every workload that claims an address, the most credible first.
    pub fn workloads_at(&self, network: &str, address: IpAddr) -> &[Arc<Workload>] {
        self.networks.workloads(network, address.to_canonical())
    }

    /// The workloads that are found by resolving a hostname, ordered by UID.
    pub fn workloads_named(&self, hostname: &str) -> &[Arc<Workload>] {
        self.workloads_by_hostname.get(hostname).map_or(&[], |few| few)
    }

    /// A service.
    pub fn service(&self, name: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// The services with a hostname, ordered by namespace.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.services_by_hostname.get(hostname).map_or(&[], |few| few)
    }

    /// The services with exactly this virtual address, ordered by name.
    pub fn services_at(&self, network: &str, address: IpAddr) -> &[Arc<Service>] {
        self.networks.vips(network, address.to_canonical())
    }

    /// The services whose virtual address range holds an address: those of the longest prefix first, then shorter ones.
    pub fn services_around(&self, network: &str, address: IpAddr) -> impl Iterator<Item = &[Arc<Service>]> {
        self.networks.ranges(network, address.to_canonical())
    }

    /// The endpoints of a service, also of one that is not known yet.
    pub fn endpoints(&self, service: &NamespacedHostname) -> Option<&Endpoints> {
        self.endpoints.get(service)
    }

    /// The policies that apply to a workload: global ones, those of its namespace, then those that it names.
    pub fn policies_for<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = Applying<'a>> {
        let of_namespace = self.namespace_policies.get(&workload.namespace);
        let named = workload.authorization_policies.iter().filter_map(|name| match self.policies.get(name) {
            // A policy of another scope applies, or not, by its scope: being named adds nothing.
            Some(policy) if policy.scope != Scope::WorkloadSelector => None,
            Some(policy) => Some(Applying::Known(policy)),
            None => Some(Applying::Missing(name)),
        });
        let unnamed = self.global_policies.values().chain(of_namespace.into_iter().flat_map(OrdMap::values));
        unnamed.map(Applying::Known).chain(named)
    }

    /// All workloads, in no particular order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, in no particular order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All policies, ordered by name.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// A policy.
    pub fn policy(&self, name: &NamespacedName) -> Option<&Arc<Policy>> {
        self.policies.get(name)
    }

    /// The services that workloads name and that are not known, with those workloads.
    pub fn staged(&self) -> impl Iterator<Item = (&NamespacedHostname, &Endpoints)> {
        self.endpoints.iter().filter(|(name, _)| !self.services.contains_key(*name))
    }

    pub(super) fn set_version(&mut self, version: u64) {
        self.version = version;
    }

    pub(super) fn apply(&mut self, change: Change, applied: &mut Applied) {
        match change {
            Change::PutWorkload(new) => {
                let uid = new.uid.clone();
                self.set_workload(&uid, Some(new), applied);
            }
            Change::RemoveWorkload(uid) => self.set_workload(&uid, None, applied),
            Change::PutService(new) => {
                let key = new.key();
                self.set_service(key, Some(new), applied);
            }
            Change::RemoveService(key) => self.set_service(key, None, applied),
            Change::PutPolicy(new) => {
                let key = new.key();
                self.set_policy(key, Some(new), applied);
            }
            Change::RemovePolicy(key) => self.set_policy(key, None, applied),
        }
    }

    fn set_workload(&mut self, uid: &Str, new: Option<Arc<Workload>>, applied: &mut Applied) {
        let old = self.workloads.get(uid).cloned();
        if old == new {
            return;
        }
        if let Some(old) = &old {
            self.unlink_workload(old);
        }
        match &new {
            Some(new) => {
                self.workloads.insert(uid.clone(), new.clone());
                self.link_workload(new);
            }
            None => {
                self.workloads.remove(uid);
            }
        }
        applied.workloads.push(WorkloadChange { old, new });
    }

    fn link_workload(&mut self, workload: &Arc<Workload>) {
        self.networks.add_workload(workload);
        if !workload.hostname.is_empty() {
            let few = self.workloads_by_hostname.entry(workload.hostname.clone()).or_default();
            few.insert(few.partition_point(|other| other.uid < workload.uid), workload.clone());
        }
        for membership in workload.services.iter() {
            let endpoints = self.endpoints.entry(membership.service.clone()).or_default();
            // Staged endpoints, or the first endpoint of a service that came before them.
            if endpoints.is_empty() {
                endpoints.set_service(self.services.get(&membership.service).map(Arc::as_ref));
            }
            endpoints.add(workload);
        }
    }

    fn unlink_workload(&mut self, workload: &Workload) {
        self.networks.remove_workload(workload);
        if !workload.hostname.is_empty() {
            remove(&mut self.workloads_by_hostname, &workload.hostname, |other| other.uid == workload.uid);
        }
        for membership in workload.services.iter() {
            let Some(endpoints) = self.endpoints.get_mut(&membership.service) else { continue };
            endpoints.remove(workload);
            if endpoints.is_empty() {
                self.endpoints.remove(&membership.service);
            }
        }
    }

    fn set_service(&mut self, key: NamespacedHostname, new: Option<Arc<Service>>, applied: &mut Applied) {
        let old = self.services.get(&key).cloned();
        if old == new {
            return;
        }
        if let Some(old) = &old {
            self.networks.remove_service(old);
            remove(&mut self.services_by_hostname, &key.hostname, |other| other.namespace == key.namespace);
        }
        if let Some(endpoints) = self.endpoints.get_mut(&key) {
            endpoints.set_service(new.as_deref());
        }
        match new {
            Some(new) => {
                self.networks.add_service(&new);
                let few = self.services_by_hostname.entry(key.hostname.clone()).or_default();
                few.insert(few.partition_point(|other| other.namespace < key.namespace), new.clone());
                self.services.insert(key.clone(), new);
            }
            None => {
                self.services.remove(&key);
            }
        }
        applied.services.push(key);
    }

    fn set_policy(&mut self, key: NamespacedName, new: Option<Arc<Policy>>, applied: &mut Applied) {
        let old = self.policies.get(&key).cloned();
        if old == new {
            return;
        }
        match old.as_ref().map(|old| old.scope) {
            Some(Scope::Global) => {
                self.global_policies.remove(&key);
            }
            Some(Scope::Namespace) => {
                if let Some(policies) = self.namespace_policies.get_mut(&key.namespace) {
                    policies.remove(&key.name);
                    if policies.is_empty() {
                        self.namespace_policies.remove(&key.namespace);
                    }
                }
            }
            Some(Scope::WorkloadSelector) | None => {}
        }
        match new {
            Some(new) => {
                match new.scope {
                    Scope::Global => {
                        self.global_policies.insert(key.clone(), new.clone());
                    }
                    Scope::Namespace => {
                        let policies = self.namespace_policies.entry(key.namespace.clone()).or_default();
                        policies.insert(key.name.clone(), new.clone());
                    }
                    Scope::WorkloadSelector => {}
                }
                self.policies.insert(key.clone(), new);
            }
            None => {
                self.policies.remove(&key);
            }
        }
        applied.policies.push(key);
    }

    /// Whether no index holds anything.
    #[cfg(test)]
    pub(super) fn is_bare(&self) -> bool {
        self.networks.is_empty()
            && self.workloads_by_hostname.is_empty()
            && self.services_by_hostname.is_empty()
            && self.endpoints.is_empty()
            && self.global_policies.is_empty()
            && self.namespace_policies.is_empty()
    }

    #[cfg(test)]
    pub(super) fn check_endpoints(&self) {
        for (name, endpoints) in self.endpoints.iter() {
            assert!(!endpoints.is_empty(), "{name}");
            endpoints.check();
        }
    }
}

fn remove<T>(map: &mut HashMap<Str, Few<Arc<T>>>, key: &Str, is: impl Fn(&T) -> bool) {
    let Some(few) = map.get_mut(key) else { return };
    few.retain(|value| !is(value));
    if few.is_empty() {
        map.remove(key);
    }
}
