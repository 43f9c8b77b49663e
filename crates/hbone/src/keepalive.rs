//! Whether a silent peer is still there. A function of the times it is told: when something was heard, and what the time is.

use std::time::Duration;

use tokio::time::Instant;

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing before this time.
    Wait(Instant),
    /// Ask for a sign of life.
    Ping,
    /// There was none in time.
    Dead,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Keepalive {
    interval: Duration,
    timeout: Duration,
    heard: Instant,
    asked: Option<Instant>,
}

impl Keepalive {
    pub(crate) fn new(interval: Duration, timeout: Duration, now: Instant) -> Self {
        Self { interval, timeout, heard: now, asked: None }
    }

    /// Something came from the peer.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.asked = None;
    }

    /// A ping was sent.
    pub(crate) fn asked(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    pub(crate) fn step(&self, now: Instant) -> Step {
        let (due, step) = match self.asked {
            None => (self.heard + self.interval, Step::Ping),
            Some(asked) => (asked + self.timeout, Step::Dead),
        };
        if now < due { Step::Wait(due) } else { step }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_is_asked_about_and_then_believed() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let at = |seconds: u32| start + second * seconds;
        let mut keepalive = Keepalive::new(10 * second, 20 * second, start);
        assert_eq!(keepalive.step(at(9)), Step::Wait(at(10)));
        keepalive.heard(at(9));
        assert_eq!(keepalive.step(at(18)), Step::Wait(at(19)));
        assert_eq!(keepalive.step(at(19)), Step::Ping);
        keepalive.asked(at(19));
        assert_eq!(keepalive.step(at(38)), Step::Wait(at(39)));
        assert_eq!(keepalive.step(at(39)), Step::Dead);
        keepalive.heard(at(38));
        assert_eq!(keepalive.step(at(47)), Step::Wait(at(48)));
    }
}
