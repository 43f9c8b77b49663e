//! How long to wait before the next attempt: doubling, with full jitter, so that nodes that lost a server together do not come
//! back together.

use std::time::Duration;

#[derive(Debug)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    attempt: u32,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, attempt: 0 }
    }

    /// How many attempts failed since the last one that did not.
    pub(super) fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The wait after a stream that lived for a while. Only one that lived longer than the longest wait counts as a success:
    /// a server that accepts streams and drops them at once is not to be asked a hundred times a second.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        if lived > self.max {
            self.attempt = 0;
        }
        let bound = self.bound();
        self.attempt = self.attempt.saturating_add(1);
        bound.mul_f64(rand::random::<f64>())
    }

    fn bound(&self) -> Duration {
        let factor = 1u32.checked_shl(self.attempt).unwrap_or(u32::MAX);
        self.min.saturating_mul(factor).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_the_longest_wait_and_starts_anew_after_a_stream_that_lived() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(15));
        let mut bounds = Vec::new();
        for _ in 0..40 {
            let bound = backoff.bound();
            assert!(backoff.after(Duration::from_secs(1)) <= bound);
            bounds.push(bound.as_millis());
        }
        assert_eq!(bounds[..5], [10, 20, 40, 80, 160]);
        assert_eq!(bounds[39], 15_000);
        assert!(backoff.after(Duration::from_secs(16)) <= Duration::from_millis(10));
        assert_eq!(backoff.attempt(), 1);
    }
}
