//! Numbers about a source, in a form that any metrics library can read.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use zspire_model::{SpiffeId, TrustDomain};

use crate::story::Trusted;

/// A snapshot of a source's numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Certificates obtained since the start.
    pub issued: u64,
    /// Failed attempts by reason (a small closed set of names).
    pub failures: BTreeMap<&'static str, u64>,
    /// Requests that the CA refused or that did not reach it, by gRPC's name of the code.
    pub refusals: BTreeMap<&'static str, u64>,
    /// How long requests took, whatever became of them.
    pub latency: Latency,
    /// Until when each identity that is ready can be used.
    pub expiry: Vec<(SpiffeId, SystemTime)>,
    /// Since when the certificate of each identity that is ready is valid.
    pub since: Vec<(SpiffeId, SystemTime)>,
    /// Identities that wait for their turn.
    pub queued: usize,
    /// Requests under way.
    pub in_flight: usize,
    /// Prefetches turned away because the queue was full.
    pub turned_away: u64,
    /// Workloads, or identities where workloads share them, that are followed.
    pub held: usize,
    /// Those of them that have a certificate.
    pub ready: usize,
    /// Answers that came, also empty ones.
    pub updates: u64,
    /// What went wrong, by gRPC's name of the code, or a name of ours (a small closed set).
    pub errors: BTreeMap<&'static str, u64>,
    /// How long it took from the moment that a workload was there to its first certificate.
    pub first: Latency,
    /// Since when the roots of each trust domain have been what they are; the oldest, where workloads differ.
    pub bundles: BTreeMap<TrustDomain, SystemTime>,
}

impl Stats {
    pub(crate) fn trusted(&mut self, bundles: &[Trusted]) {
        for Trusted { domain, since, .. } in bundles {
            let oldest = self.bundles.entry(domain.clone()).or_insert(*since);
            *oldest = (*oldest).min(*since);
        }
    }
}

/// A histogram of durations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    counts: [u64; Latency::BOUNDS.len() + 1],
    sum: Duration,
}

impl Latency {
    /// Upper bounds of the buckets, in milliseconds; one more bucket has none.
    const BOUNDS: [u64; 11] = [5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000];

    pub(crate) fn observe(&mut self, took: Duration) {
        let bucket = Self::BOUNDS.partition_point(|bound| Duration::from_millis(*bound) < took);
        self.counts[bucket] += 1;
        self.sum += took;
    }

    /// Upper bounds in seconds (the last is infinite), each with the observations in that bucket alone.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = Self::BOUNDS.iter().map(|bound| *bound as f64 / 1000.0).chain([f64::INFINITY]);
        bounds.zip(self.counts)
    }

    /// Observations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them together.
    pub fn sum(&self) -> Duration {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_in_the_first_bucket_that_holds_it() {
        let mut latency = Latency::default();
        for millis in [0, 5, 6, 10_000, 10_001] {
            latency.observe(Duration::from_millis(millis));
        }
        let filled: Vec<_> = latency.buckets().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(0.005, 2), (0.01, 1), (10.0, 1), (f64::INFINITY, 1)]);
        assert_eq!((latency.count(), latency.sum()), (5, Duration::from_millis(20_012)));
    }
}
