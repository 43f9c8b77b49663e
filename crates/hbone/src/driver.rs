//! What drives a tunnel, the same at both ends: `h2`, then one write, then the times that matter.
//!
//! A turn: `h2` reads, wakes streams and encodes frames until it can do no more; what it wrote leaves in one write
//! ([`crate::wire`]); the connection window follows what stalled streams hold; silence is noticed.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use h2::{Ping, PingPong};
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep};

use crate::config::Config;
use crate::error::{Ended, Flood};
use crate::keepalive::{Keepalive, Step};
use crate::shared::Shared;
use crate::wire::{Pusher, Watch};

/// Streams that a peer may reset before they are answered, beyond those that time restores (ten a second).
const ABANDONED: u32 = 200;

/// Everything of a driver but the connection itself.
pub(crate) struct Turn<IO> {
    pusher: Pusher<IO>,
    pub(crate) watch: Rc<Watch>,
    pub(crate) shared: Rc<Shared>,
    ping_pong: Option<PingPong>,
    keepalive: Keepalive,
    reads: u64,
    held: usize,
    window: u32,
    buffered_cap: u32,
    settings_by: Option<Instant>,
    started: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl<IO: AsyncWrite + Unpin> Turn<IO> {
    pub(crate) fn new(
        config: &Config,
        pusher: Pusher<IO>,
        watch: Rc<Watch>,
        shared: Rc<Shared>,
        ping_pong: Option<PingPong>,
    ) -> Self {
        let now = Instant::now();
        Self {
            pusher,
            watch,
            shared,
            ping_pong,
            keepalive: Keepalive::new(config.ping_interval, config.ping_timeout, now),
            reads: 0,
            held: 0,
            window: config.connection_window,
            buffered_cap: config.buffered_cap,
            settings_by: Some(now + config.handshake_timeout),
            started: now,
            sleep: Box::pin(tokio::time::sleep_until(now + config.ping_interval)),
        }
    }

    /// The window that the connection should have now, if it has changed: what stalled streams hold is lent on top, so that
    /// they do not stall the others.
    pub(crate) fn new_window(&mut self) -> Option<u32> {
        let held = self.shared.held.get();
        // Small changes are not worth a frame.
        if held.abs_diff(self.held) < self.window as usize / 8 && !(held == 0 && self.held != 0) {
            return None;
        }
        self.held = held;
        let extra = u32::try_from(held).unwrap_or(u32::MAX).min(self.buffered_cap);
        Some(self.window.saturating_add(extra).min(i32::MAX as u32))
    }

    /// After `h2` has done what it could: writes, and looks at the clock. Ready: the tunnel has to end.
    pub(crate) fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        self.shared.driven_by(cx.waker());
        if let Poll::Ready(Err(error)) = self.pusher.poll_push(cx) {
            return Poll::Ready(Ended::Io(std::sync::Arc::new(error)));
        }
        self.poll_clock(cx)
    }

    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if self.watch.reads.get() != self.reads {
            self.reads = self.watch.reads.get();
            self.keepalive.heard(Instant::now());
            // Answers to our pings are heard like anything else; `h2` wants them to be taken.
            if let Some(ping_pong) = &mut self.ping_pong {
                let _ = ping_pong.poll_pong(cx);
            }
            if self.watch.settings.get() && self.settings_by.take().is_some() {
                self.shared.settled.set(true);
                self.shared.notify_freed();
            }
        }
        loop {
            let now = Instant::now();
            if self.too_many_abandoned(now) {
                return Poll::Ready(Ended::Flood(Flood("RST_STREAM")));
            }
            if self.settings_by.is_some_and(|by| now >= by) {
                return Poll::Ready(Ended::Handshake);
            }
            let next = match self.keepalive.step(now) {
                Step::Dead => return Poll::Ready(Ended::Silent),
                Step::Wait(until) => until,
                Step::Ping => {
                    self.ping(now);
                    continue;
                }
            };
            let next = self.settings_by.map_or(next, |by| by.min(next));
            if self.sleep.deadline() != next {
                self.sleep.as_mut().reset(next);
            }
            if self.sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    fn ping(&mut self, now: Instant) {
        if let Some(ping_pong) = &mut self.ping_pong {
            // Fails only while one is under way, which is as good.
            let _ = ping_pong.send_ping(Ping::opaque());
        }
        self.keepalive.asked(now);
    }

    fn too_many_abandoned(&self, now: Instant) -> bool {
        let restored = u32::try_from(now.duration_since(self.started).as_secs()).unwrap_or(u32::MAX).saturating_mul(10);
        self.shared.abandoned.get() > ABANDONED.saturating_add(restored)
    }
}
