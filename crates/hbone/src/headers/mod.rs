//! The headers of CONNECT that ztunnel knows: `baggage`, `forwarded`, `traceparent`, `x-forwarded-network`.
//!
//! What a peer sends is parsed into bounded values; what does not parse is absent, since none of it decides anything by itself.

mod baggage;
mod forwarded;
mod traceparent;

use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue};

pub use baggage::{Baggage, Kind};
pub use forwarded::Forwarded;
pub use traceparent::TraceParent;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// Longest value of any of these headers that is looked at.
const VALUE_LIMIT: usize = 4096;

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
    /// Reads what is there and well-formed.
    pub fn read(map: &HeaderMap) -> Self {
        // `baggage` may be split over several headers (W3C Baggage §3.2.1); of the others only one may exist.
        let mut baggage: Option<Baggage> = None;
        for value in map.get_all(BAGGAGE).iter().take(8).filter_map(text) {
            if baggage.get_or_insert_default().merge(value).is_err() {
                baggage = None;
                break;
            }
        }
        Self {
            baggage,
            forwarded: single(map, FORWARDED).and_then(|value| value.parse().ok()),
            traceparent: single(map, TRACEPARENT).and_then(|value| value.parse().ok()),
            network: single(map, NETWORK).filter(|value| is_plain(value)).map(Into::into),
        }
    }

    pub(crate) fn write(&self, map: &mut HeaderMap) {
        let mut put = |name: HeaderName, text: String| {
            // A value of ours that HTTP cannot carry is left out.
            if let Ok(value) = HeaderValue::try_from(text) {
                map.insert(name, value);
            }
        };
        if let Some(baggage) = &self.baggage {
            put(BAGGAGE, baggage.to_string());
        }
        if let Some(forwarded) = &self.forwarded {
            put(FORWARDED, forwarded.to_string());
        }
        if let Some(traceparent) = &self.traceparent {
            put(TRACEPARENT, traceparent.to_string());
        }
        if let Some(network) = &self.network {
            put(NETWORK, network.to_string());
        }
    }
}

fn single(map: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = map.get_all(name).iter();
    let value = values.next().and_then(text)?;
    values.next().is_none().then_some(value)
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok().filter(|text| text.len() <= VALUE_LIMIT)
}

/// Names as Kubernetes and DNS have them; nothing that could be mistaken for syntax in a log line or a header.
fn is_plain(text: &str) -> bool {
    text.len() <= 253 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./:%~+@".contains(&b))
}
