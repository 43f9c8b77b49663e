//! Whether a worker that wakes interrupts whoever runs.
//!
//! Where all processors are in use, a thread that wakes mostly takes the place of one that runs at once. For a worker that means to
//! interrupt, for one message, the very applications that are about to give it the next ones. If it waits until they sleep, it finds
//! several, and they are not held up: half as many switches, a tenth less CPU and more, and shorter queues (`docs/performance.md`). Where
//! a processor is free it makes no difference. But whoever runs may be one that never sleeps, and then a wait takes milliseconds. So a
//! worker is patient for as long as its waits are short on average, and then not again for a while.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use zspire_sys::sched::{self, Counted, Turns};

/// Between two looks at how long the worker has waited.
const LOOK: Duration = Duration::from_millis(100);
/// The same for one that has little to do.
const LOOK_IDLE: Duration = Duration::from_secs(1);
/// Fewer turns between two looks say nothing.
const FEW: u64 = 50;
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
    let (mut patience, mut before) = (Patience::new(Instant::now()), Counted::default());
    let mut is = false;
    loop {
        let wanted = patience.is_patient();
        if wanted != is {
            if let Err(error) = sched::set_patient(wanted) {
                tracing::debug!(%error, "a worker cannot choose how it is scheduled");
                return;
            }
            tracing::debug!(patient = wanted, "how a worker is scheduled has changed");
            is = wanted;
        }
        let Ok(now) = turns.read() else { return };
        let busy = patience.look(Instant::now(), since(before, now));
        before = now;
        sleep(if busy { LOOK } else { LOOK_IDLE }).await;
    }
}

fn since(before: Counted, now: Counted) -> Counted {
    Counted { turns: now.turns.saturating_sub(before.turns), waited: now.waited.saturating_sub(before.waited) }
}

/// What a worker has found out.
#[derive(Debug)]
struct Patience {
    state: State,
    /// How long it was not patient the last time.
    rest: Duration,
}

#[derive(Debug)]
enum State {
    Patient { since: Instant },
    Not { until: Instant },
}

impl Patience {
    fn new(now: Instant) -> Self {
        Self { state: State::Patient { since: now }, rest: FIRST }
    }

    fn is_patient(&self) -> bool {
        matches!(self.state, State::Patient { .. })
    }

    /// Learns what the kernel has counted since the last look; whether that was enough to learn from.
    fn look(&mut self, now: Instant, counted: Counted) -> bool {
        let busy = counted.turns >= FEW;
        match self.state {
            State::Patient { since }
                if busy && counted.waited > SHORT * u32::try_from(counted.turns).unwrap_or(u32::MAX) =>
            {
                let paid = now.duration_since(since) >= PAID;
                self.rest = if paid { FIRST } else { (2 * self.rest).min(LONGEST) };
                self.state = State::Not { until: now + self.rest };
            }
            State::Not { until } if now >= until => self.state = State::Patient { since: now },
            State::Patient { .. } | State::Not { .. } => {}
        }
        busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(turns: u64, each: u64) -> Counted {
        Counted { turns, waited: Duration::from_micros(turns as u32 as u64 * each) }
    }

    #[test]
    fn a_worker_is_patient_as_long_as_its_waits_are_short() {
        let start = Instant::now();
        let mut patience = Patience::new(start);
        for (turns, each, busy) in [(1000, 200, true), (1000, 0, true), (10, 5000, false), (0, 0, false)] {
            assert_eq!(patience.look(start, waits(turns, each)), busy);
            assert!(patience.is_patient(), "{turns} turns that wait {each} µs each");
        }
        patience.look(start + PAID, waits(1000, 201));
        assert!(!patience.is_patient());
    }

    #[test]
    fn it_tries_again_ever_more_seldom_until_that_pays() {
        let mut now = Instant::now();
        let mut patience = Patience::new(now);
        now += PAID;
        for seconds in [1, 2, 4, 8, 16, 32, 64, 64] {
            patience.look(now, waits(100, 3000));
            now += Duration::from_secs(seconds) - LOOK;
            patience.look(now, waits(100, 3000));
            assert!(!patience.is_patient(), "{seconds} s are not over");
            now += LOOK;
            patience.look(now, waits(100, 3000));
            assert!(patience.is_patient(), "after {seconds} s");
            now += LOOK;
        }
        now += PAID;
        patience.look(now, waits(100, 3000));
        patience.look(now + FIRST, waits(100, 0));
        assert!(patience.is_patient(), "it had paid in between");
    }

    #[tokio::test(start_paused = true)]
    async fn the_kernel_is_told() {
        let policy = || {
            std::fs::read_to_string("/proc/thread-self/stat").map(|stat| {
                // The 41st field, counted from the state, which follows the name.
                let fields = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').nth(38).map(str::to_owned));
                fields.flatten().unwrap_or_default()
            })
        };
        assert_eq!(policy().unwrap(), "0", "SCHED_OTHER");
        let _ = tokio::time::timeout(LOOK_IDLE, keep()).await;
        assert_eq!(policy().unwrap(), "3", "SCHED_BATCH");
        sched::set_patient(false).unwrap();
        assert_eq!(policy().unwrap(), "0");
    }
}
