//! How the numbers are shown: the name and the help of each metric, and collectors for those that prometheus_client does not hold
//! itself.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::labels::{Labels, LookupLabels};
use super::{Metrics, Reporter, Series};

impl Metrics {
    /// Registers upstream's metrics, in a registry with the prefix `istio`.
    pub fn register_upstream(&self, istio: &mut Registry) {
        istio.register_collector(Box::new(self.clone()));
        self.0.dns.register(istio);
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
