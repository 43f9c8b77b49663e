//! Buffers for sealed bytes, lent by each thread to whichever connection has bytes under way.
//!
//! An idle connection holds no buffer, so memory follows the traffic and not the number of connections.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Plain bytes that are sealed into one buffer at most.
pub(super) const PLAIN: usize = 512 << 10;
/// Plain bytes in one record (RFC 8446 §5.1).
pub(super) const RECORD: usize = 16 << 10;
/// What a record may cost on top of its plain bytes: header, content type and tag are 22 bytes.
const OVERHEAD: usize = 64;
/// Size of a lent buffer: all of [`PLAIN`] sealed, and something of the handshake before it.
const LENT: usize = PLAIN + (PLAIN / RECORD + 1) * OVERHEAD + RECORD;
/// Buffers that each thread keeps for reuse; more than these are given back to the allocator.
const KEPT: usize = 4;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn take() -> Box<[u8]> {
    SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; LENT].into_boxed_slice())
}

fn give(buffer: Box<[u8]>) {
    // A thread that ends drops its connections after its spare buffers.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < KEPT {
            spare.push(buffer);
        }
    });
}

/// A part of a lent buffer that is in use.
#[derive(Default)]
struct Lent {
    buffer: Option<Box<[u8]>>,
    used: Range<usize>,
}

impl Lent {
    fn bytes(&mut self) -> &mut [u8] {
        match &mut self.buffer {
            Some(buffer) => &mut buffer[self.used.clone()],
            None => &mut [],
        }
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.buffer.get_or_insert_with(take)[self.used.end..]
    }

    fn added(&mut self, n: usize) {
        self.used.end += n;
    }

    fn discard(&mut self, n: usize) {
        self.used.start += n;
        if self.used.is_empty() {
            self.release();
        }
    }

    fn release(&mut self) {
        self.used = 0..0;
        if let Some(buffer) = self.buffer.take() {
            give(buffer);
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.release();
    }
}

/// Sealed bytes of the peer that were not opened yet.
#[derive(Default)]
pub(super) struct Incoming {
    lent: Lent,
    /// The beginning of a record or a message whose rest is waited for: a buffer of its own size, since a slow peer may let it
    /// wait for long.
    rest: Vec<u8>,
}

impl Incoming {
    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty() && self.lent.used.is_empty()
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        if self.rest.is_empty() { self.lent.bytes() } else { &mut self.rest }
    }

    pub(super) fn discard(&mut self, n: usize) {
        if self.rest.is_empty() {
            self.lent.discard(n);
        } else if n == self.rest.len() {
            self.rest = Vec::new();
        } else {
            self.rest.drain(..n);
        }
    }

    /// Reads what the connection has. Zero: the peer has closed it.
    pub(super) fn poll_fill<IO>(&mut self, cx: &mut Context<'_>, io: &mut IO) -> Poll<io::Result<usize>>
    where
        IO: AsyncRead + Unpin,
    {
        self.make_room();
        let room = self.lent.room();
        if room.is_empty() {
            // rustls refuses records and messages long before they fill a buffer.
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a TLS message is too long")));
        }
        let mut room = ReadBuf::new(room);
        let read = Pin::new(io).poll_read(cx, &mut room);
        let n = room.filled().len();
        match read {
            Poll::Ready(Ok(())) => {
                self.lent.added(n);
                if self.lent.used.is_empty() {
                    self.lent.release();
                }
                Poll::Ready(Ok(n))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                self.rest = self.lent.bytes().to_vec();
                self.lent.release();
                Poll::Pending
            }
        }
    }

    /// Moves what is there to the front of a lent buffer.
    fn make_room(&mut self) {
        if !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            self.lent.room()[..rest.len()].copy_from_slice(&rest);
            self.lent.added(rest.len());
        } else if self.lent.used.start > 0 {
            let used = self.lent.used.clone();
            if let Some(buffer) = &mut self.lent.buffer {
                buffer.copy_within(used.clone(), 0);
            }
            self.lent.used = 0..used.len();
        }
    }
}

/// Sealed bytes that were not written yet.
#[derive(Default)]
pub(super) struct Outgoing(Lent);

impl Outgoing {
    pub(super) fn is_empty(&self) -> bool {
        self.0.used.is_empty()
    }

    /// Where more can be put; tell [`added`](Self::added) how much it was.
    pub(super) fn room(&mut self) -> &mut [u8] {
        self.0.room()
    }

    pub(super) fn added(&mut self, n: usize) {
        self.0.added(n);
        if self.is_empty() {
            self.0.release();
        }
    }

    /// Ready: all of it is written.
    pub(super) fn poll_drain<IO>(&mut self, cx: &mut Context<'_>, io: &mut IO) -> Poll<io::Result<()>>
    where
        IO: AsyncWrite + Unpin,
    {
        while !self.is_empty() {
            match ready!(Pin::new(&mut *io).poll_write(cx, self.0.bytes()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.0.discard(n),
            }
        }
        Poll::Ready(Ok(()))
    }
}
