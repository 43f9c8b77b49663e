//! Whether a worker that wakes interrupts whoever runs.
//!
//! Where all processors are in use, a thread that wakes mostly takes the place of one that runs at once. For a worker that means to
//! interrupt, for one message, the very applications that are about to give it the next ones. If it waits until they sleep, it finds
//! several, and they are not held up: half as many switches, a tenth less CPU and more, and shorter queues (`docs/performance.md`).
//! But whoever runs may be one that does not sleep soon, and then a wait takes milliseconds.
//!
//! So what the kernel counts of a worker's waits decides. One that hardly waits has nothing to gain, and is as every thread. One that
//! does is patient for as long as its waits are short on average; and if they are not, then not again for a while.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use zspire_sys::sched::{self, Counted, Turns};

/// Between two looks at how long the worker has waited.
const LOOK: Duration = Duration::from_millis(100);
/// The same for one that has little to do.
const LOOK_IDLE: Duration = Duration::from_secs(1);
/// Fewer turns between two looks say nothing.
const FEW: u64 = 50;
/// With waits of this length, on average, there is something to be gained.
const CONTENDED: Duration = Duration::from_micros(30);
/// With shorter ones there is not.
const FREE: Duration = Duration::from_micros(10);
/// The longest wait, on average, of a worker that is patient.
const SHORT: Duration = Duration::from_micros(200);
/// How long a worker is not patient after that; twice as long if patience did not pay when it was tried again.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(64);
/// Patience that lasted so long has paid.
const PAID: Duration = Duration::from_secs(1);

/// Keeps the calling worker patient as long as that pays; runs until dropped, or until the kernel says no.
pub(crate) async fn keep() {
    let Ok(turns) = Turns::of_this_thread() else { return };
    let (mut patience, mut before) = (Patience::default(), Counted::default());
    let mut is = false;
    loop {
        let Ok(now) = turns.read() else { return };
        let busy = patience.look(Instant::now(), since(before, now));
        before = now;
        // Before the next look begins, which is about what it has come to.
        let wanted = patience.is_patient();
        if wanted != is {
            if let Err(error) = sched::set_patient(wanted) {
                tracing::debug!(%error, "a worker cannot choose how it is scheduled");
                return;
            }
            tracing::debug!(patient = wanted, "how a worker is scheduled has changed");
            is = wanted;
        }
        sleep(if busy { LOOK } else { LOOK_IDLE }).await;
    }
}

fn since(before: Counted, now: Counted) -> Counted {
    Counted { turns: now.turns.saturating_sub(before.turns), waited: now.waited.saturating_sub(before.waited) }
}

/// What a worker has found out.
#[derive(Debug)]
struct Patience {
    /// Since when it is patient, if it is.
    since: Option<Instant>,
    /// It is not before.
    not_before: Option<Instant>,
    /// How long it was not patient the last time that it did not pay.
    rest: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { since: None, not_before: None, rest: FIRST / 2 }
    }
}

impl Patience {
    fn is_patient(&self) -> bool {
        self.since.is_some()
    }

    /// Learns what the kernel has counted since the last look; whether that was enough to learn from.
    fn look(&mut self, now: Instant, counted: Counted) -> bool {
        let busy = counted.turns >= FEW;
        let each = Duration::from_nanos(counted.waited.as_nanos() as u64 / counted.turns.max(1));
        match self.since {
            Some(since) if busy && each > SHORT => {
                let paid = now.duration_since(since) >= PAID;
                self.rest = if paid { FIRST } else { (2 * self.rest).min(LONGEST) };
                self.not_before = Some(now + self.rest);
                self.since = None;
            }
            Some(_) if !busy || each < FREE => self.since = None,
            None if busy && each >= CONTENDED && self.not_before.is_none_or(|at| now >= at) => self.since = Some(now),
            _ => {}
        }
        busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(turns: u64, each: u64) -> Counted {
        Counted { turns, waited: Duration::from_micros(turns * each) }
    }

    #[test]
    fn a_worker_is_patient_as_long_as_its_waits_are_neither_long_nor_nothing() {
        let now = Instant::now();
        let mut patience = Patience::default();
        for (turns, each, patient) in [
            (1000, 0, false),
            (1000, 29, false),
            (FEW - 1, 100, false),
            (FEW, 30, true),
            (1000, 200, true),
            (1000, 10, true),
            (1000, 9, false),
            (1000, 100, true),
            (FEW - 1, 100, false),
            (1000, 300, true),
            (1000, 201, false),
            (1000, 100, false),
        ] {
            assert_eq!(patience.look(now, waits(turns, each)), turns >= FEW);
            assert_eq!(patience.is_patient(), patient, "{turns} turns that wait {each} µs each");
        }
    }

    #[test]
    fn it_tries_again_ever_more_seldom_until_that_pays() {
        let mut now = Instant::now();
        let mut patience = Patience::default();
        patience.look(now, waits(100, 50));
        for seconds in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert!(patience.is_patient());
            now += LOOK;
            patience.look(now, waits(100, 3000));
            now += Duration::from_secs(seconds) - LOOK;
            patience.look(now, waits(100, 50));
            assert!(!patience.is_patient(), "{seconds} s are not over");
            now += LOOK;
            patience.look(now, waits(100, 50));
        }
        patience.look(now + PAID, waits(100, 3000));
        assert!(!patience.is_patient());
        patience.look(now + PAID + FIRST, waits(100, 50));
        assert!(patience.is_patient(), "it had paid in between");
    }

    #[test]
    fn the_kernel_is_told_and_counts() {
        let policy = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            // The 41st field; the third follows the name.
            stat.rsplit_once(") ").unwrap().1.split(' ').nth(38).unwrap().to_owned()
        };
        let turns = Turns::of_this_thread().unwrap();
        let before = turns.read().unwrap();
        for (patient, expected) in [(true, "3"), (false, "0")] {
            sched::set_patient(patient).unwrap();
            assert_eq!(policy(), expected);
            std::thread::sleep(Duration::from_millis(1));
        }
        let counted = since(before, turns.read().unwrap());
        assert!(counted.turns >= 2, "{counted:?}");
    }
}
