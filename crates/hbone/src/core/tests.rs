//! The core by itself: however its input is cut, whatever two of them do with each other, and what a peer must not do.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::time::Duration;

use http::StatusCode;
use proptest::prelude::*;

use super::frame::{self, Frame, PREFACE};
use super::{Broken, Core, Entry, Event, Sent, message};
use crate::config::Config;
use crate::headers::Headers;
use crate::reason::Reason;
use crate::request::{Request, ResponseHead};

mod hostile;

const NOW: Duration = Duration::ZERO;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Frame { length: payload.len() as u32, kind, flags, stream }.bytes().to_vec();
    bytes.extend(payload);
    bytes
}

fn request() -> Request {
    Request { target: "10.0.0.1:80".parse().unwrap(), headers: Headers::default() }
}

fn block() -> Vec<u8> {
    message::write_request(&request()).unwrap().to_vec()
}

/// What a client says first.
fn hello() -> Vec<u8> {
    [PREFACE.to_vec(), frame(frame::SETTINGS, 0, 0, &[])].concat()
}

/// What came of some input: the events, with the bytes of each stream put together, and the end.
#[derive(Debug, Default, PartialEq)]
struct Story {
    events: Vec<String>,
    data: Vec<(u32, Vec<u8>)>,
    broken: Option<Broken>,
    said: Vec<u8>,
}

/// Feeds an end of a tunnel; if it is a server, it grants every request.
fn feed<'a>(mut core: Core<()>, pieces: impl Iterator<Item = &'a [u8]>) -> Story {
    let mut story = Story::default();
    for piece in pieces {
        let mut at = 0;
        loop {
            match core.receive(piece, &mut at, NOW) {
                Ok(None) => break,
                Ok(Some(Event::Data { stream, range, end })) => {
                    // Nothing is taken: the credit that is returned goes by the pieces that are taken at once.
                    match story.data.last_mut() {
                        Some((last, bytes)) if *last == stream => bytes.extend(&piece[range]),
                        _ => story.data.push((stream, piece[range].to_vec())),
                    }
                    if end {
                        story.events.push(format!("end of {stream}"));
                        story.data.push((0, vec![]));
                    }
                }
                Ok(Some(event)) => {
                    if let Event::Request { stream, head: Ok(_) } = event {
                        core.answer(stream, &ResponseHead::default());
                    }
                    story.data.push((0, vec![]));
                    story.events.push(format!("{event:?}"));
                }
                Err(broken) => {
                    story.broken = Some(broken);
                    story.said = core.out.bytes().to_vec();
                    return story;
                }
            }
        }
        assert_eq!(at, piece.len(), "all of it is read");
    }
    story.said = core.out.bytes().to_vec();
    story
}

/// Frames as a peer might send them, mostly good ones. `block`: the header block of each message.
fn some_frames(block: fn() -> Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let stream = || prop_oneof![8 => (0u32..4).prop_map(|n| 2 * n + 1), 1 => 0u32..12];
    let payload = |max: usize| prop::collection::vec(any::<u8>(), 0..max);
    let padded = |(stream, mut bytes, padding, end): (u32, Vec<u8>, u8, bool)| {
        bytes.insert(0, padding);
        bytes.resize(bytes.len() + usize::from(padding), 0);
        frame(frame::DATA, frame::PADDED | u8::from(end), stream, &bytes)
    };
    let in_two = move |(stream, at, end): (u32, usize, bool)| {
        let block = block();
        let (first, second) = block.split_at(at.min(block.len()));
        let mut bytes = frame(frame::HEADERS, u8::from(end), stream, first);
        bytes.extend(frame(frame::CONTINUATION, frame::END_HEADERS, stream, second));
        bytes
    };
    prop_oneof![
        6 => stream().prop_map(move |stream| frame(frame::HEADERS, frame::END_HEADERS, stream, &block())),
        2 => (stream(), 0usize..40, any::<bool>()).prop_map(in_two),
        8 => (stream(), payload(300), any::<bool>()).prop_map(|(stream, bytes, end)| frame(frame::DATA, u8::from(end), stream, &bytes)),
        3 => (stream(), payload(30), any::<u8>(), any::<bool>()).prop_map(padded),
        2 => stream().prop_map(|stream| frame(frame::RST_STREAM, 0, stream, &8u32.to_be_bytes())),
        2 => (stream(), 1u32..1000).prop_map(|(stream, n)| frame(frame::WINDOW_UPDATE, 0, stream, &n.to_be_bytes())),
        1 => Just(frame(frame::PING, 0, 0, &[7; 8])),
        1 => (0u32..12).prop_map(|last| frame(frame::GOAWAY, 0, 0, &[&last.to_be_bytes()[..], &[0; 4], b"bye"].concat())),
        1 => Just(frame(frame::SETTINGS, frame::ACK, 0, &[])),
        1 => (0u16..7, any::<u32>()).prop_map(|(name, value)| {
            frame(frame::SETTINGS, 0, 0, &[&name.to_be_bytes()[..], &value.to_be_bytes()].concat())
        }),
        1 => (any::<u8>(), any::<u8>(), stream(), payload(20)).prop_map(|(kind, flags, stream, bytes)| frame(kind, flags, stream, &bytes)),
    ]
}

/// A peer's frames, how they are cut, and one byte that is something else.
type Input = (Vec<Vec<u8>>, Vec<usize>, Option<(prop::sample::Index, u8)>);

fn some_input(block: fn() -> Vec<u8>) -> impl Strategy<Value = Input> {
    let garbage = prop::option::of((any::<prop::sample::Index>(), any::<u8>()));
    (prop::collection::vec(some_frames(block), 0..40), prop::collection::vec(1usize..40, 1..30), garbage)
}

/// The story of some input, in one piece and in many.
fn stories(core: impl Fn() -> Core<()>, mut input: Vec<u8>, (frames, sizes, garbage): Input) -> (Story, Story) {
    input.extend(frames.concat());
    if let Some((at, byte)) = garbage {
        let at = at.index(input.len());
        input[at] = byte;
    }
    let whole = feed(core(), std::iter::once(&input[..]));
    let mut rest = &input[..];
    let mut sizes = sizes.iter().cycle();
    let pieces = std::iter::from_fn(|| {
        let (piece, left) = rest.split_at(rest.len().min(*sizes.next()?));
        rest = left;
        (!piece.is_empty()).then_some(piece)
    });
    (whole, feed(core(), pieces))
}

fn narrow() -> Config {
    Config { stream_window: 1500, connection_window: 5000, idle_frames: 20, server_streams: 3, ..Config::default() }
}

proptest! {
    /// Any split of the input gives the same events, the same end and the same answers.
    #[test]
    fn it_does_not_matter_how_the_input_is_cut(input in some_input(block)) {
        let (whole, cut) = stories(|| Core::server(&narrow()), hello(), input);
        prop_assert_eq!(whole, cut);
    }

    /// The same at the other end, which has asked for some streams.
    #[test]
    fn it_does_not_matter_how_the_answers_are_cut(input in some_input(|| vec![0x88])) {
        let client = || {
            let mut core = Core::client(&narrow());
            for _ in 0..4 {
                core.open(&request(), ()).unwrap();
            }
            core
        };
        let (whole, cut) = stories(client, frame(frame::SETTINGS, 0, 0, &[]), input);
        prop_assert_eq!(whole, cut);
    }
}

/// One end of a tunnel and what it believes of its streams.
struct Side {
    core: Core<()>,
    streams: BTreeMap<u32, Told>,
    /// Requests that wait for an answer.
    asked: Vec<u32>,
}

/// What a side has been told of a stream, and has said.
#[derive(Default)]
struct Told {
    sent: Vec<u8>,
    received: Vec<u8>,
    held: usize,
    answered: bool,
    sent_end: bool,
    ended: bool,
    gone: bool,
}

impl Side {
    fn new(core: Core<()>) -> Self {
        Self { core, streams: BTreeMap::new(), asked: Vec::new() }
    }

    /// Takes up to `n` bytes of what the other has said.
    fn hear(&mut self, other: &mut Self, n: usize) {
        let n = n.min(other.core.out.len());
        let bytes = other.core.out.bytes()[..n].to_vec();
        other.core.out.written(n);
        let mut at = 0;
        while let Some(event) = self.core.receive(&bytes, &mut at, NOW).expect("neither breaks the protocol") {
            match event {
                Event::Request { stream, head } => {
                    head.unwrap();
                    assert!(self.streams.insert(stream, Told::default()).is_none(), "asked for once");
                    self.asked.push(stream);
                }
                Event::Answer { stream, status, .. } => {
                    let told = self.streams.get_mut(&stream).unwrap();
                    assert!(!told.answered && !told.gone);
                    told.answered = status == StatusCode::OK;
                }
                Event::Data { stream, range, end } => {
                    let told = self.streams.get_mut(&stream).unwrap();
                    assert!(!told.ended && !told.gone, "nothing follows an end");
                    self.core.hold(range.len());
                    told.held += range.len();
                    told.received.extend(&bytes[range]);
                    told.ended = end;
                }
                Event::Reset { stream, .. } => {
                    let told = self.streams.get_mut(&stream).unwrap();
                    let over = told.gone || (told.ended && told.sent_end);
                    assert!(!over, "a stream ends once");
                    told.gone = true;
                    self.asked.retain(|asked| *asked != stream);
                }
                Event::GoAway => {
                    for (stream, told) in &mut self.streams {
                        told.gone |= self.core.get(*stream).is_some_and(|entry| entry.reset().is_some());
                    }
                }
                Event::Window { .. } | Event::Settings => {}
            }
        }
        assert_eq!(at, n);
    }

    fn nth(&self, n: u8) -> Option<u32> {
        self.streams.keys().nth(usize::from(n) % self.streams.len().max(1)).copied()
    }

    fn send(&mut self, stream: u32, n: usize) {
        let told = self.streams.get_mut(&stream).unwrap();
        if !told.answered || told.gone || told.sent_end {
            return;
        }
        let start = told.sent.len();
        let pattern = move |at: usize| ((start + at) * 7 + stream as usize) as u8;
        let fill = |places: &mut [IoSliceMut<'_>]| {
            let bytes = places.iter_mut().flat_map(|place| place.iter_mut());
            Ok(bytes.enumerate().map(|(at, byte)| *byte = pattern(at)).count())
        };
        if let Sent::Asked(_, Ok(n)) = self.core.send(stream, n, fill) {
            told.sent.extend((0..n).map(pattern));
        }
    }

    fn take(&mut self, stream: u32, n: usize) {
        let told = self.streams.get_mut(&stream).unwrap();
        let n = n.min(told.held);
        told.held -= n;
        self.core.give(n);
        self.core.taken(stream, n);
    }

    fn release(&mut self, stream: u32) {
        let held = self.streams[&stream].held;
        self.take(stream, held);
        self.core.release(stream);
        self.streams.get_mut(&stream).unwrap().gone = true;
        self.asked.retain(|asked| *asked != stream);
    }

    fn act(&mut self, action: u8, which: u8, n: usize) {
        let Some(stream) = self.nth(which) else { return };
        match action {
            0..=5 => self.send(stream, n),
            6..=8 => self.take(stream, n),
            9 if self.streams[&stream].answered && !self.streams[&stream].gone => {
                self.core.end(stream);
                self.streams.get_mut(&stream).unwrap().sent_end = true;
            }
            10 if which < 30 => self.release(stream),
            11.. => {
                let Some(stream) = self.asked.pop() else { return };
                if action == 11 {
                    self.core.refuse(stream, StatusCode::UNAUTHORIZED);
                    self.streams.get_mut(&stream).unwrap().gone = true;
                } else {
                    assert!(self.core.answer(stream, &ResponseHead::default()));
                    self.streams.get_mut(&stream).unwrap().answered = true;
                }
            }
            _ => {}
        }
    }
}

fn settle(client: &mut Side, server: &mut Side) {
    while !client.core.out.is_empty() || !server.core.out.is_empty() {
        server.hear(client, usize::MAX);
        client.hear(server, usize::MAX);
    }
}

fn send_window<T>(entry: &Entry<T>) -> i64 {
    entry.send_window
}

proptest! {
    /// Whatever two ends do: windows are neither exceeded nor lost, bytes arrive as they were sent, every stream ends once.
    #[test]
    fn two_that_follow_the_protocol_never_disagree(
        windows in (500u32..200_000, 1000u32..400_000, 0u32..100_000),
        actions in prop::collection::vec((0u8..16, 0u8..14, any::<u8>(), 1usize..40_000), 0..300),
    ) {
        let config = Config {
            stream_window: windows.0, connection_window: windows.1, buffered_cap: windows.2, server_streams: 8, ..Config::default()
        };
        let (mut client, mut server) = (Side::new(Core::client(&config)), Side::new(Core::server(&config)));
        for (who, action, which, n) in actions {
            match who {
                0 | 1 => server.hear(&mut client, n),
                2 | 3 => client.hear(&mut server, n),
                4 if client.core.active() < 8 && client.core.goaway().is_none() => {
                    let stream = client.core.open(&request(), ()).unwrap();
                    client.streams.insert(stream, Told::default());
                }
                5..=9 => client.act(action.min(10), which, n),
                // The last streams of a server that drains are carried to their ends like all others.
                10 if which > 240 => server.core.drain(),
                _ => server.act(action, which, n),
            }
        }
        settle(&mut client, &mut server);
        for side in [&mut client, &mut server] {
            for stream in side.streams.keys().copied().collect::<Vec<_>>() {
                side.take(stream, usize::MAX);
            }
        }
        settle(&mut client, &mut server);
        for (one, other) in [(&client, &server), (&server, &client)] {
            prop_assert_eq!(one.core.send_window, i64::from(other.core.credit.window()), "credit of the tunnel");
            for (stream, told) in &one.streams {
                let Some(of_other) = other.streams.get(stream) else { continue };
                prop_assert!(of_other.sent.starts_with(&told.received), "stream {}", stream);
                if told.ended || !(told.gone || of_other.gone) {
                    prop_assert!(of_other.sent == told.received, "stream {}", stream);
                }
                if let (Some(entry), Some(same)) = (one.core.get(*stream), other.core.get(*stream))
                    && !entry.is_closed()
                {
                    prop_assert!(!same.is_closed(), "stream {} is open at one end only", stream);
                    if !entry.local_ended() {
                        prop_assert_eq!(send_window(entry), same.window, "credit of stream {}", stream);
                    }
                }
            }
        }
        prop_assert_eq!(client.core.active(), server.core.active());
    }
}

/// A server that has granted stream 1 gets this; how it takes it.
fn after_open(bytes: &[u8]) -> Story {
    let input = [hello(), frame(frame::HEADERS, frame::END_HEADERS, 1, &block()), bytes.to_vec()].concat();
    let config = Config { stream_window: 70_000, connection_window: 90_000, ..Config::default() };
    feed(Core::server(&config), std::iter::once(&input[..]))
}

/// RFC 9113, and RFC 7541 where it says so: what ends a connection, and with which error.
#[test]
fn violations_end_the_tunnel() {
    let setting =
        |name: u16, value: u32| frame(frame::SETTINGS, 0, 0, &[&name.to_be_bytes()[..], &value.to_be_bytes()].concat());
    let headers = |stream| frame(frame::HEADERS, frame::END_HEADERS, stream, &block());
    let open_block = frame(frame::HEADERS, 0, 3, &block());
    let protocol = Reason::PROTOCOL_ERROR;
    let size = Reason::FRAME_SIZE_ERROR;
    let flow = Reason::FLOW_CONTROL_ERROR;
    for (what, bytes, reason) in [
        ("§4.2 a frame beyond the size", frame(frame::DATA, 0, 1, &vec![0; (1 << 20) + 1]), size),
        ("§4.3 no HPACK", frame(frame::HEADERS, frame::END_HEADERS, 3, &[0x80]), Reason::COMPRESSION_ERROR),
        ("§5.1 data of an idle stream", frame(frame::DATA, 0, 7, &[]), protocol),
        ("§5.1 reset of an idle stream", frame(frame::RST_STREAM, 0, 7, &[0; 4]), protocol),
        ("§5.1 a window of an idle stream", frame(frame::WINDOW_UPDATE, 0, 7, &[0, 0, 0, 1]), protocol),
        ("§5.1.1 a stream of a server", headers(2), protocol),
        ("§6.1 data of no stream", frame(frame::DATA, 0, 0, &[1]), protocol),
        ("§6.1 more padding than frame", frame(frame::DATA, frame::PADDED, 1, &[9, 1]), protocol),
        ("§6.1 no padding where some is said", frame(frame::DATA, frame::PADDED, 1, &[]), size),
        ("§6.2 headers of no stream", headers(0), protocol),
        (
            "§6.2 more padding than headers",
            frame(frame::HEADERS, frame::PADDED | frame::END_HEADERS, 3, &[9]),
            protocol,
        ),
        ("§6.2 an interrupted block", [open_block.clone(), frame(frame::PING, 0, 0, &[0; 8])].concat(), protocol),
        ("§6.3 a priority of no stream", frame(frame::PRIORITY, 0, 0, &[0; 5]), protocol),
        ("§6.3 a priority of 4 bytes", frame(frame::PRIORITY, 0, 1, &[0; 4]), size),
        ("§6.4 a reset of no stream", frame(frame::RST_STREAM, 0, 0, &[0; 4]), protocol),
        ("§6.4 a reset of 3 bytes", frame(frame::RST_STREAM, 0, 1, &[0; 3]), size),
        ("§6.5 settings of a stream", frame(frame::SETTINGS, 0, 1, &[]), protocol),
        ("§6.5 settings of 5 bytes", frame(frame::SETTINGS, 0, 0, &[0; 5]), size),
        ("§6.5 an acknowledgement with settings", frame(frame::SETTINGS, frame::ACK, 0, &[0; 6]), size),
        ("§6.5.2 ENABLE_PUSH", setting(2, 2), protocol),
        ("§6.5.2 INITIAL_WINDOW_SIZE", setting(4, 1 << 31), flow),
        ("§6.5.2 MAX_FRAME_SIZE", setting(5, 16383), protocol),
        ("§6.5.2 MAX_FRAME_SIZE", setting(5, 1 << 24), protocol),
        ("§6.6 a push", frame(frame::PUSH_PROMISE, frame::END_HEADERS, 1, &[0; 4]), protocol),
        ("§6.7 a ping of a stream", frame(frame::PING, 0, 1, &[0; 8]), protocol),
        ("§6.7 a ping of 7 bytes", frame(frame::PING, 0, 0, &[0; 7]), size),
        ("§6.8 a goaway of a stream", frame(frame::GOAWAY, 0, 1, &[0; 8]), protocol),
        ("§6.8 a goaway of 7 bytes", frame(frame::GOAWAY, 0, 0, &[0; 7]), size),
        ("§6.9 a window of 3 bytes", frame(frame::WINDOW_UPDATE, 0, 0, &[0; 3]), size),
        ("§6.9 a window opened by nothing", frame(frame::WINDOW_UPDATE, 0, 0, &[0; 4]), protocol),
        ("§6.9.1 a window beyond its size", frame(frame::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]), flow),
        ("§6.9.1 data beyond the window of the tunnel", frame(frame::DATA, 0, 1, &vec![0; 90_001]), flow),
        ("§6.10 a continuation of nothing", frame(frame::CONTINUATION, frame::END_HEADERS, 1, &block()), protocol),
        (
            "§6.10 of another stream",
            [open_block, frame(frame::CONTINUATION, frame::END_HEADERS, 1, &[])].concat(),
            protocol,
        ),
    ] {
        assert_eq!(after_open(&bytes).broken.map(Broken::reason), Some(reason), "{what}");
    }
}

/// What costs a peer a stream, and not the tunnel.
#[test]
fn mistakes_end_a_stream() {
    let end = |stream| frame(frame::DATA, frame::END_STREAM, stream, &[]);
    let headers = |flags, stream| frame(frame::HEADERS, frame::END_HEADERS | flags, stream, &block());
    for (what, bytes, stream, reason) in [
        ("§5.1 data after the end", [end(1), frame(frame::DATA, 0, 1, &[1])].concat(), 1, Reason::STREAM_CLOSED),
        ("§5.1 headers after the end", [end(1), headers(frame::END_STREAM, 1)].concat(), 1, Reason::STREAM_CLOSED),
        ("§6.9 a window opened by nothing", frame(frame::WINDOW_UPDATE, 0, 1, &[0; 4]), 1, Reason::PROTOCOL_ERROR),
        (
            "§6.9.1 a window beyond its size",
            frame(frame::WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff]),
            1,
            Reason::FLOW_CONTROL_ERROR,
        ),
        ("§6.9.1 data beyond the window", frame(frame::DATA, 0, 1, &vec![0; 70_001]), 1, Reason::FLOW_CONTROL_ERROR),
        ("§8.1 trailers that are not the end", headers(0, 1), 1, Reason::PROTOCOL_ERROR),
        ("§8.1 trailers with pseudo-headers", headers(frame::END_STREAM, 1), 1, Reason::PROTOCOL_ERROR),
        (
            "§8.3 a request without a method",
            frame(frame::HEADERS, frame::END_HEADERS, 3, &[]),
            3,
            Reason::PROTOCOL_ERROR,
        ),
    ] {
        let story = after_open(&bytes);
        assert_eq!(story.broken, None, "{what}");
        let reset = frame(frame::RST_STREAM, 0, stream, &u32::from(reason).to_be_bytes());
        assert!(story.said.ends_with(&reset), "{what}");
    }
}

#[test]
fn what_comes_first_must_be_settings() {
    let config = Config::default();
    for input in [
        [PREFACE.to_vec(), frame(frame::PING, 0, 0, &[0; 8])].concat(),
        [PREFACE.to_vec(), frame(frame::SETTINGS, frame::ACK, 0, &[])].concat(),
        b"PRI * HTTP/1.1\r\n".to_vec(),
    ] {
        let story = feed(Core::server(&config), std::iter::once(&input[..]));
        assert_eq!(story.broken.map(Broken::reason), Some(Reason::PROTOCOL_ERROR));
    }
}

/// CVE-2025-64763: what a client sends before it is answered, or after it was refused, is nobody's.
#[test]
fn early_and_late_data_reach_nobody() {
    let mut core = Core::<()>::server(&Config::default());
    let events = |core: &mut Core<()>, bytes: &[u8]| {
        let (mut at, mut events) = (0, Vec::new());
        while let Some(event) = core.receive(bytes, &mut at, NOW).unwrap() {
            events.push(event);
        }
        events
    };
    events(&mut core, &[hello(), frame(frame::HEADERS, frame::END_HEADERS, 1, &block())].concat());
    let early = events(&mut core, &frame(frame::DATA, 0, 1, b"early"));
    assert_eq!(early, [Event::Reset { stream: 1, reason: Reason::PROTOCOL_ERROR }]);
    assert!(!core.answer(1, &ResponseHead::default()), "it is too late for an answer");

    events(&mut core, &frame(frame::HEADERS, frame::END_HEADERS, 3, &block()));
    core.refuse(3, StatusCode::UNAUTHORIZED);
    assert_eq!(events(&mut core, &frame(frame::DATA, 0, 3, b"late")), []);
    // An end without data is no data.
    events(&mut core, &frame(frame::HEADERS, frame::END_HEADERS, 5, &block()));
    assert_eq!(
        events(&mut core, &frame(frame::DATA, frame::END_STREAM, 5, b"")),
        [Event::Data { stream: 5, range: 9..9, end: true }]
    );
}

/// Who is told to go keeps what is under way, and nothing that the other will not look at.
#[test]
fn a_goaway_refuses_the_streams_behind_it() {
    let mut core = Core::<()>::client(&Config::default());
    let streams: Vec<u32> = (0..3).map(|_| core.open(&request(), ()).unwrap()).collect();
    let mut bytes = frame(frame::SETTINGS, 0, 0, &[]);
    bytes.extend(frame(frame::GOAWAY, 0, 0, &[0, 0, 0, 3, 0, 0, 0, 0, b'b', b'y', b'e']));
    let mut at = 0;
    while core.receive(&bytes, &mut at, NOW).unwrap().is_some() {}
    let resets: Vec<_> = streams.iter().map(|stream| core.get(*stream).unwrap().reset()).collect();
    assert_eq!(resets, [None, None, Some(Reason::REFUSED_STREAM)]);
    assert_eq!((core.goaway(), core.active()), (Some(Reason::NO_ERROR), 2));
}

/// A peer that takes frames of 16 KiB gets no larger ones, though as many as there are bytes; one that changes its mind is heeded.
#[test]
fn frames_are_as_large_as_the_peer_takes_them() {
    let mut core = Core::<()>::client(&Config::default());
    let stream = core.open(&request(), ()).unwrap();
    let size = |size: u32| frame(frame::SETTINGS, 0, 0, &[&[0, 5][..], &size.to_be_bytes()].concat());
    let hear = |core: &mut Core<()>, bytes: &[u8]| {
        let mut at = 0;
        while core.receive(bytes, &mut at, NOW).unwrap().is_some() {}
        core.written(usize::MAX);
    };
    // The sizes of the frames that carry `n` bytes.
    let send = |core: &mut Core<()>, n: usize| {
        let all = |places: &mut [IoSliceMut<'_>]| Ok(places.iter().map(|place| place.len()).sum());
        assert!(matches!(core.send(stream, n, all), Sent::Asked(asked, Ok(sent)) if asked == n && sent == n));
        let (mut sizes, mut rest) = (Vec::new(), core.out.bytes());
        while let Some((header, payload)) = rest.split_first_chunk() {
            let length = Frame::parse(*header).length as usize;
            sizes.push(length);
            rest = &payload[length..];
        }
        core.written(usize::MAX);
        sizes
    };
    hear(&mut core, &frame(frame::SETTINGS, 0, 0, &[]));
    assert_eq!(send(&mut core, 40_000), [16 << 10, 16 << 10, 40_000 - (32 << 10)]);
    hear(&mut core, &size(20_000));
    assert_eq!(send(&mut core, 20_000), [20_000]);
    hear(&mut core, &size(1 << 20));
    assert_eq!(send(&mut core, 5535), [5535]);
    assert!(matches!(core.send(stream, 1, |_| Ok(1)), Sent::Parked), "the window is used up");
    // A smaller window for all streams makes it smaller than nothing (§6.9.2).
    hear(&mut core, &frame(frame::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 1]));
    hear(&mut core, &frame(frame::WINDOW_UPDATE, 0, 0, &[0, 1, 0, 0]));
    hear(&mut core, &frame(frame::WINDOW_UPDATE, 0, stream, &65_534u32.to_be_bytes()));
    assert!(matches!(core.send(stream, 1, |_| Ok(1)), Sent::Parked));
    hear(&mut core, &frame(frame::WINDOW_UPDATE, 0, stream, &1u32.to_be_bytes()));
    assert!(matches!(core.send(stream, 100, |_| Ok(1)), Sent::Asked(1, Ok(1))));
}

/// Whoever wants to send is served in turn, also when there is room for few at a time, and those come back at once.
#[test]
fn nobody_waits_for_room_for_ever() {
    let mut core = Core::<()>::client(&Config::default());
    let mut at = 0;
    let mut hello = frame(frame::SETTINGS, 0, 0, &[&[0, 4][..], &(1u32 << 30).to_be_bytes()].concat());
    hello.extend(frame(frame::WINDOW_UPDATE, 0, 0, &(1u32 << 30).to_be_bytes()));
    while core.receive(&hello, &mut at, NOW).unwrap().is_some() {}
    let streams: Vec<u32> = (0..10).map(|_| core.open(&request(), ()).unwrap()).collect();
    core.written(usize::MAX);
    let mut sent = BTreeMap::<u32, usize>::new();
    let all = |places: &mut [IoSliceMut<'_>]| Ok(places.iter().map(|place| place.len()).sum());
    let mut asking = streams.clone();
    for _ in 0..100 {
        for stream in asking {
            // Each takes what it gets, and asks again until there is no room.
            while let Sent::Asked(_, Ok(n)) = core.send(stream, 150_000, all) {
                *sent.entry(stream).or_default() += n;
            }
        }
        core.written(usize::MAX);
        core.turned();
        asking = Vec::new();
        core.each_waiting(|entry| asking.push(entry.id));
        assert_eq!(asking.len(), streams.len(), "all of them wait");
    }
    let (least, most) = (sent.values().min().unwrap(), sent.values().max().unwrap());
    assert_eq!(sent.len(), streams.len());
    assert!(most - least <= 1 << 20, "{sent:?}");
}

/// Nor is anything kept of those that have waited and are gone, also when nobody is ever told that there is room.
#[test]
fn places_of_streams_that_are_gone_are_forgotten() {
    let mut core = Core::<()>::client(&Config::default());
    let mut at = 0;
    while core.receive(&frame(frame::SETTINGS, 0, 0, &[]), &mut at, NOW).unwrap().is_some() {}
    let all = |places: &mut [IoSliceMut<'_>]| Ok(places.iter().map(|place| place.len()).sum());
    let first = core.open(&request(), ()).unwrap();
    assert!(matches!(core.send(first, usize::MAX, all), Sent::Asked(65_535, Ok(65_535))), "the window of the tunnel");
    for _ in 0..10_000 {
        let stream = core.open(&request(), ()).unwrap();
        assert!(matches!(core.send(stream, 1, all), Sent::Parked));
        core.release(stream);
        core.written(usize::MAX);
        core.turned();
        core.each_waiting(|_| panic!("there is no room"));
    }
    assert!(core.queue.len() < 100, "{}", core.queue.len());
}

/// What the last words of two that end at the same time say of streams that are gone is no waste, however often.
#[test]
fn ends_and_resets_may_cross() {
    let config = Config { idle_frames: 2, ..Config::default() };
    let (mut client, mut server) = (Side::new(Core::client(&config)), Side::new(Core::server(&config)));
    for round in 0..20_000u32 {
        let stream = client.core.open(&request(), ()).unwrap();
        client.streams.insert(stream, Told::default());
        settle(&mut client, &mut server);
        assert!(server.core.answer(stream, &ResponseHead::default()));
        if round & 1 == 0 {
            settle(&mut client, &mut server);
        }
        // Each ends its direction, or not, and gives the stream up, or not, before it has heard of the other.
        for (side, ways) in [(&mut client, round >> 1), (&mut server, round >> 3)] {
            if ways & 1 == 0 {
                side.core.end(stream);
            }
            if ways & 2 == 0 {
                side.core.release(stream);
            }
        }
        cross(&mut client, &mut server);
        for side in [&mut client, &mut server] {
            side.core.release(stream);
            (side.streams, side.asked) = Default::default();
        }
        cross(&mut client, &mut server);
    }
}

/// What both have said reaches the other, without either having heard it before.
fn cross(client: &mut Side, server: &mut Side) {
    let said = [&mut *client, &mut *server].map(|side| {
        let said = side.core.out.bytes().to_vec();
        side.core.written(usize::MAX);
        said
    });
    for (side, said) in [(server, &said[0]), (client, &said[1])] {
        let mut at = 0;
        while side.core.receive(said, &mut at, NOW).expect("nobody floods").is_some() {}
    }
}

/// Streams of a tunnel that is gone may live on for a while: nothing that they say is kept, nor what waited.
#[test]
fn a_tunnel_that_is_gone_gathers_nothing() {
    let mut core = Core::<()>::client(&Config::default());
    let streams: Vec<u32> = (0..3).map(|_| core.open(&request(), ()).unwrap()).collect();
    let waits = core.out.len();
    assert!(waits > 0);
    core.finish();
    core.end(streams[0]);
    core.reset(streams[1], Reason::CANCEL);
    core.release(streams[1]);
    core.ping();
    core.close(Reason::NO_ERROR);
    assert!(matches!(core.send(streams[2], 100, |_| Ok(100)), Sent::Closed));
    assert_eq!(core.out.len(), waits, "what was said before may still be written");
    core.out.clear();
    core.ping();
    assert!(core.out.is_empty());
}
