//! What is done when a connection cannot be accepted, mostly for want of descriptors.
//!
//! Such a connection stays in the kernel's queue and the listener stays readable, so whoever only tries again burns a core and
//! fills the log. A line is written at most every ten seconds. One descriptor can be held back, by which a question is answered
//! all the same: an operator asks just then.

use std::fs::File;
use std::io;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

/// Pause after an accept failed.
const PAUSE: Duration = Duration::from_millis(100);
/// At most one line in this time.
const COMPLAINT: Duration = Duration::from_secs(10);

/// What one listener does about it.
#[derive(Debug)]
pub(crate) struct Shortage {
    what: &'static str,
    held: Option<File>,
    complained: Option<Instant>,
}

impl Shortage {
    /// `what` is the listener, in the log.
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, held: None, complained: None }
    }

    /// Holds a descriptor back.
    pub(crate) fn with_reserve(what: &'static str) -> Self {
        Self { held: hold(), ..Self::new(what) }
    }

    /// Says it, if it was not just said.
    fn complain(&mut self, error: &io::Error) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAINT) {
            self.complained = Some(Instant::now());
            tracing::warn!(
                %error,
                "cannot accept a connection ({}): if it goes on, allow the process more open files (ulimit -n, LimitNOFILE)",
                self.what
            );
        }
    }

    /// Rests.
    pub(crate) async fn rest(&mut self, error: &io::Error) {
        self.complain(error);
        tokio::time::sleep(PAUSE).await;
    }

    /// Answers one connection by the descriptor that is held back, or rests.
    pub(crate) async fn answer_one<F>(
        &mut self,
        listener: &TcpListener,
        error: &io::Error,
        answer: impl Fn(TcpStream) -> F,
    ) where
        F: Future<Output = ()>,
    {
        self.complain(error);
        let had = self.held.take().is_some();
        match timeout(PAUSE, async { if had { listener.accept().await.ok() } else { std::future::pending().await } })
            .await
        {
            Ok(Some((stream, _))) => answer(stream).await,
            Ok(None) => tokio::time::sleep(PAUSE).await,
            Err(_) => {}
        }
        self.held = hold();
    }
}

fn hold() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_answered_by_the_descriptor_that_is_held_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut shortage = Shortage::with_reserve("a test");
        let answered = std::sync::atomic::AtomicBool::new(false);
        let error = io::Error::from_raw_os_error(24);
        let answer = |_| async { answered.store(true, std::sync::atomic::Ordering::Relaxed) };
        shortage.answer_one(&listener, &error, answer).await;
        assert!(answered.load(std::sync::atomic::Ordering::Relaxed) && shortage.held.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_said_once_in_ten_seconds() {
        let mut shortage = Shortage::new("a test");
        let error = io::Error::from_raw_os_error(24);
        let mut said = 0;
        for _ in 0..250 {
            let before = shortage.complained;
            shortage.rest(&error).await;
            said += usize::from(shortage.complained != before);
        }
        assert_eq!(said, 3, "25 seconds");
    }
}
