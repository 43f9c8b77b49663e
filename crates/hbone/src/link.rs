//! What the streams, the handles and the driver of a tunnel share: its state machine, and who is to be woken.
//!
//! Whoever has gathered frames wakes the driver, which writes what all have gathered in one piece. The driver writes what came
//! for a stream to its application at once; a stream's task is woken only for what that does not settle.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};

use http::StatusCode;
use smallvec::SmallVec;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::core::{Core, Entry};
use crate::error::Ended;
use crate::meter::Counters;
use crate::request::ResponseHead;
use crate::unread::{GATHER, Unread};

/// Names a tunnel among all of its thread, also when it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TunnelId(u64);

impl TunnelId {
    fn new() -> Self {
        thread_local! {
            static NEXT: Cell<u64> = const { Cell::new(0) };
        }
        NEXT.with(|next| Self(next.replace(next.get() + 1)))
    }
}

/// One tunnel.
pub(crate) struct Link {
    pub(crate) id: TunnelId,
    pub(crate) core: RefCell<Core<Local>>,
    /// Streams that are open or being opened.
    pub(crate) streams: Cell<usize>,
    /// When the last stream was closed.
    pub(crate) idle_since: Cell<Instant>,
    /// No new streams.
    pub(crate) closing: Cell<bool>,
    /// Streams that wait for their answers, and until when.
    pub(crate) replies: RefCell<VecDeque<(Instant, u32)>>,
    handles: Cell<usize>,
    ended: RefCell<Option<Ended>>,
    driver: RefCell<Option<Waker>>,
    /// The driver is at work, and will look at everything before it rests.
    pub(crate) driving: Cell<bool>,
    /// Called when more streams may be free than before.
    freed: RefCell<Option<Rc<dyn Fn()>>>,
}

/// What is kept for each stream.
#[derive(Debug, Default)]
pub(crate) struct Local {
    /// Whoever carries the stream, or opens it, or reads from it.
    pub(crate) waker: Option<Waker>,
    /// Whoever writes to it, if somebody else.
    pub(crate) writer: Option<Waker>,
    /// There for a moment only, and larger than all the rest.
    pub(crate) answer: Option<Box<(StatusCode, ResponseHead)>>,
    /// No answer came in time.
    pub(crate) timed_out: bool,
    pub(crate) unread: Unread,
    pub(crate) app: Option<Rc<App>>,
}

impl Local {
    pub(crate) fn wake(&self) {
        for waker in [&self.waker, &self.writer].into_iter().flatten() {
            waker.wake_by_ref();
        }
    }
}

/// Keeps a waker, if it is not the one that is kept.
pub(crate) fn keep(place: &mut Option<Waker>, waker: &Waker) {
    if !place.as_ref().is_some_and(|known| known.will_wake(waker)) {
        *place = Some(waker.clone());
    }
}

/// Has a task go on when everybody else has had their turn, also those whose sockets have become ready meanwhile: to wake it at once
/// would be before those are even asked for.
pub(crate) fn go_on(cx: &mut Context<'_>) {
    // It is woken from there; whether it is ready now does not matter.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

/// The application of a stream that is relayed.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) socket: TcpStream,
    pub(crate) counters: Counters,
    /// It knows that nothing follows.
    pub(crate) told: Cell<bool>,
    /// What went wrong when the driver wrote to it.
    pub(crate) failed: RefCell<Option<io::Error>>,
}

impl App {
    pub(crate) fn new(socket: TcpStream, counters: Counters) -> Self {
        Self { socket, counters, told: Cell::new(false), failed: RefCell::new(None) }
    }

    /// Writes as much as it takes now.
    pub(crate) fn write(&self, slices: &[IoSlice<'_>]) -> usize {
        self.send(slices, 0)
    }

    /// Writes what comes before the end, if there is anything. If it takes all, it is told the end in the same packet: the last bytes wait
    /// for that in the kernel, and so it has to be at once.
    pub(crate) fn write_last(&self, slices: &[IoSlice<'_>]) -> usize {
        let n = self.send(slices, libc::MSG_MORE);
        if n > 0 && n == length(slices) {
            self.end();
        }
        n
    }

    /// Tells it that nothing follows.
    pub(crate) fn end(&self) {
        self.told.set(true);
        match SockRef::from(&self.socket).shutdown(Shutdown::Write) {
            // It has closed both directions already, and did not need the end.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => *self.failed.borrow_mut() = Some(error),
            _ => {}
        }
    }

    fn send(&self, slices: &[IoSlice<'_>], flags: libc::c_int) -> usize {
        let (socket, flags) = (SockRef::from(&self.socket), flags | libc::MSG_NOSIGNAL);
        let written = match slices {
            [] => return 0,
            [one] => self.socket.try_io(Interest::WRITABLE, || socket.send_with_flags(one, flags)),
            several => self.socket.try_io(Interest::WRITABLE, || socket.send_vectored_with_flags(several, flags)),
        };
        match written {
            Ok(n) => {
                self.counters.received(n);
                if n < length(slices) {
                    exhausted(&self.socket, Interest::WRITABLE);
                }
                n
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                *self.failed.borrow_mut() = Some(error);
                0
            }
        }
    }
}

fn length(slices: &[IoSlice<'_>]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

/// After a short read or write the socket is not asked again until the kernel says that there is more.
pub(crate) fn exhausted(socket: &TcpStream, interest: Interest) {
    let _ = socket.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
}

/// Bytes that came for a stream, in the buffer into which they were received.
#[derive(Debug)]
pub(crate) struct Came {
    pub(crate) stream: u32,
    pub(crate) range: std::ops::Range<usize>,
    /// Nothing follows.
    pub(crate) end: bool,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("streams", &self.streams).field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Link {
    pub(crate) fn new(core: Core<Local>) -> Rc<Self> {
        Rc::new(Self {
            id: TunnelId::new(),
            core: RefCell::new(core),
            streams: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            closing: Cell::new(false),
            replies: RefCell::default(),
            handles: Cell::new(0),
            ended: RefCell::new(None),
            driver: RefCell::new(None),
            driving: Cell::new(false),
            freed: RefCell::new(None),
        })
    }

    /// The tunnel ended; every stream finds out why.
    pub(crate) fn end(&self, why: &Ended) {
        self.closing.set(true);
        *self.ended.borrow_mut() = Some(why.clone());
        self.driver.take();
        let mut core = self.core.borrow_mut();
        core.finish();
        core.each(|entry| entry.data.wake());
        drop(core);
        self.replies.take();
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Nobody can open a stream any more, and none is open.
    pub(crate) fn is_forsaken(&self) -> bool {
        self.handles.get() == 0 && self.streams.get() == 0
    }

    /// The driver's task, to be woken when something changes that it decides about.
    pub(crate) fn driven_by(&self, waker: &Waker) {
        keep(&mut self.driver.borrow_mut(), waker);
    }

    pub(crate) fn wake_driver(&self) {
        if !self.driving.get()
            && let Some(driver) = &*self.driver.borrow()
        {
            driver.wake_by_ref();
        }
    }

    /// Calls `f` whenever more streams may be free than before.
    pub(crate) fn on_freed(&self, f: Rc<dyn Fn()>) {
        *self.freed.borrow_mut() = Some(f);
    }

    pub(crate) fn notify_freed(&self) {
        let freed = self.freed.borrow().clone();
        if let Some(freed) = freed {
            freed();
        }
    }

    /// An answer is expected until then.
    pub(crate) fn expect_reply(&self, stream: u32, until: Instant) {
        let mut replies = self.replies.borrow_mut();
        if replies.len() > 64 && replies.len() > 4 * self.streams.get() {
            let core = self.core.borrow();
            replies.retain(|(_, stream)| core.get(*stream).is_some_and(is_waiting));
        }
        replies.push_back((until, stream));
    }

    /// Tells those who have waited too long, and says when to look again.
    pub(crate) fn replies_due(&self, now: Instant) -> Option<Instant> {
        let mut replies = self.replies.borrow_mut();
        let mut core = self.core.borrow_mut();
        while let Some((until, stream)) = replies.front() {
            match core.get_mut(*stream).filter(|entry| is_waiting(entry)) {
                Some(_) if *until > now => return Some(*until),
                Some(entry) => {
                    entry.data.timed_out = true;
                    entry.data.wake();
                }
                None => {}
            }
            replies.pop_front();
        }
        // What a burst has needed is not kept.
        replies.shrink_to(4);
        None
    }

    /// Hands over what came for one stream: to its application as far as that takes it, or to whoever reads.
    pub(crate) fn deliver(&self, came: &[Came], bytes: &[u8]) {
        let Some(last) = came.last() else { return };
        let core = &mut *self.core.borrow_mut();
        let Some(entry) = core.get_mut(last.stream) else { return };
        let local = &mut entry.data;
        let total: usize = came.iter().map(|came| came.range.len()).sum();
        let app = local.app.clone();
        let mut taken = 0;
        match app {
            Some(app) if local.unread.is_empty() && came.len() <= GATHER => {
                let slices = came.iter().filter(|came| !came.range.is_empty());
                let slices: SmallVec<[IoSlice<'_>; GATHER]> =
                    slices.map(|came| IoSlice::new(&bytes[came.range.clone()])).collect();
                taken = if last.end { app.write_last(&slices) } else { app.write(&slices) };
                keep_rest(&mut local.unread, came, bytes, taken);
            }
            Some(app) if local.unread.is_empty() => {
                keep_rest(&mut local.unread, came, bytes, 0);
                taken = app.write(&local.unread.slices());
                local.unread.consume(taken);
            }
            _ => keep_rest(&mut local.unread, came, bytes, 0),
        }
        if last.end || taken < total {
            local.wake();
        }
        core.hold(total - taken);
        core.taken(last.stream, taken);
    }
}

fn keep_rest(unread: &mut Unread, came: &[Came], bytes: &[u8], taken: usize) {
    let mut skip = taken;
    for came in came {
        let bytes = &bytes[came.range.clone()];
        let skipped = skip.min(bytes.len());
        skip -= skipped;
        if skipped < bytes.len() {
            unread.push(&bytes[skipped..]);
        }
    }
}

fn is_waiting(entry: &Entry<Local>) -> bool {
    !entry.is_answered() && !entry.is_closed() && !entry.data.timed_out
}

/// A handle with which streams can be opened: without one, a tunnel ends with its last stream.
#[derive(Debug)]
pub(crate) struct Handle(pub(crate) Rc<Link>);

impl Handle {
    pub(crate) fn new(link: &Rc<Link>) -> Self {
        link.handles.set(link.handles.get() + 1);
        Self(link.clone())
    }
}

impl Clone for Handle {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let left = self.0.handles.get() - 1;
        self.0.handles.set(left);
        if left == 0 {
            self.0.wake_driver();
        }
    }
}

/// One of the streams of a tunnel, from before it is opened until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot(pub(crate) Rc<Link>);

impl Slot {
    pub(crate) fn new(link: &Rc<Link>) -> Self {
        link.streams.set(link.streams.get() + 1);
        Self(link.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let left = self.0.streams.get() - 1;
        self.0.streams.set(left);
        if left == 0 {
            self.0.idle_since.set(Instant::now());
            self.0.wake_driver();
        }
        self.0.notify_freed();
    }
}

/// The error of a tunnel that is gone, for those who see it as a byte stream.
pub(crate) fn gone(ended: Ended) -> io::Error {
    match &ended {
        Ended::Io(io) => io::Error::new(io.kind(), ended),
        _ => io::Error::other(ended),
    }
}

/// A tunnel whose driver went away.
pub(crate) fn aborted() -> Ended {
    Ended::Io(Arc::new(io::ErrorKind::ConnectionAborted.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hundred thousand of them wait in a process.
    #[test]
    fn an_idle_stream_keeps_little() {
        assert!(size_of::<Entry<Local>>() <= 176, "{} bytes", size_of::<Entry<Local>>());
        assert!(size_of::<Link>() <= 1024, "{} bytes", size_of::<Link>());
    }
}
