//! The server's end of a tunnel.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::config::Config;
use crate::core::Core;
use crate::driver::Machine;
use crate::error::Ended;
use crate::link::{Link, Slot, keep};
use crate::request::{Malformed, RequestHead, ResponseHead};
use crate::stream::Stream;

/// A stream that a peer asks for. Dropping it without an answer refuses it with 503.
pub struct Incoming {
    /// What is asked for.
    pub head: RequestHead,
    stream: Option<Stream>,
}

impl Incoming {
    /// Grants it: the destination is connected.
    pub fn accept(mut self, head: &ResponseHead) -> Result<Stream, Ended> {
        // None: it was told that nobody waits.
        let Some(stream) = self.stream.take() else { return Err(Ended::Closed) };
        let link = &stream.slot.0;
        if let Some(ended) = link.ended() {
            return Err(ended);
        }
        if !link.core.borrow_mut().answer(stream.id, head) {
            return Err(Ended::Closed);
        }
        link.wake_driver();
        Ok(stream)
    }

    /// Refuses it: 400 for what makes no sense, 401 for what policy denies, 503 for what cannot be connected.
    pub fn reject(mut self, status: StatusCode) {
        self.refuse(status);
    }

    /// Completes when the peer no longer waits for an answer. Safe to cancel.
    pub async fn abandoned(&mut self) {
        let Some(Stream { id, slot }) = &self.stream else { return };
        // A reset or the end of the tunnel: either way nobody waits.
        poll_fn(|cx| {
            if slot.0.ended().is_some() {
                return Poll::Ready(());
            }
            match slot.0.core.borrow_mut().get_mut(*id) {
                Some(entry) if entry.reset().is_none() => {
                    keep(&mut entry.data.waker, cx.waker());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
        self.stream = None;
    }

    fn refuse(&mut self, status: StatusCode) {
        if let Some(stream) = self.stream.take() {
            stream.slot.0.core.borrow_mut().refuse(stream.id, status);
            stream.slot.0.wake_driver();
        }
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
    let link = Link::new(Core::server(config));
    let mut machine = Machine::new(io, link.clone(), config);
    let mut drain = pin!(drain);
    let mut draining = false;
    poll_fn(|cx| {
        if !draining && drain.as_mut().poll(cx).is_ready() {
            draining = true;
            link.core.borrow_mut().drain();
        }
        machine.poll(cx, &mut |id, head| asked(&link, handler, id, head))
    })
    .await
}

fn asked<H: Handler>(link: &Rc<Link>, handler: &H, id: u32, head: Result<RequestHead, Malformed>) {
    match head {
        Ok(head) => handler.stream(Incoming { head, stream: Some(Stream { id, slot: Slot::new(link) }) }),
        Err(malformed) => handler.malformed(malformed),
    }
}
