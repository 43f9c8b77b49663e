//! What can go wrong with a tunnel and with opening a stream.

use std::io;
use std::sync::Arc;

use http::StatusCode;

use crate::reason::Reason;

/// A peer that does more than an honest one would of what costs it little and us something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Flood {
    /// Empty ones, or nothing but padding.
    #[error("the peer floods the tunnel with DATA frames without data")]
    Data,
    /// Too many that lead to nothing, or a block that is or unfolds to too much.
    #[error("the peer floods the tunnel with HEADERS")]
    Headers,
    /// PRIORITY, which means nothing.
    #[error("the peer floods the tunnel with PRIORITY frames")]
    Priority,
    /// For streams that are gone.
    #[error("the peer floods the tunnel with RST_STREAM frames")]
    Reset,
    /// Settings, or acknowledgements of none.
    #[error("the peer floods the tunnel with SETTINGS")]
    Settings,
    /// Pings, or answers to none.
    #[error("the peer floods the tunnel with PING frames")]
    Ping,
    /// More than one says.
    #[error("the peer floods the tunnel with GOAWAY frames")]
    GoAway,
    /// More than what was sent explains.
    #[error("the peer floods the tunnel with WINDOW_UPDATE frames")]
    WindowUpdate,
    /// A header block without end.
    #[error("the peer floods the tunnel with CONTINUATION frames")]
    Continuation,
    /// Frames that HTTP/2 does not know.
    #[error("the peer floods the tunnel with unknown frames")]
    Unknown,
    /// Requests that the peer takes back before they are answered (CVE-2023-44487), or spoils so that we reset them (CVE-2025-8671).
    #[error("the peer floods the tunnel with requests that it takes back or spoils")]
    Abandoned,
}

impl Flood {
    /// As it is called in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Data => "flood_data",
            Self::Headers => "flood_headers",
            Self::Priority => "flood_priority",
            Self::Reset => "flood_rst_stream",
            Self::Settings => "flood_settings",
            Self::Ping => "flood_ping",
            Self::GoAway => "flood_goaway",
            Self::WindowUpdate => "flood_window_update",
            Self::Continuation => "flood_continuation",
            Self::Unknown => "flood_unknown",
            Self::Abandoned => "flood_abandoned",
        }
    }
}

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

impl Ended {
    /// What an operator should hear of the peer, if it ended by something that no honest one does: one of a few names.
    pub fn offence(&self) -> Option<&'static str> {
        match self {
            Self::Protocol(violation) => Some(match violation.reason {
                Reason::FLOW_CONTROL_ERROR => "flow_control_error",
                Reason::FRAME_SIZE_ERROR => "frame_size_error",
                Reason::COMPRESSION_ERROR => "compression_error",
                _ => "protocol_error",
            }),
            Self::Flood(flood) => Some(flood.label()),
            Self::Handshake => Some("settings_timeout"),
            _ => None,
        }
    }
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
