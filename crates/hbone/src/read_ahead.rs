//! Reads much at once from a socket for a reader that asks for little: rustls reads in steps of 4 KiB.

use std::fmt;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::lend;

/// A connection whose reads are served from a buffer that is borrowed while there is something in it.
pub struct ReadAhead<IO> {
    io: IO,
    buffer: Option<Box<[u8]>>,
    unread: Range<usize>,
}

impl<IO> ReadAhead<IO> {
    /// Nothing is read yet.
    pub fn new(io: IO) -> Self {
        Self { io, buffer: None, unread: 0..0 }
    }

    /// The connection below.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }

    fn serve(&mut self, out: &mut ReadBuf<'_>) {
        let Some(buffer) = &self.buffer else { return };
        let take = out.remaining().min(self.unread.len());
        out.put_slice(&buffer[self.unread.start..self.unread.start + take]);
        self.unread.start += take;
        if self.unread.is_empty() {
            self.release();
        }
    }

    fn release(&mut self) {
        self.unread = 0..0;
        if let Some(buffer) = self.buffer.take() {
            lend::give(buffer);
        }
    }
}

impl<IO> Drop for ReadAhead<IO> {
    fn drop(&mut self) {
        self.release();
    }
}

impl<IO: fmt::Debug> fmt::Debug for ReadAhead<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadAhead").field("io", &self.io).field("unread", &self.unread.len()).finish()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadAhead<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.unread.is_empty() {
            let mut buffer = lend::take();
            let mut into = ReadBuf::new(&mut buffer);
            let read = Pin::new(&mut this.io).poll_read(cx, &mut into);
            let filled = into.filled().len();
            this.buffer = Some(buffer);
            if !matches!(read, Poll::Ready(Ok(()))) || filled == 0 {
                this.release();
                return read;
            }
            ready!(read)?;
            this.unread = 0..filled;
        }
        this.serve(out);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadAhead<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn small_reads_see_every_byte_in_order_and_then_the_end() {
        let (mut peer, io) = tokio::io::duplex(1 << 20);
        let sent: Vec<u8> = (0..600_000u32).map(|i| (i % 251) as u8).collect();
        peer.write_all(&sent).await.unwrap();
        drop(peer);
        let mut ahead = ReadAhead::new(io);
        let (mut received, mut step) = (Vec::new(), [0; 4096]);
        loop {
            match ahead.read(&mut step).await.unwrap() {
                0 => break,
                n => received.extend_from_slice(&step[..n]),
            }
        }
        assert!(received == sent);
        assert!(ahead.buffer.is_none(), "the buffer went back");
    }
}
