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

use crate::lend;
use crate::meter::{self, Counters, End};

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
        End::Complete => {}
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

/// One direction. It completes only when a socket fails: after its end it goes on watching for a reset.
async fn one_way(from: &TcpStream, to: &TcpStream, open: &Cell<u8>, count: impl Fn(usize)) -> (Side, Arc<io::Error>) {
    loop {
        if let Err(error) = from.readable().await {
            return (Side::From, Arc::new(error));
        }
        let mut buffer = lend::take();
        let n = match from.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return (Side::From, Arc::new(error)),
        };
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            match to.try_write(rest) {
                Ok(n) => {
                    rest = &rest[n..];
                    count(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Err(error) = to.writable().await {
                        return (Side::To, Arc::new(error));
                    }
                }
                Err(error) => return (Side::To, Arc::new(error)),
            }
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
