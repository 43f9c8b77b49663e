//! What DNS counts: upstream's series with upstream's labels.

use std::time::Duration;

use hickory_proto::rr::RecordType;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use zspire_model::Workload;

const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Counters of all pods. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    requests: Family<Labels, Counter>,
    upstream_requests: Family<Labels, Counter>,
    upstream_failures: Family<Labels, Counter>,
    upstream_duration: Family<Labels, Histogram, fn() -> Histogram>,
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
        }
    }
}

impl Labels {
    pub(crate) fn new(kind: RecordType, transport: Transport, client: Option<&Workload>) -> Self {
        let text = |text: Option<&str>| text.filter(|text| !text.is_empty()).unwrap_or("unknown").to_owned();
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
        self.requests.get_or_create(labels).inc();
    }

    /// A query was forwarded, and how long that took; `failed` if nobody answered.
    pub(crate) fn forwarded(&self, labels: &Labels, took: Duration, failed: bool) {
        self.upstream_requests.get_or_create(labels).inc();
        self.upstream_duration.get_or_create(labels).observe(took.as_secs_f64());
        if failed {
            self.upstream_failures.get_or_create(labels).inc();
        }
    }
}
