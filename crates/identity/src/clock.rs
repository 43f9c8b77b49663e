//! Where wall-clock time comes from, so that tests can set it.
//!
//! Certificates speak of wall-clock time; waiting (back-off, deadlines) uses tokio's monotonic time instead.

use std::fmt::Debug;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::UnixTime;

/// A source of wall-clock time.
pub trait Clock: Debug + Send + Sync + 'static {
    /// The present moment. It may jump in either direction.
    fn now(&self) -> SystemTime;
}

/// The operating system's clock.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// Moments before 1970 count as 1970: no certificate in use is that old.
pub(crate) fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Seconds since 1970 (as X.509 libraries give them) to a moment; absurd values are clamped, never a panic.
pub(crate) fn from_unix(seconds: i64) -> SystemTime {
    const YEAR_9999: u64 = 253_402_300_799;
    let seconds = u64::try_from(seconds).unwrap_or(0).min(YEAR_9999);
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// RFC 3339 in UTC, for messages and views.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    time::OffsetDateTime::from(time)
        .replace_nanosecond(0)
        .expect("zero is a valid nanosecond")
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_else(|_| format!("{time:?}"))
}

/// Gives a [`Clock`] to rustls.
#[derive(Debug)]
pub(crate) struct TlsTime(pub(crate) std::sync::Arc<dyn Clock>);

impl rustls::time_provider::TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(self.0.now()))
    }
}
