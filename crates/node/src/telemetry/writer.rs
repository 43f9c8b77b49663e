//! The thread that writes log lines, and the bounded queue before it.
//!
//! Whoever logs never waits: when lines are written more slowly than they come, those that do not fit are dropped and counted. The
//! end of the process does not wait either, beyond a moment for what is in the queue: standard output may be a pipe that
//! nobody reads.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait.
const QUEUE: usize = 16_384;
/// How long the end of the process waits for them.
const LAST_MOMENT: Duration = Duration::from_secs(1);
/// How long lines are gathered before they are written.
const GATHER: Duration = Duration::from_millis(10);
/// Bytes that are written at once at most, so that a burst is not one system call a line.
const BATCH: usize = 64 << 10;

/// Where log lines are put. Clones put them in the same queue.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    lines: SyncSender<Vec<u8>>,
    dropped: Arc<AtomicU64>,
}

/// Writes what still waits when it is dropped, as far as that does not take long.
#[derive(Debug)]
pub struct Rest {
    queue: Queue,
    ending: Arc<AtomicBool>,
    ended: Receiver<()>,
}

/// Starts the thread.
pub(super) fn start(to: impl Write + Send + 'static) -> io::Result<(Queue, Rest)> {
    start_with(to, QUEUE)
}

fn start_with(to: impl Write + Send + 'static, size: usize) -> io::Result<(Queue, Rest)> {
    let (lines, waiting) = sync_channel(size);
    let (end, ended) = sync_channel::<()>(1);
    let queue = Queue { lines, dropped: Arc::default() };
    let ending = Arc::new(AtomicBool::new(false));
    let asked_to_end = ending.clone();
    std::thread::Builder::new().name("log".into()).spawn(move || {
        write(to, &waiting, &asked_to_end);
        // Its receiver hears of that.
        drop(end);
    })?;
    Ok((queue.clone(), Rest { queue, ending, ended }))
}

fn write(mut to: impl Write, lines: &Receiver<Vec<u8>>, ending: &AtomicBool) {
    let mut batch = Vec::new();
    while let Ok(line) = lines.recv() {
        batch.extend_from_slice(&line);
        if !ending.load(Ordering::Acquire) {
            // Who sends to a thread that waits has to wake it, which costs a worker more than the line does.
            std::thread::sleep(GATHER);
        }
        let empty = loop {
            if batch.len() >= BATCH {
                break false;
            }
            match lines.try_recv() {
                Ok(line) => batch.extend_from_slice(&line),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break true,
            }
        };
        // There is nowhere to say that the log cannot be written.
        let _ = to.write_all(&batch).and_then(|()| to.flush());
        batch.clear();
        if empty && ending.load(Ordering::Acquire) {
            return;
        }
    }
}

impl Queue {
    /// Lines that did not fit.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Write for Queue {
    /// Takes one line, whole.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines.try_send(line.to_vec()).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // Wakes a thread that waits for a line; one that does not has some left and looks afterwards.
        let _ = self.queue.lines.try_send(Vec::new());
        let _ = self.ended.recv_timeout(LAST_MOMENT);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use super::*;

    /// Keeps what is written; waits for `open` first.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>, Arc<Mutex<()>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _open = self.1.lock().unwrap();
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_order_and_the_last_ones_too() {
        let kept = Kept::default();
        let (mut queue, rest) = start(kept.clone()).unwrap();
        let lines: Vec<String> = (0..10_000).map(|n| format!("line {n}\n")).collect();
        for line in &lines {
            queue.write_all(line.as_bytes()).unwrap();
        }
        drop(rest);
        assert_eq!(queue.dropped(), 0);
        assert_eq!(String::from_utf8(kept.0.lock().unwrap().clone()).unwrap(), lines.concat());
    }

    #[test]
    fn nobody_waits_for_a_writer_that_stands() {
        let kept = Kept::default();
        let closed = kept.1.lock().unwrap();
        let (mut queue, rest) = start_with(kept.clone(), 8).unwrap();
        let began = Instant::now();
        for _ in 0..10_000 {
            queue.write_all(b"line\n").unwrap();
        }
        // The queue, and what the thread has taken out of it.
        assert!(queue.dropped() >= 10_000 - 3 * 8, "{}", queue.dropped());
        drop(rest);
        assert!(began.elapsed() < LAST_MOMENT * 5, "{:?}", began.elapsed());
        drop(closed);
    }
}
