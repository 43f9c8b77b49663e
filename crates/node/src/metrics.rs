//! Metrics of the process itself, and the page they are read from.
//!
//! What the data plane counts is registered by `proxy`, what the sources of certificates and discovery count is read
//! here when the page is asked for. Names of upstream's metrics are upstream's.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::runtime::RuntimeMetrics;
use tokio_util::sync::CancellationToken;

use crate::pods::Board;
use crate::pods::launcher::Counts;
use crate::telemetry::Logging;

/// Registers `istio_build`.
pub fn register_build(istio: &mut Registry, tag: &str) {
    // Not an `Info`, which would append `_info` to the name.
    let build = prometheus_client::metrics::family::Family::<
        Vec<(String, String)>,
        prometheus_client::metrics::gauge::Gauge,
    >::default();
    build.get_or_create(&vec![("component".into(), "ztunnel".into()), ("tag".into(), tag.into())]).set(1);
    istio.register("build", "Istio component build info", build);
}

/// Descriptors, runtimes and the log of this process.
#[derive(Debug)]
pub struct Process {
    /// One runtime for each data-plane worker.
    pub workers: Vec<RuntimeMetrics>,
    pub logging: Logging,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: i64| {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        gauge("process_open_fds", "Number of open file descriptors", open_descriptors())?;
        gauge("process_max_fds", "Maximum number of open file descriptors", zspire_sys::privileges::max_descriptors())?;
        gauge("tokio_num_workers", "Number of data-plane workers", self.workers.len() as i64)?;
        let sum = |of: fn(&RuntimeMetrics) -> usize| self.workers.iter().map(of).sum::<usize>() as i64;
        gauge(
            "tokio_global_queue_depth",
            "Tasks waiting in the global queues",
            sum(RuntimeMetrics::global_queue_depth),
        )?;
        gauge("tokio_num_alive_tasks", "Tasks alive on the data-plane workers", sum(RuntimeMetrics::num_alive_tasks))?;
        self.encode_workers(&mut encoder)?;
        let dropped = ConstCounter::new(self.logging.dropped_lines());
        dropped.encode(encoder.encode_descriptor(
            "zspire_log_lines_dropped",
            "Log lines dropped because standard output was slower than the log",
            None,
            dropped.metric_type(),
        )?)
    }
}

impl Process {
    fn encode_workers(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        let kind = prometheus_client::metrics::MetricType::Counter;
        let labels = |number: usize| [("worker", number.to_string())];
        let help = "Time each worker was busy";
        let mut busy = encoder.encode_descriptor("tokio_worker_total_busy_duration_seconds", help, None, kind)?;
        for (number, worker) in self.workers.iter().enumerate() {
            let seconds = worker.worker_total_busy_duration(0).as_secs_f64();
            ConstCounter::new(seconds).encode(busy.encode_family(&labels(number))?)?;
        }
        type Count = (&'static str, &'static str, fn(&RuntimeMetrics) -> u64);
        let counts: [Count; 2] = [
            ("tokio_worker_park_count", "Times each worker went to sleep", |m| m.worker_park_count(0)),
            ("tokio_worker_park_unpark_count", "Times each worker went to sleep or woke", |m| {
                m.worker_park_unpark_count(0)
            }),
        ];
        for (name, help, read) in counts {
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            for (number, worker) in self.workers.iter().enumerate() {
                ConstCounter::new(read(worker)).encode(metric.encode_family(&labels(number))?)?;
            }
        }
        Ok(())
    }
}

fn open_descriptors() -> i64 {
    // Looking takes one: where there is none left, all are open.
    std::fs::read_dir("/proc/self/fd")
        .map_or_else(|_| zspire_sys::privileges::max_descriptors(), |entries| entries.count() as i64)
}

/// What a source of identities counts.
#[derive(Debug)]
pub struct Identities(pub Arc<dyn zspire_identity::Source>);

impl Collector for Identities {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.0.stats();
        let issued = ConstCounter::new(stats.issued);
        let kind = issued.metric_type();
        issued.encode(encoder.encode_descriptor(
            "zspire_certificates_issued",
            "Certificates obtained",
            None,
            kind,
        )?)?;
        let turned_away = ConstCounter::new(stats.turned_away);
        turned_away.encode(encoder.encode_descriptor(
            "zspire_certificate_prefetches_turned_away",
            "Prefetches that found the queue full",
            None,
            kind,
        )?)?;
        let help = "Failed attempts to obtain a certificate";
        let mut failures = encoder.encode_descriptor("zspire_certificate_failures", help, None, kind)?;
        for (reason, count) in &stats.failures {
            ConstCounter::new(*count).encode(failures.encode_family(&[("reason", *reason)])?)?;
        }
        let mut gauge = |name: &str, help: &str, value: usize| {
            let metric = ConstGauge::new(value as i64);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        gauge("zspire_certificates_queued", "Identities that wait for their turn", stats.queued)?;
        gauge("zspire_certificate_requests_in_flight", "Requests to the CA under way", stats.in_flight)?;
        self.encode_requests(&mut encoder, &stats)?;
        self.encode_expiry(&mut encoder, &stats)?;
        self.encode_age(&mut encoder, &stats)
    }
}

impl Identities {
    fn encode_requests(&self, encoder: &mut DescriptorEncoder<'_>, stats: &zspire_identity::Stats) -> std::fmt::Result {
        let help = "Requests that the CA refused or that did not reach it, by gRPC code";
        let kind = prometheus_client::metrics::MetricType::Counter;
        let mut refusals = encoder.encode_descriptor("zspire_ca_request_failures", help, None, kind)?;
        for (code, count) in &stats.refusals {
            ConstCounter::new(*count).encode(refusals.encode_family(&[("code", *code)])?)?;
        }
        let help = "How long requests to the CA took, whatever became of them";
        let kind = prometheus_client::metrics::MetricType::Histogram;
        let mut latency = encoder.encode_descriptor("zspire_ca_request_duration_seconds", help, None, kind)?;
        let buckets: Vec<_> = stats.latency.buckets().collect();
        latency.encode_histogram::<NoLabelSet>(stats.latency.sum().as_secs_f64(), stats.latency.count(), &buckets, None)
    }

    fn encode_age(&self, encoder: &mut DescriptorEncoder<'_>, stats: &zspire_identity::Stats) -> std::fmt::Result {
        let kind = prometheus_client::metrics::MetricType::Gauge;
        let help = "How long the certificate of an identity has been valid, in seconds";
        let mut age = encoder.encode_descriptor("zspire_certificate_age_seconds", help, None, kind)?;
        let now = std::time::SystemTime::now();
        for (id, since) in &stats.since {
            let seconds = now.duration_since(*since).unwrap_or_default().as_secs();
            ConstGauge::new(seconds as i64).encode(age.encode_family(&[("identity", id.as_str())])?)?;
        }
        Ok(())
    }

    fn encode_expiry(&self, encoder: &mut DescriptorEncoder<'_>, stats: &zspire_identity::Stats) -> std::fmt::Result {
        let kind = prometheus_client::metrics::MetricType::Gauge;
        let help = "When the certificate of an identity expires, in seconds since 1970";
        let mut expiry = encoder.encode_descriptor("zspire_certificate_expiry_timestamp_seconds", help, None, kind)?;
        for (id, at) in &stats.expiry {
            let seconds = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
            ConstGauge::new(seconds as i64).encode(expiry.encode_family(&[("identity", id.as_str())])?)?;
        }
        Ok(())
    }
}

/// Trust domains whose age is told; the others are counted together as `other`.
const TRUST_DOMAINS: usize = 64;

/// What every source of identities counts, told by the name of the source.
#[derive(Debug)]
pub struct Sources(pub Vec<Arc<dyn zspire_identity::Source>>);

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let all: Vec<_> = self.0.iter().map(|source| (source.name(), source.stats())).collect();
        let mut gauge = |name: &str, help: &str, value: fn(&zspire_identity::Stats) -> usize| {
            let kind = prometheus_client::metrics::MetricType::Gauge;
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            all.iter().try_for_each(|(source, stats)| {
                ConstGauge::new(value(stats) as i64).encode(metric.encode_family(&[("source", *source)])?)
            })
        };
        let help = "Workloads whose identity is followed, or identities where workloads share them";
        gauge("zspire_identity_subscriptions", help, |stats| stats.held)?;
        gauge("zspire_identity_svids", "Those of them that have an SVID", |stats| stats.ready)?;
        let kind = prometheus_client::metrics::MetricType::Counter;
        let help = "Answers that came, also empty ones";
        let mut updates = encoder.encode_descriptor("zspire_identity_updates", help, None, kind)?;
        for (source, stats) in &all {
            ConstCounter::new(stats.updates).encode(updates.encode_family(&[("source", *source)])?)?;
        }
        let help = "What went wrong, by gRPC code or, where it is not gRPC's, by a name of ours";
        let mut errors = encoder.encode_descriptor("zspire_identity_errors", help, None, kind)?;
        for (source, stats) in &all {
            for (code, count) in &stats.errors {
                let labels = [("source", *source), ("code", *code)];
                ConstCounter::new(*count).encode(errors.encode_family(&labels)?)?;
            }
        }
        let kind = prometheus_client::metrics::MetricType::Histogram;
        let help = "Time from the moment that a workload was there to its first SVID";
        let mut first = encoder.encode_descriptor("zspire_identity_first_svid_seconds", help, None, kind)?;
        for (source, stats) in &all {
            let (buckets, labels): (Vec<_>, _) = (stats.first.buckets().collect(), [("source", *source)]);
            let mut first = first.encode_family(&labels)?;
            first.encode_histogram::<NoLabelSet>(
                stats.first.sum().as_secs_f64(),
                stats.first.count(),
                &buckets,
                None,
            )?;
        }
        self.encode_bundles(&mut encoder, &all)
    }
}

impl Sources {
    fn encode_bundles(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        all: &[(&'static str, zspire_identity::Stats)],
    ) -> std::fmt::Result {
        let kind = prometheus_client::metrics::MetricType::Gauge;
        let help =
            "Time since the roots of a trust domain were seen to change, of the workload that has had them longest";
        let mut ages = encoder.encode_descriptor("zspire_identity_bundle_age_seconds", help, None, kind)?;
        let now = std::time::SystemTime::now();
        for (source, stats) in all {
            let age = |since: &std::time::SystemTime| now.duration_since(*since).unwrap_or_default().as_secs();
            let mut age_of = |domain: &str, seconds: u64| {
                let labels = [("source", *source), ("trust_domain", domain)];
                ConstGauge::new(seconds as i64).encode(ages.encode_family(&labels)?)
            };
            for (domain, since) in stats.bundles.iter().take(TRUST_DOMAINS) {
                age_of(domain.as_str(), age(since))?;
            }
            // Whoever federates with many does not make the page grow without end.
            if let Some(oldest) = stats.bundles.values().skip(TRUST_DOMAINS).min() {
                age_of("other", age(oldest))?;
            }
        }
        Ok(())
    }
}

/// The proxies of pods, under upstream's names.
#[derive(Debug)]
pub struct Pods {
    pub board: Board,
    pub counts: Arc<Counts>,
}

impl Collector for Pods {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let pods = self.board.pods();
        let pending = pods.iter().filter(|pod| pod.pending.is_some()).count();
        let mut gauge = |name: &str, help: &str, value: usize| {
            let metric = ConstGauge::new(value as i64);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let help = "The total number current workloads with active proxies";
        gauge("workload_manager_active_proxy_count", help, pods.len() - pending)?;
        let help = "The total number current workloads with pending proxies";
        gauge("workload_manager_pending_proxy_count", help, pending)?;
        let mut counter = |name: &str, help: &str, value: &AtomicU64| {
            let metric = ConstCounter::new(value.load(Relaxed));
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let counts = &self.counts;
        let help = "The total number of proxies that were started";
        counter("workload_manager_proxies_started", help, &counts.started)?;
        let help = "The total number of proxies that were stopped";
        counter("workload_manager_proxies_stopped", help, &counts.stopped)?;
        let help = "Times that a pod was refused because its network namespace is not the pod's";
        counter("zspire_pods_refused", help, &counts.refused)
    }
}

/// The state of the revocation lists; nothing without a file of them.
#[derive(Debug)]
pub struct Revocations(pub zspire_identity::Revocation);

impl Collector for Revocations {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(stats) = self.0.stats() else { return Ok(()) };
        let mut counter = |name: &str, help: &str, value: u64| {
            let metric = ConstCounter::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        counter("zspire_crl_loads", "Files of revocation lists that were taken", stats.loads)?;
        counter("zspire_crl_load_failures", "Files of revocation lists that could not be used", stats.failures)?;
        let mut gauge = |name: &str, help: &str, value: i64| {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        gauge("zspire_crl_rejected", "Whether the file as it is now is not in force", i64::from(stats.rejected))?;
        gauge("zspire_crl_lists", "Revocation lists in force", stats.lists as i64)?;
        gauge("zspire_crl_revoked_certificates", "Certificates that they revoke", stats.revoked as i64)?;
        gauge("zspire_crl_expired_lists", "Those of the lists that have expired", stats.expired as i64)?;
        let Some(at) = stats.next_update else { return Ok(()) };
        let seconds = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let help = "When the first of the lists expires, in seconds since 1970";
        gauge("zspire_crl_next_update_timestamp_seconds", help, seconds as i64)
    }
}

/// What a client of a discovery server counts; registered with upstream's prefix, since the names are upstream's.
#[derive(Debug)]
pub struct Discovery(pub zspire_xds::client::Stats);

impl Collector for Discovery {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.0.snapshot();
        let mut counter = |name: &str, help: &str, label: &'static str, values: Vec<(&'static str, u64)>| {
            let kind = prometheus_client::metrics::MetricType::Counter;
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            values
                .into_iter()
                .try_for_each(|(of, value)| ConstCounter::new(value).encode(metric.encode_family(&[(label, of)])?))
        };
        let terminations = stats.connection_terminations.iter().map(|(reason, n)| (reason.as_str(), *n)).collect();
        let help = "The total number of completed connections to the discovery server";
        counter("xds_connection_terminations", help, "reason", terminations)?;
        let of =
            |values: &std::collections::BTreeMap<&'static str, u64>| values.iter().map(|(url, n)| (*url, *n)).collect();
        counter("xds_message", "Total number of messages received", "url", of(&stats.messages))?;
        counter("xds_message_bytes", "Total number of bytes received", "url", of(&stats.message_bytes))
    }
}

/// How fresh discovery is: what upstream does not count.
#[derive(Debug)]
pub struct Freshness {
    /// A client of a discovery server, if there is one.
    pub stats: Option<zspire_xds::client::Stats>,
    pub board: crate::discovery::Board,
}

impl Collector for Freshness {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: f64| {
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        if let Some(stats) = self.stats.as_ref().map(zspire_xds::client::Stats::snapshot) {
            gauge(
                "zspire_xds_connected",
                "Whether the discovery server answers",
                f64::from(u8::from(stats.connected)),
            )?;
            if let Some(at) = stats.last_message {
                let help = "Time since the last message of the discovery server; it sends none while nothing changes";
                gauge("zspire_xds_last_message_age_seconds", help, at.elapsed().as_secs_f64())?;
            }
            if let Some(took) = stats.first_answer {
                let help = "How long the discovery server took for the first answer of the newest stream";
                gauge("zspire_xds_first_answer_seconds", help, took.as_secs_f64())?;
            }
        }
        let Some(file) = self.board.status().file else { return Ok(()) };
        let help = "Whether the mesh file as it is now is not in force";
        gauge("zspire_mesh_file_rejected", help, f64::from(u8::from(file.is_rejected)))?;
        let kind = prometheus_client::metrics::MetricType::Counter;
        let help = "How often the mesh file was read again";
        let mut reloads = encoder.encode_descriptor("zspire_mesh_file_reloads", help, None, kind)?;
        for (result, count) in [("accepted", file.accepted), ("rejected", file.rejected)] {
            ConstCounter::new(count).encode(reloads.encode_family(&[("result", result)])?)?;
        }
        Ok(())
    }
}

/// Drops the series of workloads that have been gone for a while, until stopped.
pub async fn prune(shared: Arc<zspire_proxy::Shared>, grace: Duration, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(grace) => {}
        }
        let shared = shared.clone();
        // Looks at every workload: not on the thread that does all control work.
        let done = tokio::task::spawn_blocking(move || {
            let snapshot = shared.mesh.load();
            let known: HashSet<(&str, &str)> =
                snapshot.workloads().map(|workload| (&*workload.namespace, &*workload.workload_name)).collect();
            shared.metrics.prune(|namespace, workload| known.contains(&(namespace, workload)));
            let clients: HashSet<(&str, &str)> =
                snapshot.workloads().map(|it| (&*it.canonical_name, &*it.canonical_revision)).collect();
            shared.metrics.prune_names(|service, revision| clients.contains(&(service, revision)));
        });
        // What panicked has said so.
        let _ = done.await;
    }
}

/// `/metrics` and `/stats/prometheus`.
pub fn router(registry: Registry) -> Router {
    Router::new().route("/metrics", get(page)).route("/stats/prometheus", get(page)).with_state(Arc::new(registry))
}

async fn page(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    if text::encode(&mut text, &registry).is_err() {
        text.clear();
        let _ = writeln!(text, "# the metrics cannot be written");
    }
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::SystemTime;

    use zspire_identity::{Entry, Priority, Source, Stats, Watch, WorkloadKey};

    use super::*;

    /// A source that has these numbers and nothing else.
    #[derive(Debug)]
    struct Counted(Stats);

    impl Source for Counted {
        fn name(&self) -> &'static str {
            "counted"
        }
        fn watch(&self, _: &WorkloadKey, _: Priority) -> Watch {
            unreachable!("nobody asks")
        }
        fn forget(&self, _: &WorkloadKey) {}
        fn entries(&self) -> Vec<Entry> {
            Vec::new()
        }
        fn stats(&self) -> Stats {
            self.0.clone()
        }
    }

    fn page_of(collector: impl Collector) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(collector));
        let mut page = String::new();
        text::encode(&mut page, &registry).unwrap();
        page
    }

    #[test]
    fn revocation_lists_are_counted_only_where_there_are_any() {
        assert_eq!(page_of(Revocations(zspire_identity::Revocation::default())), "# EOF\n");
        let unknown = zspire_identity::revocation::Unknown::Deny;
        let clock = Arc::new(zspire_identity::SystemClock);
        let (revocation, _) = zspire_identity::revocation::follow("/nowhere/crl.pem", unknown, clock);
        let page = page_of(Revocations(revocation));
        for line in ["zspire_crl_load_failures_total 1", "zspire_crl_rejected 1", "zspire_crl_lists 0"] {
            assert!(page.contains(line), "no {line} in {page}");
        }
    }

    #[test]
    fn the_histogram_of_requests_is_complete() {
        let stats = Stats { refusals: [("Unavailable", 3)].into(), ..Stats::default() };
        let page = page_of(Identities(Arc::new(Counted(stats))));
        for line in [
            "zspire_ca_request_failures_total{code=\"Unavailable\"} 3",
            "zspire_ca_request_duration_seconds_bucket{le=\"0.005\"} 0",
            "zspire_ca_request_duration_seconds_bucket{le=\"+Inf\"} 0",
            "zspire_ca_request_duration_seconds_count 0",
        ] {
            assert!(page.contains(line), "no {line} in {page}");
        }
    }
    #[test]
    fn sources_are_told_apart_and_trust_domains_are_bounded() {
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        let domain = |n: usize| (format!("td{n:03}").parse().unwrap(), hour_ago);
        let stats = Stats {
            held: 3,
            ready: 2,
            updates: 7,
            errors: [("NoEntry", 4)].into(),
            bundles: (0..TRUST_DOMAINS + 10).map(domain).collect(),
            ..Stats::default()
        };
        let page = page_of(Sources(vec![Arc::new(Counted(stats))]));
        for line in [
            "zspire_identity_subscriptions{source=\"counted\"} 3\n",
            "zspire_identity_svids{source=\"counted\"} 2\n",
            "zspire_identity_updates_total{source=\"counted\"} 7\n",
            "zspire_identity_errors_total{source=\"counted\",code=\"NoEntry\"} 4\n",
            "zspire_identity_first_svid_seconds_bucket{le=\"+Inf\",source=\"counted\"} 0\n",
            "zspire_identity_bundle_age_seconds{source=\"counted\",trust_domain=\"td000\"} 36",
            "zspire_identity_bundle_age_seconds{source=\"counted\",trust_domain=\"other\"} 36",
        ] {
            assert!(page.contains(line), "no {line} in {page}");
        }
        let ages = page.lines().filter(|line| line.starts_with("zspire_identity_bundle_age_seconds{")).count();
        assert_eq!(ages, TRUST_DOMAINS + 1);
    }
}
