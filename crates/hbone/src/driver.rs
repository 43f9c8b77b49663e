//! What drives a tunnel, the same at both ends: reads, hands over, writes, and looks at the clock.
//!
//! A turn: what the connection has is read and goes to the applications at once, grouped by stream; what everybody has gathered
//! leaves in one write; silence is noticed. One task per tunnel, one timer.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::config::Config;
use crate::core::{self, Event};
use crate::error::Ended;
use crate::keepalive::{Keepalive, Step};
use crate::lend;
use crate::link::{self, Came, Link};
use crate::reason::Reason;
use crate::request::{Malformed, RequestHead};

/// Bytes that one tunnel receives before everything else of the thread has its turn.
const TURN: usize = 1 << 20;
/// The same where several streams wait for each other: so much at once says that bytes queue.
const TURN_OF_SEVERAL: usize = core::DEEP;

/// A peer that was told that the tunnel ends has this long to close it, too.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes that are still read of a peer that broke the protocol: enough to tell it why, and no more.
const OF_A_BROKEN_PEER: usize = 64 << 10;

thread_local! {
    /// Where the tunnels of a thread note in turn what came, so that none keeps memory for it.
    static CAME: Cell<Vec<Came>> = const { Cell::new(Vec::new()) };
}
/// What a turn without like has needed is not kept.
const NOTES: usize = 1024;

/// Takes the requests of a peer: the stream and what is asked for.
pub(crate) type Asked<'a> = dyn FnMut(u32, Result<RequestHead, Malformed>) + 'a;

/// See the module.
pub(crate) struct Machine<IO> {
    io: IO,
    pub(crate) link: Rc<Link>,
    clock: Clock,
    came: Vec<Came>,
    /// What was written may not have left.
    unflushed: bool,
    /// The last turn did not read all there was: there was too much to be written.
    left_unread: bool,
    /// How it ends when everything has left.
    closing: Option<Ended>,
    /// How it has ended, and what is still read of the peer.
    parting: Option<Parting>,
    /// What the peer may have under way when it is told that the tunnel ends.
    window: usize,
}

/// The end was said. What the peer still sends is read and thrown away until it closes as well: a socket that is closed with unread
/// bytes is reset, and with that what was written last may be lost on its way.
struct Parting {
    ended: Ended,
    /// The peer was told that nothing follows.
    told: bool,
    /// Bytes that are still read.
    left: usize,
}

impl<IO> Drop for Machine<IO> {
    fn drop(&mut self) {
        if self.link.ended().is_none() {
            self.link.end(&link::aborted());
        }
        // Streams may still be there, which keep the rest.
        self.link.core.borrow_mut().out.clear();
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Machine<IO> {
    pub(crate) fn new(io: IO, link: Rc<Link>, config: &Config) -> Self {
        Self {
            io,
            link,
            clock: Clock::new(config),
            came: Vec::new(),
            unflushed: false,
            left_unread: false,
            closing: None,
            parting: None,
            window: config.connection_window as usize,
        }
    }

    /// One turn. Ready: the tunnel has ended, and its connection can be closed.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, asked: &mut Asked<'_>) -> Poll<Ended> {
        if self.parting.is_some() {
            return self.part(cx);
        }
        self.link.driven_by(cx.waker());
        self.link.driving.set(true);
        let turn = self.turn(cx, asked);
        self.link.driving.set(false);
        let (ended, left) = match turn {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(ended)) => (ended, self.window),
            Err(ended) => {
                let left = self.fail(&ended);
                (ended, left)
            }
        };
        self.link.end(&ended);
        if left == 0 {
            let _ = self.poll_last_words(cx);
            return Poll::Ready(ended);
        }
        self.parting = Some(Parting { ended, told: false, left });
        self.clock.sleep.as_mut().reset(Instant::now() + LINGER);
        self.part(cx)
    }

    /// Writes what waits, says that nothing follows, and reads until the peer says the same; not for long, and not for much.
    fn part(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let said = self.poll_last_words(cx);
        let Some(Parting { ended, told, left }) = &mut self.parting else { return Poll::Pending };
        *told |= said.is_ready();
        let unheard = matches!(said, Poll::Ready(Err(_)));
        let over = match discard(&mut self.io, cx, left) {
            Poll::Pending => false,
            // It may still read what we have to say.
            Poll::Ready(Discarded::All) => *told,
            Poll::Ready(Discarded::Enough) => true,
        };
        if unheard || over || self.clock.sleep.as_mut().poll(cx).is_ready() {
            return Poll::Ready(ended.clone());
        }
        Poll::Pending
    }

    /// Ready: the connection below has taken everything, or takes nothing more.
    fn poll_last_words(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.parting.as_ref().is_some_and(|parting| parting.told) {
            return Poll::Ready(Ok(()));
        }
        let out = &mut self.link.core.borrow_mut().out;
        while !out.is_empty() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, out.bytes()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => out.written(n),
            }
        }
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn turn(&mut self, cx: &mut Context<'_>, asked: &mut Asked<'_>) -> Result<Poll<Ended>, Ended> {
        let now = Instant::now();
        let mut more = false;
        if self.closing.is_none() {
            if self.link.core.borrow().stalled {
                let _ = self.poll_write(cx)?;
            }
            more = self.read(cx, now, asked)?;
            self.closing = self.is_done();
        }
        let written = self.poll_write(cx)?;
        // What was left unread for the sake of a peer that did not read: nobody else asks for it when all was written now.
        more |= self.closing.is_none() && written.is_ready() && self.left_unread;
        if let Some(ended) = &self.closing
            && written.is_ready()
        {
            return Ok(Poll::Ready(ended.clone()));
        }
        self.clock.poll(cx, now, &self.link)?;
        if more {
            link::go_on(cx);
        }
        Ok(Poll::Pending)
    }

    /// Reads what the connection has; whether there is more.
    fn read(&mut self, cx: &mut Context<'_>, now: Instant, asked: &mut Asked<'_>) -> Result<bool, Ended> {
        let mut buffer = lend::take();
        let turn = if self.link.core.borrow().active() > 1 { TURN_OF_SEVERAL } else { TURN };
        let mut total = 0;
        self.left_unread = false;
        let more = loop {
            // A peer that does not read what it makes us answer is not read from either.
            if self.link.core.borrow().is_overloaded() {
                self.left_unread = true;
                break false;
            }
            let room = buffer.len().min(turn - total);
            let mut room = ReadBuf::new(&mut buffer[..room]);
            match Pin::new(&mut self.io).poll_read(cx, &mut room) {
                Poll::Pending => break false,
                Poll::Ready(Err(error)) => return Err(self.broken(error)),
                Poll::Ready(Ok(())) => {}
            }
            let n = room.filled().len();
            if n == 0 {
                return Err(self.eof());
            }
            self.clock.keepalive.heard(now);
            self.receive(&buffer[..n], now, asked)?;
            total += n;
            if total >= turn {
                break true;
            }
        };
        if total > 0 {
            self.link.core.borrow_mut().came(total, self.clock.age(now));
        }
        Ok(more)
    }

    fn receive(&mut self, bytes: &[u8], now: Instant, asked: &mut Asked<'_>) -> Result<(), Ended> {
        let age = self.clock.age(now);
        self.came = CAME.take();
        let mut at = 0;
        loop {
            let event = self.link.core.borrow_mut().receive(bytes, &mut at, age);
            match event {
                Ok(Some(Event::Data { stream, range, end })) => self.came.push(Came { stream, range, end }),
                Ok(Some(Event::Reset { stream, .. })) => {
                    self.deliver(bytes);
                    self.with(stream, |local| local.wake());
                }
                Ok(Some(event)) => self.apply(event, asked),
                Ok(None) => break,
                Err(broken) => {
                    self.deliver(bytes);
                    return Err(broken.into());
                }
            }
        }
        self.deliver(bytes);
        Ok(())
    }

    fn apply(&mut self, event: Event, asked: &mut Asked<'_>) {
        match event {
            Event::Request { stream, head } => asked(stream, head),
            Event::Answer { stream, status, head } => self.with(stream, |local| {
                local.answer = Some(Box::new((status, head)));
                local.wake();
            }),
            Event::Window { stream: Some(stream) } => self.with(stream, |local| local.wake()),
            Event::Window { stream: None } => self.unpark(),
            Event::Settings => {
                self.clock.settled();
                self.link.core.borrow_mut().each(|entry| entry.data.wake());
                self.link.notify_freed();
            }
            Event::GoAway => {
                self.link.closing.set(true);
                self.link.core.borrow_mut().each(|entry| entry.data.wake());
            }
            Event::Data { .. } | Event::Reset { .. } => unreachable!("handed over in their order"),
        }
    }

    fn with(&self, stream: u32, f: impl FnOnce(&mut link::Local)) {
        if let Some(entry) = self.link.core.borrow_mut().get_mut(stream) {
            f(&mut entry.data);
        }
    }

    /// Those that had no room to send may try again.
    fn unpark(&self) {
        self.link.core.borrow_mut().each_waiting(|entry| entry.data.wake());
    }

    /// Hands over what came, stream by stream.
    fn deliver(&mut self, bytes: &[u8]) {
        if self.came.windows(2).any(|two| two[0].stream > two[1].stream) {
            self.came.sort_by_key(|came| came.stream);
        }
        for came in self.came.chunk_by(|one, other| one.stream == other.stream) {
            self.link.deliver(came, bytes);
        }
        let mut came = std::mem::take(&mut self.came);
        if came.capacity() <= NOTES {
            came.clear();
            CAME.set(came);
        }
    }

    /// How the tunnel ends, if nothing keeps it any more.
    fn is_done(&mut self) -> Option<Ended> {
        let mut core = self.link.core.borrow_mut();
        let ended = match core.goaway() {
            _ if core.is_drained() => Ended::Closed,
            Some(reason) if core.active() == 0 => went_away(reason),
            _ if core.is_client() && self.link.is_forsaken() => Ended::Closed,
            _ => return None,
        };
        core.close(Reason::NO_ERROR);
        drop(core);
        self.link.closing.set(true);
        Some(ended)
    }

    /// Writes what was gathered. Ready: all of it has left.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Ended> {
        let mut core = self.link.core.borrow_mut();
        let written = loop {
            if core.out.is_empty() {
                if !self.unflushed {
                    break Poll::Ready(Ok(()));
                }
                let flushed = Pin::new(&mut self.io).poll_flush(cx);
                self.unflushed = flushed.is_pending();
                break flushed;
            }
            self.unflushed = true;
            match Pin::new(&mut self.io).poll_write(cx, core.out.bytes()) {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => core.out.written(n),
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
            }
        };
        core.stalled = written.is_pending();
        drop(core);
        match written {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Err(error)) => Err(self.broken(error)),
            Poll::Ready(Ok(())) => {
                self.link.core.borrow_mut().turned();
                self.unpark();
                Ok(Poll::Ready(()))
            }
        }
    }

    fn eof(&self) -> Ended {
        let core = self.link.core.borrow();
        match core.goaway() {
            Some(reason) => went_away(reason),
            None if core.active() == 0 => Ended::Closed,
            None => Ended::Io(Arc::new(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn broken(&self, error: io::Error) -> Ended {
        match self.link.core.borrow().goaway() {
            Some(reason) if reason != Reason::NO_ERROR => Ended::GoAway(reason),
            // A peer that goes when it has nothing left need not wait for our last words.
            Some(_) if self.link.streams.get() == 0 => Ended::Closed,
            _ => Ended::Io(Arc::new(error)),
        }
    }

    /// The last words; the bytes that are read of the peer until it has heard them.
    fn fail(&mut self, ended: &Ended) -> usize {
        let (reason, left) = match ended {
            Ended::Protocol(violation) => (violation.reason, OF_A_BROKEN_PEER),
            Ended::Flood(_) => (Reason::ENHANCE_YOUR_CALM, OF_A_BROKEN_PEER),
            // It has been waited for long enough.
            Ended::Handshake => (Reason::SETTINGS_TIMEOUT, 0),
            _ => return 0,
        };
        self.link.core.borrow_mut().close(reason);
        left
    }
}

/// What was thrown away.
enum Discarded {
    /// All that the peer had to say.
    All,
    /// As much as it was given.
    Enough,
}

/// Reads what nobody wants, at most `left` bytes.
fn discard(io: &mut (impl AsyncRead + Unpin), cx: &mut Context<'_>, left: &mut usize) -> Poll<Discarded> {
    let mut buffer = lend::take();
    let mut total = 0;
    while total < TURN_OF_SEVERAL {
        let mut room = ReadBuf::new(&mut buffer);
        match Pin::new(&mut *io).poll_read(cx, &mut room) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(())) if !room.filled().is_empty() => {}
            Poll::Ready(_) => return Poll::Ready(Discarded::All),
        }
        let n = room.filled().len();
        let Some(rest) = left.checked_sub(n) else { return Poll::Ready(Discarded::Enough) };
        (*left, total) = (rest, total + n);
    }
    link::go_on(cx);
    Poll::Pending
}

fn went_away(reason: Reason) -> Ended {
    if reason == Reason::NO_ERROR { Ended::Closed } else { Ended::GoAway(reason) }
}

/// The times of a tunnel: when it must be settled, answers are due, and silence is asked about.
struct Clock {
    started: Instant,
    settings_by: Option<Instant>,
    keepalive: Keepalive,
    sleep: Pin<Box<Sleep>>,
}

impl Clock {
    fn new(config: &Config) -> Self {
        let now = Instant::now();
        let settings_by = now + config.handshake_timeout;
        Self {
            started: now,
            settings_by: Some(settings_by),
            keepalive: Keepalive::new(config.ping_interval, config.ping_timeout, now),
            sleep: Box::pin(tokio::time::sleep_until(settings_by.min(now + config.ping_interval))),
        }
    }

    fn age(&self, now: Instant) -> std::time::Duration {
        now.duration_since(self.started)
    }

    fn settled(&mut self) {
        self.settings_by = None;
    }

    /// Does what is due, and sleeps until the next thing is. The timer is left as it is while it is early enough: with traffic,
    /// times move on every turn.
    fn poll(&mut self, cx: &mut Context<'_>, mut now: Instant, link: &Link) -> Result<(), Ended> {
        loop {
            if self.settings_by.is_some_and(|by| now >= by) {
                return Err(Ended::Handshake);
            }
            let silence = match self.keepalive.step(now) {
                Step::Dead => return Err(Ended::Silent),
                Step::Wait(until) => until,
                Step::Ping => {
                    link.core.borrow_mut().ping();
                    self.keepalive.asked(now);
                    // It is written in the next turn.
                    cx.waker().wake_by_ref();
                    continue;
                }
            };
            let next = self.settings_by.into_iter().chain(link.replies_due(now)).fold(silence, Instant::min);
            if next < self.sleep.deadline() {
                self.sleep.as_mut().reset(next);
            }
            if self.sleep.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            now = Instant::now();
            self.sleep.as_mut().reset(next.max(now));
        }
    }
}
