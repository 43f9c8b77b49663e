//! The endpoints of one service, arranged so that choosing one does not scan them.
//!
//! A service says which scopes an endpoint should share with its client (region, then zone, …). Endpoints are kept in one group
//! for every prefix of that list, named by the endpoint's values in these scopes: a client looks up the groups with its own
//! values, longest prefix first. In a group, endpoints lie in buckets by the magnitude of their capacity: a bucket is drawn by
//! its weight, then a member by rejection, which accepts at least every second time. All of it is persistent.

use std::sync::Arc;

use imbl::{HashMap, Vector};
use rand_core::RngCore;
use smallvec::SmallVec;

use crate::service::{HealthPolicy, LoadBalancer, Mode, Scope};
use crate::workload::Health;
use crate::{Service, Str, Workload};

/// The endpoints of a service. They may arrive before the service: then they are only staged.
#[derive(Debug, Clone, Default)]
pub struct Endpoints {
    /// Every workload that names the service, whatever its health, by UID.
    members: HashMap<Str, Arc<Workload>>,
    /// How to choose; none while the service is unknown.
    balancer: Option<Arc<LoadBalancer>>,
    /// All that may be chosen.
    root: Group,
    /// The same, by their values in the first scopes.
    groups: HashMap<Values, Group>,
}

/// In place for as many scopes as there are kinds of.
type Values = SmallVec<[Str; 6]>;

impl Endpoints {
    /// How many workloads name the service.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether no workload names the service.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The endpoints that may be chosen, in no particular order. Empty while the service is unknown.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        let balancer = self.balancer.as_deref();
        self.members.values().filter(move |workload| balancer.is_some_and(|balancer| counts(balancer, workload)))
    }

    /// The workloads that name the service, in no particular order.
    pub fn members(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.members.values()
    }

    /// Whether a workload names the service.
    pub fn has_member(&self, uid: &str) -> bool {
        self.members.contains_key(uid)
    }

    pub(super) fn add(&mut self, workload: &Arc<Workload>) {
        // A workload may name a service twice; it is one endpoint all the same.
        if let Some(old) = self.members.insert(workload.uid.clone(), workload.clone()) {
            self.disarrange(&old);
        }
        self.arrange(workload);
    }

    pub(super) fn remove(&mut self, workload: &Workload) {
        if let Some(old) = self.members.remove(&workload.uid) {
            self.disarrange(&old);
        }
    }

    /// Takes the choice from the service (none: it is gone). Costs in proportion to the endpoints only if the choice changed.
    pub(super) fn set_service(&mut self, service: Option<&Service>) {
        if self.balancer.as_deref() == service.map(|service| &service.load_balancer) {
            return;
        }
        self.balancer = service.map(|service| Arc::new(service.load_balancer.clone()));
        self.root = Group::default();
        self.groups = HashMap::new();
        let members = self.members.clone();
        for workload in members.values() {
            self.arrange(workload);
        }
    }

    /// Draws an endpoint for a client, weighted by capacity, among those that `eligible` accepts.
    pub fn choose(
        &self,
        client: &Workload,
        rng: &mut impl RngCore,
        eligible: impl Fn(&Workload) -> bool,
    ) -> Option<Choice<'_>> {
        let balancer = self.balancer.as_deref()?;
        let wanted = values(&balancer.preferences, client);
        for shared in levels(balancer).rev() {
            let group = if shared == 0 { Some(&self.root) } else { self.groups.get(&wanted[..shared]) };
            if let Some(workload) = group.and_then(|group| group.choose(rng, &eligible)) {
                return Some(Choice { workload, shared, preferences: &balancer.preferences });
            }
        }
        None
    }

    fn arrange(&mut self, workload: &Arc<Workload>) {
        let Some(balancer) = self.balancer.clone() else { return };
        if !counts(&balancer, workload) {
            return;
        }
        let values = values(&balancer.preferences, workload);
        for shared in levels(&balancer) {
            match shared {
                0 => self.root.insert(workload),
                _ => self.groups.entry(values[..shared].into()).or_default().insert(workload),
            }
        }
    }

    fn disarrange(&mut self, workload: &Workload) {
        let Some(balancer) = self.balancer.clone() else { return };
        if !counts(&balancer, workload) {
            return;
        }
        let values = values(&balancer.preferences, workload);
        for shared in levels(&balancer) {
            if shared == 0 {
                self.root.remove(workload);
            } else if let Some(group) = self.groups.get_mut(&values[..shared]) {
                group.remove(workload);
                if group.is_empty() {
                    self.groups.remove(&values[..shared]);
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        let Some(balancer) = self.balancer.as_deref() else {
            assert!(self.root.is_empty() && self.groups.is_empty());
            return;
        };
        let per_level = self.iter().count();
        let in_groups: usize = std::iter::once(&self.root).chain(self.groups.values()).map(Group::check).sum();
        assert_eq!(in_groups, per_level * levels(balancer).count());
    }
}

/// A chosen endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Choice<'a> {
    /// The endpoint.
    pub workload: &'a Arc<Workload>,
    /// How many of the preferred scopes it shares with the client, counted from the first.
    pub shared: usize,
    /// The preferred scopes.
    pub preferences: &'a [Scope],
}

/// The lengths of the prefixes for which there are groups.
fn levels(balancer: &LoadBalancer) -> std::ops::Range<usize> {
    let all = balancer.preferences.len();
    match balancer.mode {
        Mode::Standard => 0..1,
        Mode::Failover => 0..all + 1,
        Mode::Strict => all..all + 1,
        Mode::Passthrough => 0..0,
    }
}

fn counts(balancer: &LoadBalancer, workload: &Workload) -> bool {
    let healthy = balancer.health == HealthPolicy::AllowAll || workload.status == Health::Healthy;
    healthy && workload.capacity > 0
}

fn values(scopes: &[Scope], workload: &Workload) -> Values {
    scopes.iter().map(|scope| scope.of(workload).clone()).collect()
}

/// Endpoints among which the weight alone decides.
#[derive(Debug, Clone, Default)]
struct Group {
    /// By magnitude of the capacity; at most 32, mostly one.
    buckets: SmallVec<[Bucket; 1]>,
    /// Place of each endpoint in its bucket.
    places: HashMap<Str, u32>,
}

/// Endpoints with a capacity from `1 << magnitude` up to its double.
#[derive(Debug, Clone)]
struct Bucket {
    magnitude: u32,
    weight: u64,
    members: Vector<Arc<Workload>>,
}

/// How often to draw again when the drawn endpoint is not eligible, before looking at all of them. Endpoints are mostly alike in
/// what makes them eligible (they have the port), so the second case is one of a service whose endpoints differ.
const DRAWS: usize = 16;

impl Group {
    fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    fn insert(&mut self, workload: &Arc<Workload>) {
        let magnitude = workload.capacity.ilog2();
        let at = self.buckets.partition_point(|bucket| bucket.magnitude < magnitude);
        if self.buckets.get(at).is_none_or(|bucket| bucket.magnitude != magnitude) {
            self.buckets.insert(at, Bucket { magnitude, weight: 0, members: Vector::new() });
        }
        let bucket = &mut self.buckets[at];
        bucket.weight += u64::from(workload.capacity);
        let place = u32::try_from(bucket.members.len()).expect("a mesh has fewer than 2^32 workloads");
        self.places.insert(workload.uid.clone(), place);
        bucket.members.push_back(workload.clone());
    }

    fn remove(&mut self, workload: &Workload) {
        let magnitude = workload.capacity.ilog2();
        let Some(at) = self.buckets.iter().position(|bucket| bucket.magnitude == magnitude) else { return };
        let Some(place) = self.places.remove(&workload.uid) else { return };
        let bucket = &mut self.buckets[at];
        bucket.weight -= u64::from(workload.capacity);
        // The last one takes the free place.
        if let Some(last) = bucket.members.pop_back()
            && last.uid != workload.uid
        {
            self.places.insert(last.uid.clone(), place);
            bucket.members.set(place as usize, last);
        }
        if bucket.members.is_empty() {
            self.buckets.remove(at);
        }
    }

    fn choose(&self, rng: &mut impl RngCore, eligible: &impl Fn(&Workload) -> bool) -> Option<&Arc<Workload>> {
        let total: u64 = self.buckets.iter().map(|bucket| bucket.weight).sum();
        if total == 0 {
            return None;
        }
        let drawn = (0..DRAWS).map(|_| self.draw(below(rng, total), rng)).find(|workload| eligible(workload));
        drawn.or_else(|| self.choose_among_all(rng, eligible))
    }

    fn draw(&self, mut point: u64, rng: &mut impl RngCore) -> &Arc<Workload> {
        let mut buckets = self.buckets.iter();
        let bucket = buckets
            .find(|bucket| match point.checked_sub(bucket.weight) {
                Some(rest) => {
                    point = rest;
                    false
                }
                None => true,
            })
            .expect("the point is below the sum of the weights");
        loop {
            let place = below(rng, bucket.members.len() as u64) as usize;
            let workload = &bucket.members[place];
            if below(rng, 2 << bucket.magnitude) < u64::from(workload.capacity) {
                return workload;
            }
        }
    }

    fn choose_among_all(
        &self,
        rng: &mut impl RngCore,
        eligible: &impl Fn(&Workload) -> bool,
    ) -> Option<&Arc<Workload>> {
        let mut total = 0;
        let mut chosen = None;
        let members = self.buckets.iter().flat_map(|bucket| bucket.members.iter());
        for workload in members.filter(|workload| eligible(workload)) {
            let capacity = u64::from(workload.capacity);
            total += capacity;
            if below(rng, total) < capacity {
                chosen = Some(workload);
            }
        }
        chosen
    }

    #[cfg(test)]
    fn check(&self) -> usize {
        let mut members = 0;
        for bucket in &self.buckets {
            assert!(!bucket.members.is_empty());
            assert_eq!(bucket.weight, bucket.members.iter().map(|w| u64::from(w.capacity)).sum::<u64>());
            for (place, workload) in bucket.members.iter().enumerate() {
                assert_eq!(self.places.get(&workload.uid), Some(&(place as u32)));
                members += 1;
            }
        }
        assert_eq!(members, self.places.len());
        members
    }
}

/// A number below `n`, every one as likely (Lemire's multiplication with rejection). `n` is not zero.
pub(crate) fn below(rng: &mut impl RngCore, n: u64) -> u64 {
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(n);
        let low = product as u64;
        if low >= n || low >= n.wrapping_neg() % n {
            return (product >> 64) as u64;
        }
    }
}
