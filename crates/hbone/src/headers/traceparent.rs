//! `traceparent` (W3C Trace Context).

use std::fmt;
use std::str::FromStr;

use super::Malformed;

/// The place of a request in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// The whole trace; not zero.
    pub trace: u128,
    /// The span that sent it; not zero.
    pub span: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

impl TraceParent {
    /// A new trace from random numbers, not sampled.
    pub fn new(trace: u128, span: u64) -> Self {
        Self { trace: trace.max(1), span: span.max(1), flags: 0 }
    }

    /// The next span of the same trace.
    pub fn child(self, span: u64) -> Self {
        Self { span: span.max(1), ..self }
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

impl FromStr for TraceParent {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        parse(text).ok_or(Malformed("traceparent"))
    }
}

fn parse(text: &str) -> Option<TraceParent> {
    let (version, rest) = text.split_once('-')?;
    let (trace, rest) = rest.split_once('-')?;
    let (span, flags) = rest.split_once('-')?;
    let version = hex::<2>(version)?;
    // A later version may append fields; version 0 has none, and 255 is forbidden.
    let (flags, more) = flags.split_once('-').map_or((flags, false), |(flags, _)| (flags, true));
    if version == 0xff || (version == 0 && more) {
        return None;
    }
    let (trace, span) = (hex::<32>(trace)?, hex::<16>(span)?);
    let flags = hex::<2>(flags)?;
    (trace != 0 && span != 0).then_some(TraceParent { trace, span: span as u64, flags: flags as u8 })
}

/// Exactly `N` lower-case digits.
fn hex<const N: usize>(text: &str) -> Option<u128> {
    let digits = text.len() == N && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    digits.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(text.parse::<TraceParent>().unwrap().to_string(), text);
        let later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more";
        assert!(later.parse::<TraceParent>().is_ok());
    }

    #[test]
    fn refused() {
        for bad in [
            "".to_owned(),
            "0".repeat(55),
            format!("{}é", "0".repeat(53)),
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331".to_owned(),
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01".to_owned(),
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01".to_owned(),
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x".to_owned(),
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
        ] {
            assert!(bad.parse::<TraceParent>().is_err(), "{bad:?}");
        }
    }
}
