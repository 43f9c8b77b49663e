//! An encrypted connection: the handshake, and the byte stream that it yields.
//!
//! Bytes are read in large pieces and opened where they lie; what is to be written is sealed in large pieces and leaves in one
//! write. Neither a connection that waits nor a handshake that stalls holds a large buffer.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buffer::{Incoming, Outgoing, PLAIN, RECORD};
use super::session::{Plain, Session, Step};
use super::verify::Role;
use super::{ALPN, Error, Evidence, Peer};
use crate::x509::{self, Leaf};

/// An encrypted connection. It implements tokio's `AsyncRead` and `AsyncWrite`.
pub struct Stream<IO> {
    io: IO,
    session: Session,
    incoming: Incoming,
    outgoing: Outgoing,
    /// Opened bytes that the reader had no room for.
    opened: Vec<u8>,
    /// The part of `opened` that was read already.
    read: usize,
    /// The peer has announced that nothing follows.
    ended: bool,
    /// We have announced it.
    closing: bool,
    /// What broke the session; nothing works after it.
    failed: Option<rustls::Error>,
}

/// The side that connected.
pub type ClientTls<IO> = Stream<IO>;
/// The side that accepted.
pub type ServerTls<IO> = Stream<IO>;

thread_local! {
    /// Where the pieces of a record are put together before it is sealed.
    static PIECES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Stream<IO> {
    /// Makes the client's handshake.
    pub(crate) async fn connect(io: IO, config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<Self> {
        Self::handshake(io, Session::client(config, name)).await
    }

    /// Makes the server's handshake.
    pub(crate) async fn accept(io: IO, config: Arc<ServerConfig>) -> io::Result<Self> {
        Self::handshake(io, Session::server(config)).await
    }

    async fn handshake(io: IO, session: Result<Session, rustls::Error>) -> io::Result<Self> {
        let mut stream = Self {
            io,
            session: session.map_err(broken)?,
            incoming: Incoming::default(),
            outgoing: Outgoing::default(),
            opened: Vec::new(),
            read: 0,
            ended: false,
            closing: false,
            failed: None,
        };
        poll_fn(|cx| stream.poll_handshake(cx)).await?;
        Ok(stream)
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.step(cx, None, None)? {
                Step::Progress | Step::Sealed => {}
                Step::Starved => {
                    ready!(self.outgoing.poll_drain(cx, &mut self.io))?;
                    if !self.session.state().is_handshaking() {
                        return Pin::new(&mut self.io).poll_flush(cx);
                    }
                    ready!(Pin::new(&mut self.io).poll_flush(cx))?;
                    if ready!(self.incoming.poll_fill(cx, &mut self.io))? == 0 {
                        return Poll::Ready(Err(truncated()));
                    }
                }
                Step::PeerClosed | Step::Closed => return Poll::Ready(Err(truncated())),
            }
        }
    }

    /// Waits until the server has said something. In TLS 1.3 it looks at the client's certificate after the client's handshake:
    /// a refusal is heard only now.
    pub(crate) async fn heard(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_heard(cx)).await
    }

    fn poll_heard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.opened.is_empty() {
            match self.step(cx, None, None)? {
                Step::Progress | Step::Sealed => {}
                Step::Starved => {
                    if ready!(self.incoming.poll_fill(cx, &mut self.io))? == 0 {
                        return Poll::Ready(Err(truncated()));
                    }
                }
                Step::PeerClosed | Step::Closed => return Poll::Ready(Err(truncated())),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// One step of the session; bytes of the peer go to `out` as far as there is room.
    fn step(
        &mut self,
        cx: &mut Context<'_>,
        plain: Option<Plain<'_>>,
        mut out: Option<&mut ReadBuf<'_>>,
    ) -> io::Result<Step> {
        if let Some(error) = &self.failed {
            return Err(broken(error.clone()));
        }
        let opened = &mut self.opened;
        let mut hand_over = |bytes: &[u8]| {
            let mut rest = bytes;
            if let (Some(out), true) = (&mut out, opened.is_empty()) {
                let n = out.remaining().min(rest.len());
                out.put_slice(&rest[..n]);
                rest = &rest[n..];
            }
            opened.extend_from_slice(rest);
        };
        let step = self.session.step(&mut self.incoming, &mut self.outgoing, plain, &mut hand_over);
        step.map_err(|error| {
            self.failed = Some(error.clone());
            self.tell_why(cx);
            broken(error)
        })
    }

    /// Sends the alert that goes with a failure, as far as the connection takes it now.
    fn tell_why(&mut self, cx: &mut Context<'_>) {
        // While it has something to say rustls does not look at what the peer has sent, which it must not do again.
        while self.session.state().wants_write() {
            if self.session.step(&mut self.incoming, &mut self.outgoing, None, &mut |_| {}).is_err() {
                break;
            }
        }
        if let Poll::Ready(Ok(())) = self.outgoing.poll_drain(cx, &mut self.io) {
            let _ = Pin::new(&mut self.io).poll_flush(cx);
        }
    }

    /// Seals the beginning of what is to be written: whole records, also where it comes in pieces. How much it was.
    fn seal(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        if let [one] = pieces
            && !one.is_empty()
        {
            let one = &one[..one.len().min(PLAIN)];
            self.seal_one(cx, Plain::Bytes(one))?;
            return Ok(one.len());
        }
        let mut record = PIECES.with_borrow_mut(std::mem::take);
        record.clear();
        let sealed = self.seal_records(cx, pieces, &mut record);
        PIECES.with_borrow_mut(|kept| *kept = record);
        sealed
    }

    fn seal_records(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
        record: &mut Vec<u8>,
    ) -> io::Result<usize> {
        let mut room = PLAIN;
        for piece in pieces {
            let mut piece = &piece[..piece.len().min(room)];
            room -= piece.len();
            while !piece.is_empty() {
                let whole = piece.len() - piece.len() % RECORD;
                if record.is_empty() && whole > 0 {
                    self.seal_one(cx, Plain::Bytes(&piece[..whole]))?;
                    piece = &piece[whole..];
                    continue;
                }
                let (head, rest) = piece.split_at(piece.len().min(RECORD - record.len()));
                record.extend_from_slice(head);
                piece = rest;
                if record.len() == RECORD {
                    self.seal_one(cx, Plain::Bytes(record))?;
                    record.clear();
                }
            }
        }
        if !record.is_empty() {
            self.seal_one(cx, Plain::Bytes(record))?;
        }
        Ok(PLAIN - room)
    }

    fn seal_one(&mut self, cx: &mut Context<'_>, plain: Plain<'_>) -> io::Result<()> {
        loop {
            match self.step(cx, Some(plain), None)? {
                Step::Sealed => return Ok(()),
                Step::Progress => {}
                // The other direction is not this one's concern.
                Step::PeerClosed => self.ended = true,
                Step::Starved | Step::Closed => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }

    fn read_opened(&mut self, out: &mut ReadBuf<'_>) {
        let rest = &self.opened[self.read..];
        let n = out.remaining().min(rest.len());
        out.put_slice(&rest[..n]);
        self.read += n;
        if self.read == self.opened.len() {
            self.opened = Vec::new();
            self.read = 0;
        }
    }
}

impl<IO> Stream<IO> {
    /// The connection below.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }

    /// The key exchange that was agreed, as rustls names it.
    pub fn key_exchange(&self) -> Option<&'static str> {
        self.state().negotiated_key_exchange_group().map(|group| group.name().as_str().unwrap_or("unknown"))
    }

    fn state(&self) -> &CommonState {
        self.session.state()
    }

    /// The verified peer; `None` if it presented no certificate.
    pub(crate) fn peer(&self) -> Result<Option<Peer>, Error> {
        let Some(chain @ [leaf, ..]) = self.state().peer_certificates() else { return Ok(None) };
        // The verifier has read the same bytes with the same function.
        let svid = Leaf::parse(leaf).map_err(Error::Rejected)?;
        let role = match self.session {
            Session::Client(_) => Role::Server,
            Session::Server(_) => Role::Client,
        };
        let evidence = Evidence { chain: chain.into(), role };
        Ok(Some(Peer { id: svid.id, not_after: svid.not_after, fingerprint: x509::fingerprint(leaf), evidence }))
    }

    /// Refuses a peer that negotiated something else than HTTP/2.
    pub(crate) fn require_alpn(&self) -> Result<(), Error> {
        if self.state().alpn_protocol() == Some(ALPN) { Ok(()) } else { Err(Error::NoAlpn) }
    }
}

/// An error of the session, in the words of a byte stream; [`Error::from_io`] finds it again.
fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The peer has closed the connection without having announced it: what came may not be all there was.
fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection without TLS close_notify")
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = out.filled().len();
        loop {
            if !this.opened.is_empty() {
                this.read_opened(out);
            }
            // Without anything of the peer there is nothing to open, and a turn of a tunnel asks often.
            let mut starved = this.incoming.is_empty();
            while !this.ended && !starved && out.remaining() > 0 {
                match this.step(cx, None, Some(out))? {
                    Step::Progress | Step::Sealed => {}
                    Step::Starved => starved = true,
                    Step::PeerClosed | Step::Closed => this.ended = true,
                }
            }
            if !this.outgoing.is_empty() {
                // An answer to a change of keys; if the connection takes no more now, it goes with the next write.
                let _ = this.outgoing.poll_drain(cx, &mut this.io)?;
            }
            if out.filled().len() > before || this.ended || out.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if ready!(this.incoming.poll_fill(cx, &mut this.io))? == 0 {
                return Poll::Ready(Err(truncated()));
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.outgoing.poll_drain(cx, &mut this.io))?;
        let n = this.seal(cx, bufs)?;
        // What the connection does not take now leaves with the next write or flush.
        if let Poll::Ready(written) = this.outgoing.poll_drain(cx, &mut this.io) {
            written?;
        }
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.outgoing.poll_drain(cx, &mut this.io))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing && this.failed.is_none() {
            ready!(this.outgoing.poll_drain(cx, &mut this.io))?;
            this.seal_one(cx, Plain::CloseNotify)?;
            this.closing = true;
        }
        ready!(this.outgoing.poll_drain(cx, &mut this.io))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

impl<IO: fmt::Debug> fmt::Debug for Stream<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("io", &self.io).finish_non_exhaustive()
    }
}
