//! What can go wrong with a tunnel and with opening a stream.

use std::io;
use std::sync::Arc;

use http::StatusCode;

use crate::reason::Reason;

/// A peer that sends more frames without content than an honest one would.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer floods the tunnel with {0} frames")]
pub struct Flood(pub &'static str);

/// A peer that does what HTTP/2 forbids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer broke the protocol: {what}")]
pub struct Violation {
    /// What it is told.
    pub reason: Reason,
    /// What it did.
    pub what: &'static str,
}

/// Why a tunnel ended. Cheap to clone: every stream of the tunnel gets one.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Ended {
    /// In good order: drained, or closed by us when unused.
    #[error("the tunnel was closed")]
    Closed,
    /// The connection below broke. TLS alerts are found in its sources.
    #[error("the connection below the tunnel failed")]
    Io(#[source] Arc<io::Error>),
    /// The peer went away with an error.
    #[error("the peer closed the tunnel: {0}")]
    GoAway(Reason),
    /// The peer broke the protocol or a limit of it.
    #[error(transparent)]
    Protocol(#[from] Violation),
    /// The peer wasted our time.
    #[error(transparent)]
    Flood(#[from] Flood),
    /// The HTTP/2 handshake took too long.
    #[error("no HTTP/2 settings from the peer in time")]
    Handshake,
    /// No sign of life.
    #[error("the peer is silent and does not answer pings")]
    Silent,
}

/// Why there is no stream.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The peer answered, and the answer is no.
    #[error("http status: {0}")]
    Refused(StatusCode),
    /// The peer reset the stream instead of answering.
    #[error("the peer reset the stream before answering: {0}")]
    Reset(Reason),
    /// No answer in time.
    #[error("no answer to CONNECT in time")]
    TimedOut,
    /// No stream is free on this tunnel.
    #[error("the tunnel has no stream left")]
    Full,
    /// The request cannot be written as HTTP.
    #[error("the request is not valid HTTP")]
    Invalid,
    /// The tunnel is gone.
    #[error(transparent)]
    Ended(#[from] Ended),
}

impl OpenError {
    /// Whether the peer has certainly not processed the request, so that another tunnel to it may be tried.
    pub fn unprocessed(&self) -> bool {
        match self {
            Self::Full | Self::Reset(Reason::REFUSED_STREAM) => true,
            Self::Ended(ended) => !matches!(ended, Ended::Flood(_) | Ended::Protocol(_)),
            _ => false,
        }
    }
}
