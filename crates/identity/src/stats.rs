//! Numbers about a source, in a form that any metrics library can read.

use std::collections::BTreeMap;
use std::time::SystemTime;

use zspire_model::SpiffeId;

/// A snapshot of a source's numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Certificates obtained since the start.
    pub issued: u64,
    /// Failed attempts by reason (a small closed set of names).
    pub failures: BTreeMap<&'static str, u64>,
    /// Until when each identity that is ready can be used.
    pub expiry: Vec<(SpiffeId, SystemTime)>,
    /// Identities that wait for their turn.
    pub queued: usize,
    /// Requests under way.
    pub in_flight: usize,
    /// Prefetches turned away because the queue was full.
    pub turned_away: u64,
}
