//! HTTP/2 for CONNECT as a state machine: bytes of the peer in, events out; commands in, frames gathered for one write.
//!
//! It knows no socket, no clock and no task: the time is an argument, and what was gathered is taken from [`Core::out`]. One value
//! is one end of one tunnel. `T` is whatever its owner keeps for each stream, so that both are found at once.
//!
//! ```text
//!          receive(bytes) ──▶ Event          open, answer, refuse, send, end, reset, taken, release
//!  peer ──────────────────▶ ┌──────┐ ◀────────────────────────────────────────────────────────── owner
//!       ◀────────────────── │ Core │
//!                  out      └──────┘
//!
//!  a stream:  (open | Request) ─▶ asked ─ answer ─▶ open ─ each side ends by itself ─▶ ended
//!                                   └──── refuse, reset, RST_STREAM, a mistake of the peer ─▶ reset
//! ```
//! A stream that has ended or was reset stays known until its owner [releases](Core::release) it; for the peer it is gone.
//!
//! What is received is in [`receive`], what is sent in [`send`]; `guard` has the budgets for what a peer may waste.

mod flow;
mod frame;
mod guard;
pub mod hpack;
mod message;
mod out;
mod receive;
mod send;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use http::StatusCode;

use crate::config::Config;
use crate::error::{Ended, Flood, Violation};
use crate::reason::Reason;
use crate::request::{Malformed, RequestHead, ResponseHead};

use flow::Credit;
pub(crate) use flow::DEEP;
use guard::Guard;
use hpack::Decoder;
pub(crate) use out::Out;
use receive::{Block, Reading};
pub(crate) use send::Sent;
pub use stream::Entry;
use stream::Streams;

/// The window of a stream or a connection before anything was said about it (RFC 9113 §6.9.2).
const WINDOW: u32 = 65_535;
/// The largest window (RFC 9113 §6.9.1).
const WINDOW_MAX: i64 = 0x7fff_ffff;
/// Bytes that wait for a peer that does not read, beyond which nothing is taken from it either.
const BACKLOG: usize = out::GATHER + (64 << 10);

/// Which end of the tunnel this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

/// What the peer has said about itself.
#[derive(Debug)]
struct Peer {
    frame_size: u32,
    stream_window: u32,
    streams: Option<u32>,
    /// Its first SETTINGS have come.
    settled: bool,
    /// It has acknowledged ours.
    acknowledged: bool,
    /// It takes, or opens, no more streams.
    goaway: Option<Reason>,
}

/// How far a server is in taking no more streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drain {
    No,
    /// Announced; what is under way is still taken.
    Announced,
    /// The peer has heard it.
    Heard,
}

/// See the module.
#[derive(Debug)]
pub struct Core<T> {
    role: Role,
    config: Config,
    reading: Reading,
    /// The part of a frame that has come, if it has not come at once.
    partial: Vec<u8>,
    /// The header block that is not complete.
    block: Option<Block>,
    decoder: Decoder,
    guard: Guard,
    peer: Peer,
    streams: Streams<T>,
    /// The peer was told that our header blocks use no table.
    no_table_said: bool,
    /// The last stream that the peer has opened.
    last_peer: u32,
    /// The next stream that we open.
    next: u32,
    /// What may be sent on all streams together.
    send_window: i64,
    credit: Credit,
    /// Frames that wait to be written.
    pub(crate) out: Out,
    /// Not everything could be written: nothing more is gathered before it is.
    pub(crate) stalled: bool,
    /// Streams that want to send and wait for room, by their turn; each keeps its place until it was served.
    queue: VecDeque<(u64, u32)>,
    /// The next place in it.
    place: u64,
    /// The stream that was the last to send, and whether others sent in the same turn.
    sender: u32,
    crowd: bool,
    drain: Drain,
    pinged: bool,
}

/// Something that the peer did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It opens a stream; a malformed request was answered already, and its stream is gone.
    Request { stream: u32, head: Result<RequestHead, Malformed> },
    /// It answers a request of ours.
    Answer { stream: u32, status: StatusCode, head: ResponseHead },
    /// It sends bytes: those of the input in this range. `end`: nothing follows them.
    Data { stream: u32, range: Range<usize>, end: bool },
    /// The stream was reset, by the peer or for a mistake of the peer.
    Reset { stream: u32, reason: Reason },
    /// The stream, or every one (none), may be able to send more.
    Window { stream: Option<u32> },
    /// It has said what it takes.
    Settings,
    /// It opens or takes no more streams; those that it will not look at were reset.
    GoAway,
}

/// Why nothing more can be done with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// It breaks the protocol.
    Protocol(Violation),
    /// It wastes our time.
    Flood(Flood),
}

impl Broken {
    /// What the peer is told.
    pub fn reason(self) -> Reason {
        match self {
            Self::Protocol(violation) => violation.reason,
            Self::Flood(_) => Reason::ENHANCE_YOUR_CALM,
        }
    }
}

impl From<Flood> for Broken {
    fn from(flood: Flood) -> Self {
        Self::Flood(flood)
    }
}

impl From<Violation> for Broken {
    fn from(violation: Violation) -> Self {
        Self::Protocol(violation)
    }
}

impl From<Broken> for Ended {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Protocol(violation) => Self::Protocol(violation),
            Broken::Flood(flood) => Self::Flood(flood),
        }
    }
}

fn violation(reason: Reason, what: &'static str) -> Broken {
    Broken::Protocol(Violation { reason, what })
}

impl<T: Default> Core<T> {
    /// The client's end; its first frames are gathered.
    pub fn client(config: &Config) -> Self {
        let mut core = Self::new(Role::Client, config);
        core.out.put(frame::PREFACE);
        core.greet();
        core
    }

    /// The server's end; its first frames are gathered.
    pub fn server(config: &Config) -> Self {
        let mut core = Self::new(Role::Server, config);
        core.greet();
        core
    }

    fn new(role: Role, config: &Config) -> Self {
        Self {
            role,
            reading: if role == Role::Server { Reading::Preface(0) } else { Reading::Header },
            partial: Vec::new(),
            block: None,
            decoder: Decoder::default(),
            guard: Guard::new(config.idle_frames),
            peer: Peer {
                frame_size: 16 << 10,
                stream_window: WINDOW,
                streams: None,
                settled: false,
                acknowledged: false,
                goaway: None,
            },
            streams: Streams::default(),
            last_peer: 0,
            next: 1,
            send_window: i64::from(WINDOW),
            credit: Credit::new(config),
            out: Out::default(),
            no_table_said: false,
            stalled: false,
            queue: VecDeque::new(),
            place: 0,
            sender: 0,
            crowd: false,
            drain: Drain::No,
            pinged: false,
            config: config.clone(),
        }
    }

    /// What each side says first (RFC 9113 §3.4).
    fn greet(&mut self) {
        const ENABLE_PUSH: u16 = 2;
        const MAX_CONCURRENT_STREAMS: u16 = 3;
        const INITIAL_WINDOW_SIZE: u16 = 4;
        const MAX_FRAME_SIZE: u16 = 5;
        const MAX_HEADER_LIST_SIZE: u16 = 6;
        let own = match self.role {
            Role::Client => (ENABLE_PUSH, 0),
            Role::Server => (MAX_CONCURRENT_STREAMS, self.config.server_streams),
        };
        let settings = [
            own,
            (INITIAL_WINDOW_SIZE, self.config.stream_window),
            (MAX_FRAME_SIZE, self.config.frame_size),
            (MAX_HEADER_LIST_SIZE, self.config.header_list),
        ];
        let mut payload = [0; 24];
        for (place, (setting, value)) in payload.chunks_exact_mut(6).zip(settings) {
            place[..2].copy_from_slice(&setting.to_be_bytes());
            place[2..].copy_from_slice(&value.to_be_bytes());
        }
        self.out.frame(frame::SETTINGS, 0, 0, &payload);
        self.return_credit();
    }

    /// The peer's first SETTINGS have come.
    pub fn is_settled(&self) -> bool {
        self.peer.settled
    }

    /// The first bytes of what was gathered have been written, at most `n`.
    pub fn written(&mut self, n: usize) {
        self.out.written(n.min(self.out.len()));
    }

    /// As if the next stream had this number.
    #[cfg(test)]
    pub(crate) fn skip_to(&mut self, next: u32) {
        self.next = next;
    }

    pub(crate) fn is_client(&self) -> bool {
        self.role == Role::Client
    }

    /// Streams that the peer takes at once.
    pub(crate) fn peer_streams(&self) -> usize {
        self.peer.streams.map_or(usize::MAX, |streams| streams as usize)
    }

    /// The peer takes, or opens, no more streams.
    pub fn goaway(&self) -> Option<Reason> {
        self.peer.goaway
    }

    /// Streams that have not ended.
    pub fn active(&self) -> usize {
        self.streams.active
    }

    /// The peer has heard that no more streams are taken, and the last one has ended.
    pub fn is_drained(&self) -> bool {
        self.drain == Drain::Heard && self.streams.active == 0
    }

    /// The peer does not read what we answer: nothing more should be received before it does.
    pub fn is_overloaded(&self) -> bool {
        self.out.len() > BACKLOG
    }

    /// So many bytes were received in one turn.
    pub(crate) fn came(&mut self, bytes: usize, now: Duration) {
        self.credit.came(bytes, self.streams.active > 1, now);
    }

    /// A stream that was not released yet.
    pub fn get(&self, stream: u32) -> Option<&Entry<T>> {
        self.streams.get(stream)
    }

    /// The same, with what its owner keeps.
    pub fn get_mut(&mut self, stream: u32) -> Option<&mut Entry<T>> {
        self.streams.get_mut(stream)
    }

    /// Every stream that was not released yet.
    pub(crate) fn each(&mut self, f: impl FnMut(&mut Entry<T>)) {
        self.streams.each(f);
    }

    /// Tells the streams that wait for room, in their order. Whoever finds none again keeps its place, so that those who are
    /// served and want more do not come first for ever.
    pub(crate) fn each_waiting(&mut self, mut tell: impl FnMut(&mut Entry<T>)) {
        if self.send_window <= 0 {
            return;
        }
        let streams = &mut self.streams;
        self.queue.retain(|(place, stream)| match streams.get_mut(*stream) {
            Some(entry) if entry.place == Some(*place) => {
                tell(entry);
                true
            }
            _ => false,
        });
        // What a crowd has needed is not kept.
        if self.queue.is_empty() {
            self.queue.shrink_to(4);
        }
    }
}
