//! The byte path: an application's socket on one side, a stream of a tunnel on the other.
//!
//! ```text
//!  application ── EOF ──▶ END_STREAM      reset ──▶ RST_STREAM(CONNECT_ERROR)
//!  stream ── END_STREAM ──▶ FIN, after all bytes      RST_STREAM or the tunnel's end ──▶ reset
//! ```
//! A stream that is reset without an error (NO_ERROR) after END_STREAM was closed in good order by a peer that wants nothing more
//! (RFC 9113 §8.1): the application gets all bytes, and a close. Before END_STREAM it is a reset like any other. Each direction
//! ends by itself; neither message ever becomes the other. Stream credit goes back to the peer when the application has taken the
//! bytes. An idle relay holds no buffer.
//!
//! What the application sends is read straight into the frame that carries it. What comes for it is written by the tunnel's
//! driver ([`crate::link`]); here is written only what its socket did not take then.

use std::future::{Future, poll_fn};
use std::io::{self, IoSliceMut};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::core::{Entry, Sent};
use crate::link::{App, Link, exhausted, go_on, keep};
use crate::meter::{self, Counters, End};
use crate::reason::Reason;
use crate::stream::Stream;

/// The most that a stream gives to its tunnel in one turn when it is the only one that has something to send.
const ALONE: usize = 512 << 10;
/// And when it is not: what one sends is everybody's time.
const IN_A_CROWD: usize = 128 << 10;

impl Stream {
    /// Carries bytes between the stream and a socket until both directions have ended, or until `cut` completes.
    ///
    /// Dropping the future resets the stream and closes the socket.
    pub async fn relay(self, app: TcpStream, counters: &Counters, cut: impl Future<Output = ()>) -> End {
        let app = Rc::new(App::new(app, counters.clone()));
        if let Some(entry) = self.slot.0.core.borrow_mut().get_mut(self.id) {
            entry.data.app = Some(app.clone());
        }
        let mut relay = Relay { stream: self, app, watch: None };
        let end = {
            let mut cut = pin!(cut);
            poll_fn(|cx| {
                if cut.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(End::Cut);
                }
                relay.poll(cx)
            })
            .await
        };
        relay.finish(&end);
        end
    }
}

/// A relay under way.
struct Relay {
    stream: Stream,
    app: Rc<App>,
    /// Waits for a reset of an application that is not read from: it has ended its direction, or there is no room.
    watch: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl Relay {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let link = self.stream.slot.0.clone();
        if let Err(end) = self.down(cx, &link) {
            return Poll::Ready(end);
        }
        let ended = match self.up(cx, &link) {
            Ok(ended) => ended,
            Err(end) => return Poll::Ready(end),
        };
        // What it has sent is not read now: neither would its reset be.
        let parked = link.core.borrow().get(self.stream.id).is_some_and(Entry::is_parked);
        match (ended, self.app.told.get()) {
            (true, true) => Poll::Ready(End::Complete),
            (true, false) => self.watch(cx),
            (false, _) if parked => self.watch(cx),
            (false, _) => {
                self.watch = None;
                Poll::Pending
            }
        }
    }

    /// To the application: what it did not take at once, and then the end.
    fn down(&mut self, cx: &mut Context<'_>, link: &Link) -> Result<(), End> {
        let id = self.stream.id;
        let mut core = link.core.borrow_mut();
        let Some(entry) = core.get_mut(id) else { return Err(End::Reset(Reason::CANCEL)) };
        keep(&mut entry.data.waker, cx.waker());
        let reset = entry.reset();
        if let Some(reason) = reset.filter(|reason| !entry.remote_ended() || *reason != Reason::NO_ERROR) {
            return Err(End::Reset(reason));
        }
        if !entry.is_closed()
            && let Some(ended) = link.ended()
        {
            return Err(End::Tunnel(ended));
        }
        let mut taken = 0;
        let mut failed = self.app.failed.take();
        while failed.is_none() && !entry.data.unread.is_empty() && self.app.socket.poll_write_ready(cx).is_ready() {
            let unread = &entry.data.unread;
            let last = entry.remote_ended() && unread.is_in_one_go();
            let n = if last { self.app.write_last(&unread.slices()) } else { self.app.write(&unread.slices()) };
            entry.data.unread.consume(n);
            taken += n;
            failed = self.app.failed.take();
        }
        let end = match failed {
            Some(error) => Some(End::Application(Arc::new(error))),
            // The one that was let pass above.
            None => reset.filter(|_| entry.data.unread.is_empty()).map(|_| End::Closed),
        };
        let untold = !self.app.told.get() && entry.remote_ended() && entry.data.unread.is_empty();
        let all = entry.local_ended();
        // However the connection goes on: what is not given back is missing in the tunnel for good.
        if taken > 0 {
            core.give(taken);
            core.taken(id, taken);
            let said = !core.out.is_empty();
            drop(core);
            if said {
                link.wake_driver();
            }
        }
        if let Some(end) = end {
            return Err(end);
        }
        // Where all that it has sent was read, closing the socket says the same.
        if untold && all {
            self.app.told.set(true);
        } else if untold {
            self.app.end();
        }
        match self.app.failed.take() {
            Some(error) => Err(End::Application(Arc::new(error))),
            None => Ok(()),
        }
    }

    /// From the application, as far as the tunnel takes it. True: it has ended.
    fn up(&mut self, cx: &mut Context<'_>, link: &Link) -> Result<bool, End> {
        let id = self.stream.id;
        let mut core = link.core.borrow_mut();
        let mut said = false;
        let result = loop {
            if core.get(id).is_none_or(|entry| entry.local_ended()) {
                break Ok(true);
            }
            match self.app.socket.poll_read_ready(cx) {
                Poll::Pending => break Ok(false),
                Poll::Ready(Err(error)) => break Err(End::Application(Arc::new(error))),
                Poll::Ready(Ok(())) => {}
            }
            let limit = if core.is_crowded(id) { IN_A_CROWD } else { ALONE };
            let read = |places: &mut [IoSliceMut<'_>]| match places {
                [one] => self.app.socket.try_read(one),
                several => self.app.socket.try_read_vectored(several),
            };
            match core.send(id, limit, read) {
                Sent::Parked | Sent::Closed => break Ok(false),
                Sent::Asked(asked, Ok(n)) => {
                    said = true;
                    self.app.counters.sent(n);
                    if n > 0 && n < asked {
                        exhausted(&self.app.socket, Interest::READABLE);
                    } else if n > 0 {
                        // There is more, and what was read has to leave first. If the peer is on this thread, it takes that while
                        // the processor still has it at hand.
                        go_on(cx);
                        break Ok(false);
                    }
                }
                Sent::Asked(_, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                Sent::Asked(_, Err(error)) => break Err(End::Application(Arc::new(error))),
            }
        };
        drop(core);
        if said {
            link.wake_driver();
        }
        result
    }

    /// Nothing is read from the application: only a reset of it is still to be noticed.
    fn watch(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let app = &self.app;
        let watch = self.watch.get_or_insert_with(|| {
            let app = app.clone();
            Box::pin(async move {
                let _ = app.socket.ready(Interest::ERROR).await;
            })
        });
        watch.as_mut().poll(cx).map(|()| End::Application(meter::socket_error(&self.app.socket)))
    }

    fn finish(self, end: &End) {
        let Self { stream, app, watch, .. } = self;
        match end {
            End::Complete | End::Closed => {}
            // RFC 9113 §8.5: a TCP error is signalled as CONNECT_ERROR.
            End::Application(_) => stream.reset_with(Reason::CONNECT_ERROR),
            End::Cut => stream.reset_with(Reason::CANCEL),
            End::Other(_) | End::Reset(_) | End::Tunnel(_) => {}
        }
        // With these goes everything else that has the socket.
        drop((watch, stream));
        let orderly = matches!(end, End::Complete | End::Closed | End::Application(_));
        if let (Some(app), false) = (Rc::into_inner(app), orderly) {
            meter::reset(app.socket);
        }
    }
}
