//! The byte path: an application's socket on one side, a stream of a tunnel on the other.
//!
//! ```text
//!  application ── EOF ──▶ END_STREAM      reset ──▶ RST_STREAM(CONNECT_ERROR)
//!  stream ── END_STREAM ──▶ FIN, after all bytes      RST_STREAM or the tunnel's end ──▶ reset
//! ```
//! Each direction ends by itself; neither message ever becomes the other. Stream credit goes back to the peer when the
//! application has taken the bytes. An idle relay holds no buffer.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use smallvec::SmallVec;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;
use tokio_util::io::poll_read_buf;

use crate::meter::{self, Counters, End};
use crate::shared::{Held, Shared};
use crate::stream::Stream;

/// The first read of a socket that was idle.
const READ_MIN: usize = 4 << 10;
/// The largest read: a turn of one stream is everybody's time.
const READ_MAX: usize = 512 << 10;
/// Frames written to the application at once.
const GATHER: usize = 16;

impl Stream {
    /// Carries bytes between the stream and a socket until both directions have ended, or until `cut` completes.
    ///
    /// Dropping the future resets the stream and closes the socket.
    pub async fn relay(self, mut app: TcpStream, counters: &Counters, cut: impl Future<Output = ()>) -> End {
        let Self { mut send, mut recv, slot } = self;
        let state = State::default();
        let end = {
            let (from, to) = app.split();
            let mut up = pin!(up(from, &mut send, &slot.0, counters, &state));
            let mut down = pin!(down(to.as_ref(), &mut recv, &slot.0, counters, &state));
            let mut cut = pin!(cut);
            poll_fn(|cx| poll_both(cx, &state, up.as_mut(), down.as_mut(), cut.as_mut())).await
        };
        match &end {
            End::Complete => {}
            End::Application(_) => {
                // RFC 9113 §8.5: a TCP error is signalled as CONNECT_ERROR.
                send.send_reset(Reason::CONNECT_ERROR);
                drop(app);
            }
            End::Cut => {
                send.send_reset(Reason::CANCEL);
                meter::reset(app);
            }
            End::Other(_) | End::Reset(_) | End::Tunnel(_) => meter::reset(app),
        }
        end
    }
}

/// What the two directions know of each other.
#[derive(Debug, Default)]
struct State {
    /// The application has ended its direction, and the peer was told.
    up_done: Cell<bool>,
    /// The peer has ended its direction, and the application was told.
    down_done: Cell<bool>,
}

fn poll_both<U, D, C>(
    cx: &mut Context<'_>,
    state: &State,
    mut up: std::pin::Pin<&mut U>,
    down: std::pin::Pin<&mut D>,
    cut: std::pin::Pin<&mut C>,
) -> Poll<End>
where
    U: Future<Output = End>,
    D: Future<Output = Result<(), End>>,
    C: Future<Output = ()>,
{
    if cut.poll(cx).is_ready() {
        return Poll::Ready(End::Cut);
    }
    if let Poll::Ready(end) = up.as_mut().poll(cx) {
        return Poll::Ready(end);
    }
    if !state.down_done.get() {
        match down.poll(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(end)) => return Poll::Ready(end),
            Poll::Ready(Ok(())) => state.down_done.set(true),
        }
        // From now on it is `up` that has to notice a reset.
        if !state.up_done.get()
            && let Poll::Ready(end) = up.poll(cx)
        {
            return Poll::Ready(end);
        }
    }
    if state.up_done.get() { Poll::Ready(End::Complete) } else { Poll::Pending }
}

/// From the application into the stream. It completes only when something fails: after the application's end it goes on
/// watching for a reset.
async fn up(
    mut app: ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    shared: &Shared,
    counters: &Counters,
    state: &State,
) -> End {
    let mut size = READ_MIN;
    loop {
        let read = poll_fn(|cx| poll_read(cx, &mut app, send, shared, state, &mut size)).await;
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(end) => return end,
        };
        let n = bytes.len();
        if let Err(error) = send.send_data(bytes, n == 0) {
            return stream_end(shared, error);
        }
        if n == 0 {
            break;
        }
        counters.sent(n);
    }
    state.up_done.set(true);
    match app.ready(Interest::ERROR).await {
        Ok(_) => End::Application(meter::socket_error(app.as_ref())),
        Err(error) => End::Application(Arc::new(error)),
    }
}

/// The next bytes of the application; none at its end.
fn poll_read(
    cx: &mut Context<'_>,
    app: &mut ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    shared: &Shared,
    state: &State,
    size: &mut usize,
) -> Poll<Result<Bytes, End>> {
    loop {
        if app.as_ref().poll_read_ready(cx).map_err(|error| End::Application(Arc::new(error)))?.is_pending() {
            // Window that an idle stream has reserved is window that the others lack.
            *size = READ_MIN;
            if send.capacity() > 0 {
                send.reserve_capacity(0);
            }
            if state.down_done.get() {
                return poll_reset(cx, send, shared).map(Err);
            }
            return Poll::Pending;
        }
        let room = match poll_room(cx, send, shared, *size) {
            Poll::Ready(Ok(room)) => room,
            Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
            Poll::Pending => return Poll::Pending,
        };
        let want = room.min(*size);
        let mut buffer = BytesMut::with_capacity(want);
        // After a short read it is not asked again until the kernel says that there is more.
        match poll_read_buf(Pin::new(&mut *app), cx, &mut (&mut buffer).limit(want)) {
            Poll::Ready(Ok(n)) => {
                if n == *size {
                    *size = (*size * 4).min(READ_MAX);
                }
                return Poll::Ready(Ok(buffer.freeze()));
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(End::Application(Arc::new(error)))),
            Poll::Pending => {}
        }
    }
}

/// How much may be sent now, at least one byte.
fn poll_room(
    cx: &mut Context<'_>,
    send: &mut SendStream<Bytes>,
    shared: &Shared,
    want: usize,
) -> Poll<Result<usize, End>> {
    send.reserve_capacity(want);
    loop {
        match send.capacity() {
            0 => match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(stream_end(shared, error))),
                // The stream is closed for sending, which only a reset does before we have ended it.
                None => return poll_reset(cx, send, shared).map(Err),
            },
            room => return Poll::Ready(Ok(room)),
        }
    }
}

fn poll_reset(cx: &mut Context<'_>, send: &mut SendStream<Bytes>, shared: &Shared) -> Poll<End> {
    match ready!(send.poll_reset(cx)) {
        Ok(reason) => Poll::Ready(End::Reset(reason)),
        Err(error) => Poll::Ready(stream_end(shared, error)),
    }
}

/// From the stream to the application, until the peer has ended its direction.
async fn down(
    app: &TcpStream,
    recv: &mut RecvStream,
    shared: &Shared,
    counters: &Counters,
    state: &State,
) -> Result<(), End> {
    let mut frames: SmallVec<[Bytes; 2]> = SmallVec::new();
    let mut held = Held::new(shared);
    let mut ended = false;
    loop {
        poll_fn(|cx| poll_frames(cx, recv, shared, &mut frames, &mut ended)).await?;
        if frames.is_empty() {
            break;
        }
        while !frames.is_empty() {
            match write(app, &frames) {
                Ok(n) => {
                    consume(&mut frames, n);
                    counters.received(n);
                    // Fails only for more than was received.
                    let _ = recv.flow_control().release_capacity(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    held.set(frames.iter().map(Bytes::len).sum());
                    wait_writable(app, recv, shared, &mut frames, &mut ended, &mut held).await?;
                }
                Err(error) => return Err(End::Application(Arc::new(error))),
            }
        }
        held.set(0);
    }
    if state.up_done.get() {
        // All that it has sent was read: closing the socket says the same.
        return Ok(());
    }
    match SockRef::from(app).shutdown(Shutdown::Write) {
        Ok(()) => Ok(()),
        // It has closed both directions already, and did not need the end.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        Err(error) => Err(End::Application(Arc::new(error))),
    }
}

/// Waits until the application takes bytes; a reset is noticed meanwhile.
async fn wait_writable(
    app: &TcpStream,
    recv: &mut RecvStream,
    shared: &Shared,
    frames: &mut SmallVec<[Bytes; 2]>,
    ended: &mut bool,
    held: &mut Held<'_>,
) -> Result<(), End> {
    poll_fn(|cx| {
        if app.poll_write_ready(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        while !*ended {
            match recv.poll_data(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => *ended = true,
                Poll::Ready(Some(Ok(frame))) => frames.push(frame),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(stream_end(shared, error))),
            }
        }
        held.set(frames.iter().map(Bytes::len).sum());
        Poll::Pending
    })
    .await
}

/// Takes the frames that are there, at least one unless the stream has ended.
fn poll_frames(
    cx: &mut Context<'_>,
    recv: &mut RecvStream,
    shared: &Shared,
    frames: &mut SmallVec<[Bytes; 2]>,
    ended: &mut bool,
) -> Poll<Result<(), End>> {
    while !*ended && frames.len() < GATHER {
        match recv.poll_data(cx) {
            Poll::Ready(None) => *ended = true,
            Poll::Ready(Some(Ok(frame))) if frame.is_empty() => {}
            Poll::Ready(Some(Ok(frame))) => frames.push(frame),
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(stream_end(shared, error))),
            Poll::Pending if frames.is_empty() => return Poll::Pending,
            Poll::Pending => break,
        }
    }
    Poll::Ready(Ok(()))
}

fn write(app: &TcpStream, frames: &[Bytes]) -> io::Result<usize> {
    if let [one] = frames {
        return app.try_write(one);
    }
    let slices: SmallVec<[IoSlice<'_>; GATHER]> = frames.iter().take(GATHER).map(|frame| IoSlice::new(frame)).collect();
    app.try_write_vectored(&slices)
}

fn consume(frames: &mut SmallVec<[Bytes; 2]>, mut n: usize) {
    let mut whole = 0;
    for frame in frames.iter_mut() {
        if n < frame.len() {
            frame.advance(n);
            break;
        }
        n -= frame.len();
        whole += 1;
    }
    frames.drain(..whole);
}

fn stream_end(shared: &Shared, error: h2::Error) -> End {
    match error.reason() {
        Some(reason) if error.is_reset() && error.is_remote() => End::Reset(reason),
        _ => End::Tunnel(shared.explain(error)),
    }
}
