//! What the peer may send on all streams together.

use std::time::Duration;

use super::WINDOW;
use crate::config::Config;

/// A tunnel of several streams of which so much comes at once is read more slowly than it is written: bytes queue on the way.
pub(crate) const DEEP: usize = 256 << 10;
/// One of which so little comes at once is not.
const SHALLOW: usize = 32 << 10;
/// What the peer may send is at least this much, however it queues.
const LEAST: u32 = 1 << 20;
/// For so long the speed is measured.
const MEASURED: Duration = Duration::from_millis(100);
/// A measurement that took longer says nothing: nobody has sent meanwhile.
const STALE: Duration = Duration::from_millis(500);

/// Credit is returned when bytes are received, so that streams whose applications do not read do not stall the others; only what
/// such streams hold beyond the cap of the tunnel is withheld.
///
/// Whatever the peer may send waits on the way if it sends faster than we read, and a stream with little to say waits behind it. So
/// a tunnel of several streams whose bytes queue gets less, down to twice what the path holds, its speed times its round trip, once
/// that is known.
#[derive(Debug)]
pub(super) struct Credit {
    /// What the peer may send now.
    window: u32,
    /// What it may send when all that has come was read.
    target: u32,
    most: u32,
    cap: usize,
    /// Bytes that were received and not taken.
    held: usize,
    /// How long it takes to be answered when nothing queues, once it is known.
    round_trip: Option<Duration>,
    speed: Speed,
}

/// Bytes in a second, while they come.
#[derive(Debug, Default)]
struct Speed {
    last: Option<u64>,
    since: Duration,
    bytes: u64,
}

impl Speed {
    fn add(&mut self, bytes: usize, now: Duration) {
        self.bytes += bytes as u64;
        let took = now.saturating_sub(self.since);
        if took >= MEASURED {
            let measured = self.bytes.saturating_mul(1000) / (took.as_millis() as u64).max(1);
            *self = Self { last: (took < STALE).then_some(measured), since: now, bytes: 0 };
        }
    }

    /// What is under way in such a time.
    fn within(&self, time: Duration) -> Option<u64> {
        self.last.map(|last| last.saturating_mul(time.as_micros() as u64) / 1_000_000)
    }
}

impl Credit {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            window: WINDOW,
            target: config.connection_window.min(i32::MAX as u32),
            most: config.connection_window.min(i32::MAX as u32),
            cap: config.buffered_cap as usize,
            held: 0,
            round_trip: None,
            speed: Speed::default(),
        }
    }

    /// The peer has answered our first words, at this time after they were said.
    pub(super) fn answered(&mut self, after: Duration) {
        self.round_trip.get_or_insert(after);
    }

    /// So many bytes came at once, of several streams or of one.
    pub(super) fn came(&mut self, bytes: usize, several: bool, now: Duration) {
        self.speed.add(bytes, now);
        let path = self.round_trip.and_then(|round_trip| self.speed.within(round_trip));
        let path = path.map(|path| u32::try_from(2 * path).unwrap_or(u32::MAX));
        let target = match path {
            Some(path) if several && bytes >= DEEP => (self.target / 2).max(path).max(LEAST),
            _ if !several || bytes < SHALLOW => {
                self.target.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX)).max(path.unwrap_or(0))
            }
            // Neither: but what the path needs it gets.
            path => self.target.max(path.unwrap_or(0)),
        };
        self.target = target.min(self.most);
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
        // Where something is withheld, the rest is for all the others.
        let target = if withheld > 0 { self.most } else { self.target };
        let due = target.saturating_sub(withheld).saturating_sub(self.window);
        let worth = (target / 4).max(1);
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
    fn what_queues_costs_credit_unless_the_path_needs_it() {
        let config = Config { connection_window: 16 << 20, ..Config::default() };
        let second = Duration::from_secs(1);
        let after = |round_trip: Duration| {
            let mut credit = Credit::new(&config);
            credit.answered(round_trip);
            // 512 MiB in a second, as much at once as there is in a turn.
            (1..=2048).for_each(|turn| credit.came(DEEP, true, second * turn / 2048));
            credit
        };
        let mut near = after(Duration::from_micros(200));
        assert_eq!(near.target, LEAST);
        assert_eq!(near.returned(), Some(LEAST - WINDOW));
        let far = after(Duration::from_millis(10));
        assert!((9 << 20..12 << 20).contains(&far.target), "twice what the path holds: {}", far.target);
        assert_eq!(after(second).target, 16 << 20, "what is configured is the most");

        (0..200_000).for_each(|_| near.came(100, true, second));
        assert_eq!(near.target, 16 << 20, "it comes back when bytes no longer queue");
    }

    #[test]
    fn a_long_path_gets_what_it_needs_after_silence_and_with_turns_of_any_size() {
        let round_trip = Duration::from_millis(100);
        for turn in [SHALLOW / 2, 64 << 10, DEEP] {
            let mut credit = Credit::new(&Config { connection_window: 16 << 20, ..Config::default() });
            credit.answered(round_trip);
            // What comes after silence comes at once.
            let silent = Duration::from_secs(60);
            (0..64).for_each(|_| credit.came(DEEP, true, silent));
            assert_eq!(credit.target, 16 << 20, "nothing is known of the path yet");
            // And from wherever it has shrunk to, it grows with what comes in a round trip, which is all that there may be.
            credit.target = LEAST;
            let mut now = silent;
            for _ in 0..10 {
                let turns = credit.target as usize / turn;
                let began = now;
                for number in 1..=turns {
                    now = began + round_trip * number as u32 / turns as u32;
                    credit.came(turn, true, now);
                }
            }
            assert!(credit.target >= 12 << 20, "{turn} bytes at once: {}", credit.target);
        }
    }

    #[test]
    fn credit_of_a_single_stream_stays_whole() {
        let mut credit = Credit::new(&Config::default());
        credit.answered(Duration::from_micros(100));
        (0..1000).for_each(|_| credit.came(1 << 20, false, Duration::from_millis(1)));
        assert_eq!(credit.target, credit.most);
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
