//! `forwarded` (RFC 7239) in the one form that HBONE uses: `for="address:port";host=name`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use super::{Malformed, is_plain};

/// Where a connection came from, before the proxy that sends the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    /// `for`: port 0 if there was none.
    pub source: SocketAddr,
    /// `host`: the service that was asked for.
    pub host: Option<Box<str>>,
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", self.source)?;
        match &self.host {
            Some(host) => write!(f, ";host={host}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Forwarded {
    type Err = Malformed;

    /// Reads the first element: the hop nearest to the source.
    fn from_str(text: &str) -> Result<Self, Malformed> {
        const MALFORMED: Malformed = Malformed("forwarded");
        // Neither names nor addresses contain a comma or semicolon, so quotes need no closer look.
        let element = text.split(',').next().unwrap_or_default();
        let (mut source, mut host) = (None, None);
        for pair in element.split(';') {
            let (key, value) = pair.trim().split_once('=').ok_or(MALFORMED)?;
            let value = unquote(value).ok_or(MALFORMED)?;
            let known = match () {
                () if key.eq_ignore_ascii_case("for") => source.replace(address(value).ok_or(MALFORMED)?).is_some(),
                () if key.eq_ignore_ascii_case("host") => {
                    let valid = is_plain(value) && !value.is_empty();
                    host.replace(valid.then(|| value.into()).ok_or(MALFORMED)?).is_some()
                }
                () => false,
            };
            // Each parameter at most once (RFC 7239 §4).
            if known {
                return Err(MALFORMED);
            }
        }
        Ok(Self { source: source.ok_or(MALFORMED)?, host })
    }
}

fn unquote(value: &str) -> Option<&str> {
    match value.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').filter(|inner| !inner.contains(['"', '\\'])),
        None => (!value.contains('"')).then_some(value),
    }
}

fn address(text: &str) -> Option<SocketAddr> {
    if text.contains('%') {
        return None;
    }
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let ip: IpAddr = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text).parse().ok()?;
    Some(SocketAddr::new(ip, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for text in ["for=\"10.0.0.1:4711\";host=svc.ns", "for=\"[fd00::1]:80\"", "for=\"10.0.0.1:0\""] {
            assert_eq!(text.parse::<Forwarded>().unwrap().to_string(), text);
        }
        assert_eq!("For=10.0.0.1, for=1.1.1.1".parse::<Forwarded>().unwrap().source.to_string(), "10.0.0.1:0");
        assert_eq!("by=x;for=\"[::1]\"".parse::<Forwarded>().unwrap().source.to_string(), "[::1]:0");
    }

    #[test]
    fn refused() {
        for bad in [
            "",
            "for",
            "for=",
            "host=a",
            "for=unknown",
            "for=\"1.1.1.1",
            "for=1.1.1.1\"",
            "for=\"fe80::1%eth0\"",
            "for=\"[fe80::1%2]:1\"",
            "for=1.1.1.1;for=2.2.2.2",
            "for=1.1.1.1;host=a b",
            "for=1.1.1.1;host=",
            "for=1.1.1.1:99999",
            "for=\"1.1.1.1\\\"\"",
        ] {
            assert!(bad.parse::<Forwarded>().is_err(), "{bad:?}");
        }
    }
}
