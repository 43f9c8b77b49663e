//! What is sent: commands of the owner, as frames that are gathered.

use std::io::{self, IoSliceMut};

use http::StatusCode;

use super::frame::{self, Frame};
use super::hpack::{self, Decoder};
use super::message::{self, Block};
use super::{Core, Drain, Role};
use crate::reason::Reason;
use crate::request::{Request, ResponseHead};

/// What our pings say: a peer's answer is recognised by it.
pub(super) const PING: &[u8; 8] = b"alive???";
/// And the one that follows the announcement that no more streams are taken.
pub(super) const DRAIN: &[u8; 8] = b"draining";

/// Places in the queue that nobody holds any more, beyond as many as there are streams.
const SPARE_PLACES: usize = 16;

/// The last stream that a client can open.
const LAST: u32 = 0x7fff_ffff;

/// What has become of the wish to send.
#[derive(Debug)]
pub(crate) enum Sent {
    /// There is no window or no room; the stream stands in the list of those that are told when there is.
    Parked,
    /// The stream takes no more: it was reset, or ended by us.
    Closed,
    /// What filling the place for so many bytes has yielded.
    Asked(usize, io::Result<usize>),
}

impl<T: Default> Core<T> {
    /// Whether every stream that a client can open was opened.
    pub(crate) fn is_used_up(&self) -> bool {
        self.next > LAST
    }

    /// Asks for a stream, of which there must be one left. None: the request cannot be written.
    pub(crate) fn open(&mut self, request: &Request, data: T) -> Option<u32> {
        debug_assert!(
            self.role == Role::Client && !self.is_used_up(),
            "only clients open streams, as long as there are any"
        );
        let block = message::write_request(request)?;
        let stream = self.next;
        self.next += 2;
        let window = self.window();
        self.streams.insert(stream, self.peer.stream_window, window, data);
        self.write_headers(stream, &block, false);
        Some(stream)
    }

    /// Grants a request. False: the peer no longer waits.
    pub fn answer(&mut self, stream: u32, head: &ResponseHead) -> bool {
        let open = self.streams.change(stream, |entry| entry.answered = true);
        if open {
            self.write_headers(stream, &message::write_accept(head), false);
        }
        open
    }

    /// Refuses a request, and releases its stream.
    pub fn refuse(&mut self, stream: u32, status: StatusCode) -> Option<T> {
        let entry = self.streams.remove(stream)?;
        if !entry.is_closed() {
            self.write_headers(stream, &message::write_refusal(status), true);
            if !entry.remote_ended {
                self.write_reset(stream, Reason::NO_ERROR);
            }
        }
        Some(entry.data)
    }

    /// Sends bytes of a stream: `fill` puts them where they are written from, one place after the other, and says how many it
    /// were. None is the end, after which nothing can be sent.
    pub(crate) fn send(
        &mut self,
        stream: u32,
        limit: usize,
        fill: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Sent {
        let Some(entry) = self.streams.get_mut(stream) else { return Sent::Closed };
        let place = entry.place.take();
        entry.starved = false;
        if entry.reset.is_some() || entry.local_ended || self.out.is_shut() {
            return Sent::Closed;
        }
        let window = usize::try_from(entry.send_window.min(self.send_window)).unwrap_or(0);
        let size = self.peer.frame_size as usize;
        let room = if self.stalled { 0 } else { self.out.room(size) };
        let n = window.min(room).min(self.config.send_buffer).min(limit);
        if n == 0 {
            entry.starved = entry.send_window <= 0;
            if entry.starved {
                return Sent::Parked;
            }
            // Who was not served keeps its place.
            entry.place = place.or_else(|| {
                self.place += 1;
                self.queue.push_back((self.place, stream));
                Some(self.place)
            });
            if self.queue.len() > 2 * self.streams.active + SPARE_PLACES {
                self.forget_places();
            }
            return Sent::Parked;
        }
        let filled = fill(&mut self.out.space(n, size));
        match filled {
            Ok(0) => self.end(stream),
            Ok(n) => {
                entry.send_window -= n as i64;
                self.send_window -= n as i64;
                self.crowd |= self.sender != 0 && self.sender != stream;
                self.sender = stream;
                for start in (0..n).step_by(size) {
                    let length = size.min(n - start) as u32;
                    self.out.data(Frame { length, kind: frame::DATA, flags: 0, stream });
                }
                self.guard.sent(n);
            }
            Err(_) => self.out.tidy(),
        }
        Sent::Asked(n, filled)
    }

    /// Places of streams that are gone, or were served, stay where they are until the others are told. A peer that opens no window
    /// must not have us keep them.
    fn forget_places(&mut self) {
        let streams = &self.streams;
        self.queue.retain(|(place, stream)| streams.get(*stream).is_some_and(|entry| entry.place == Some(*place)));
    }

    /// Whether others than this stream wait for room, or have sent since everything was written the last time.
    pub(crate) fn is_crowded(&self, stream: u32) -> bool {
        self.crowd
            || (self.sender != 0 && self.sender != stream)
            || self.queue.iter().any(|(_, other)| *other != stream)
    }

    /// Everything that was gathered is written.
    pub(crate) fn turned(&mut self) {
        (self.sender, self.crowd) = (0, false);
    }

    /// Nothing more is sent on a stream.
    pub fn end(&mut self, stream: u32) {
        let mut first = false;
        self.streams.change(stream, |entry| first = !std::mem::replace(&mut entry.local_ended, true));
        if first {
            self.out.frame(frame::DATA, frame::END_STREAM, stream, &[]);
        }
    }

    /// Ends a stream in both directions at once.
    pub fn reset(&mut self, stream: u32, reason: Reason) {
        if self.streams.change(stream, |entry| entry.reset = Some(reason)) {
            self.write_reset(stream, reason);
        }
    }

    /// Nobody is interested in a stream any more. If it has not ended, it is reset.
    pub fn release(&mut self, stream: u32) -> Option<T> {
        self.reset(stream, Reason::CANCEL);
        self.streams.remove(stream).map(|entry| entry.data)
    }

    /// The application has taken this much of what came.
    pub fn taken(&mut self, stream: u32, bytes: usize) {
        let worth = (self.config.stream_window / 4).max(1);
        let Some(entry) = self.streams.get_mut(stream).filter(|entry| !entry.is_closed() && !entry.remote_ended) else {
            return;
        };
        entry.taken += u32::try_from(bytes).unwrap_or(u32::MAX);
        if entry.taken >= worth {
            let taken = std::mem::take(&mut entry.taken);
            entry.window += i64::from(taken);
            self.out.frame(frame::WINDOW_UPDATE, 0, stream, &taken.to_be_bytes());
        }
    }

    /// This much came that no application has taken yet.
    pub fn hold(&mut self, bytes: usize) {
        self.credit.hold(bytes);
    }

    /// Of what was held, this much was taken or is of no interest any more.
    pub fn give(&mut self, bytes: usize) {
        self.credit.give(bytes);
        self.return_credit();
    }

    /// Tells the peer what it may send on all streams together, if it is worth a frame.
    pub(super) fn return_credit(&mut self) {
        if let Some(credit) = self.credit.returned() {
            self.out.frame(frame::WINDOW_UPDATE, 0, 0, &credit.to_be_bytes());
        }
    }

    /// Asks for a sign of life.
    pub fn ping(&mut self) {
        if !self.pinged {
            self.pinged = true;
            self.out.frame(frame::PING, 0, 0, PING);
        }
    }

    /// Takes no more streams, which the peer is told first, so that it loses none that it has just opened.
    pub fn drain(&mut self) {
        if self.drain == Drain::No {
            self.drain = Drain::Announced;
            self.say_goaway(LAST, Reason::NO_ERROR);
            self.out.frame(frame::PING, 0, 0, DRAIN);
        }
    }

    /// Nobody reads any more, and nothing is written but what waits: memory that only that needs is given back, though streams are
    /// still to be released.
    pub(crate) fn finish(&mut self) {
        self.out.shut();
        (self.partial, self.block, self.queue) = Default::default();
        self.decoder = Decoder::default();
    }

    /// The last words.
    pub fn close(&mut self, reason: Reason) {
        self.say_goaway(self.last_peer, reason);
    }

    pub(super) fn say_goaway(&mut self, last: u32, reason: Reason) {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&last.to_be_bytes());
        payload[4..].copy_from_slice(&u32::from(reason).to_be_bytes());
        self.out.frame(frame::GOAWAY, 0, 0, &payload);
    }

    pub(super) fn write_reset(&mut self, stream: u32, reason: Reason) {
        self.out.frame(frame::RST_STREAM, 0, stream, &u32::from(reason).to_be_bytes());
    }

    /// What we write is shorter than any frame that a peer must take.
    pub(super) fn write_headers(&mut self, stream: u32, block: &Block, end: bool) {
        let flags = frame::END_HEADERS | if end { frame::END_STREAM } else { 0 };
        if std::mem::replace(&mut self.no_table_said, true) {
            return self.out.frame(frame::HEADERS, flags, stream, block);
        }
        // A peer that allows a smaller table than the usual one waits for this in the first block (RFC 9113 §4.3.1).
        self.out.frame(frame::HEADERS, flags, stream, &[&[hpack::NO_TABLE], &block[..]].concat());
    }
}
