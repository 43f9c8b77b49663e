//! Accepting connections, also when descriptors run out.
//!
//! Without a free descriptor a connection stays in the kernel's queue and the listener stays readable, so that a loop that only
//! tries again burns a core. One descriptor is held back: it is given up to accept the connection and close it, so that the
//! client learns at once, and taken again. Then the listener rests.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use zspire_sys::socket;

use crate::connect::{canonical, refuse};
use crate::pod::Pod;
use crate::proxy::BACKLOG;

/// How long a listener rests when something that a connection needs has run out.
const REST: Duration = Duration::from_millis(20);
/// How long a listener goes on when it is no longer wanted: for handshakes that have begun. Others that share its port take
/// what begins after.
const HANDSHAKES: Duration = Duration::from_millis(100);
/// At most one line about it in this time.
const COMPLAINT: Duration = Duration::from_secs(10);

/// A connection that was accepted, and nothing more.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) socket: TcpStream,
    /// Where it comes from.
    pub(crate) source: SocketAddr,
}

/// Accepts connections and starts `serve` for each as a task of the pod, until the pod drains.
///
/// The kernel resets what a listener that is closed has in its queue, and what is in the middle of a handshake with it. So
/// clients that are new are left to a successor, if there is one, and those that have begun are accepted before it is closed.
pub(crate) async fn accept<F>(listener: std::net::TcpListener, pod: &Pod, serve: impl Fn(Pod, Accepted) -> F)
where
    F: Future<Output = ()> + 'static,
{
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot watch a listening socket");
            return;
        }
    };
    let reserve = Reserve::default();
    let mut over = pin!(drained(pod, &listener));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut over => break,
        };
        match accepted {
            Ok((socket, source)) => start(pod, socket, source, &serve),
            // The listener itself is of no use, which will not pass soon.
            Err(error) if is_lasting(&error) => {
                tracing::error!(%error, "connections cannot be accepted");
                tokio::time::sleep(25 * REST).await;
            }
            // The client went away while it waited.
            Err(error) if !is_shortage(&error) => {}
            Err(error) => {
                reserve.shed(&listener, &error);
                tokio::time::sleep(REST).await;
            }
        }
    }
    for (socket, source) in waiting(&listener) {
        start(pod, socket, source, &serve);
    }
}

/// Completes when the pod drains and the listener has nobody left who has begun to connect.
async fn drained(pod: &Pod, listener: &TcpListener) {
    pod.drain().cancelled().await;
    let own = u32::try_from(pod.sockets().sharing()).unwrap_or(u32::MAX);
    // Of a port that is not shared there is no successor.
    if socket::prefer_later_listeners(listener, own).is_ok() {
        tokio::time::sleep(HANDSHAKES).await;
    }
}

fn start<F>(pod: &Pod, socket: TcpStream, source: SocketAddr, serve: &impl Fn(Pod, Accepted) -> F)
where
    F: Future<Output = ()> + 'static,
{
    let accepted = Accepted { socket, source: canonical(source) };
    pod.connections().spawn(serve(pod.clone(), accepted));
}

/// Those that wait to be accepted now, whether or not the runtime has been told of them; not those that come meanwhile for ever.
fn waiting(listener: &TcpListener) -> impl Iterator<Item = (TcpStream, SocketAddr)> {
    (0..BACKLOG).map_while(move |_| SockRef::from(listener).accept().ok()).filter_map(|(socket, source)| {
        socket.set_nonblocking(true).ok()?;
        Some((TcpStream::from_std(socket.into()).ok()?, source.as_socket()?))
    })
}

fn is_lasting(error: &io::Error) -> bool {
    // EPERM, EBADF, EINVAL, ENOTSOCK
    matches!(error.raw_os_error(), Some(1 | 9 | 22 | 88))
}

fn is_shortage(error: &io::Error) -> bool {
    // EMFILE, ENFILE, ENOBUFS, ENOMEM
    matches!(error.raw_os_error(), Some(24 | 23 | 105 | 12))
}

/// A complaint that every connection of a pod could give rise to: it is made once in a while.
#[derive(Debug, Default)]
pub(crate) struct Complaint(Mutex<Option<Instant>>);

impl Complaint {
    /// Whether it may be made now.
    pub(crate) fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|at| at.elapsed() >= COMPLAINT);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

/// The descriptor that is held back.
struct Reserve {
    held: Cell<Option<File>>,
    complaint: Complaint,
}

impl Default for Reserve {
    fn default() -> Self {
        Self { held: Cell::new(File::open("/dev/null").ok()), complaint: Complaint::default() }
    }
}

impl Reserve {
    /// Turns away what waits, as far as it waits now.
    fn shed(&self, listener: &TcpListener, error: &io::Error) {
        drop(self.held.take());
        let mut shed = 0;
        while shed < 1024
            && let Ok((socket, _)) = SockRef::from(listener).accept()
        {
            let _ = socket.set_linger(Some(Duration::ZERO));
            shed += 1;
        }
        self.held.set(File::open("/dev/null").ok());
        if self.complaint.is_due() {
            tracing::error!(%error, shed, "connections are turned away: raise the limit of open files (ulimit -n)");
        }
    }
}

impl Accepted {
    /// Where it arrived.
    pub(crate) fn local(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr().map(canonical)
    }

    /// Where the client wanted to go before it was redirected; if it was not, where it arrived.
    pub(crate) fn destination(&self) -> io::Result<SocketAddr> {
        match socket::original_destination(&self.socket, self.source) {
            Ok(original) => Ok(canonical(original)),
            Err(_) => self.local(),
        }
    }

    /// Turns the client away.
    pub(crate) fn refuse(self) {
        refuse(self.socket);
    }
}
