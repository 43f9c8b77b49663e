//! What the data plane counts: upstream's `istio_tcp_*` series with upstream's labels, and what upstream lacks.
//!
//! A label set is some twenty texts, so it is looked up once a connection, not once a counter: a [`Series`] holds all
//! counters of one label set, and a connection keeps hold of it. Series of workloads that are gone can be dropped.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, LabelSetEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use zspire_hbone::Ended;
use zspire_model::{Service, SpiffeId, Str, Workload};

/// Which end of a connection reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's proxy.
    Destination,
}

impl Reporter {
    /// As in the `reporter` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// Why a connection ended otherwise than by itself: the `response_flags` label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    /// Nothing to report.
    None,
    /// Refused by policy.
    Deny,
    /// The destination could not be connected.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// HTTP/2 could not be set up.
    H2HandshakeFailure,
    /// No answer from the peer's HBONE port: probably a network policy.
    NetworkPolicy,
    /// No certificate.
    IdentityError,
    /// The peer's certificate is revoked.
    CertRevoked,
}

impl Flag {
    /// As in the `response_flags` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

/// Who took part in a connection, as far as it is known.
#[derive(Debug, Clone)]
pub struct Ends {
    pub reporter: Reporter,
    pub source: Option<Arc<Workload>>,
    pub source_identity: Option<SpiffeId>,
    pub destination: Option<Arc<Workload>>,
    pub destination_identity: Option<SpiffeId>,
    pub service: Option<Arc<Service>>,
    /// Whether both ends are authenticated.
    pub mutual_tls: bool,
}

/// One label set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Labels {
    reporter: Reporter,
    source: Side,
    destination: Side,
    service: [Str; 3],
    mutual_tls: bool,
    flag: Flag,
}

/// By what tells label sets apart nearly always: a series is looked up for each connection.
impl Hash for Labels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.source, &self.destination, &self.service[0], self.flag).hash(state);
    }
}

/// The labels of one workload. Empty texts are shown as `unknown`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Side {
    workload: Str,
    canonical_service: Str,
    canonical_revision: Str,
    namespace: Str,
    principal: Str,
    cluster: Str,
    region: Str,
    zone: Str,
}

/// As for [`Labels`].
impl Hash for Side {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.workload, &self.namespace, &self.principal).hash(state);
    }
}

impl Side {
    fn new(workload: Option<&Workload>, identity: Option<&SpiffeId>) -> Self {
        let mut side =
            Self { principal: identity.map_or_else(Str::default, |id| id.text().clone()), ..Self::default() };
        if let Some(w) = workload {
            side.workload = w.workload_name.clone();
            side.canonical_service = w.canonical_name.clone();
            side.canonical_revision = w.canonical_revision.clone();
            side.namespace = w.namespace.clone();
            side.cluster = w.cluster_id.clone();
            side.region = w.locality.region.clone();
            side.zone = w.locality.zone.clone();
        }
        side
    }
}

impl Labels {
    fn new(ends: &Ends, flag: Flag) -> Self {
        let service = match &ends.service {
            Some(s) => [s.hostname.clone(), s.namespace.clone(), s.name.clone()],
            None => Default::default(),
        };
        Self {
            reporter: ends.reporter,
            source: Side::new(ends.source.as_deref(), ends.source_identity.as_ref()),
            destination: Side::new(ends.destination.as_deref(), ends.destination_identity.as_ref()),
            service,
            mutual_tls: ends.mutual_tls,
            flag,
        }
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let (s, d) = (&self.source, &self.destination);
        let policy = if self.mutual_tls { "mutual_tls" } else { "unknown" };
        let all: [(&str, &str); 27] = [
            ("reporter", self.reporter.as_str()),
            ("source_workload", &s.workload),
            ("source_canonical_service", &s.canonical_service),
            ("source_canonical_revision", &s.canonical_revision),
            ("source_workload_namespace", &s.namespace),
            ("source_principal", &s.principal),
            ("source_app", &s.canonical_service),
            ("source_version", &s.canonical_revision),
            ("source_cluster", &s.cluster),
            ("destination_service", &self.service[0]),
            ("destination_service_namespace", &self.service[1]),
            ("destination_service_name", &self.service[2]),
            ("destination_workload", &d.workload),
            ("destination_canonical_service", &d.canonical_service),
            ("destination_canonical_revision", &d.canonical_revision),
            ("destination_workload_namespace", &d.namespace),
            ("destination_principal", &d.principal),
            ("destination_app", &d.canonical_service),
            ("destination_version", &d.canonical_revision),
            ("destination_cluster", &d.cluster),
            ("request_protocol", "tcp"),
            ("response_flags", self.flag.as_str()),
            ("connection_security_policy", policy),
            ("source_region", &s.region),
            ("source_zone", &s.zone),
            ("destination_region", &d.region),
            ("destination_zone", &d.zone),
        ];
        encode_labels(encoder, &all)
    }
}

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
    /// Registers upstream's metrics, in a registry with the prefix `istio`.
    pub fn register_upstream(&self, istio: &mut Registry) {
        istio.register_collector(Box::new(self.clone()));
        self.0.dns.register(istio);
    }

    pub(crate) fn dns(&self) -> &crate::dns::metrics::Metrics {
        &self.0.dns
    }

    /// Registers what upstream lacks, in a registry with the prefix `zspire`.
    pub fn register_own(&self, zspire: &mut Registry) {
        zspire.register("tls_handshake_seconds", "Time of TLS handshakes between proxies", self.0.handshakes.clone());
        zspire.register(
            "tls_handshake_failures",
            "TLS handshakes between proxies that failed, by the check that failed",
            self.0.handshake_failures.clone(),
        );
        zspire.register(
            "early_denials",
            "Connections refused before anything was known of their destination",
            self.0.early_denials.clone(),
        );
        zspire.register(
            "connections_cut",
            "Live connections that the proxy ended because something they rested on was no longer so",
            self.0.cuts.clone(),
        );
        zspire.register(
            "upstream_retries",
            "Connections that were tried on another endpoint, by the response flag of the one that failed",
            self.0.retries.clone(),
        );
        zspire.register(
            "tunnel_offences",
            "Tunnels that were ended because the peer flooded them, broke HTTP/2 or did not begin it in time, by what it did",
            self.0.offences.clone(),
        );
        zspire.register("tunnel_waits", "Connections that waited for a tunnel to be made", self.0.tunnel_waits.clone());
        zspire.register_collector(Box::new(Tunnels(self.clone())));
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

/// The labels of a lookup.
struct LookupLabels<'a>(&'a Side, &'a str);

impl EncodeLabelSet for LookupLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let s = self.0;
        let all: [(&str, &str); 11] = [
            ("source_workload", &s.workload),
            ("source_canonical_service", &s.canonical_service),
            ("source_canonical_revision", &s.canonical_revision),
            ("source_workload_namespace", &s.namespace),
            ("source_principal", &s.principal),
            ("source_app", &s.canonical_service),
            ("source_version", &s.canonical_revision),
            ("source_cluster", &s.cluster),
            ("source_region", &s.region),
            ("source_zone", &s.zone),
            ("hostname", self.1),
        ];
        encode_labels(encoder, &all)
    }
}

fn encode_labels(encoder: &mut LabelSetEncoder<'_>, all: &[(&str, &str)]) -> fmt::Result {
    for (name, value) in all {
        let mut label = encoder.encode_label();
        let mut key = label.encode_label_key()?;
        key.write_str(name)?;
        let mut text = key.encode_label_value()?;
        text.write_str(if value.is_empty() { "unknown" } else { value })?;
        text.finish()?;
    }
    Ok(())
}

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

/// Name, help, and how a series shows it: `None` where it has nothing to say.
type TcpMetric = (&'static str, &'static str, fn(&Series) -> Option<u64>);

const TCP: [TcpMetric; 5] = [
    ("tcp_connections_opened", "The total number of TCP connections opened", |s| some(&s.opened)),
    ("tcp_connections_closed", "The total number of TCP connections closed", |s| some(&s.closed)),
    ("tcp_received_bytes", "The size of total bytes received during request in case of a TCP connection", |s| {
        some(&s.bytes_reported).map(|_| s.received.load(Relaxed))
    }),
    ("tcp_sent_bytes", "The size of total bytes sent during response in case of a TCP connection", |s| {
        some(&s.bytes_reported).map(|_| s.sent.load(Relaxed))
    }),
    ("tcp_connections_failed", "The total number of TCP connections that failed to be established", |s| {
        some(&s.failed)
    }),
];

fn some(counter: &AtomicU64) -> Option<u64> {
    Some(counter.load(Relaxed)).filter(|n| *n > 0)
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // Not under the lock: a slow reader of the page must not stop connections.
        let series: Vec<(Labels, Arc<Series>)> =
            self.lock().iter().map(|(labels, series)| (labels.clone(), Arc::clone(series))).collect();
        for (name, help, value) in TCP {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, series) in &series {
                if let Some(value) = value(series) {
                    ConstCounter::new(value).encode(metric.encode_family(labels)?)?;
                }
            }
        }
        let mut sockets = encoder.encode_descriptor(
            "tcp_sockets_open",
            "The current number of open TCP sockets",
            None,
            MetricType::Gauge,
        )?;
        for reporter in [Reporter::Source, Reporter::Destination] {
            let open = self.0.sockets[reporter as usize].load(Relaxed);
            ConstGauge::new(open).encode(sockets.encode_family(&[("reporter", reporter.as_str())])?)?;
        }
        let rejections = "The total number of connections refused or ended because a certificate was revoked";
        let revoked = |reporter: Reporter| self.0.revoked[reporter as usize].load(Relaxed);
        by_reporter(&mut encoder, "crl_policy_rejections", rejections, revoked)?;
        // Every live tunnel keeps what its peer was verified by, so that there are none.
        let untracked = "The total number of connections whose certificates cannot be checked again";
        by_reporter(&mut encoder, "crl_untracked_connections", untracked, |_| 0)?;
        let help = "The total number of requests that used on-demand DNS";
        let lookups = self.lookups().clone();
        let mut metric = encoder.encode_descriptor("on_demand_dns", help, None, MetricType::Counter)?;
        for ((source, hostname), (count, _)) in &lookups {
            ConstCounter::new(*count).encode(metric.encode_family(&LookupLabels(source, hostname))?)?;
        }
        Ok(())
    }
}

fn by_reporter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: impl Fn(Reporter) -> u64,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for reporter in [Reporter::Source, Reporter::Destination] {
        let counter = ConstCounter::new(value(reporter));
        counter.encode(metric.encode_family(&[("reporter", reporter.as_str())])?)?;
    }
    Ok(())
}

/// How many tunnels are pooled, and how many connections wait for one.
#[derive(Debug)]
struct Tunnels(Metrics);

impl Collector for Tunnels {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let gauge = ConstGauge::new(self.0.0.tunnels.load(Relaxed));
        gauge.encode(encoder.encode_descriptor("tunnels", "Tunnels in the pools", None, MetricType::Gauge)?)?;
        let gauge = ConstGauge::new(self.0.0.tunnels_awaited.load(Relaxed));
        let help = "Connections that wait for a tunnel now";
        gauge.encode(encoder.encode_descriptor("tunnels_awaited", help, None, MetricType::Gauge)?)
    }
}

#[cfg(test)]
mod tests {
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
