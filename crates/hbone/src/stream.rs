//! One stream of a tunnel: an established connection to somewhere, through the peer.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::shared::{Slot, TunnelId};

/// An open stream. Dropping it before both directions have ended resets it.
pub struct Stream {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) recv: RecvStream,
    pub(crate) slot: Slot,
}

impl Stream {
    /// The stream as a byte stream, for a tunnel inside this one.
    pub fn into_io(self) -> StreamIo {
        StreamIo { stream: self, unread: Bytes::new(), finished: false }
    }

    /// The tunnel that it belongs to.
    pub fn tunnel(&self) -> TunnelId {
        self.slot.0.id
    }

    /// Tells the peer that the connection was cut.
    pub fn reset(mut self) {
        self.send.send_reset(Reason::CANCEL);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.send.stream_id()).finish()
    }
}

/// A stream as tokio's `AsyncRead` and `AsyncWrite`.
#[derive(Debug)]
pub struct StreamIo {
    stream: Stream,
    unread: Bytes,
    finished: bool,
}

impl AsyncRead for StreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            match ready!(this.stream.recv.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(data) => this.unread = data.map_err(io::Error::other)?,
            }
        }
        let n = out.remaining().min(this.unread.len());
        out.put_slice(&this.unread[..n]);
        this.unread.advance(n);
        // Fails only for more than was received.
        let _ = this.stream.recv.flow_control().release_capacity(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for StreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let send = &mut this.stream.send;
        send.reserve_capacity(bytes.len());
        while send.capacity() == 0 {
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let n = bytes.len().min(send.capacity());
        send.send_data(Bytes::copy_from_slice(&bytes[..n]), false).map_err(io::Error::other)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.finished {
            this.finished = true;
            this.stream.send.send_data(Bytes::new(), true).map_err(io::Error::other)?;
        }
        Poll::Ready(Ok(()))
    }
}
