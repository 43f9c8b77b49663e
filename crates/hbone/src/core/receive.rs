//! What the peer sends: frames, however they are cut, and what each does.

use std::ops::Range;
use std::time::Duration;

use super::frame::{self, Frame, HEADER, PREFACE, number};
use super::hpack::Unreadable;
use super::message::{self, Fields, NotHttp};
use super::{Broken, Core, Drain, Event, Role, WINDOW, WINDOW_MAX, violation};
use crate::error::Flood;
use crate::reason::Reason;

/// Bytes of a compressed header block, and what it may unfold to, in header lists that we take. Beyond one of them a request is
/// refused; beyond this nothing is read.
const BLOCK: usize = 4;
/// Frames of one header block.
const BLOCK_FRAMES: u32 = 64;
/// Bytes of SETTINGS, of which six are one setting.
const SETTINGS: usize = 600;

/// What comes next.
#[derive(Debug)]
pub(super) enum Reading {
    /// The client's preface, of which this much has come.
    Preface(usize),
    Header,
    /// A frame that is looked at as a whole; the first bytes of it, if only they matter.
    Payload(Frame, usize),
    Data(Data),
    Skip(usize),
}

/// The rest of a DATA frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    stream: u32,
    left: usize,
    /// Behind the data; none as long as it is not known.
    padding: Option<usize>,
    end: bool,
}

/// A header block in several frames.
#[derive(Debug)]
pub(super) struct Block {
    stream: u32,
    end: bool,
    bytes: Vec<u8>,
    frames: u32,
}

type Received = Result<Option<Event>, Broken>;

impl<T: Default> Core<T> {
    /// Reads the input from `at` on, up to the next event. None: all of it was read.
    pub fn receive(&mut self, input: &[u8], at: &mut usize, now: Duration) -> Received {
        loop {
            let rest = &input[*at..];
            let event = match self.reading {
                Reading::Preface(seen) => {
                    let n = rest.len().min(PREFACE.len() - seen);
                    if rest[..n] != PREFACE[seen..seen + n] {
                        return Err(violation(Reason::PROTOCOL_ERROR, "it does not begin HTTP/2"));
                    }
                    *at += n;
                    self.reading = if seen + n == PREFACE.len() { Reading::Header } else { Reading::Preface(seen + n) };
                    if rest.is_empty() {
                        return Ok(None);
                    }
                    None
                }
                Reading::Header => {
                    let Some(header) = self.whole(input, at, HEADER) else { return Ok(None) };
                    let header = header.bytes(input, &mut self.partial);
                    let frame = Frame::parse(*header.first_chunk().expect("it has the length of a header"));
                    self.begin(frame, now)?
                }
                Reading::Payload(frame, needed) => {
                    let Some(payload) = self.whole(input, at, needed) else { return Ok(None) };
                    self.reading = match frame.length as usize - needed {
                        0 => Reading::Header,
                        rest => Reading::Skip(rest),
                    };
                    let mut partial = std::mem::take(&mut self.partial);
                    let event = self.frame(frame, payload.bytes(input, &mut partial), now);
                    partial.clear();
                    partial.shrink_to(64);
                    self.partial = partial;
                    event?
                }
                Reading::Data(data) => {
                    if rest.is_empty() && data.left > 0 {
                        return Ok(None);
                    }
                    self.data(data, at, rest, now)?
                }
                Reading::Skip(left) => {
                    let n = left.min(rest.len());
                    *at += n;
                    self.reading = if n == left { Reading::Header } else { Reading::Skip(left - n) };
                    if n < left {
                        return Ok(None);
                    }
                    None
                }
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    /// The next `n` bytes in one piece, if they are there: in the input, or in `partial` if they came in parts.
    fn whole(&mut self, input: &[u8], at: &mut usize, n: usize) -> Option<Piece> {
        let rest = &input[*at..];
        if self.partial.is_empty() && rest.len() >= n {
            *at += n;
            return Some(Piece::Input(*at - n..*at));
        }
        let step = rest.len().min(n - self.partial.len());
        self.partial.extend_from_slice(&rest[..step]);
        *at += step;
        (self.partial.len() == n).then_some(Piece::Partial)
    }

    /// The header of a frame has come: what is to be done with its payload.
    fn begin(&mut self, frame: Frame, now: Duration) -> Received {
        self.partial.clear();
        let length = frame.length as usize;
        if frame.length > self.config.frame_size {
            return Err(violation(Reason::FRAME_SIZE_ERROR, "a frame is larger than we take"));
        }
        if !self.peer.settled && (frame.kind != frame::SETTINGS || frame.has(frame::ACK)) {
            return Err(violation(Reason::PROTOCOL_ERROR, "it does not begin with SETTINGS"));
        }
        if self.block.as_ref().is_some_and(|block| frame.kind != frame::CONTINUATION || frame.stream != block.stream) {
            return Err(violation(Reason::PROTOCOL_ERROR, "a header block is interrupted"));
        }
        let of_stream = match frame.kind {
            frame::DATA | frame::HEADERS | frame::PRIORITY | frame::RST_STREAM | frame::CONTINUATION => true,
            frame::SETTINGS | frame::PING | frame::GOAWAY => false,
            // Of a stream or of the connection.
            _ => frame.stream != 0,
        };
        if of_stream != (frame.stream != 0) {
            return Err(violation(Reason::PROTOCOL_ERROR, "a frame has a stream or has none, and should not"));
        }
        let exactly = match frame.kind {
            frame::PRIORITY => 5,
            frame::RST_STREAM | frame::WINDOW_UPDATE => 4,
            frame::PING => 8,
            _ => length,
        };
        let broken = match frame.kind {
            frame::SETTINGS => !length.is_multiple_of(6) || (frame.has(frame::ACK) && length > 0),
            frame::GOAWAY => length < 8,
            _ => length != exactly,
        };
        if broken {
            return Err(violation(Reason::FRAME_SIZE_ERROR, "a frame has not the size of its kind"));
        }
        let needed = match frame.kind {
            frame::DATA => return self.begin_data(frame, now),
            frame::HEADERS | frame::CONTINUATION if length > BLOCK * self.config.header_list as usize => {
                return Err(Frame::flood(frame.kind).into());
            }
            frame::SETTINGS if length > SETTINGS => return Err(Frame::flood(frame.kind).into()),
            frame::PUSH_PROMISE => return Err(violation(Reason::PROTOCOL_ERROR, "it pushes")),
            frame::GOAWAY => 8,
            frame::HEADERS..=frame::CONTINUATION => length,
            _ => 0,
        };
        self.reading = Reading::Payload(frame, needed);
        Ok(None)
    }

    fn frame(&mut self, frame: Frame, payload: &[u8], now: Duration) -> Received {
        match frame.kind {
            frame::HEADERS => self.headers(frame, payload, now),
            frame::CONTINUATION => self.continuation(frame, payload, now),
            frame::RST_STREAM => self.rst_stream(frame.stream, Reason::from(number(payload)), now),
            frame::SETTINGS if frame.has(frame::ACK) => self.acknowledged(now),
            frame::SETTINGS => self.settings(payload, now),
            frame::PING => self.ping_or_pong(frame, payload, now),
            frame::GOAWAY => self.going_away(payload, now),
            frame::WINDOW_UPDATE => self.window_update(frame.stream, number(payload) & 0x7fff_ffff, now),
            kind => {
                self.guard.idle(kind, now)?;
                Ok(None)
            }
        }
    }

    /// A stream that was never opened cannot be meant.
    fn not_idle(&self, stream: u32) -> Result<(), Broken> {
        let known = match self.role {
            Role::Client => stream < self.next,
            Role::Server => stream <= self.last_peer,
        };
        // Streams of servers, which have even numbers, are those of PUSH_PROMISE.
        if known && !stream.is_multiple_of(2) {
            Ok(())
        } else {
            Err(violation(Reason::PROTOCOL_ERROR, "a stream is meant that was not opened"))
        }
    }

    /// Something came for a stream that is gone.
    fn late(&mut self, kind: u8, now: Duration) -> Result<(), Flood> {
        self.guard.gone(std::mem::take(&mut self.streams.gone));
        self.guard.late(kind, now)
    }

    fn is_open(&self, stream: u32) -> bool {
        self.streams.get(stream).is_some_and(|entry| !entry.is_closed())
    }

    /// The peer has made a mistake that costs it the stream.
    fn fail(&mut self, stream: u32, reason: Reason, now: Duration) -> Received {
        self.write_reset(stream, reason);
        if self.role == Role::Server {
            self.guard.abandoned(now)?;
        }
        let reset = self.streams.change(stream, |entry| entry.reset = Some(reason));
        Ok(reset.then_some(Event::Reset { stream, reason }))
    }

    fn begin_data(&mut self, frame: Frame, now: Duration) -> Received {
        self.not_idle(frame.stream)?;
        if !self.credit.spend(frame.length) {
            return Err(violation(Reason::FLOW_CONTROL_ERROR, "it sends more than the tunnel's window"));
        }
        self.return_credit();
        let length = frame.length as usize;
        self.reading = Reading::Skip(length);
        let Some(entry) = self.streams.get_mut(frame.stream).filter(|entry| !entry.is_closed()) else {
            // It may not have heard yet that the stream is gone.
            if frame.length == 0 {
                self.late(frame::DATA, now)?;
            }
            return Ok(None);
        };
        if frame.length == 0 && !frame.has(frame::END_STREAM) {
            self.guard.idle(frame::DATA, now)?;
        }
        // Nobody has said that bytes may come: what is sent now must never reach the application.
        let early = !entry.answered && frame.length > 0;
        if entry.remote_ended {
            return self.fail(frame.stream, Reason::STREAM_CLOSED, now);
        }
        if early {
            return self.fail(frame.stream, Reason::PROTOCOL_ERROR, now);
        }
        if i64::from(frame.length) > entry.window {
            return self.fail(frame.stream, Reason::FLOW_CONTROL_ERROR, now);
        }
        entry.window -= i64::from(frame.length);
        let padding = if frame.has(frame::PADDED) { None } else { Some(0) };
        self.reading =
            Reading::Data(Data { stream: frame.stream, left: length, padding, end: frame.has(frame::END_STREAM) });
        if padding.is_none() && length == 0 {
            return Err(violation(Reason::FRAME_SIZE_ERROR, "a padded frame is empty"));
        }
        Ok(None)
    }

    fn data(&mut self, mut data: Data, at: &mut usize, rest: &[u8], now: Duration) -> Received {
        let padding = match data.padding {
            Some(padding) => padding,
            None => {
                *at += 1;
                data.left -= 1;
                let padding = usize::from(rest[0]);
                if padding > data.left {
                    return Err(violation(Reason::PROTOCOL_ERROR, "padding is longer than its frame"));
                }
                data.left -= padding;
                data.padding = Some(padding);
                self.reading = Reading::Data(data);
                // No application takes it.
                self.taken(data.stream, 1 + padding);
                if data.left > 0 {
                    return Ok(None);
                }
                if !data.end {
                    self.guard.idle(frame::DATA, now)?;
                }
                padding
            }
        };
        let n = data.left.min(rest.len());
        let range = *at..*at + n;
        *at += n;
        data.left -= n;
        let last = data.left == 0;
        self.reading = match last {
            true if padding == 0 => Reading::Header,
            true => Reading::Skip(padding),
            false => Reading::Data(data),
        };
        let end = last && data.end;
        Ok(self.bytes(data.stream, range, end))
    }

    /// Bytes of a stream, which may have been reset since its frame began.
    fn bytes(&mut self, stream: u32, range: Range<usize>, end: bool) -> Option<Event> {
        if range.is_empty() && !end {
            return None;
        }
        let open = self.streams.change(stream, |entry| entry.remote_ended |= end);
        open.then_some(Event::Data { stream, range, end })
    }

    fn headers(&mut self, frame: Frame, mut payload: &[u8], now: Duration) -> Received {
        let short = || violation(Reason::PROTOCOL_ERROR, "a header block is shorter than its padding");
        if frame.has(frame::PADDED) {
            let (&padding, rest) = payload.split_first().ok_or_else(short)?;
            let length = rest.len().checked_sub(usize::from(padding)).ok_or_else(short)?;
            payload = &rest[..length];
        }
        if frame.has(frame::PRIORITIZED) {
            payload = payload.get(5..).ok_or_else(short)?;
        }
        match self.role {
            Role::Server if frame.stream > self.last_peer && !frame.stream.is_multiple_of(2) => {}
            _ => self.not_idle(frame.stream)?,
        }
        let end = frame.has(frame::END_STREAM);
        if frame.has(frame::END_HEADERS) {
            return self.message(frame.stream, end, payload, now);
        }
        self.block = Some(Block { stream: frame.stream, end, bytes: payload.to_vec(), frames: 1 });
        Ok(None)
    }

    fn continuation(&mut self, frame: Frame, payload: &[u8], now: Duration) -> Received {
        let Some(block) = &mut self.block else {
            return Err(violation(Reason::PROTOCOL_ERROR, "CONTINUATION of nothing"));
        };
        block.frames += 1;
        let limit = BLOCK * self.config.header_list as usize;
        if block.frames > BLOCK_FRAMES || block.bytes.len() + payload.len() > limit {
            return Err(Flood::Continuation.into());
        }
        block.bytes.extend_from_slice(payload);
        if !frame.has(frame::END_HEADERS) {
            return Ok(None);
        }
        match self.block.take() {
            Some(block) => self.message(block.stream, block.end, &block.bytes, now),
            None => Ok(None),
        }
    }

    /// A header block is complete.
    fn message(&mut self, stream: u32, end: bool, block: &[u8], now: Duration) -> Received {
        let list = self.config.header_list as usize;
        let mut fields = Fields::new(list);
        let read = self.decoder.decode(block, BLOCK * list, &mut |name, value| fields.field(name, value));
        match read {
            Ok(()) => {}
            Err(Unreadable::TooLarge) => return Err(Flood::Headers.into()),
            Err(Unreadable::Malformed) => {
                return Err(violation(Reason::COMPRESSION_ERROR, "a header block is not HPACK"));
            }
        }
        match self.role {
            Role::Server if stream > self.last_peer => self.request(stream, end, fields, now),
            _ if !self.is_open(stream) => {
                // It may not have heard yet that the stream is gone.
                self.late(frame::HEADERS, now)?;
                Ok(None)
            }
            _ if self.streams.get(stream).is_some_and(|entry| entry.remote_ended) => {
                self.fail(stream, Reason::STREAM_CLOSED, now)
            }
            Role::Client if self.streams.get(stream).is_some_and(|entry| !entry.answered) => {
                self.answer_of_peer(stream, end, fields, now)
            }
            _ if end && fields.trailers().is_ok() => Ok(self.bytes(stream, 0..0, true)),
            _ => self.fail(stream, Reason::PROTOCOL_ERROR, now),
        }
    }

    fn request(&mut self, stream: u32, end: bool, fields: Fields, now: Duration) -> Received {
        self.last_peer = stream;
        // Unless it is taken below.
        self.streams.gone += 1;
        if self.drain == Drain::Heard || self.streams.active >= self.config.server_streams as usize {
            self.guard.idle(frame::HEADERS, now)?;
            self.write_reset(stream, Reason::REFUSED_STREAM);
            return Ok(None);
        }
        let head = match fields.request() {
            Ok(head) => head,
            Err(NotHttp) => return self.fail(stream, Reason::PROTOCOL_ERROR, now),
        };
        match &head {
            Ok(_) => {
                let window = self.window();
                self.streams.gone -= 1;
                let entry = self.streams.insert(stream, self.peer.stream_window, window, T::default());
                entry.remote_ended = end;
            }
            Err(malformed) => {
                self.guard.idle(frame::HEADERS, now)?;
                self.write_headers(stream, &message::write_refusal(malformed.status()), true);
                if !end {
                    self.write_reset(stream, Reason::NO_ERROR);
                }
            }
        }
        Ok(Some(Event::Request { stream, head }))
    }

    fn answer_of_peer(&mut self, stream: u32, end: bool, fields: Fields, now: Duration) -> Received {
        let Ok((status, head)) = fields.answer() else {
            return self.fail(stream, Reason::PROTOCOL_ERROR, now);
        };
        if status.is_informational() {
            if end {
                return self.fail(stream, Reason::PROTOCOL_ERROR, now);
            }
            self.guard.idle(frame::HEADERS, now)?;
            return Ok(None);
        }
        self.streams.change(stream, |entry| {
            entry.answered = true;
            entry.remote_ended = end;
        });
        Ok(Some(Event::Answer { stream, status, head }))
    }

    fn rst_stream(&mut self, stream: u32, reason: Reason, now: Duration) -> Received {
        self.not_idle(stream)?;
        let mut answered = true;
        let reset = self.streams.change(stream, |entry| {
            answered = entry.answered;
            entry.reset = Some(reason);
        });
        if !reset {
            self.late(frame::RST_STREAM, now)?;
            return Ok(None);
        }
        if !answered && self.role == Role::Server {
            self.guard.abandoned(now)?;
        }
        Ok(Some(Event::Reset { stream, reason }))
    }

    /// The window of a new stream. Until the peer has acknowledged our SETTINGS it may go by what HTTP/2 begins with.
    pub(super) fn window(&self) -> u32 {
        if self.peer.acknowledged { self.config.stream_window } else { self.config.stream_window.max(WINDOW) }
    }

    fn acknowledged(&mut self, now: Duration) -> Received {
        if self.peer.acknowledged {
            self.guard.idle(frame::SETTINGS, now)?;
            return Ok(None);
        }
        let before = i64::from(self.window());
        self.peer.acknowledged = true;
        self.credit.answered(now);
        let change = i64::from(self.window()) - before;
        self.streams.each(|entry| entry.window += change);
        Ok(None)
    }

    fn settings(&mut self, payload: &[u8], now: Duration) -> Received {
        if self.peer.settled {
            self.guard.idle(frame::SETTINGS, now)?;
        }
        for setting in payload.chunks_exact(6) {
            let (name, value) = (u16::from_be_bytes([setting[0], setting[1]]), number(&setting[2..]));
            match name {
                2 if value > 1 || (value == 1 && self.role == Role::Client) => {
                    return Err(violation(Reason::PROTOCOL_ERROR, "ENABLE_PUSH is wrong"));
                }
                3 => self.peer.streams = Some(value),
                4 => self.new_window(value)?,
                5 if !(16 << 10..1 << 24).contains(&value) => {
                    return Err(violation(Reason::PROTOCOL_ERROR, "MAX_FRAME_SIZE is wrong"));
                }
                5 => self.peer.frame_size = value,
                // The tables of our encoder, which has none, header lists, which are short, and what is not known.
                _ => {}
            }
        }
        self.peer.settled = true;
        self.out.frame(frame::SETTINGS, frame::ACK, 0, &[]);
        Ok(Some(Event::Settings))
    }

    /// The windows of all streams change with the one that streams begin with (RFC 9113 §6.9.2).
    fn new_window(&mut self, window: u32) -> Result<(), Broken> {
        let change = i64::from(window) - i64::from(self.peer.stream_window);
        let mut beyond = i64::from(window) > WINDOW_MAX;
        self.streams.each(|entry| {
            entry.send_window += change;
            beyond |= entry.send_window > WINDOW_MAX;
        });
        self.peer.stream_window = window;
        if beyond { Err(violation(Reason::FLOW_CONTROL_ERROR, "a window is too large")) } else { Ok(()) }
    }

    fn ping_or_pong(&mut self, frame: Frame, payload: &[u8], now: Duration) -> Received {
        if !frame.has(frame::ACK) {
            self.guard.idle(frame::PING, now)?;
            self.out.frame(frame::PING, frame::ACK, 0, payload);
        } else if self.drain == Drain::Announced && payload == super::send::DRAIN {
            self.drain = Drain::Heard;
            self.say_goaway(self.last_peer, Reason::NO_ERROR);
        } else if self.pinged && payload == super::send::PING {
            self.pinged = false;
        } else {
            self.guard.idle(frame::PING, now)?;
        }
        Ok(None)
    }

    fn going_away(&mut self, payload: &[u8], now: Duration) -> Received {
        let (last, reason) = (number(payload) & 0x7fff_ffff, Reason::from(number(&payload[4..])));
        if self.peer.goaway.is_some() {
            self.guard.idle(frame::GOAWAY, now)?;
        }
        self.peer.goaway = Some(reason);
        if self.role == Role::Client {
            self.streams.change_each(|entry| {
                if entry.id > last {
                    entry.reset = Some(Reason::REFUSED_STREAM);
                }
            });
        }
        Ok(Some(Event::GoAway))
    }

    fn window_update(&mut self, stream: u32, increment: u32, now: Duration) -> Received {
        self.guard.update(now)?;
        if stream == 0 {
            self.send_window += i64::from(increment);
            if increment == 0 {
                return Err(violation(Reason::PROTOCOL_ERROR, "a window is opened by nothing"));
            }
            if self.send_window > WINDOW_MAX {
                return Err(violation(Reason::FLOW_CONTROL_ERROR, "the window of the tunnel is too large"));
            }
            return Ok((!self.queue.is_empty()).then_some(Event::Window { stream: None }));
        }
        self.not_idle(stream)?;
        let Some(entry) = self.streams.get_mut(stream).filter(|entry| !entry.is_closed()) else { return Ok(None) };
        entry.send_window += i64::from(increment);
        let (starved, window) = (std::mem::take(&mut entry.starved), entry.send_window);
        if increment == 0 {
            return self.fail(stream, Reason::PROTOCOL_ERROR, now);
        }
        if window > WINDOW_MAX {
            return self.fail(stream, Reason::FLOW_CONTROL_ERROR, now);
        }
        Ok(starved.then_some(Event::Window { stream: Some(stream) }))
    }
}

/// Where bytes are that came in one piece.
enum Piece {
    Input(Range<usize>),
    Partial,
}

impl Piece {
    fn bytes<'a>(self, input: &'a [u8], partial: &'a mut [u8]) -> &'a [u8] {
        match self {
            Self::Input(range) => &input[range],
            Self::Partial => partial,
        }
    }
}
