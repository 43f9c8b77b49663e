//! The client's end of a tunnel.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};

use crate::config::{Config, SMALL_FRAME_BUDGET};
use crate::driver::Turn;
use crate::error::{Ended, OpenError};
use crate::guard::Guard;
use crate::request::{Request, ResponseHead};
use crate::shared::{Shared, Slot, TunnelId};
use crate::stream::Stream;
use crate::wire::{self, Wire};

/// A handle to a tunnel, to open streams with. Clones share the tunnel; it is closed when the last of them and of its streams is gone.
#[derive(Clone)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    shared: Rc<Shared>,
    limit: usize,
    reply_timeout: Duration,
}

impl Tunnel {
    /// Begins HTTP/2 on a connection. The peer's settings are not waited for: the first stream may be opened at once.
    pub async fn connect<IO>(io: IO, config: &Config) -> Result<(Self, Driver<IO>), Ended>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let (wire, pusher, watch) = wire::split(io, Guard::new(false, config.idle_frames));
        let handshake = client::Builder::new()
            .initial_window_size(config.stream_window)
            .initial_connection_window_size(config.connection_window)
            .max_frame_size(config.frame_size)
            .max_header_list_size(config.header_list)
            .max_send_buffer_size(config.send_buffer)
            .initial_max_send_streams(config.client_streams)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .enable_push(false)
            .handshake::<_, Bytes>(wire);
        let (send, mut connection) = handshake.await.map_err(|error| watch.explain(error))?;
        let shared = Shared::new();
        let ping_pong = connection.ping_pong();
        let turn = Turn::new(config, pusher, watch, shared.clone(), ping_pong);
        let tunnel = Self { send, shared, limit: config.client_streams, reply_timeout: config.reply_timeout };
        Ok((tunnel, Driver { connection, turn }))
    }

    /// Streams that can still be opened. One until the peer has said how many it takes: the others would wait for it unseen.
    pub fn free(&self) -> usize {
        if self.shared.closing.get() {
            return 0;
        }
        self.limit().saturating_sub(self.shared.streams.get())
    }

    pub(crate) fn limit(&self) -> usize {
        match self.shared.settled.get() {
            true => self.limit.min(self.send.current_max_send_streams()),
            false => 1,
        }
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.shared.settled.get()
    }

    /// Calls `f` whenever more streams may be free than before.
    pub(crate) fn on_freed(&self, f: impl Fn() + 'static) {
        self.shared.on_freed(Rc::new(f));
    }

    /// Its name, as [`Stream::tunnel`] has it.
    pub fn id(&self) -> TunnelId {
        self.shared.id
    }

    /// Streams that are open.
    pub fn streams(&self) -> usize {
        self.shared.streams.get()
    }

    /// When the last stream ended; meaningless while there are any.
    pub fn idle_since(&self) -> Instant {
        self.shared.idle_since.get()
    }

    /// Why it ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        self.shared.ended()
    }

    /// Opens no more streams; those that are open live on.
    pub fn retire(&self) {
        self.shared.closing.set(true);
        self.shared.wake_driver();
    }

    /// It opens no more streams, by our will or the peer's.
    pub(crate) fn is_retired(&self) -> bool {
        self.shared.closing.get()
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.shared, &other.shared)
    }

    /// Takes one of the [`Tunnel::free`] streams, to be opened later; none if there is none.
    pub(crate) fn slot(&self) -> Option<Slot> {
        (self.free() > 0).then(|| Slot::new(&self.shared))
    }

    /// Sends a CONNECT and waits for its answer. Dropping the future resets the stream.
    pub async fn open(&self, request: &Request) -> Result<(Stream, ResponseHead), OpenError> {
        let slot = self.slot().ok_or(OpenError::Full)?;
        self.open_in(slot, request).await
    }

    pub(crate) async fn open_in(&self, slot: Slot, request: &Request) -> Result<(Stream, ResponseHead), OpenError> {
        let request = request.to_http().ok_or(OpenError::Invalid)?;
        let mut send = self.send.clone();
        let failed = |error: h2::Error| match error.reason() {
            Some(reason) if error.is_reset() && error.is_remote() => OpenError::Reset(reason),
            _ => OpenError::Ended(self.shared.explain(error)),
        };
        poll_fn(|cx| send.poll_ready(cx)).await.map_err(failed)?;
        let (response, send) = send.send_request(request, false).map_err(failed)?;
        let response = timeout(self.reply_timeout, response).await.map_err(|_| OpenError::TimedOut)?.map_err(failed)?;
        let (head, recv) = response.into_parts();
        if head.status != StatusCode::OK {
            return Err(OpenError::Refused(head.status));
        }
        Ok((Stream { send, recv, slot }, ResponseHead::parse(&head.headers)))
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("streams", &self.streams()).field("free", &self.free()).finish_non_exhaustive()
    }
}

/// Moves a tunnel's bytes: to be spawned on the thread that uses it. It yields why the tunnel ended.
pub struct Driver<IO> {
    connection: client::Connection<Wire<IO>, Bytes>,
    turn: Turn<IO>,
}

impl<IO> fmt::Debug for Driver<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Future for Driver<IO> {
    type Output = Ended;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        let this = self.get_mut();
        let ended = match Pin::new(&mut this.connection).poll(cx) {
            Poll::Ready(Ok(())) => Ended::Closed,
            Poll::Ready(Err(error)) => this.turn.watch.explain(error),
            Poll::Pending => {
                if let Some(window) = this.turn.new_window() {
                    this.connection.set_target_window_size(window);
                }
                if this.turn.watch.goaway.get() {
                    this.turn.shared.closing.set(true);
                }
                match this.turn.poll_rest(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(ended) => ended,
                }
            }
        };
        this.turn.shared.end(&ended);
        Poll::Ready(ended)
    }
}
