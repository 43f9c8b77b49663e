//! One stream of a tunnel: an established connection to somewhere, through the peer.

use std::fmt;
use std::io::{self, Read};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::core::Sent;
use crate::link::{Slot, TunnelId, gone, keep};
use crate::reason::Reason;

/// An open stream. Dropping it before both directions have ended resets it.
pub struct Stream {
    pub(crate) id: u32,
    pub(crate) slot: Slot,
}

impl Stream {
    /// The stream as a byte stream, for a tunnel inside this one.
    pub fn into_io(self) -> StreamIo {
        StreamIo { stream: self }
    }

    /// The tunnel that it belongs to.
    pub fn tunnel(&self) -> TunnelId {
        self.slot.0.id
    }

    /// Tells the peer that the connection was cut.
    pub fn reset(self) {
        self.reset_with(Reason::CANCEL);
    }

    pub(crate) fn reset_with(&self, reason: Reason) {
        self.slot.0.core.borrow_mut().reset(self.id, reason);
        self.slot.0.wake_driver();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let link = &self.slot.0;
        let mut core = link.core.borrow_mut();
        let waits = core.out.len();
        let local = core.release(self.id);
        if let Some(local) = &local {
            core.give(local.unread.len());
        }
        let said = core.out.len() > waits || core.active() == 0;
        drop(core);
        if said {
            link.wake_driver();
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.id).finish()
    }
}

/// A stream as tokio's `AsyncRead` and `AsyncWrite`.
#[derive(Debug)]
pub struct StreamIo {
    stream: Stream,
}

impl StreamIo {
    /// Why nothing can be done with it any more, if so.
    fn failed(&self) -> Option<io::Error> {
        let link = &self.stream.slot.0;
        let core = link.core.borrow();
        let entry = core.get(self.stream.id)?;
        if let Some(reason) = entry.reset() {
            return Some(io::Error::new(
                io::ErrorKind::ConnectionReset,
                format!("the peer reset the stream: {reason}"),
            ));
        }
        if entry.is_closed() { None } else { link.ended().map(gone) }
    }
}

impl AsyncRead for StreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let failed = self.failed();
        let link = &self.stream.slot.0;
        let id = self.stream.id;
        let mut core = link.core.borrow_mut();
        let Some(entry) = core.get_mut(id) else { return Poll::Ready(Ok(())) };
        let bytes = entry.data.unread.first();
        if bytes.is_empty() {
            if entry.remote_ended() {
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = failed {
                return Poll::Ready(Err(error));
            }
            keep(&mut entry.data.waker, cx.waker());
            return Poll::Pending;
        }
        let n = out.remaining().min(bytes.len());
        out.put_slice(&bytes[..n]);
        entry.data.unread.consume(n);
        core.give(n);
        core.taken(id, n);
        let said = !core.out.is_empty();
        drop(core);
        if said {
            link.wake_driver();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for StreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if let Some(error) = self.failed() {
            return Poll::Ready(Err(error));
        }
        let link = &self.stream.slot.0;
        let id = self.stream.id;
        let mut core = link.core.borrow_mut();
        let sent = core.send(id, bytes.len(), |places| {
            let mut rest = bytes;
            places.iter_mut().map(|place| rest.read(place)).sum()
        });
        match sent {
            Sent::Parked => {
                if let Some(entry) = core.get_mut(id) {
                    keep(&mut entry.data.writer, cx.waker());
                }
                Poll::Pending
            }
            Sent::Closed => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Sent::Asked(_, written) => {
                drop(core);
                link.wake_driver();
                Poll::Ready(written)
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(error) = self.failed() {
            return Poll::Ready(Err(error));
        }
        self.stream.slot.0.core.borrow_mut().end(self.stream.id);
        self.stream.slot.0.wake_driver();
        Poll::Ready(Ok(()))
    }
}
