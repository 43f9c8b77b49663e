//! Peers that waste our time: exactly how far each gets, by what it is cut off, and what it can make us hold.
//!
//! One table for all that a client can do over and over, whether it reads our answers or not. Nothing here has a clock: budgets that
//! time restores are what they are at one moment.

use super::*;
use crate::error::Flood;

/// Frames without content that are taken in these tests.
const IDLE: usize = 100;
/// Requests that may be abandoned at once.
const ABANDONED: usize = 200;
/// Frames of a stream that is gone which are no waste.
const LATE: usize = 3;
/// Streams at once.
const STREAMS: usize = 50;

/// What is sent in each round.
type Again = fn(u32) -> Vec<u8>;

/// What a client does with a server that grants its requests, and how many times that goes well.
struct Attack {
    name: &'static str,
    start: Vec<u8>,
    again: Again,
    /// Whether its requests are granted, or wait for ever.
    granted: bool,
    rounds: usize,
    flood: Flood,
}

fn headers(stream: u32) -> Vec<u8> {
    frame(frame::HEADERS, frame::END_HEADERS, stream, &block())
}

/// The streams of a client that opens a new one in each round.
fn nth(round: u32) -> u32 {
    2 * round + 1
}

fn reset(stream: u32) -> Vec<u8> {
    frame(frame::RST_STREAM, 0, stream, &8u32.to_be_bytes())
}

fn update(stream: u32, n: u32) -> Vec<u8> {
    frame(frame::WINDOW_UPDATE, 0, stream, &n.to_be_bytes())
}

/// Fields without compression, which enter no table.
fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let field = |(name, value): &(&str, &str)| {
        [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
    };
    fields.iter().flat_map(field).collect()
}

fn get() -> Vec<u8> {
    fields(&[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")])
}

/// A request whose list of fields is larger than we take, by many small ones.
fn many_fields() -> Vec<u8> {
    // `:method: CONNECT`, then `accept-encoding: gzip, deflate`, a byte and 60 bytes by HTTP/2's measure for each.
    [fields(&[(":method", "CONNECT"), (":authority", "10.0.0.1:80")]), vec![0x90; 300]].concat()
}

fn setting(name: u16, value: u32) -> Vec<u8> {
    frame(frame::SETTINGS, 0, 0, &[&name.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

fn attacks() -> Vec<Attack> {
    let open = || headers(1);
    let gone = || [headers(1), reset(1)].concat();
    let attack = |name, start: Vec<u8>, again: Again, granted, rounds, flood| Attack {
        name,
        start: [hello(), start].concat(),
        again,
        granted,
        rounds,
        flood,
    };
    vec![
        attack("pings", vec![], |_| frame(frame::PING, 0, 0, &[1; 8]), true, IDLE, Flood::Ping),
        attack("answers to no ping", vec![], |_| frame(frame::PING, frame::ACK, 0, &[1; 8]), true, IDLE, Flood::Ping),
        attack("settings", vec![], |_| frame(frame::SETTINGS, 0, 0, &[]), true, IDLE, Flood::Settings),
        attack(
            "a hundred settings each",
            vec![],
            |_| frame(frame::SETTINGS, 0, 0, &[9; 600]),
            true,
            IDLE,
            Flood::Settings,
        ),
        attack("a window to and fro", open(), |round| setting(4, round % 2), true, IDLE, Flood::Settings),
        // The first is an answer.
        attack(
            "acknowledgements",
            vec![],
            |_| frame(frame::SETTINGS, frame::ACK, 0, &[]),
            true,
            IDLE + 1,
            Flood::Settings,
        ),
        attack("priorities", vec![], |_| frame(frame::PRIORITY, 0, 1, &[0; 5]), true, IDLE, Flood::Priority),
        attack("unknown frames", vec![], |_| frame(99, 0, 0, &[0; 20]), true, IDLE, Flood::Unknown),
        // The first is heeded.
        attack("goaways", vec![], |_| frame(frame::GOAWAY, 0, 0, &[0; 8]), true, IDLE + 1, Flood::GoAway),
        attack("a window for all", open(), |_| update(0, 1), true, IDLE, Flood::WindowUpdate),
        attack("a window for one", open(), |_| update(1, 1), true, IDLE, Flood::WindowUpdate),
        attack("a window for one that is gone", gone(), |_| update(1, 1), true, IDLE, Flood::WindowUpdate),
        // CVE-2019-9518.
        attack("empty data", open(), |_| frame(frame::DATA, 0, 1, &[]), true, IDLE, Flood::Data),
        attack(
            "padding",
            open(),
            |_| frame(frame::DATA, frame::PADDED, 1, &[&[255][..], &[0; 255]].concat()),
            true,
            IDLE,
            Flood::Data,
        ),
        attack(
            "no padding, and said so",
            open(),
            |_| frame(frame::DATA, frame::PADDED, 1, &[0]),
            true,
            IDLE,
            Flood::Data,
        ),
        attack(
            "empty data of one that is gone",
            gone(),
            |_| frame(frame::DATA, 0, 1, &[]),
            true,
            IDLE + LATE,
            Flood::Data,
        ),
        attack("resets of one that is gone", gone(), |_| reset(1), true, IDLE + LATE, Flood::Reset),
        attack("headers of one that is gone", gone(), |_| headers(1), true, IDLE + LATE, Flood::Headers),
        // CVE-2019-9518 again; the first frame is HEADERS.
        attack(
            "an empty block",
            frame(frame::HEADERS, 0, 1, &[]),
            |_| frame(frame::CONTINUATION, 0, 1, &[]),
            true,
            63,
            Flood::Continuation,
        ),
        // RUSTSEC-2024-0332.
        attack(
            "a long block",
            frame(frame::HEADERS, 0, 1, &[]),
            |_| frame(frame::CONTINUATION, 0, 1, &[0; 8 << 10]),
            true,
            8,
            Flood::Continuation,
        ),
        attack(
            "a long block at once",
            vec![],
            |_| frame(frame::HEADERS, 0, 1, &[0; (64 << 10) + 1]),
            true,
            0,
            Flood::Headers,
        ),
        // HPACK bombs: a field of 4000 bytes in the table and 8000 mentions of it; as many fields of nothing as there is room for.
        attack(
            "a large field again and again",
            vec![],
            |_| {
                let bomb = [&block(), &[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'y'; 4000], &[0xbe; 8000]].concat();
                frame(frame::HEADERS, frame::END_HEADERS, 1, &bomb)
            },
            true,
            0,
            Flood::Headers,
        ),
        attack(
            "fields of nothing",
            vec![],
            |_| frame(frame::HEADERS, frame::END_HEADERS, 1, &[0; 3 * 20_000]),
            true,
            0,
            Flood::Headers,
        ),
        attack(
            "many small fields",
            vec![],
            |round| frame(frame::HEADERS, frame::END_HEADERS, nth(round), &many_fields()),
            true,
            IDLE,
            Flood::Headers,
        ),
        attack(
            "requests that are no CONNECT",
            vec![],
            |round| frame(frame::HEADERS, frame::END_HEADERS, nth(round), &get()),
            true,
            IDLE,
            Flood::Headers,
        ),
        attack("requests beyond the limit", vec![], |round| headers(nth(round)), true, STREAMS + IDLE, Flood::Headers),
        attack(
            "requests beyond the limit that nobody answers",
            vec![],
            |round| headers(nth(round)),
            false,
            STREAMS + IDLE,
            Flood::Headers,
        ),
        // CVE-2023-44487.
        attack(
            "requests taken back",
            vec![],
            |round| [headers(nth(round)), reset(nth(round))].concat(),
            false,
            ABANDONED,
            Flood::Abandoned,
        ),
        // RUSTSEC-2024-0003: the same where nothing that we would say of a stream has a window.
        attack(
            "requests taken back without a window",
            setting(4, 0),
            |round| [headers(nth(round)), reset(nth(round))].concat(),
            false,
            ABANDONED,
            Flood::Abandoned,
        ),
        // CVE-2025-8671: it makes us take them back.
        attack(
            "requests that are not HTTP",
            vec![],
            |round| frame(frame::HEADERS, frame::END_HEADERS, nth(round), &[]),
            true,
            ABANDONED,
            Flood::Abandoned,
        ),
        attack(
            "data before the answer",
            vec![],
            |round| [headers(nth(round)), frame(frame::DATA, 0, nth(round), &[1])].concat(),
            false,
            ABANDONED,
            Flood::Abandoned,
        ),
        attack(
            "a window opened by nothing",
            vec![],
            |round| [headers(nth(round)), update(nth(round), 0)].concat(),
            false,
            IDLE,
            Flood::WindowUpdate,
        ),
        attack(
            "a window beyond its size",
            vec![],
            |round| [headers(nth(round)), update(nth(round), 0x7fff_ffff)].concat(),
            true,
            IDLE,
            Flood::WindowUpdate,
        ),
        attack(
            "data after the end",
            vec![],
            |round| {
                let end = frame(frame::DATA, frame::END_STREAM, nth(round), &[]);
                [headers(nth(round)), end, frame(frame::DATA, 0, nth(round), &[1])].concat()
            },
            true,
            ABANDONED,
            Flood::Abandoned,
        ),
        attack(
            "headers after the end",
            vec![],
            |round| {
                let end = frame(frame::DATA, frame::END_STREAM, nth(round), &[]);
                [headers(nth(round)), end, headers(nth(round))].concat()
            },
            true,
            ABANDONED,
            Flood::Abandoned,
        ),
        attack(
            "trailers that are not the end",
            vec![],
            |round| [headers(nth(round)), headers(nth(round))].concat(),
            true,
            ABANDONED,
            Flood::Abandoned,
        ),
        attack(
            "data beyond the window",
            vec![],
            |round| [headers(nth(round)), frame(frame::DATA, 0, nth(round), &[1; 66_000])].concat(),
            true,
            ABANDONED,
            Flood::Abandoned,
        ),
    ]
}

/// A server and what its peer has made of it.
struct Victim {
    core: Core<()>,
    granted: bool,
    /// Bytes that it was given, and that it has said.
    heard: usize,
    said: usize,
    /// The most that waited to be written, and the most streams that there were.
    waited: usize,
    streams: usize,
    data: usize,
}

impl Victim {
    fn new(config: &Config, granted: bool) -> Self {
        Self { core: Core::server(config), granted, heard: 0, said: 0, waited: 0, streams: 0, data: 0 }
    }

    fn hear(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        self.heard += bytes.len();
        let mut at = 0;
        while let Some(event) = self.core.receive(bytes, &mut at, NOW)? {
            match event {
                Event::Request { stream, head: Ok(_) } if self.granted => {
                    assert!(self.core.answer(stream, &ResponseHead::default()));
                }
                Event::Reset { stream, .. } => drop(self.core.release(stream)),
                Event::Data { stream, range, .. } => {
                    self.data += range.len();
                    self.core.taken(stream, range.len());
                }
                _ => {}
            }
            self.streams = self.streams.max(self.core.active());
        }
        self.waited = self.waited.max(self.core.out.len());
        Ok(())
    }

    fn write(&mut self) {
        self.said += self.core.out.len();
        self.core.written(usize::MAX);
    }
}

fn config() -> Config {
    Config { idle_frames: IDLE as u32, server_streams: STREAMS as u32, stream_window: 65_535, ..Config::default() }
}

#[test]
fn every_flood_is_cut_off_where_its_budget_ends() {
    for Attack { name, start, again, granted, rounds, flood } in attacks() {
        let mut victim = Victim::new(&config(), granted);
        // The first WINDOW_UPDATE and SETTINGS of an honest peer cost nothing.
        victim.hear(&start).unwrap();
        victim.write();
        let mut round = 0;
        let broken = loop {
            match victim.hear(&again(round)) {
                Ok(()) => victim.write(),
                Err(broken) => break broken,
            }
            round += 1;
            assert!(round < 10_000, "{name}: it goes on");
        };
        assert_eq!((broken, round as usize), (Broken::Flood(flood), rounds), "{name}");
        assert_eq!(broken.reason(), Reason::ENHANCE_YOUR_CALM);
        victim.write();
        assert!(victim.said <= 200 + 2 * victim.heard, "{name}: {} bytes said to {}", victim.said, victim.heard);
        assert!(victim.streams <= STREAMS, "{name}: {} streams", victim.streams);
        assert_eq!(victim.data, 0, "{name}: nothing that an application should see");
        assert!(victim.core.partial.capacity() <= 128 << 10, "{name}");
    }
}

/// The same by a peer that reads nothing of what it makes us say, and has a budget without end: the one that reads the connection
/// stops when too much waits, so that what waits is little more than that.
#[test]
fn nothing_piles_up_for_a_peer_that_does_not_read() {
    for Attack { name, start, again, granted, .. } in attacks() {
        let mut victim = Victim::new(&Config { idle_frames: u32::MAX, ..config() }, granted);
        victim.hear(&start).unwrap();
        let (mut round, mut largest) = (0, 0);
        let cut = loop {
            if victim.core.is_overloaded() || round == 60_000 {
                break false;
            }
            let bytes = again(round);
            largest = largest.max(bytes.len());
            if victim.hear(&bytes).is_err() {
                break true;
            }
            round += 1;
        };
        assert!(victim.waited <= super::super::BACKLOG + largest, "{name}: {} bytes wait", victim.waited);
        assert!(victim.streams <= STREAMS, "{name}: {} streams", victim.streams);
        assert!(cut || round == 60_000 || victim.core.is_overloaded(), "{name}");
    }
}

/// CVE-2019-9511: whoever opens its window by a byte at a time, and waits for that byte, gets it: an answer that is no larger than
/// the question. Nothing waits for it in between.
#[test]
fn a_window_that_is_opened_by_single_bytes() {
    let (mut victim, send) = without_a_window();
    for _ in 0..10_000 {
        victim.hear(&update(1, 1)).unwrap();
        assert!(matches!(send(&mut victim), Sent::Asked(1, Ok(1))));
        assert!(matches!(send(&mut victim), Sent::Parked));
        assert_eq!(victim.core.out.len(), 9 + 1);
        victim.write();
    }
    assert!(victim.core.queue.is_empty(), "a stream without a window has no place among those that wait for room");
    assert!(victim.said < victim.heard, "{} bytes for {}", victim.said, victim.heard);
}

/// And whoever does not wait gets all in one frame, and is told apart from an honest peer by its many frames.
#[test]
fn a_window_that_is_opened_by_single_bytes_at_once() {
    let (mut victim, send) = without_a_window();
    let mut rounds = 0;
    let broken = loop {
        if let Some(broken) = (0..10).find_map(|_| victim.hear(&update(1, 1)).err()) {
            break broken;
        }
        assert!(matches!(send(&mut victim), Sent::Asked(10, Ok(10))));
        victim.write();
        rounds += 1;
    };
    // Ten are spent in each round, and two are earned.
    assert_eq!((broken, rounds), (Broken::Flood(Flood::WindowUpdate), (IDLE - 2) / 8));
}

/// A server that wants to send without end, and may not.
fn without_a_window() -> (Victim, impl Fn(&mut Victim) -> Sent) {
    let mut victim = Victim::new(&config(), true);
    victim.hear(&[hello(), setting(4, 0), headers(1)].concat()).unwrap();
    victim.write();
    let all = |places: &mut [IoSliceMut<'_>]| Ok(places.iter().map(|place| place.len()).sum());
    let send = move |victim: &mut Victim| victim.core.send(1, usize::MAX, all);
    assert!(matches!(send(&mut victim), Sent::Parked));
    (victim, send)
}

/// What a server may do to its client: each is cut off or costs a stream, and never reaches the application.
#[test]
fn a_server_is_held_to_the_same() {
    let pings = |_| frame(frame::PING, 0, 0, &[1; 8]);
    let informational = |_| frame(frame::HEADERS, frame::END_HEADERS, 1, &fields(&[(":status", "103")]));
    let floods: [(&str, Again, Flood); 4] = [
        ("pings", pings, Flood::Ping),
        ("answers that are none yet", informational, Flood::Headers),
        ("windows", |_| update(0, 1), Flood::WindowUpdate),
        ("settings", |_| frame(frame::SETTINGS, 0, 0, &[]), Flood::Settings),
    ];
    for (name, again, flood) in floods {
        let mut core = Core::<()>::client(&config());
        core.open(&request(), ()).unwrap();
        events(&mut core, &frame(frame::SETTINGS, 0, 0, &[])).unwrap();
        let ends =
            (0..).find_map(|round| events(&mut core, &again(round)).err().map(|broken| (round as usize, broken)));
        assert_eq!(ends, Some((IDLE, Broken::Flood(flood))), "{name}");
    }
}

/// CVE-2025-64763 from the other side: data before the answer, after an end, and beside a refusal.
#[test]
fn data_that_a_client_did_not_ask_for() {
    let ok = || frame(frame::HEADERS, frame::END_HEADERS, 1, &[0x88]);
    let data = || frame(frame::DATA, 0, 1, b"data");
    let end = || frame(frame::DATA, frame::END_STREAM, 1, &[]);
    let reset = |reason| Event::Reset { stream: 1, reason };
    let client = |bytes: Vec<u8>| {
        let mut core = Core::<()>::client(&config());
        core.open(&request(), ()).unwrap();
        let told = events(&mut core, &[frame(frame::SETTINGS, 0, 0, &[]), bytes].concat()).unwrap();
        (core, told)
    };
    let (_, told) = client([data(), ok()].concat());
    assert_eq!(told, [Event::Settings, reset(Reason::PROTOCOL_ERROR)], "before the answer, which comes too late");
    let (_, told) = client([ok(), end(), data()].concat());
    assert_eq!(told.last(), Some(&reset(Reason::STREAM_CLOSED)), "after the end");
    let (_, told) = client([ok(), end(), ok()].concat());
    assert_eq!(told.last(), Some(&reset(Reason::STREAM_CLOSED)), "headers after the end");
    // It is told, and has released the stream by then: see `connect::data_of_a_refusal_is_nobodys`.
    let refusal = frame(frame::HEADERS, frame::END_HEADERS, 1, &fields(&[(":status", "403")]));
    let (mut core, told) = client(refusal);
    assert!(matches!(told[1], Event::Answer { status: StatusCode::FORBIDDEN, .. }));
    core.release(1);
    assert_eq!(events(&mut core, &data()), Ok(vec![]), "after a refusal");
}

fn events(core: &mut Core<()>, bytes: &[u8]) -> Result<Vec<Event>, Broken> {
    let (mut at, mut events) = (0, Vec::new());
    while let Some(event) = core.receive(bytes, &mut at, NOW)? {
        events.push(event);
    }
    Ok(events)
}

/// The other side of it: who gets single bytes on a thousand streams, and returns every window for every byte, wastes nothing.
#[test]
fn a_window_that_is_returned_for_every_byte() {
    let many = Config { idle_frames: 0, server_streams: 1000, ..config() };
    let mut victim = Victim::new(&many, true);
    let streams = || (0..1000).map(nth);
    victim.hear(&hello()).unwrap();
    streams().for_each(|stream| victim.hear(&headers(stream)).unwrap());
    for _ in 0..200 {
        for stream in streams() {
            assert!(matches!(victim.core.send(stream, 1, |_| Ok(1)), Sent::Asked(1, Ok(1))));
            victim.write();
        }
        let returned: Vec<u8> = streams().flat_map(|stream| [update(stream, 1), update(0, 1)].concat()).collect();
        victim.hear(&returned).unwrap();
    }
}
