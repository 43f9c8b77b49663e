//! The server's end of a tunnel.

use std::fmt;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use h2::server::{self, SendResponse};
use h2::{Reason, RecvStream};
use http::{Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::config::{Config, SMALL_FRAME_BUDGET};
use crate::driver::Turn;
use crate::error::Ended;
use crate::guard::Guard;
use crate::request::{Malformed, RequestHead, ResponseHead};
use crate::shared::{Shared, Slot};
use crate::stream::Stream;
use crate::wire;

/// A stream that a peer asks for. Dropping it without an answer refuses it with 503.
pub struct Incoming {
    /// What is asked for.
    pub head: RequestHead,
    answer: Option<(SendResponse<Bytes>, RecvStream, Slot)>,
}

impl Incoming {
    /// Grants it: the destination is connected.
    pub fn accept(mut self, head: &ResponseHead) -> Result<Stream, Ended> {
        let (mut respond, recv, slot) = self.answer.take().expect("an answer takes the value");
        match respond.send_response(head.to_http(), false) {
            Ok(send) => Ok(Stream { send, recv, slot }),
            Err(error) => Err(slot.0.explain(error)),
        }
    }

    /// Refuses it: 400 for what makes no sense, 401 for what policy denies, 503 for what cannot be connected.
    pub fn reject(mut self, status: StatusCode) {
        self.refuse(status);
    }

    /// Completes when the peer no longer waits for an answer. Safe to cancel.
    pub async fn abandoned(&mut self) {
        let Some((respond, ..)) = &mut self.answer else { return };
        // A reset or the end of the tunnel: either way nobody waits.
        let _ = poll_fn(|cx| respond.poll_reset(cx)).await;
        if let Some((_, _, slot)) = self.answer.take() {
            slot.0.abandoned.set(slot.0.abandoned.get() + 1);
            slot.0.wake_driver();
        }
    }

    fn refuse(&mut self, status: StatusCode) {
        let Some((mut respond, ..)) = self.answer.take() else { return };
        let mut response = Response::new(());
        *response.status_mut() = status;
        // Fails only if nobody waits any more.
        let _ = respond.send_response(response, true);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.refuse(StatusCode::SERVICE_UNAVAILABLE);
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("head", &self.head).finish_non_exhaustive()
    }
}

/// What becomes of the streams of a tunnel.
pub trait Handler {
    /// A stream is asked for. Called on the tunnel's task: start a local task for whatever waits.
    fn stream(&self, incoming: Incoming);

    /// A request was answered with 400 because it is not HBONE.
    fn malformed(&self, what: Malformed);
}

/// Serves a tunnel until it ends; when `drain` completes, it takes no more streams (GOAWAY) and ends with its last one.
///
/// Dropping the future cuts every stream.
pub async fn serve<IO, H>(io: IO, config: &Config, handler: &H, drain: impl Future<Output = ()>) -> Ended
where
    IO: AsyncRead + AsyncWrite + Unpin,
    H: Handler,
{
    let (wire, pusher, watch) = wire::split(io, Guard::new(true, config.idle_frames));
    let handshake = server::Builder::new()
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.connection_window)
        .max_frame_size(config.frame_size)
        .max_header_list_size(config.header_list)
        .max_concurrent_streams(config.server_streams)
        .max_send_buffer_size(config.send_buffer)
        .data_frame_budget(SMALL_FRAME_BUDGET)
        .handshake::<_, Bytes>(wire);
    // What `h2` wrote in the handshake is gathered like everything else.
    let mut handshake = pin!(timeout(config.handshake_timeout, handshake));
    let handshake = poll_fn(|cx| match handshake.as_mut().poll(cx) {
        Poll::Pending => {
            let _ = pusher.poll_push(cx);
            Poll::Pending
        }
        ready => ready,
    });
    let mut connection = match handshake.await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return watch.explain(error),
        Err(_) => return Ended::Handshake,
    };
    let shared = Shared::new();
    let ping_pong = connection.ping_pong();
    let mut turn = Turn::new(config, pusher, watch, shared.clone(), ping_pong);
    let mut drain = pin!(drain);
    let mut draining = false;
    poll_fn(|cx| {
        if !draining && drain.as_mut().poll(cx).is_ready() {
            draining = true;
            connection.graceful_shutdown();
        }
        loop {
            let ended = match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    accept(request, respond, &shared, handler);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => turn.watch.explain(error),
                Poll::Ready(None) => Ended::Closed,
                Poll::Pending => {
                    if let Some(window) = turn.new_window() {
                        connection.set_target_window_size(window);
                    }
                    match turn.poll_rest(cx) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(ended) => ended,
                    }
                }
            };
            // A client that was told to go may close first, while our last words are on their way.
            let gone = draining && shared.streams.get() == 0 && matches!(ended, Ended::Io(_));
            let ended = if gone { Ended::Closed } else { ended };
            shared.end(&ended);
            if matches!(ended, Ended::Flood(_)) {
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                let _ = connection.poll_closed(cx);
                let _ = turn.poll_rest(cx);
            }
            return Poll::Ready(ended);
        }
    })
    .await
}

fn accept<H: Handler>(
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    shared: &Rc<Shared>,
    handler: &H,
) {
    match RequestHead::parse(&request) {
        Ok(head) => {
            let slot = Slot::new(shared);
            handler.stream(Incoming { head, answer: Some((respond, request.into_body(), slot)) });
        }
        Err(malformed) => {
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::BAD_REQUEST;
            let _ = respond.send_response(response, true);
            handler.malformed(malformed);
        }
    }
}

/// The address that a CONNECT asks for, if it asks for one.
impl RequestHead {
    /// The address asked for; none for a hostname.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.target {
            crate::request::Target::Address(address) => Some(address),
            crate::request::Target::Host { .. } => None,
        }
    }
}
