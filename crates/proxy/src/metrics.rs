//! What the data plane counts: upstream's `istio_tcp_*` series with upstream's labels, and what upstream lacks.
//!
//! A label set is some twenty texts, so it is looked up once a connection, not once a counter: a [`Series`] holds all
//! counters of one label set, and a connection keeps hold of it. Series of workloads that are gone can be dropped.
//!
//! What a label set is made of is in [`labels`], under which names the numbers are shown in [`page`].

mod labels;
mod page;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use zspire_hbone::Ended;
use zspire_model::{Str, Workload};

pub use labels::{Ends, Flag, Reporter};
use labels::{Labels, Side};

/// The counters of one label set.
#[derive(Debug, Default)]
pub struct Series {
    opened: AtomicU64,
    closed: AtomicU64,
    failed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    /// Connections whose bytes are in the counters.
    bytes_reported: AtomicU64,
    /// Its workloads were gone when it was looked at last.
    doomed: AtomicBool,
}

impl Series {
    /// A connection was opened.
    pub fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    /// A connection was closed.
    pub fn closed(&self) {
        self.closed.fetch_add(1, Relaxed);
    }

    /// A connection could not be made.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// Bytes as upstream counts them: `sent` towards the destination by a source, towards the source by a destination.
    pub fn bytes(&self, sent: u64, received: u64) {
        self.bytes_reported.fetch_add(1, Relaxed);
        self.sent.fetch_add(sent, Relaxed);
        self.received.fetch_add(received, Relaxed);
    }
}

/// A plain label set of static texts.
type Static = Vec<(&'static str, &'static str)>;

/// Everything that the data plane counts. Clones count together.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    series: Mutex<HashMap<Labels, Arc<Series>>>,
    /// Hostnames of workloads that were looked up, by who asked: how often, and whether the asking workload was gone.
    lookups: Mutex<HashMap<(Side, Str), (u64, bool)>>,
    sockets: [AtomicI64; 2],
    handshakes: Family<Static, Histogram, fn() -> Histogram>,
    handshake_failures: Family<Static, Counter>,
    early_denials: Family<Static, Counter>,
    cuts: Family<Static, Counter>,
    retries: Family<Static, Counter>,
    offences: Family<Static, Counter>,
    /// By reporter.
    revoked: [AtomicU64; 2],
    tunnels: AtomicI64,
    tunnel_waits: Counter,
    tunnels_awaited: AtomicI64,
    dns: crate::dns::metrics::Metrics,
}

impl Default for Metrics {
    fn default() -> Self {
        let histogram: fn() -> Histogram =
            || Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0]);
        Self(Arc::new(Inner {
            series: Mutex::default(),
            lookups: Mutex::default(),
            sockets: [AtomicI64::new(0), AtomicI64::new(0)],
            handshakes: Family::new_with_constructor(histogram),
            handshake_failures: Family::default(),
            early_denials: Family::default(),
            cuts: Family::default(),
            retries: Family::default(),
            offences: Family::default(),
            revoked: Default::default(),
            tunnels: AtomicI64::new(0),
            tunnel_waits: Counter::default(),
            tunnels_awaited: AtomicI64::new(0),
            dns: crate::dns::metrics::Metrics::default(),
        }))
    }
}

impl Metrics {
    pub(crate) fn dns(&self) -> &crate::dns::metrics::Metrics {
        &self.0.dns
    }

    /// The series for a connection between these ends that ends (or has begun) so.
    pub fn series(&self, ends: &Ends, flag: Flag) -> Arc<Series> {
        Arc::clone(self.lock().entry(Labels::new(ends, flag)).or_default())
    }

    /// Drops series that no connection holds and whose workloads `is_known` does not know by namespace and workload name, nor did
    /// when this was called before: what is gone is shown until then, so that its last numbers are read.
    ///
    /// An identity without a workload is one of another mesh: it is kept while it has connections.
    pub fn prune(&self, is_known: impl Fn(&str, &str) -> bool) {
        let known = |side: &Side| match side.workload.is_empty() {
            true => side.principal.is_empty(),
            false => is_known(&side.namespace, &side.workload),
        };
        self.lock().retain(|labels, series| {
            let wanted = Arc::strong_count(series) > 1 || (known(&labels.source) && known(&labels.destination));
            !series.doomed.swap(!wanted, Relaxed) || wanted
        });
        self.lookups().retain(|(source, _), (_, doomed)| {
            let wanted = known(source);
            !std::mem::replace(doomed, !wanted) || wanted
        });
    }

    /// The same for the series of DNS, whose clients are known by canonical service and revision.
    pub fn prune_names(&self, is_known: impl Fn(&str, &str) -> bool) {
        self.0.dns.prune(is_known);
    }

    /// Counts a captured socket until the returned value is dropped.
    pub fn socket(&self, reporter: Reporter) -> OpenSocket {
        self.0.sockets[reporter as usize].fetch_add(1, Relaxed);
        OpenSocket { metrics: self.clone(), reporter }
    }

    /// A TLS handshake succeeded.
    pub fn handshake(&self, reporter: Reporter, seconds: f64) {
        self.0.handshakes.get_or_create(&vec![("reporter", reporter.as_str())]).observe(seconds);
    }

    /// A TLS handshake failed at the check of this name.
    pub fn handshake_failed(&self, reporter: Reporter, reason: &'static str) {
        self.0.handshake_failures.get_or_create(&vec![("reporter", reporter.as_str()), ("reason", reason)]).inc();
    }

    /// A connection was refused before its destination was known.
    pub fn denied_early(&self, reporter: Reporter, reason: &'static str) {
        self.0.early_denials.get_or_create(&vec![("reporter", reporter.as_str()), ("reason", reason)]).inc();
    }

    /// A live connection was cut.
    pub fn cut(&self, reporter: Reporter, reason: &'static str) {
        self.0.cuts.get_or_create(&vec![("reporter", reporter.as_str()), ("reason", reason)]).inc();
    }

    /// A tunnel has ended. What only a peer does that is broken or hostile is counted; its name is returned.
    pub fn tunnel_ended(&self, reporter: Reporter, ended: &Ended) -> Option<&'static str> {
        let offence = ended.offence()?;
        self.0.offences.get_or_create(&vec![("reporter", reporter.as_str()), ("reason", offence)]).inc();
        Some(offence)
    }

    /// A connection is tried on another endpoint.
    pub fn retried(&self, flag: Flag) {
        self.0.retries.get_or_create(&vec![("reason", flag.as_str())]).inc();
    }

    /// A connection was refused or cut because the peer's certificate is revoked.
    pub fn revoked(&self, reporter: Reporter) {
        self.0.revoked[reporter as usize].fetch_add(1, Relaxed);
    }

    /// A connection waits for a tunnel, until the returned value is dropped.
    pub fn tunnel_wait(&self) -> Waiting {
        self.0.tunnel_waits.inc();
        self.0.tunnels_awaited.fetch_add(1, Relaxed);
        Waiting(self.clone())
    }

    /// Pooled tunnels came (positive) or went.
    pub fn tunnels(&self, change: i64) {
        self.0.tunnels.fetch_add(change, Relaxed);
    }

    /// The hostname of a workload is looked up for a connection.
    pub fn looked_up(&self, source: &Workload, hostname: &Str) {
        let side = Side::new(Some(source), source.identity().as_ref());
        let mut lookups = self.lookups();
        if lookups.len() < LOOKUPS {
            lookups.entry((side, hostname.clone())).or_default().0 += 1;
        } else if let Some(count) = lookups.get_mut(&(side, hostname.clone())) {
            count.0 += 1;
        }
    }

    fn lookups(&self) -> MutexGuard<'_, HashMap<(Side, Str), (u64, bool)>> {
        self.0.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Labels, Arc<Series>>> {
        self.0.series.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pairs of a workload and a hostname that are counted.
const LOOKUPS: usize = 10_000;

/// A captured socket that is open. See [`Metrics::socket`].
#[derive(Debug)]
pub struct OpenSocket {
    metrics: Metrics,
    reporter: Reporter,
}

impl Drop for OpenSocket {
    fn drop(&mut self) {
        self.metrics.0.sockets[self.reporter as usize].fetch_sub(1, Relaxed);
    }
}

/// A connection that waits for a tunnel. See [`Metrics::tunnel_wait`].
#[derive(Debug)]
pub struct Waiting(Metrics);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.tunnels_awaited.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    fn ends() -> Ends {
        let workload = |name: &str| {
            Arc::new(Workload { namespace: "shop".into(), workload_name: name.into(), ..Workload::default() })
        };
        Ends {
            reporter: Reporter::Destination,
            source: Some(workload("web")),
            source_identity: "spiffe://cluster.local/ns/shop/sa/web".parse().ok(),
            destination: Some(workload("db")),
            destination_identity: None,
            service: None,
            mutual_tls: true,
        }
    }

    fn page(metrics: &Metrics) -> String {
        let mut registry = Registry::default();
        metrics.register_upstream(registry.sub_registry_with_prefix("istio"));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text.lines().filter(|l| !l.starts_with('#')).map(|l| l.to_owned() + "\n").collect()
    }

    #[test]
    fn series_have_upstreams_names_and_labels() {
        let metrics = Metrics::default();
        metrics.series(&ends(), Flag::Deny).failed();
        let text = page(&metrics);
        let expected = "istio_tcp_connections_failed_total{reporter=\"destination\",source_workload=\"web\",\
            source_canonical_service=\"unknown\",source_canonical_revision=\"unknown\",\
            source_workload_namespace=\"shop\",source_principal=\"spiffe://cluster.local/ns/shop/sa/web\",\
            source_app=\"unknown\",source_version=\"unknown\",source_cluster=\"unknown\",\
            destination_service=\"unknown\",destination_service_namespace=\"unknown\",\
            destination_service_name=\"unknown\",destination_workload=\"db\",\
            destination_canonical_service=\"unknown\",destination_canonical_revision=\"unknown\",\
            destination_workload_namespace=\"shop\",destination_principal=\"unknown\",\
            destination_app=\"unknown\",destination_version=\"unknown\",destination_cluster=\"unknown\",\
            request_protocol=\"tcp\",response_flags=\"DENY\",connection_security_policy=\"mutual_tls\",\
            source_region=\"unknown\",source_zone=\"unknown\",destination_region=\"unknown\",\
            destination_zone=\"unknown\"} 1\n";
        assert!(text.starts_with(expected), "{text}");
        assert!(!text.contains("opened"), "what never happened has no series: {text}");
    }

    #[test]
    fn series_of_workloads_that_are_gone_are_dropped_once_nothing_holds_them_for_a_while() {
        let metrics = Metrics::default();
        let held = metrics.series(&ends(), Flag::None);
        held.opened();
        let shown = || page(&metrics).contains("opened_total");
        let without_db = |_: &str, workload: &str| workload != "db";
        for _ in 0..3 {
            metrics.prune(without_db);
            assert!(shown());
        }
        drop(held);
        metrics.prune(|_, _| true);
        metrics.prune(without_db);
        assert!(shown(), "it may be asked for once more");
        // A connection that comes meanwhile begins the time anew.
        drop(metrics.series(&ends(), Flag::None));
        let held = metrics.series(&ends(), Flag::None);
        metrics.prune(without_db);
        drop(held);
        metrics.prune(without_db);
        assert!(shown());
        metrics.prune(without_db);
        assert!(!shown());
    }

    #[test]
    fn peers_of_other_meshes_do_not_stay_for_ever() {
        let metrics = Metrics::default();
        for number in 0..100 {
            let source_identity = format!("spiffe://other/ns/a/sa/b{number}").parse().ok();
            metrics.series(&Ends { source: None, source_identity, ..ends() }, Flag::Deny).failed();
        }
        assert_eq!(page(&metrics).matches("failed_total").count(), 100);
        metrics.prune(|_, _| true);
        metrics.prune(|_, _| true);
        assert_eq!(page(&metrics).matches("failed_total").count(), 0);
    }

    #[test]
    fn lookups_of_hostnames_are_counted_by_who_asks() {
        let metrics = Metrics::default();
        let web = Workload { namespace: "shop".into(), workload_name: "web".into(), ..Workload::default() };
        for _ in 0..2 {
            metrics.looked_up(&web, &"db.example".into());
        }
        let text = page(&metrics);
        let line = text.lines().find(|line| line.starts_with("istio_on_demand_dns_total")).unwrap();
        assert!(line.contains("source_workload=\"web\"") && line.ends_with("hostname=\"db.example\"} 2"), "{line}");
        metrics.prune(|_, _| false);
        metrics.prune(|_, _| false);
        assert!(!page(&metrics).contains("db.example"));
    }

    #[test]
    fn open_sockets_are_counted_while_they_are_open() {
        let metrics = Metrics::default();
        let one = metrics.socket(Reporter::Source);
        assert!(page(&metrics).contains("istio_tcp_sockets_open{reporter=\"source\"} 1"));
        drop(one);
        assert!(page(&metrics).contains("istio_tcp_sockets_open{reporter=\"source\"} 0"));
    }
}
