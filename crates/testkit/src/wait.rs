//! Waiting for a state, with a deadline. Nothing here waits for time to pass.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// How long anything that has to come about may take. Two cores may be shared by several tests.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks at a state that nobody announces.
const LOOK: Duration = Duration::from_millis(10);

/// Looks until there is a value, and fails the test with the last reason when there is none in time.
#[track_caller]
pub fn until<T, E: Display>(what: &str, look: impl FnMut() -> Result<T, E>) -> T {
    match within(DEADLINE, look) {
        Ok(value) => value,
        Err(why) => panic!("waited {DEADLINE:?} for {what}: {why}"),
    }
}

/// Looks until there is a value or the time is over; then the last reason why there was none.
pub fn within<T, E>(time: Duration, mut look: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let deadline = Instant::now() + time;
    loop {
        match look() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(LOOK),
            looked => return looked,
        }
    }
}
