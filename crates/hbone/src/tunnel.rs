//! The client's end of a tunnel.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::config::Config;
use crate::core::Core;
use crate::driver::Machine;
use crate::error::{Ended, OpenError};
use crate::link::{Handle, Link, Local, Slot, TunnelId, keep};
use crate::request::{Request, ResponseHead};
use crate::stream::Stream;

/// A handle to a tunnel, to open streams with. Clones share the tunnel; it is closed when the last of them and of its streams is gone.
#[derive(Clone)]
pub struct Tunnel {
    handle: Handle,
    limit: usize,
    reply_timeout: Duration,
}

impl Tunnel {
    /// Begins HTTP/2 on a connection. The peer's settings are not waited for: the first stream may be opened at once.
    pub async fn connect<IO>(io: IO, config: &Config) -> Result<(Self, Driver<IO>), Ended>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let link = Link::new(Core::client(config));
        let handle = Handle::new(&link);
        let tunnel = Self { handle, limit: config.client_streams, reply_timeout: config.reply_timeout };
        Ok((tunnel, Driver { machine: Machine::new(io, link, config) }))
    }

    fn link(&self) -> &Rc<Link> {
        &self.handle.0
    }

    /// Streams that can still be opened. One until the peer has said how many it takes: the others would wait for it unseen.
    pub fn free(&self) -> usize {
        if self.link().closing.get() {
            return 0;
        }
        self.limit().saturating_sub(self.link().streams.get())
    }

    pub(crate) fn limit(&self) -> usize {
        let core = self.link().core.borrow();
        if core.is_settled() { self.limit.min(core.peer_streams()) } else { 1 }
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.link().core.borrow().is_settled()
    }

    /// Calls `f` whenever more streams may be free than before.
    pub(crate) fn on_freed(&self, f: impl Fn() + 'static) {
        self.link().on_freed(Rc::new(f));
    }

    /// Its name, as [`Stream::tunnel`] has it.
    pub fn id(&self) -> TunnelId {
        self.link().id
    }

    /// Streams that are open.
    pub fn streams(&self) -> usize {
        self.link().streams.get()
    }

    /// When the last stream ended; meaningless while there are any.
    pub fn idle_since(&self) -> Instant {
        self.link().idle_since.get()
    }

    /// Why it ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        self.link().ended()
    }

    /// Opens no more streams; those that are open live on.
    pub fn retire(&self) {
        self.link().closing.set(true);
        self.link().wake_driver();
    }

    /// It opens no more streams, by our will or the peer's.
    pub(crate) fn is_retired(&self) -> bool {
        self.link().closing.get()
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(self.link(), other.link())
    }

    /// Takes one of the [`Tunnel::free`] streams, to be opened later; none if there is none.
    pub(crate) fn slot(&self) -> Option<Slot> {
        (self.free() > 0).then(|| Slot::new(self.link()))
    }

    /// Sends a CONNECT and waits for its answer. Dropping the future resets the stream.
    pub async fn open(&self, request: &Request) -> Result<(Stream, ResponseHead), OpenError> {
        let slot = self.slot().ok_or(OpenError::Full)?;
        self.open_in(slot, request).await
    }

    pub(crate) async fn open_in(&self, slot: Slot, request: &Request) -> Result<(Stream, ResponseHead), OpenError> {
        let link = self.link();
        let stream = Stream { id: self.ask(request)?, slot };
        let id = stream.id;
        link.expect_reply(id, Instant::now() + self.reply_timeout);
        link.wake_driver();
        let head = poll_fn(|cx| poll_answer(cx, link, id)).await?;
        Ok((stream, head))
    }

    /// Gathers a request; its stream.
    fn ask(&self, request: &Request) -> Result<u32, OpenError> {
        if let Some(ended) = self.link().ended() {
            return Err(ended.into());
        }
        let mut core = self.link().core.borrow_mut();
        if core.goaway().is_some() || core.is_used_up() {
            return Err(OpenError::Full);
        }
        let stream = core.open(request, Local::default()).ok_or(OpenError::Invalid)?;
        if core.is_used_up() {
            // It was the last one: others are for another tunnel.
            self.link().closing.set(true);
        }
        Ok(stream)
    }
}

/// The answer to a request, when it comes.
fn poll_answer(cx: &mut Context<'_>, link: &Link, id: u32) -> Poll<Result<ResponseHead, OpenError>> {
    let mut core = link.core.borrow_mut();
    let Some(entry) = core.get_mut(id) else { return Poll::Ready(Err(OpenError::Ended(Ended::Closed))) };
    // An answer that came before the stream was reset is an answer all the same.
    let answer = match entry.data.answer.take().map(|answer| *answer) {
        Some((StatusCode::OK, head)) => Ok(head),
        Some((status, _)) => Err(OpenError::Refused(status)),
        None => {
            if let Some(reason) = entry.reset() {
                Err(OpenError::Reset(reason))
            } else if let Some(ended) = link.ended() {
                Err(OpenError::Ended(ended))
            } else if entry.data.timed_out {
                Err(OpenError::TimedOut)
            } else {
                keep(&mut entry.data.waker, cx.waker());
                return Poll::Pending;
            }
        }
    };
    Poll::Ready(answer)
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("streams", &self.streams()).field("free", &self.free()).finish_non_exhaustive()
    }
}

/// Moves a tunnel's bytes: to be spawned on the thread that uses it. It yields why the tunnel ended.
pub struct Driver<IO> {
    machine: Machine<IO>,
}

impl<IO> fmt::Debug for Driver<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Future for Driver<IO> {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        // Nobody asks a client.
        self.machine.poll(cx, &mut |_, _| {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::Headers;

    #[tokio::test]
    async fn a_tunnel_without_stream_numbers_is_full_and_gives_way_to_another() {
        let (near, _far) = tokio::io::duplex(1000);
        let (tunnel, _driver) = Tunnel::connect(near, &Config::default()).await.unwrap();
        let request = Request { target: "10.0.0.1:80".parse().unwrap(), headers: Headers::default() };
        tunnel.link().core.borrow_mut().skip_to(0x7fff_fffd);
        assert_eq!(tunnel.ask(&request).unwrap(), 0x7fff_fffd);
        assert!(!tunnel.is_retired());
        assert_eq!(tunnel.ask(&request).unwrap(), 0x7fff_ffff, "the last one");
        assert!(tunnel.is_retired());
        assert_eq!(tunnel.free(), 0);
        let error = tunnel.ask(&request).unwrap_err();
        assert!(matches!(error, OpenError::Full), "{error}");
        assert!(error.unprocessed(), "another tunnel may be tried");
    }
}
