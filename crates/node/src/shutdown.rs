//! When the proxy stops: SIGTERM, SIGINT or `/quitquitquit`, and a second signal for the impatient.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Why the proxy was told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Terminated,
    Interrupted,
    Quit,
}

/// Signals of this process, taken over when it is made.
#[derive(Debug)]
pub struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    /// Takes over SIGTERM and SIGINT.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The first reason to stop. Safe to cancel.
    pub async fn stop(&mut self, quit: &CancellationToken) -> Reason {
        tokio::select! {
            _ = self.terminate.recv() => Reason::Terminated,
            _ = self.interrupt.recv() => Reason::Interrupted,
            () = quit.cancelled() => Reason::Quit,
        }
    }

    /// Another signal while draining: stop at once. Safe to cancel.
    pub async fn again(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
