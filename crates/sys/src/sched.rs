//! How the kernel schedules the calling thread (`sched(7)`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

/// Whether the thread, when it wakes, leaves a processor to whoever runs there until that one sleeps or has had its time
/// (`SCHED_BATCH`), instead of taking its place as soon as it may (`SCHED_OTHER`). Needs no privilege.
pub fn set_patient(patient: bool) -> io::Result<()> {
    let policy = if patient { libc::SCHED_BATCH } else { libc::SCHED_OTHER };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and the parameters live through the call, which copies them.
    let status = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the kernel counts of one thread.
#[derive(Debug)]
pub struct Turns(File);

/// How often a thread has run so far, and how long it was ready and had to wait for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counted {
    /// Turns on a processor.
    pub turns: u64,
    /// Waits for them, all together.
    pub waited: Duration,
}

impl Turns {
    /// Of the calling thread. An error says that the kernel does not count.
    pub fn of_this_thread() -> io::Result<Self> {
        let turns = Self(File::open("/proc/thread-self/schedstat")?);
        turns.read()?;
        Ok(turns)
    }

    /// The counts until now, by whichever thread.
    pub fn read(&self) -> io::Result<Counted> {
        let mut text = [0; 96];
        let n = self.0.read_at(&mut text, 0)?;
        // Nanoseconds run, nanoseconds waited, turns.
        let text = String::from_utf8_lossy(&text[..n]);
        let mut numbers = text.split_ascii_whitespace().skip(1).map_while(|number| number.parse().ok());
        match (numbers.next(), numbers.next()) {
            (Some(waited), Some(turns)) => Ok(Counted { turns, waited: Duration::from_nanos(waited) }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("not what schedstat says: {text:?}"))),
        }
    }
}
