//! What the peer may send on all streams together.

use super::WINDOW;
use crate::config::Config;

/// Credit is returned when bytes are received, so that streams whose applications do not read do not stall the others; only what
/// such streams hold beyond the cap of the tunnel is withheld.
#[derive(Debug)]
pub(super) struct Credit {
    /// What the peer may send now.
    window: u32,
    target: u32,
    cap: usize,
    /// Bytes that were received and not taken.
    held: usize,
}

impl Credit {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            window: WINDOW,
            target: config.connection_window.min(i32::MAX as u32),
            cap: config.buffered_cap as usize,
            held: 0,
        }
    }

    /// The peer has sent this much. False: it was not allowed to.
    pub(super) fn spend(&mut self, bytes: u32) -> bool {
        match self.window.checked_sub(bytes) {
            Some(left) => {
                self.window = left;
                true
            }
            None => false,
        }
    }

    #[cfg(test)]
    pub(super) fn window(&self) -> u32 {
        self.window
    }

    pub(super) fn hold(&mut self, bytes: usize) {
        self.held += bytes;
    }

    pub(super) fn give(&mut self, bytes: usize) {
        self.held -= bytes;
    }

    /// What is worth a WINDOW_UPDATE now.
    pub(super) fn returned(&mut self) -> Option<u32> {
        let withheld = u32::try_from(self.held.saturating_sub(self.cap)).unwrap_or(u32::MAX);
        let due = self.target.saturating_sub(withheld).saturating_sub(self.window);
        let worth = (self.target / 4).max(1);
        (due >= worth).then(|| {
            self.window += due;
            due
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_comes_back_by_quarters_and_not_for_what_is_held_beyond_the_cap() {
        let config = Config { connection_window: 400_000, buffered_cap: 1000, ..Config::default() };
        let mut credit = Credit::new(&config);
        assert_eq!(credit.returned(), Some(400_000 - WINDOW));
        assert!(credit.spend(99_999));
        assert_eq!(credit.returned(), None);
        assert!(credit.spend(1));
        assert_eq!(credit.returned(), Some(100_000));
        assert!(credit.spend(300_000));
        credit.hold(300_000);
        assert_eq!(credit.returned(), None, "299,000 are withheld");
        assert!(credit.spend(100_000));
        credit.hold(100_000);
        assert!(!credit.spend(1), "the peer may send no more");
        credit.give(399_000);
        assert_eq!(credit.returned(), Some(400_000));
        assert!(!credit.spend(400_001));
    }

    #[test]
    fn a_window_smaller_than_the_first_is_never_exceeded_for_long() {
        let config = Config { connection_window: 10_000, ..Config::default() };
        let mut credit = Credit::new(&config);
        assert_eq!(credit.returned(), None);
        assert!(credit.spend(WINDOW));
        assert_eq!(credit.returned(), Some(10_000));
    }
}
