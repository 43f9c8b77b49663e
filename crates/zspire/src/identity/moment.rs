//! Moments as a reader wants them: how long ago, how long still.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

fn seconds(at: &str) -> Option<i64> {
    OffsetDateTime::parse(at, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}

/// How long ago a moment was, in the two largest units: `2m 10s`.
pub(crate) fn ago(at: &str, now: i64) -> String {
    seconds(at).map_or_else(|| at.to_owned(), |at| length(now - at))
}

/// `expires in 5m 2s`, or `expired 3s ago`.
pub(crate) fn until(at: &str, now: i64) -> String {
    match seconds(at) {
        Some(at) if at > now => format!("expires in {}", length(at - now)),
        Some(at) => format!("expired {} ago", length(now - at)),
        None => format!("expires {at}"),
    }
}

fn length(seconds: i64) -> String {
    const UNITS: [(i64, char); 4] = [(86_400, 'd'), (3_600, 'h'), (60, 'm'), (1, 's')];
    let mut left = seconds.max(0);
    let mut parts = Vec::new();
    for (size, unit) in UNITS {
        if left >= size && parts.len() < 2 {
            parts.push(format!("{}{unit}", left / size));
        } else if !parts.is_empty() {
            break;
        }
        left %= size;
    }
    if parts.is_empty() { "0s".into() } else { parts.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_largest_units() {
        for (seconds, text) in
            [(-5, "0s"), (0, "0s"), (59, "59s"), (130, "2m 10s"), (120, "2m"), (3_605, "1h"), (90_000, "1d 1h")]
        {
            assert_eq!(length(seconds), text);
        }
        assert_eq!(until("1970-01-01T00:01:00Z", 50), "expires in 10s");
        assert_eq!(until("1970-01-01T00:01:00Z", 63), "expired 3s ago");
        assert_eq!(ago("not a time", 0), "not a time");
    }
}
