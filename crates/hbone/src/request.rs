//! The CONNECT request and its answer, as values.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use http::StatusCode;

use crate::headers::{Baggage, Headers};

/// Longest DNS name.
const NAME_LIMIT: usize = 253;

/// What a stream should be connected to: the `:authority` of CONNECT.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A service by hostname, for the inner request of a tunnel in a tunnel. Port 0 leaves the choice to the endpoint.
    Host {
        /// Lower-case DNS name.
        name: Box<str>,
        /// Port of the service.
        port: u16,
    },
}

impl Target {
    /// The port asked for.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

impl FromStr for Target {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        // The standard library also reads scoped addresses; a scope of the peer's machine means nothing here.
        if text.contains('%') {
            return Err(Malformed::Authority);
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self::Address(address));
        }
        let (name, port) = text.rsplit_once(':').ok_or(Malformed::Authority)?;
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Malformed::Authority);
        }
        let port = port.parse().map_err(|_| Malformed::Authority)?;
        // What looks like an address but is none (`127.1`, `1.2.3.4.5`) is not a name either.
        let numeric = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if numeric || name.parse::<IpAddr>().is_ok() || !is_name(name) {
            return Err(Malformed::Authority);
        }
        Ok(Self::Host { name: name.to_ascii_lowercase().into(), port })
    }
}

fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
    };
    name.len() <= NAME_LIMIT && name.split('.').all(label)
}

/// A CONNECT to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Where to.
    pub target: Target,
    /// On whose behalf.
    pub headers: Headers,
}

/// A CONNECT that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// Where to.
    pub target: Target,
    /// What the peer says about the connection. Only claims: nothing of it is authenticated.
    pub headers: Headers,
}

impl RequestHead {
    /// The address asked for; none for a hostname.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.target {
            Target::Address(address) => Some(address),
            Target::Host { .. } => None,
        }
    }
}

/// A positive answer to CONNECT.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResponseHead {
    /// What the peer says about the workload it connected to.
    pub baggage: Option<Baggage>,
}

/// A request that no handler ever sees. It was answered with 400, or with 431 if it is too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// Another method.
    #[error("the method is not CONNECT")]
    Method,
    /// Extended CONNECT (RFC 8441).
    #[error("CONNECT with :protocol is not HBONE")]
    Protocol,
    /// Nowhere to connect to.
    #[error("CONNECT without :authority")]
    NoAuthority,
    /// Not `address:port` or `hostname:port`.
    #[error("the :authority is neither address:port nor hostname:port")]
    Authority,
    /// More headers than are read.
    #[error("the headers of the request are too large")]
    TooLarge,
}

impl Malformed {
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::TooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        for good in ["10.0.0.1:80", "[fd00::1]:8080", "svc.ns.svc.cluster.local:0", "a_b.c:65535"] {
            assert_eq!(good.parse::<Target>().map(|t| t.to_string()), Ok(good.to_owned()));
        }
        for bad in [
            "",
            ":80",
            "host",
            "host:",
            "host:+1",
            "host:65536",
            "10.0.0.1",
            "[fe80::1%1]:80",
            "[fe80::1%eth0]:80",
            "127.1:80",
            "1.2.3.4.5:80",
            "fd00::1:80",
            "user@host:80",
            "a..b:80",
            ".:80",
            "-a.b:80",
            "ho st:80",
            "[::1:80",
        ] {
            assert_eq!(bad.parse::<Target>(), Err(Malformed::Authority), "{bad:?}");
        }
        assert!(format!("{}:80", "a.".repeat(200)).parse::<Target>().is_err());
    }
}
