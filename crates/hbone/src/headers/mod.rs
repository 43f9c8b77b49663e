//! The headers of CONNECT that ztunnel knows: `baggage`, `forwarded`, `traceparent`, `x-forwarded-network`.
//!
//! What a peer sends is parsed into bounded values; what does not parse is absent, since none of it decides anything by itself.

mod baggage;
mod forwarded;
mod traceparent;

use std::fmt;

pub use baggage::{Baggage, Kind};
pub use forwarded::Forwarded;
pub use traceparent::TraceParent;

const BAGGAGE: &str = "baggage";
const FORWARDED: &str = "forwarded";
const TRACEPARENT: &str = "traceparent";
const NETWORK: &str = "x-forwarded-network";

/// Longest value of any of these headers that is looked at, or written.
pub(crate) const VALUE_LIMIT: usize = 4096;

/// A header that is not as its specification says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0} header")]
pub struct Malformed(pub &'static str);

/// The headers of a CONNECT.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Headers {
    /// About the source workload.
    pub baggage: Option<Baggage>,
    /// Where the connection came from before the last proxy.
    pub forwarded: Option<Forwarded>,
    /// Trace context.
    pub traceparent: Option<TraceParent>,
    /// The network the connection came from, for the inner request of a tunnel in a tunnel.
    pub network: Option<Box<str>>,
}

impl Headers {
    /// Hands over each header that is there: its name, and what writes its value.
    pub(crate) fn write(&self, put: &mut dyn FnMut(&'static str, &dyn fmt::Display)) {
        if let Some(baggage) = &self.baggage {
            put(BAGGAGE, baggage);
        }
        if let Some(forwarded) = &self.forwarded {
            put(FORWARDED, forwarded);
        }
        if let Some(traceparent) = &self.traceparent {
            put(TRACEPARENT, traceparent);
        }
        if let Some(network) = &self.network {
            put(NETWORK, network);
        }
    }
}

/// Reads the headers of a message one after another; keeps what is there and well-formed.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    headers: Headers,
    /// How many there were of each: `baggage` may be split over several (W3C Baggage §3.2.1); of the others only one may exist.
    baggage: u8,
    forwarded: u8,
    traceparent: u8,
    network: u8,
    spoilt: bool,
}

impl Reader {
    pub(crate) fn field(&mut self, name: &[u8], value: &[u8]) {
        let is = |known: &str| name == known.as_bytes();
        let Headers { baggage, forwarded, traceparent, network } = &mut self.headers;
        if is(BAGGAGE) {
            if once_more(&mut self.baggage) > 8 || self.spoilt {
                return;
            }
            if let Some(value) = text(value)
                && baggage.get_or_insert_default().merge(value).is_err()
            {
                *baggage = None;
                self.spoilt = true;
            }
        } else if is(FORWARDED) {
            *forwarded = single(&mut self.forwarded, value).and_then(|value| value.parse().ok());
        } else if is(TRACEPARENT) {
            *traceparent = single(&mut self.traceparent, value).and_then(|value| value.parse().ok());
        } else if is(NETWORK) {
            *network = single(&mut self.network, value).filter(|value| is_plain(value)).map(Into::into);
        }
    }

    pub(crate) fn finish(self) -> Headers {
        self.headers
    }
}

fn once_more(seen: &mut u8) -> u8 {
    *seen = seen.saturating_add(1);
    *seen
}

fn single<'a>(seen: &mut u8, value: &'a [u8]) -> Option<&'a str> {
    (once_more(seen) == 1).then(|| text(value)).flatten()
}

fn text(value: &[u8]) -> Option<&str> {
    let visible = |byte: &u8| matches!(byte, b' '..=b'~' | b'\t');
    let text = std::str::from_utf8(value).ok()?;
    (value.len() <= VALUE_LIMIT && value.iter().all(visible)).then_some(text)
}

/// Names as Kubernetes and DNS have them; nothing that could be mistaken for syntax in a log line or a header.
fn is_plain(text: &str) -> bool {
    text.len() <= 253 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./:%~+@".contains(&b))
}
