//! One connection, as it is told of: in the connection table while it lives, in metrics and access log when it ends.
//!
//! ```text
//!  Flow::open ──▶ table ──▶ opened() ──▶ opened_total ──▶ finish(outcome) ──▶ closed/failed_total, bytes, one line in the log
//!     └─ by_another_way ─┘
//! ```
//! A flow that is dropped without [`Flow::finish`] (its task was cancelled) ends as cut off by the proxy: nothing is lost.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Instant, SystemTime};

use zspire_hbone::Counters;
use zspire_model::{Service, SpiffeId, Str, Workload};

use crate::metrics::{Ends, Flag, Metrics, OpenSocket, Reporter};

/// Which way a connection goes, seen from the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    fn reporter(self) -> Reporter {
        match self {
            Self::Inbound => Reporter::Destination,
            Self::Outbound => Reporter::Source,
        }
    }
}

/// How a connection crosses the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a tunnel.
    Hbone,
    /// In a tunnel to a gateway, inside another.
    DoubleHbone,
    /// As it is.
    Tcp,
}

impl Transport {
    /// As the configuration dump shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hbone => "HBONE",
            Self::DoubleHbone => "DOUBLE_HBONE",
            Self::Tcp => "TCP",
        }
    }
}

/// What is known of a connection when it is opened.
#[derive(Debug, Clone)]
pub struct About {
    pub direction: Direction,
    pub transport: Transport,
    pub source_address: SocketAddr,
    pub source: Option<Arc<Workload>>,
    pub source_identity: Option<SpiffeId>,
    /// Where the connection was opened to, as the access log tells it: at a tunnel's end, the HBONE port.
    pub destination_address: SocketAddr,
    /// Where the bytes go next, as views show it: the peer's proxy, or the application.
    pub next_hop: SocketAddr,
    /// What a tunnel was asked for.
    pub hbone_address: Option<Str>,
    /// What the application had asked for.
    pub original_destination: Option<SocketAddr>,
    pub destination: Option<Arc<Workload>>,
    pub destination_identity: Option<SpiffeId>,
    pub service: Option<Arc<Service>>,
}

impl About {
    fn ends(&self) -> Ends {
        Ends {
            reporter: self.direction.reporter(),
            source: self.source.clone(),
            source_identity: self.source_identity.clone(),
            destination: self.destination.clone(),
            destination_identity: self.destination_identity.clone(),
            service: self.service.clone(),
            mutual_tls: self.transport != Transport::Tcp,
        }
    }
}

/// Why a connection did not end by itself: a flag for metrics, a sentence for the log.
#[derive(Debug, Clone)]
pub struct Failure {
    pub flag: Flag,
    pub why: String,
    /// The nearest word that sockets have for it.
    pub kind: io::ErrorKind,
    /// Whether it is of the way that was tried, so that another endpoint may be reached where this one was not.
    pub(crate) another_way: bool,
}

impl Failure {
    /// A failure with its flag.
    pub fn new(flag: Flag, why: impl fmt::Display) -> Self {
        let kind = if flag == Flag::Deny { io::ErrorKind::PermissionDenied } else { io::ErrorKind::Other };
        Self { flag, why: why.to_string(), kind, another_way: false }
    }

    /// The same, of the way that was tried.
    pub(crate) fn on_this_way(self) -> Self {
        Self { another_way: true, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// A live connection, as the table shows it.
#[derive(Debug)]
pub struct Live {
    /// The pod of this proxy that it belongs to.
    pub pod: Str,
    pub about: About,
    /// `sent` is what the pod's application sent, by whichever end.
    pub bytes: Counters,
    pub since: SystemTime,
}

/// Every live connection of this proxy. Clones are the same table.
#[derive(Debug, Clone, Default)]
pub struct Table(Arc<[Shard; 16]>);

/// Connections come and go on several workers at once: sixteen locks are rarely met by two of them.
type Shard = Mutex<slab::Slab<Weak<Live>>>;

impl Table {
    /// The live connections, in no order.
    pub fn live(&self) -> Vec<Arc<Live>> {
        let of = |shard: &Shard| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.iter().filter_map(|(_, live)| live.upgrade()).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of).collect()
    }

    fn insert(&self, live: &Arc<Live>) -> (usize, usize) {
        let shard = usize::from(live.about.source_address.port()) % self.0.len();
        let mut entries = self.0[shard].lock().unwrap_or_else(PoisonError::into_inner);
        (shard, entries.insert(Arc::downgrade(live)))
    }

    fn remove(&self, (shard, key): (usize, usize)) {
        self.0[shard].lock().unwrap_or_else(PoisonError::into_inner).try_remove(key);
    }
}

/// An open connection. See the module.
#[derive(Debug)]
pub struct Flow {
    live: Arc<Live>,
    metrics: Metrics,
    table: Table,
    slot: (usize, usize),
    series: Arc<crate::metrics::Series>,
    started: Instant,
    counted: bool,
    retries: u32,
    finished: bool,
    _socket: OpenSocket,
}

impl Flow {
    /// Enters the connection into table and metrics.
    pub fn open(pod: Str, about: About, metrics: &Metrics, table: &Table) -> Self {
        let socket = metrics.socket(about.direction.reporter());
        let series = metrics.series(&about.ends(), Flag::None);
        let live = Arc::new(Live { pod, about, bytes: Counters::default(), since: SystemTime::now() });
        let slot = table.insert(&live);
        Self {
            live,
            metrics: metrics.clone(),
            table: table.clone(),
            slot,
            series,
            started: Instant::now(),
            counted: false,
            retries: 0,
            finished: false,
            _socket: socket,
        }
    }

    /// The same connection by another way: it was not counted for the first one yet.
    pub(crate) fn by_another_way(mut self, about: About) -> Self {
        self.table.remove(self.slot);
        self.series = self.metrics.series(&about.ends(), Flag::None);
        let (pod, since) = (self.live.pod.clone(), self.live.since);
        self.live = Arc::new(Live { pod, about, bytes: Counters::default(), since });
        self.slot = self.table.insert(&self.live);
        self.retries += 1;
        self
    }

    /// It is decided which way the connection goes.
    pub(crate) fn opened(&mut self) {
        if !std::mem::replace(&mut self.counted, true) {
            self.series.opened();
        }
    }

    /// Where relayed bytes are counted.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// The connection ended: `established` says whether bytes could flow at all.
    pub fn finish(mut self, established: bool, outcome: Result<(), Failure>) {
        self.end(established, outcome.as_ref().err());
    }

    fn end(&mut self, established: bool, failure: Option<&Failure>) {
        self.finished = true;
        self.opened();
        self.table.remove(self.slot);
        let (sent, received) = self.live.bytes.load();
        self.series.bytes(sent, received);
        let flag = failure.map_or(Flag::None, |f| f.flag);
        let series = match flag {
            Flag::None => Arc::clone(&self.series),
            flag => self.metrics.series(&self.live.about.ends(), flag),
        };
        series.closed();
        if !established {
            series.failed();
        }
        log(&self.live.about, sent, received, self.started, self.retries, failure);
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if !self.finished {
            let cut = Failure::new(Flag::None, "connection closed: the proxy is shutting down");
            self.end(true, Some(&cut));
        }
    }
}

/// A connection that is refused before anything is known of its destination: a warning in the access log.
pub fn deny_early(
    metrics: &Metrics,
    direction: Direction,
    source: SocketAddr,
    destination: Option<SocketAddr>,
    reason: &'static str,
    why: &dyn fmt::Display,
) {
    metrics.denied_early(direction.reporter(), reason);
    let way = word(direction);
    tracing::event!(
        target: "access",
        tracing::Level::WARN,
        src.addr = %source,
        dst.addr = destination.map(tracing::field::display),
        direction = way,
        error = &*why.to_string(),
        "connection failed"
    );
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    }
}

/// Texts that are empty are left out.
fn text(text: Option<&Str>) -> Option<&str> {
    text.map(|t| &**t).filter(|t| !t.is_empty())
}

fn log(about: &About, sent: u64, received: u64, started: Instant, retries: u32, failure: Option<&Failure>) {
    let (src, dst) = (about.source.as_deref(), about.destination.as_deref());
    let duration = format!("{}ms", started.elapsed().as_millis());
    macro_rules! line {
        ($level:expr, $error:expr) => {
            tracing::event!(
                target: "access",
                $level,
                src.addr = %about.source_address,
                src.workload = text(src.map(|w| &w.name)),
                src.namespace = text(src.map(|w| &w.namespace)),
                src.identity = about.source_identity.as_ref().map(SpiffeId::as_str),
                src.cluster = text(src.map(|w| &w.cluster_id)),
                dst.addr = %about.destination_address,
                dst.hbone_addr = about.hbone_address.as_ref().map(tracing::field::display),
                dst.service = text(about.service.as_ref().map(|s| &s.hostname)),
                dst.workload = text(dst.map(|w| &w.name)),
                dst.namespace = text(dst.map(|w| &w.namespace)),
                dst.identity = about.destination_identity.as_ref().map(SpiffeId::as_str),
                dst.cluster = text(dst.map(|w| &w.cluster_id)),
                direction = word(about.direction),
                bytes_sent = sent,
                bytes_recv = received,
                duration = &*duration,
                retries = (retries > 0).then_some(retries),
                error = $error,
                "connection complete"
            )
        };
    }
    match failure {
        None => line!(tracing::Level::INFO, None::<&str>),
        Some(failure) => line!(tracing::Level::ERROR, Some(&*failure.why)),
    }
}
