//! What DNS counts: upstream's series with upstream's labels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::rr::RecordType;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use zspire_model::Workload;

/// What stands for a name that is empty.
const UNKNOWN: &str = "unknown";
const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Counters of all pods. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    requests: Family<Labels, Counter>,
    upstream_requests: Family<Labels, Counter>,
    upstream_failures: Family<Labels, Counter>,
    upstream_duration: Family<Labels, Histogram, fn() -> Histogram>,
    /// The label sets in use, and whether the next look drops them.
    known: Arc<Mutex<HashMap<Labels, bool>>>,
}

/// Who asks what, over what.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Labels {
    request_query_type: &'static str,
    request_protocol: &'static str,
    source_canonical_service: String,
    source_canonical_revision: String,
}

/// What a query came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            upstream_duration: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            known: Arc::default(),
        }
    }
}

impl Labels {
    pub(crate) fn new(kind: RecordType, transport: Transport, client: Option<&Workload>) -> Self {
        let text = |text: Option<&str>| text.filter(|text| !text.is_empty()).unwrap_or(UNKNOWN).to_owned();
        Self {
            request_query_type: word(kind),
            request_protocol: if transport == Transport::Udp { "udp" } else { "tcp" },
            source_canonical_service: text(client.map(|client| &*client.canonical_name)),
            source_canonical_revision: text(client.map(|client| &*client.canonical_revision)),
        }
    }
}

/// What a client makes up must not become a label.
fn word(kind: RecordType) -> &'static str {
    match kind {
        RecordType::A => "A",
        RecordType::AAAA => "AAAA",
        RecordType::ANY => "ANY",
        RecordType::CNAME => "CNAME",
        RecordType::HTTPS => "HTTPS",
        RecordType::MX => "MX",
        RecordType::NS => "NS",
        RecordType::PTR => "PTR",
        RecordType::SOA => "SOA",
        RecordType::SRV => "SRV",
        RecordType::SVCB => "SVCB",
        RecordType::TXT => "TXT",
        _ => "other",
    }
}

impl Metrics {
    pub(crate) fn register(&self, istio: &mut Registry) {
        istio.register("dns_requests", "Total number of DNS requests", self.requests.clone());
        let help = "Total number of DNS requests forwarded to upstream";
        istio.register("dns_upstream_requests", help, self.upstream_requests.clone());
        let help = "Total number of DNS requests forwarded to upstream that failed";
        istio.register("dns_upstream_failures", help, self.upstream_failures.clone());
        let help = "Total time to get a response from upstream";
        istio.register("dns_upstream_request_duration_seconds", help, self.upstream_duration.clone());
    }

    pub(crate) fn asked(&self, labels: &Labels) {
        self.keep(labels);
        self.requests.get_or_create(labels).inc();
    }

    /// Drops the series of clients that `is_known` does not know by canonical service and revision, nor did when this was called
    /// before.
    pub(crate) fn prune(&self, is_known: impl Fn(&str, &str) -> bool) {
        self.known().retain(|labels, doomed| {
            let name = |shown| if shown == UNKNOWN { "" } else { shown };
            let wanted = is_known(name(&labels.source_canonical_service), name(&labels.source_canonical_revision));
            let keep = !std::mem::replace(doomed, !wanted) || wanted;
            if !keep {
                self.requests.remove(labels);
                self.upstream_requests.remove(labels);
                self.upstream_failures.remove(labels);
                self.upstream_duration.remove(labels);
            }
            keep
        });
    }

    /// What is not in the table has no series.
    fn keep(&self, labels: &Labels) {
        let mut known = self.known();
        match known.get_mut(labels) {
            Some(doomed) => *doomed = false,
            None => drop(known.insert(labels.clone(), false)),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Labels, bool>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A query was forwarded, and how long that took; `failed` if nobody answered.
    pub(crate) fn forwarded(&self, labels: &Labels, took: Duration, failed: bool) {
        self.keep(labels);
        self.upstream_requests.get_or_create(labels).inc();
        self.upstream_duration.get_or_create(labels).observe(took.as_secs_f64());
        if failed {
            self.upstream_failures.get_or_create(labels).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_of_clients_that_are_gone_are_dropped_after_a_while() {
        let metrics = Metrics::default();
        let client = |name: &str| Workload { canonical_name: name.into(), ..Workload::default() };
        for name in ["web", "gone"] {
            let labels = Labels::new(RecordType::A, Transport::Udp, Some(&client(name)));
            metrics.asked(&labels);
            metrics.forwarded(&labels, Duration::from_millis(1), true);
        }
        let shown = |name: &str| {
            let mut registry = Registry::default();
            metrics.register(&mut registry);
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text.matches(&format!("source_canonical_service=\"{name}\"")).count()
        };
        let all = shown("gone");
        assert!(all > 3);
        let known = |service: &str, _: &str| service == "web";
        metrics.prune(known);
        assert_eq!(shown("gone"), all, "it may be asked for once more");
        metrics.asked(&Labels::new(RecordType::A, Transport::Udp, Some(&client("gone"))));
        metrics.prune(known);
        assert_eq!(shown("gone"), all);
        metrics.prune(known);
        assert_eq!((shown("gone"), shown("web")), (0, all));
    }
}
