//! Plain TCP to plain TCP, for what does not go through a tunnel: the same ends, told the same way.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::consume_budget;

use crate::lend;
use crate::meter::{self, Counters, End};
use crate::pipe::{self, Pipe};

/// Carries bytes between two sockets until both directions have ended, or until `cut` completes.
///
/// `app` counts as the application's: what it sends is [`Counters::sent`]. A reset of one becomes a reset of the other.
pub async fn copy(app: TcpStream, other: TcpStream, counters: &Counters, cut: impl Future<Output = ()>) -> End {
    let open = Cell::new(2u8);
    let end = {
        let mut up = pin!(one_way(&app, &other, &open, |n| counters.sent(n)));
        let mut down = pin!(one_way(&other, &app, &open, |n| counters.received(n)));
        let mut cut = pin!(cut);
        poll_fn(|cx| {
            if cut.as_mut().poll(cx).is_ready() {
                return Poll::Ready(End::Cut);
            }
            let failed = |failure| match failure {
                (Side::From, error) => End::Application(error),
                (Side::To, error) => End::Other(error),
            };
            if let Poll::Ready(failure) = up.as_mut().poll(cx) {
                return Poll::Ready(failed(failure));
            }
            if let Poll::Ready((side, error)) = down.as_mut().poll(cx) {
                let side = if matches!(side, Side::From) { Side::To } else { Side::From };
                return Poll::Ready(failed((side, error)));
            }
            if open.get() == 0 { Poll::Ready(End::Complete) } else { Poll::Pending }
        })
        .await
    };
    match end {
        End::Complete | End::Closed => {}
        End::Application(_) => meter::reset(other),
        End::Other(_) => meter::reset(app),
        _ => {
            meter::reset(app);
            meter::reset(other);
        }
    }
    end
}

/// The socket that failed, seen from one direction.
enum Side {
    From,
    To,
}

/// A read of this many bytes is taken for bulk: what follows is left to the kernel ([`pipe`]), until it is less again. Below it two
/// short copies cost less than moving pages.
const BULK: usize = 64 << 10;

/// One direction. It completes only when a socket fails: after its end it goes on watching for a reset.
async fn one_way(from: &TcpStream, to: &TcpStream, open: &Cell<u8>, count: impl Fn(usize)) -> (Side, Arc<io::Error>) {
    let mut bulk = false;
    loop {
        // Where both sockets are always ready, nothing here waits: the others of this worker, and a cut, want their turns.
        consume_budget().await;
        if let Err(error) = from.readable().await {
            return (Side::From, Arc::new(error));
        }
        let moved = match bulk.then(pipe::take).flatten() {
            Some(pipe) => by_pipe(pipe, from, to, &count).await,
            None => by_buffer(from, to, &count).await,
        };
        match moved {
            Ok(0) => break,
            Ok(n) => bulk = n >= BULK,
            Err((Side::From, error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err((side, error)) => return (side, Arc::new(error)),
        }
    }
    match SockRef::from(to).shutdown(Shutdown::Write) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
        Err(error) => return (Side::To, Arc::new(error)),
    }
    open.set(open.get() - 1);
    match from.ready(Interest::ERROR).await {
        Ok(_) => (Side::From, meter::socket_error(from)),
        Err(error) => (Side::From, Arc::new(error)),
    }
}

/// Moves what one socket has to the other, as much as a pipe holds: the number of bytes, 0 at the end.
async fn by_pipe(
    mut pipe: Pipe,
    from: &TcpStream,
    to: &TcpStream,
    count: impl Fn(usize),
) -> Result<usize, (Side, io::Error)> {
    let filled = pipe.try_fill(from).map_err(|error| (Side::From, error));
    while !pipe.is_empty() {
        consume_budget().await;
        match pipe.try_drain(to) {
            Ok(n) => count(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                to.writable().await.map_err(|error| (Side::To, error))?;
            }
            Err(error) => return Err((Side::To, error)),
        }
    }
    pipe::give(pipe);
    filled
}

/// The same by copying. What the other socket does not take at once is kept in memory of its own size: a reader that sleeps costs no
/// more than it was sent.
async fn by_buffer(from: &TcpStream, to: &TcpStream, count: impl Fn(usize)) -> Result<usize, (Side, io::Error)> {
    let (n, kept) = {
        let mut buffer = lend::take();
        let n = from.try_read(&mut buffer[..BULK]).map_err(|error| (Side::From, error))?;
        let taken = write_some(&buffer[..n], to, &count)?;
        (n, buffer[taken..n].to_vec())
    };
    let mut rest = &kept[..];
    while !rest.is_empty() {
        to.writable().await.map_err(|error| (Side::To, error))?;
        consume_budget().await;
        rest = &rest[write_some(rest, to, &count)?..];
    }
    Ok(n)
}

/// Writes what a socket takes now: the number of bytes.
fn write_some(bytes: &[u8], to: &TcpStream, count: impl Fn(usize)) -> Result<usize, (Side, io::Error)> {
    if bytes.is_empty() {
        return Ok(0);
    }
    match to.try_write(bytes) {
        Ok(n) => {
            count(n);
            Ok(n)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err((Side::To, error)),
    }
}
