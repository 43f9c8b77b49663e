//! The connection as `h2` sees it, shared with the tunnel's driver: writes are gathered, reads are watched.
//!
//! `h2` writes and flushes every DATA frame by itself. With many small streams that is a TLS record and a system call for each;
//! here they are gathered until the driver has polled `h2` to its end, and leave in one write a turn. Large writes go straight through.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::error::{Ended, Flood};
use crate::guard::Guard;
use crate::lend::{self, LENT};

/// Writes of at least this size are not worth a copy.
const DIRECT: usize = 32 << 10;

/// The end that `h2` holds.
pub(crate) struct Wire<IO>(Rc<RefCell<Inner<IO>>>, Rc<Watch>);

/// The end that the driver holds.
pub(crate) struct Pusher<IO>(Rc<RefCell<Inner<IO>>>);

/// What the driver wants to know of the bytes that came in.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Grows with every read that yields something.
    pub(crate) reads: Cell<u64>,
    pub(crate) settings: Cell<bool>,
    pub(crate) goaway: Cell<bool>,
    flood: Cell<Option<Flood>>,
    /// `h2` reports I/O errors by their kind only; what was below is kept here.
    error: RefCell<Option<Arc<io::Error>>>,
}

impl Watch {
    /// Why the tunnel ended, when `h2` says that it ended by `error`.
    pub(crate) fn explain(&self, error: h2::Error) -> Ended {
        match self.flood.get() {
            Some(flood) => Ended::Flood(flood),
            None => Ended::from_h2(error, self.error.borrow().clone()),
        }
    }

    /// Keeps an I/O error with its causes, and gives `h2` one of the same kind.
    fn keep(&self, error: io::Error) -> io::Error {
        let kind = error.kind();
        *self.error.borrow_mut() = Some(Arc::new(error));
        kind.into()
    }
}

struct Inner<IO> {
    io: IO,
    guard: Guard,
    buffer: Option<Box<[u8]>>,
    /// The part of `buffer` that waits to be written.
    start: usize,
    end: usize,
}

pub(crate) fn split<IO>(io: IO, guard: Guard) -> (Wire<IO>, Pusher<IO>, Rc<Watch>) {
    let inner = Rc::new(RefCell::new(Inner { io, guard, buffer: None, start: 0, end: 0 }));
    let watch = Rc::new(Watch::default());
    (Wire(inner.clone(), watch.clone()), Pusher(inner), watch)
}

impl<IO: AsyncWrite + Unpin> Pusher<IO> {
    /// Writes what was gathered. Ready: all of it is written.
    pub(crate) fn poll_push(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.poll_drain(cx))?;
        Pin::new(&mut inner.io).poll_flush(cx)
    }
}

impl<IO: AsyncWrite + Unpin> Inner<IO> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(buffer) = &self.buffer {
            if self.start == self.end {
                break;
            }
            match ready!(Pin::new(&mut self.io).poll_write(cx, &buffer[self.start..self.end]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.start += n,
            }
        }
        self.release();
        Poll::Ready(Ok(()))
    }

    fn gather(&mut self, bytes: &[u8]) -> usize {
        let buffer = self.buffer.get_or_insert_with(lend::take);
        let n = bytes.len().min(LENT - self.end);
        buffer[self.end..self.end + n].copy_from_slice(&bytes[..n]);
        self.end += n;
        n
    }
}

impl<IO> Inner<IO> {
    fn release(&mut self) {
        (self.start, self.end) = (0, 0);
        if let Some(buffer) = self.buffer.take() {
            lend::give(buffer);
        }
    }
}

impl<IO> Drop for Inner<IO> {
    fn drop(&mut self) {
        self.release();
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Wire<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self(inner, watch) = self.get_mut();
        let Inner { io, guard, .. } = &mut *inner.borrow_mut();
        let before = out.filled().len();
        ready!(Pin::new(io).poll_read(cx, out)).map_err(|error| watch.keep(error))?;
        let new = &out.filled()[before..];
        if !new.is_empty() {
            watch.reads.set(watch.reads.get() + 1);
            if let Err(flood) = guard.inspect(new) {
                watch.flood.set(Some(flood));
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            watch.settings.set(guard.settings);
            watch.goaway.set(guard.goaway);
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Wire<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self(inner, watch) = self.get_mut();
        let inner = &mut *inner.borrow_mut();
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        if total >= DIRECT || inner.end + total > LENT {
            ready!(inner.poll_drain(cx)).map_err(|error| watch.keep(error))?;
        }
        if total >= DIRECT {
            return Pin::new(&mut inner.io).poll_write_vectored(cx, bufs).map_err(|error| watch.keep(error));
        }
        Poll::Ready(Ok(bufs.iter().map(|buf| inner.gather(buf)).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// The driver flushes, once a turn.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self(inner, watch) = self.get_mut();
        let inner = &mut *inner.borrow_mut();
        ready!(inner.poll_drain(cx)).map_err(|error| watch.keep(error))?;
        Pin::new(&mut inner.io).poll_shutdown(cx).map_err(|error| watch.keep(error))
    }
}
