//! The byte stream that a handshake yields.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use rustls::CommonState;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;

use super::verify::Role;
use super::{ALPN, Error, Evidence, Peer};
use crate::x509::{self, Leaf};

/// An encrypted connection. It implements tokio's `AsyncRead` and `AsyncWrite`.
#[derive(Debug)]
pub struct Stream<IO>(TlsStream<IO>);

/// The side that connected.
pub type ClientTls<IO> = Stream<IO>;
/// The side that accepted.
pub type ServerTls<IO> = Stream<IO>;

/// Bytes that may be sealed before they are written.
const SEALED: usize = 1 << 20;

impl<IO> Stream<IO> {
    pub(crate) fn new(stream: impl Into<TlsStream<IO>>) -> Self {
        let mut stream = stream.into();
        // A turn's worth of frames is sealed at once; the default would cut it into four writes of 64 KiB.
        match &mut stream {
            TlsStream::Client(client) => client.get_mut().1.set_buffer_limit(Some(SEALED)),
            TlsStream::Server(server) => server.get_mut().1.set_buffer_limit(Some(SEALED)),
        }
        Self(stream)
    }

    /// The connection below.
    pub fn get_ref(&self) -> &IO {
        self.0.get_ref().0
    }

    /// The key exchange that was agreed, as rustls names it.
    pub fn key_exchange(&self) -> Option<&'static str> {
        self.state().negotiated_key_exchange_group().map(|group| group.name().as_str().unwrap_or("unknown"))
    }

    fn state(&self) -> &CommonState {
        self.0.get_ref().1
    }

    /// The verified peer; `None` if it presented no certificate.
    pub(crate) fn peer(&self) -> Result<Option<Peer>, Error> {
        let Some(chain @ [leaf, ..]) = self.state().peer_certificates() else { return Ok(None) };
        // The verifier has read the same bytes with the same function.
        let svid = Leaf::parse(leaf).map_err(Error::Rejected)?;
        let role = match self.0 {
            TlsStream::Client(_) => Role::Server,
            TlsStream::Server(_) => Role::Client,
        };
        let evidence = Evidence { chain: chain.into(), role };
        Ok(Some(Peer { id: svid.id, not_after: svid.not_after, fingerprint: x509::fingerprint(leaf), evidence }))
    }

    /// Refuses a peer that negotiated something else than HTTP/2.
    pub(crate) fn require_alpn(&self) -> Result<(), Error> {
        if self.state().alpn_protocol() == Some(ALPN) { Ok(()) } else { Err(Error::NoAlpn) }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
