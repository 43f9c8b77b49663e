//! Counters of the control plane, with istiod's names for what istiod counts too.
//!
//! istiod's counters have no `_total`, which `prometheus-client` adds; [`Metrics::text`] takes it off again, and the page is in
//! Prometheus' own text format. Expiry is computed when the page is asked for, so it is right after a reload too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::ca::Issuing;
use crate::state::WriterStats;
use crate::time_text::unix;

/// Counters with istiod's names.
const ISTIOD: &str = "citadel_server_";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ErrorLabel {
    error: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ResultLabel {
    result: &'static str,
}

/// How often something was reloaded.
#[derive(Debug, Default, Clone)]
pub(crate) struct Reloads(Family<ResultLabel, Counter>);

impl Reloads {
    pub(crate) fn accepted(&self) {
        self.0.get_or_create(&ResultLabel { result: "accepted" }).inc();
    }

    pub(crate) fn rejected(&self) {
        self.0.get_or_create(&ResultLabel { result: "rejected" }).inc();
    }
}

/// Everything counted.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) csrs: Counter,
    pub(crate) authentication_failures: Counter,
    pub(crate) csr_parsing_errors: Counter,
    pub(crate) id_extraction_errors: Counter,
    sign_errors: Family<ErrorLabel, Counter>,
    pub(crate) issued: Counter,
    joins: Family<ResultLabel, Counter>,
    pub(crate) overloaded: Counter,
    pub(crate) handshake_errors: Counter,
    pub(crate) connections: Gauge,
    pub(crate) mesh_reloads: Reloads,
    pub(crate) ca_reloads: Reloads,
    /// 1 while the mesh files on the disk are not those in force.
    pub(crate) mesh_rejected: Gauge,
    root_expiry: Gauge,
    root_left: Gauge,
    chain_expiry: Gauge,
    chain_left: Gauge,
    records_written: Counter<u64, Shared>,
    records_lost: Counter<u64, Shared>,
}

impl Metrics {
    pub(crate) fn not_signed(&self, error: &'static str) {
        self.sign_errors.get_or_create(&ErrorLabel { error }).inc();
    }

    pub(crate) fn join(&self, result: &'static str) {
        self.joins.get_or_create(&ResultLabel { result }).inc();
    }

    /// The page, in Prometheus' text format 0.0.4.
    pub(crate) fn text(&self, issuing: &Issuing, writer: &WriterStats, now: SystemTime) -> String {
        self.expiry(issuing, now);
        self.records_written.inner().set(&writer.written);
        self.records_lost.inner().set(&writer.lost);
        let mut registry = Registry::default();
        self.register_istiods(registry.sub_registry_with_prefix("citadel_server"));
        self.register_own(registry.sub_registry_with_prefix("zspire_control_plane"));
        let mut page = String::new();
        text::encode(&mut page, &registry).expect("writing to a string does not fail");
        without_suffix(&page)
    }

    fn expiry(&self, issuing: &Issuing, now: SystemTime) {
        let now = unix(now);
        let (root, chain) = (unix(issuing.authority.roots_not_after()), unix(issuing.authority.not_after()));
        self.root_expiry.set(root);
        self.root_left.set(root - now);
        self.chain_expiry.set(chain);
        self.chain_left.set(chain - now);
    }

    fn register_istiods(&self, to: &mut Registry) {
        let counters = [
            ("csr_count", "The number of CSRs received by Citadel server", &self.csrs),
            ("authentication_failure_count", "The number of authentication failures", &self.authentication_failures),
            ("csr_parsing_err_count", "The number of errors occurred when parsing the CSR", &self.csr_parsing_errors),
            (
                "id_extraction_err_count",
                "The number of errors occurred when extracting the ID from CSR",
                &self.id_extraction_errors,
            ),
            ("success_cert_issuance_count", "The number of certificates issuances that have succeeded", &self.issued),
        ];
        for (name, help, counter) in counters {
            to.register(name, help, counter.clone());
        }
        to.register(
            "csr_sign_err_count",
            "The number of errors occurred when signing the CSR",
            self.sign_errors.clone(),
        );
        let gauges = [
            (
                "root_cert_expiry_timestamp",
                "The unix timestamp, in seconds, when the root cert will expire",
                &self.root_expiry,
            ),
            (
                "root_cert_expiry_seconds",
                "The time remaining, in seconds, before the root cert will expire. A negative value indicates the cert is expired",
                &self.root_left,
            ),
            (
                "cert_chain_expiry_timestamp",
                "The unix timestamp, in seconds, when the Istio generated cert chain will expire",
                &self.chain_expiry,
            ),
            (
                "cert_chain_expiry_seconds",
                "The time remaining, in seconds, before the Istio generated cert chain will expire. A negative value indicates the cert is expired",
                &self.chain_left,
            ),
        ];
        for (name, help, gauge) in gauges {
            to.register(name, help, gauge.clone());
        }
    }

    fn register_own(&self, to: &mut Registry) {
        to.register("join_tokens", "Join tokens shown, by outcome", self.joins.clone());
        to.register(
            "overloaded",
            "Requests refused because too many certificates were being signed",
            self.overloaded.clone(),
        );
        to.register("tls_handshake_errors", "Connections that did not get through TLS", self.handshake_errors.clone());
        to.register("connections", "Open connections to the serving port", self.connections.clone());
        to.register("mesh_reloads", "Changes of the mesh files, by outcome", self.mesh_reloads.0.clone());
        to.register("ca_reloads", "Changes of a plugged-in CA, by outcome", self.ca_reloads.0.clone());
        to.register("mesh_rejected", "1 while the mesh files are not those in force", self.mesh_rejected.clone());
        to.register("records_written", "Records of issued certificates written", self.records_written.clone());
        to.register("records_lost", "Records of issued certificates lost", self.records_lost.clone());
    }
}

/// A counter whose value is kept elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Shared(AtomicU64);

impl Shared {
    fn set(&self, from: &AtomicU64) {
        self.0.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl prometheus_client::metrics::counter::Atomic<u64> for Shared {
    fn inc(&self) -> u64 {
        self.inc_by(1)
    }

    fn inc_by(&self, more: u64) -> u64 {
        self.0.fetch_add(more, Ordering::Relaxed)
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

fn without_suffix(page: &str) -> String {
    let mut out = String::with_capacity(page.len());
    for line in page.lines() {
        let name = line.split([' ', '{']).next().unwrap_or_default();
        match name.strip_suffix("_total").filter(|name| name.starts_with(ISTIOD)) {
            Some(bare) => {
                out.push_str(bare);
                out.push_str(&line[name.len()..]);
            }
            None => out.push_str(line),
        }
        out.push('\n');
    }
    out
}

/// Counts a connection for as long as it lives.
#[derive(Debug)]
pub(crate) struct Open(Arc<Metrics>);

impl Open {
    pub(crate) fn new(metrics: &Arc<Metrics>) -> Self {
        metrics.connections.inc();
        Self(metrics.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.dec();
    }
}
