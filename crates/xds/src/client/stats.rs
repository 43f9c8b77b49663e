//! Counters of a discovery client, by the names of ztunnel's metrics; whoever renders them asks for a [`Snapshot`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::codec::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// The counters, shared with the running client.
#[derive(Debug, Clone, Default)]
pub struct Stats(Arc<Mutex<Snapshot>>);

/// The counters at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Streams that ended (`xds_connection_terminations`), by reason.
    pub connection_terminations: BTreeMap<Termination, u64>,
    /// Responses (`xds_message`), by type URL; the text `unknown` stands for all types that are not known here.
    pub messages: BTreeMap<&'static str, u64>,
    /// Bytes of the responses (`xds_message_bytes`), by type URL.
    pub message_bytes: BTreeMap<&'static str, u64>,
    /// Whether the server has answered on the stream that there is.
    pub connected: bool,
    /// When the last response came.
    pub last_message: Option<Instant>,
    /// How long the server took for the first answer of the newest stream that it answered.
    pub first_answer: Option<Duration>,
}

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Termination {
    /// It could not be opened.
    ConnectionError,
    /// It broke, or the server ended it with an error.
    Error,
    /// The server ended it without one.
    Complete,
}

impl Termination {
    /// The word for it in the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Complete => "Complete",
        }
    }
}

impl Stats {
    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        self.with(|counters| counters.clone())
    }

    pub(super) fn terminated(&self, reason: Termination) {
        self.with(|counters| {
            counters.connected = false;
            *counters.connection_terminations.entry(reason).or_default() += 1;
        });
    }

    pub(super) fn connected(&self, after: Duration) {
        self.with(|counters| {
            counters.connected = true;
            counters.first_answer = Some(after);
        });
    }

    pub(super) fn message(&self, type_url: &str, bytes: usize) {
        // What the server makes up must not become labels.
        let url = [ADDRESS_TYPE, AUTHORIZATION_TYPE].into_iter().find(|url| *url == type_url).unwrap_or("unknown");
        self.with(|counters| {
            counters.last_message = Some(Instant::now());
            *counters.messages.entry(url).or_default() += 1;
            *counters.message_bytes.entry(url).or_default() += bytes as u64;
        });
    }

    fn with<T>(&self, f: impl FnOnce(&mut Snapshot) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}
