//! What a peer may do that costs it little and us something: budgets, restored with time.
//!
//! | counter | spent by | restored by |
//! |---|---|---|
//! | idle | frames that carry nothing: PING, SETTINGS, PRIORITY, unknown and empty ones, and whatever concerns no stream of ours | time |
//! | updates | WINDOW_UPDATE | what we send: an honest peer takes it and says so; then like the others |
//! | late | what comes of streams that are gone: RST_STREAM, HEADERS, empty DATA | each stream that is gone: what the peer said of it may have crossed what we said; then like the others |
//! | abandoned | requests that the peer takes back before they are answered, or spoils | time |

use std::time::Duration;

use super::frame::{self, Frame};
use crate::error::Flood;

/// Requests that a peer may abandon at once, beyond those that time restores.
const ABANDONED: u64 = 200;
/// Abandoned requests that each second restores: as many as impatient clients of a workload that hangs may well give up.
const ABANDONED_EACH_SECOND: u64 = 100;
/// Updates of windows that each frame of ours may cause: of the stream and of the connection.
const UPDATES: u64 = 2;
/// A frame that the peer takes in pieces may cause updates for each of this many bytes.
const PIECE: u64 = 1024;
/// What an honest peer may still say of a stream that is gone: it answers, ends its direction, and gives the stream up.
const LATE: u64 = 3;
/// Late frames that are under way at most. Those of streams that went long ago will not come any more.
const LATE_AT_ONCE: u64 = 16_384;

/// Updates that a peer may have saved up: twice what the largest window, sent at once, may cause.
const UPDATES_AT_ONCE: u64 = 2 * (1 << 31) / PIECE;

#[derive(Debug)]
pub(super) struct Guard {
    budget: u32,
    left: u32,
    restored: Duration,
    /// Requests that may be abandoned now, and the second for which that was counted.
    may_abandon: u64,
    counted: u64,
    updates: u64,
    late: u64,
}

impl Guard {
    /// `budget` frames that carry nothing may come at once; an eighth of it comes back every second.
    pub(super) fn new(budget: u32) -> Self {
        Self { budget, left: budget, restored: Duration::ZERO, may_abandon: ABANDONED, counted: 0, updates: 0, late: 0 }
    }

    /// A frame came that carries nothing.
    pub(super) fn idle(&mut self, kind: u8, now: Duration) -> Result<(), Flood> {
        if self.left == 0 {
            // The time is looked at only when the budget is used up.
            let eighths = now.saturating_sub(self.restored).as_secs_f64();
            self.left = (eighths * f64::from(self.budget) / 8.0).min(f64::from(self.budget)) as u32;
            self.restored = now;
        }
        self.left = self.left.checked_sub(1).ok_or(Frame::flood(kind))?;
        Ok(())
    }

    /// The peer gave something to send: what it says of a window is an answer to this.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.updates = (self.updates + UPDATES + bytes as u64 / PIECE).min(UPDATES_AT_ONCE);
    }

    /// A window was updated.
    pub(super) fn update(&mut self, now: Duration) -> Result<(), Flood> {
        match self.updates.checked_sub(1) {
            Some(left) => self.updates = left,
            None => self.idle(frame::WINDOW_UPDATE, now)?,
        }
        Ok(())
    }

    /// So many streams are gone, which the peer may not know yet.
    pub(super) fn gone(&mut self, streams: u64) {
        self.late = (self.late + LATE * streams).min(LATE_AT_ONCE);
    }

    /// A frame came for a stream that is gone.
    pub(super) fn late(&mut self, kind: u8, now: Duration) -> Result<(), Flood> {
        match self.late.checked_sub(1) {
            Some(left) => self.late = left,
            None => self.idle(kind, now)?,
        }
        Ok(())
    }

    /// A request that was not answered yet is none any more, by the peer's doing.
    pub(super) fn abandoned(&mut self, now: Duration) -> Result<(), Flood> {
        let restored = now.as_secs().saturating_sub(self.counted).saturating_mul(ABANDONED_EACH_SECOND);
        self.counted = now.as_secs();
        self.may_abandon = self.may_abandon.saturating_add(restored).min(ABANDONED);
        self.may_abandon = self.may_abandon.checked_sub(1).ok_or(Flood::Abandoned)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_budget_is_restored_with_time() {
        let mut guard = Guard::new(8);
        for _ in 0..8 {
            guard.idle(frame::PING, at(0)).unwrap();
        }
        assert_eq!(guard.idle(frame::PING, at(0)), Err(Flood::Ping));
        for _ in 0..2 {
            guard.idle(frame::PING, at(2)).unwrap();
        }
        assert_eq!(guard.idle(99, at(2)), Err(Flood::Unknown));
        for _ in 0..8 {
            guard.idle(frame::PING, at(1000)).unwrap();
        }
        assert!(guard.idle(frame::PING, at(1000)).is_err(), "no more than the budget is saved");
    }

    #[test]
    fn updates_of_windows_answer_what_was_sent() {
        let mut guard = Guard::new(3);
        for _ in 0..1000 {
            // A peer that returns the window of each byte, of the stream and of the connection.
            guard.sent(1);
            guard.update(at(0)).unwrap();
            guard.update(at(0)).unwrap();
        }
        for _ in 0..3 {
            guard.update(at(0)).unwrap();
        }
        assert_eq!(guard.update(at(0)), Err(Flood::WindowUpdate));
    }

    #[test]
    fn the_last_words_of_two_may_cross() {
        let mut guard = Guard::new(1);
        for _ in 0..100_000 {
            guard.gone(1);
            for kind in [frame::HEADERS, frame::DATA, frame::RST_STREAM] {
                guard.late(kind, at(0)).unwrap();
            }
        }
        guard.late(frame::RST_STREAM, at(0)).unwrap();
        assert_eq!(guard.late(frame::RST_STREAM, at(0)), Err(Flood::Reset));
    }

    #[test]
    fn streams_of_long_ago_excuse_nothing() {
        let mut guard = Guard::new(1);
        guard.gone(1_000_000);
        let excused = (0..).take_while(|_| guard.late(frame::HEADERS, at(0)).is_ok()).count() as u64;
        assert_eq!(excused, LATE_AT_ONCE + 1);
    }

    #[test]
    fn requests_may_be_abandoned_now_and_then() {
        let mut guard = Guard::new(8);
        for _ in 0..200 {
            guard.abandoned(at(0)).unwrap();
        }
        assert_eq!(guard.abandoned(at(0)), Err(Flood::Abandoned));
        for second in 1..100 {
            for _ in 0..100 {
                guard.abandoned(at(second)).unwrap();
            }
        }
        for _ in 0..200 {
            guard.abandoned(at(100_000)).unwrap();
        }
        assert!(guard.abandoned(at(100_000)).is_err(), "the age of a tunnel is no reason for more");
    }
}
