//! Moments and durations as text: RFC 3339 for operators, Go's form where istiod's messages are kept.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Seconds since 1970; moments before count as 1970.
pub(crate) fn unix(moment: SystemTime) -> i64 {
    let seconds = moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

/// RFC 3339 in UTC.
pub(crate) fn rfc3339(moment: SystemTime) -> String {
    rfc3339_of_unix(unix(moment))
}

/// The same of seconds since 1970.
pub(crate) fn rfc3339_of_unix(seconds: i64) -> String {
    let moment = OffsetDateTime::from_unix_timestamp(seconds).ok();
    moment.and_then(|moment| moment.format(&Rfc3339).ok()).unwrap_or_else(|| format!("@{seconds}"))
}

/// As Go prints whole seconds: `2161h0m0s`, `1m30s`, `5s`.
pub(crate) fn go(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_prints_them() {
        let go = |seconds| go(Duration::from_secs(seconds));
        assert_eq!([go(5), go(90), go(90 * 86_400), go(3601)], ["5s", "1m30s", "2160h0m0s", "1h0m1s"]);
    }

    #[test]
    fn moments() {
        assert_eq!(rfc3339_of_unix(1_800_000_000), "2027-01-15T08:00:00Z");
        assert_eq!(rfc3339_of_unix(i64::MAX), format!("@{}", i64::MAX));
    }
}
