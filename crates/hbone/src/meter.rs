//! Bytes that were carried, and how a connection ended: the same for a tunnel's stream and for plain TCP.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::net::TcpStream;

use crate::error::Ended;
use crate::reason::Reason;

/// Bytes of a live connection, seen from the application's side of the proxy.
///
/// Written by the one thread that carries the connection, read by whoever looks. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Counters(Arc<Totals>);

#[derive(Debug, Default)]
struct Totals {
    /// Taken from the application's socket and sent on.
    sent: AtomicU64,
    /// Received for the application and written to its socket.
    received: AtomicU64,
}

impl Counters {
    /// What was carried so far: sent, received.
    pub fn load(&self) -> (u64, u64) {
        (self.0.sent.load(Relaxed), self.0.received.load(Relaxed))
    }

    pub(crate) fn sent(&self, n: usize) {
        add(&self.0.sent, n);
    }

    pub(crate) fn received(&self, n: usize) {
        add(&self.0.received, n);
    }
}

/// There is one writer, so this needs no locked instruction.
fn add(counter: &AtomicU64, n: usize) {
    counter.store(counter.load(Relaxed) + n as u64, Relaxed);
}

/// How a relayed connection ended.
#[derive(Debug, Clone)]
pub enum End {
    /// Both directions were ended by their senders.
    Complete,
    /// The peer ended its direction and wants nothing more, by a reset without an error; the application was told by a close.
    Closed,
    /// The application's socket failed, mostly by a reset; the peer was told by a reset.
    Application(Arc<io::Error>),
    /// The other socket failed (plain TCP); the application was told by a reset.
    Other(Arc<io::Error>),
    /// The peer reset the stream; the application was told by a reset.
    Reset(Reason),
    /// The tunnel ended below the stream; the application was told by a reset.
    Tunnel(Ended),
    /// We cut it: both ends were told by a reset.
    Cut,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => f.write_str("complete"),
            Self::Closed => f.write_str("closed by the peer"),
            Self::Application(error) => write!(f, "the application's connection failed: {error}"),
            Self::Other(error) => write!(f, "the destination's connection failed: {error}"),
            Self::Reset(reason) => write!(f, "the peer reset the connection: {reason}"),
            Self::Tunnel(ended) => ended.fmt(f),
            Self::Cut => f.write_str("the connection was cut"),
        }
    }
}

/// The error by which a socket failed when it became readable or writable for no other reason.
pub(crate) fn socket_error(socket: &TcpStream) -> Arc<io::Error> {
    let error = socket.take_error().ok().flatten();
    Arc::new(error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
}

/// Closes a socket with a reset instead of an orderly end.
pub(crate) fn reset(socket: TcpStream) {
    // Without it the close is orderly, which is the worse message but no leak.
    let _ = socket.set_zero_linger();
    drop(socket);
}
