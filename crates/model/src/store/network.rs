//! What is found by address, per network: workloads, virtual addresses, virtual address ranges.

use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};
use ipnet::IpNet;
use smallvec::SmallVec;

use crate::workload::NetworkMode;
use crate::{Protocol, Service, Str, Workload};

/// Mostly one.
pub(super) type Few<T> = SmallVec<[T; 1]>;

/// The indexes by address of all networks. The network is looked up first, so that a lookup needs no owned key.
#[derive(Debug, Clone, Default)]
pub(super) struct Networks(HashMap<Str, Network>);

#[derive(Debug, Clone, Default)]
struct Network {
    /// Most credible first.
    workloads: HashMap<IpAddr, Few<Arc<Workload>>>,
    /// Ordered by name.
    vips: HashMap<IpAddr, Few<Arc<Service>>>,
    v4: Ranges,
    v6: Ranges,
}

/// Ranges by prefix length: a lookup tries each length that occurs, longest first (33 or 129 at most, mostly two or three).
type Ranges = OrdMap<u8, HashMap<IpAddr, Few<Arc<Service>>>>;

impl Network {
    fn ranges(&mut self, net: IpNet) -> &mut Ranges {
        match net {
            IpNet::V4(_) => &mut self.v4,
            IpNet::V6(_) => &mut self.v6,
        }
    }

    fn is_empty(&self) -> bool {
        self.workloads.is_empty() && self.vips.is_empty() && self.v4.is_empty() && self.v6.is_empty()
    }
}

impl Networks {
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn workloads(&self, network: &str, address: IpAddr) -> &[Arc<Workload>] {
        self.0.get(network).and_then(|network| network.workloads.get(&address)).map_or(&[], |few| few)
    }

    pub(super) fn vips(&self, network: &str, address: IpAddr) -> &[Arc<Service>] {
        self.0.get(network).and_then(|network| network.vips.get(&address)).map_or(&[], |few| few)
    }

    /// The services whose range holds the address, those of the longest prefix first.
    pub(super) fn ranges(&self, network: &str, address: IpAddr) -> impl Iterator<Item = &[Arc<Service>]> {
        let ranges = self.0.get(network).map(|network| match address {
            IpAddr::V4(_) => &network.v4,
            IpAddr::V6(_) => &network.v6,
        });
        ranges.into_iter().flat_map(|ranges| ranges.iter().rev()).filter_map(move |(length, ranges)| {
            let net = IpNet::new(address, *length).ok()?;
            ranges.get(&net.network()).map(SmallVec::as_slice)
        })
    }

    /// Workloads on their node's network are not found by address: anything on the node may be behind it.
    pub(super) fn add_workload(&mut self, workload: &Arc<Workload>) {
        if workload.network_mode == NetworkMode::HostNetwork || workload.addresses.is_empty() {
            return;
        }
        let network = self.0.entry(workload.network.clone()).or_default();
        for address in &workload.addresses {
            let few = network.workloads.entry(*address).or_default();
            let at = few.partition_point(|other| credibility(other) > credibility(workload));
            few.insert(at, workload.clone());
        }
    }

    pub(super) fn remove_workload(&mut self, workload: &Workload) {
        if workload.network_mode == NetworkMode::HostNetwork {
            return;
        }
        self.change(&workload.network, |network| {
            for address in &workload.addresses {
                remove(&mut network.workloads, address, |other| other.uid == workload.uid);
            }
        });
    }

    pub(super) fn add_service(&mut self, service: &Arc<Service>) {
        let rank = |other: &Arc<Service>| (&other.namespace, &other.hostname) < (&service.namespace, &service.hostname);
        for vip in &service.vips {
            let few = self.0.entry(vip.network.clone()).or_default().vips.entry(vip.address).or_default();
            few.insert(few.partition_point(rank), service.clone());
        }
        for vip in &service.cidr_vips {
            let ranges = self.0.entry(vip.network.clone()).or_default().ranges(vip.net);
            let few = ranges.entry(vip.net.prefix_len()).or_default().entry(vip.net.network()).or_default();
            few.insert(few.partition_point(rank), service.clone());
        }
    }

    pub(super) fn remove_service(&mut self, service: &Service) {
        let is = |other: &Service| other.namespace == service.namespace && other.hostname == service.hostname;
        for vip in &service.vips {
            self.change(&vip.network, |network| remove(&mut network.vips, &vip.address, is));
        }
        for vip in &service.cidr_vips {
            self.change(&vip.network, |network| {
                let ranges = network.ranges(vip.net);
                let Some(of_length) = ranges.get_mut(&vip.net.prefix_len()) else { return };
                remove(of_length, &vip.net.network(), is);
                if of_length.is_empty() {
                    ranges.remove(&vip.net.prefix_len());
                }
            });
        }
    }

    fn change(&mut self, name: &str, change: impl FnOnce(&mut Network)) {
        let Some(network) = self.0.get_mut(name) else { return };
        change(network);
        if network.is_empty() {
            self.0.remove(name);
        }
    }
}

fn remove<T>(map: &mut HashMap<IpAddr, Few<Arc<T>>>, key: &IpAddr, is: impl Fn(&T) -> bool) {
    let Some(few) = map.get_mut(key) else { return };
    few.retain(|value| !is(value));
    if few.is_empty() {
        map.remove(key);
    }
}

/// Who is believed where several workloads claim an address: a pod before what was merely declared, then what is in the mesh;
/// the UID only makes the order total.
fn credibility(workload: &Workload) -> (bool, bool, std::cmp::Reverse<&Str>) {
    let pod = workload.uid.contains("//Pod/");
    (pod, workload.protocol == Protocol::Hbone, std::cmp::Reverse(&workload.uid))
}
