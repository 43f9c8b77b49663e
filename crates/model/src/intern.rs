//! Sharing of equal values: whoever decodes a mesh keeps one [`Interner`], so that a namespace that 10,000 workloads name, or the
//! list of services that replicas share, is in memory once.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use crate::{Extension, Gateway, Locality, Membership, NamespacedName, Port, Str};

/// Pools of shared values. What nobody else holds any more is dropped now and then, so that an interner may live as long as the
/// stream that it decodes.
#[derive(Debug, Default)]
pub struct Interner {
    texts: Pool<str>,
    ports: Pool<[Port]>,
    memberships: Pool<[Membership]>,
    policies: Pool<[NamespacedName]>,
    extensions: Pool<[Extension]>,
    localities: Pool<Locality>,
    gateways: Pool<Gateway>,
}

impl Interner {
    /// A text.
    pub fn text(&mut self, text: &str) -> Str {
        if text.is_empty() { Str::default() } else { self.texts.get(text, |text| text.into()) }
    }

    /// The ports of a membership.
    pub fn ports(&mut self, ports: Vec<Port>) -> Arc<[Port]> {
        self.ports.own(ports)
    }

    /// The services of a workload.
    pub fn memberships(&mut self, memberships: Vec<Membership>) -> Arc<[Membership]> {
        self.memberships.own(memberships)
    }

    /// The policies that select a workload.
    pub fn policies(&mut self, policies: Vec<NamespacedName>) -> Arc<[NamespacedName]> {
        self.policies.own(policies)
    }

    /// Extensions.
    pub fn extensions(&mut self, extensions: Vec<Extension>) -> Arc<[Extension]> {
        self.extensions.own(extensions)
    }

    /// A locality.
    pub fn locality(&mut self, locality: Locality) -> Arc<Locality> {
        self.localities.get(&locality, |locality| Arc::new(locality.clone()))
    }

    /// A waypoint or network gateway.
    pub fn gateway(&mut self, gateway: Gateway) -> Arc<Gateway> {
        self.gateways.get(&gateway, |gateway| Arc::new(gateway.clone()))
    }

    /// How many values are shared now, for tests and statistics.
    pub fn len(&self) -> usize {
        self.texts.values.len()
            + self.ports.values.len()
            + self.memberships.values.len()
            + self.policies.values.len()
            + self.extensions.values.len()
            + self.localities.values.len()
            + self.gateways.values.len()
    }

    /// Whether nothing is shared.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Below this many values a pool is never swept.
const SWEEP_AT_LEAST: usize = 1024;

#[derive(Debug)]
struct Pool<T: ?Sized> {
    values: HashSet<Arc<T>>,
    /// Sweep when there are so many: twice as many as were left by the last sweep, so that sweeping costs a constant per value.
    sweep_at: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), sweep_at: SWEEP_AT_LEAST }
    }
}

impl<T: ?Sized + Hash + Eq> Pool<T> {
    fn get(&mut self, value: &T, share: impl FnOnce(&T) -> Arc<T>) -> Arc<T> {
        if let Some(shared) = self.values.get(value) {
            return shared.clone();
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|shared| Arc::strong_count(shared) > 1);
            self.sweep_at = SWEEP_AT_LEAST.max(2 * self.values.len());
        }
        let shared = share(value);
        self.values.insert(shared.clone());
        shared
    }
}

impl<T: Hash + Eq> Pool<[T]> {
    fn own(&mut self, values: Vec<T>) -> Arc<[T]> {
        if values.is_empty() {
            return Arc::default();
        }
        match self.values.get(values.as_slice()) {
            Some(shared) => shared.clone(),
            None => {
                let shared: Arc<[T]> = values.into();
                self.get(&shared, |_| shared.clone())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one() {
        let mut interner = Interner::default();
        assert!(Arc::ptr_eq(&interner.text("a"), &interner.text("a")));
        let port = Port { number: 80, target: None, protocol: Default::default() };
        assert!(Arc::ptr_eq(&interner.ports(vec![port]), &interner.ports(vec![port])));
        assert_eq!(interner.len(), 2);
    }

    #[test]
    fn what_nobody_holds_goes() {
        let mut interner = Interner::default();
        let kept = interner.text("kept");
        for i in 0..100_000 {
            interner.text(&i.to_string());
        }
        assert!(interner.len() <= SWEEP_AT_LEAST + 1, "{}", interner.len());
        assert!(Arc::ptr_eq(&kept, &interner.text("kept")));
    }
}
