//! The events of a tunnel: whatever a peer sends between whatever we do, each stream begins once, ends once, and nothing of it
//! comes after its end; and what we hold is what came and was not taken.
#![no_main]

use std::collections::HashMap;
use std::time::Duration;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use zspire_hbone::core::{Core, Event};
use zspire_hbone::{Config, Reason, ResponseHead, StatusCode};

#[derive(Arbitrary, Debug)]
enum Act<'a> {
    Receive(&'a [u8]),
    Frame { kind: u8, flags: u8, stream: u8, payload: &'a [u8] },
    Connect { stream: u8, end: bool },
    Answer(u8),
    Refuse(u8),
    Take(u8),
    End(u8),
    Reset(u8),
    Release(u8),
    Written(u16),
    Drain,
}

#[derive(Default)]
struct Told {
    held: usize,
    ended: bool,
    gone: bool,
}

const CONNECT: &[u8] = b"\x02\x07CONNECT\x01\x0b10.0.0.1:80";

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags, 0, 0, 0, stream]);
    bytes.extend(payload);
    bytes
}

struct Server {
    core: Core<()>,
    streams: HashMap<u32, Told>,
}

impl Server {
    /// False: the peer has broken the protocol.
    fn hear(&mut self, bytes: &[u8]) -> bool {
        let mut at = 0;
        loop {
            let event = match self.core.receive(bytes, &mut at, Duration::ZERO) {
                Ok(None) => return true,
                Ok(Some(event)) => event,
                Err(_) => return false,
            };
            match event {
                Event::Request { stream, head: Ok(_) } => {
                    assert!(self.streams.insert(stream, Told::default()).is_none());
                }
                Event::Data { stream, range, end } => {
                    let told = self.streams.get_mut(&stream).expect("it was asked for");
                    assert!(!told.ended && !told.gone);
                    told.held += range.len();
                    told.ended = end;
                    self.core.hold(range.len());
                }
                Event::Reset { stream, .. } => {
                    let told = self.streams.get_mut(&stream).expect("it was asked for");
                    assert!(!std::mem::replace(&mut told.gone, true));
                }
                _ => {}
            }
        }
    }

    fn take(&mut self, stream: u32) {
        if let Some(told) = self.streams.get_mut(&stream) {
            let held = std::mem::take(&mut told.held);
            self.core.give(held);
            self.core.taken(stream, held);
        }
    }
}

fuzz_target!(|acts: Vec<Act<'_>>| {
    let config = Config { stream_window: 2000, connection_window: 5000, buffered_cap: 3000, idle_frames: 50, server_streams: 5, ..Config::default() };
    let mut server = Server { core: Core::server(&config), streams: HashMap::new() };
    assert!(server.hear(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"));
    for act in acts {
        let well = match act {
            Act::Receive(bytes) => server.hear(bytes),
            Act::Frame { kind, flags, stream, payload } => server.hear(&frame(kind % 12, flags, stream % 16, payload)),
            Act::Connect { stream, end } => server.hear(&frame(1, 4 | u8::from(end), stream, CONNECT)),
            Act::Answer(stream) => {
                server.core.answer(stream.into(), &ResponseHead::default());
                true
            }
            Act::Take(stream) => {
                server.take(stream.into());
                true
            }
            Act::End(stream) => {
                server.core.end(stream.into());
                true
            }
            Act::Reset(stream) => {
                server.core.reset(stream.into(), Reason::CANCEL);
                if let Some(told) = server.streams.get_mut(&stream.into()) {
                    told.gone = true;
                }
                true
            }
            Act::Refuse(stream) | Act::Release(stream) => {
                server.take(stream.into());
                if let Act::Refuse(_) = act {
                    server.core.refuse(stream.into(), StatusCode::UNAUTHORIZED);
                } else {
                    server.core.release(stream.into());
                }
                if let Some(told) = server.streams.get_mut(&stream.into()) {
                    told.gone = true;
                }
                true
            }
            Act::Written(n) => {
                server.core.written(n.into());
                true
            }
            Act::Drain => {
                server.core.drain();
                true
            }
        };
        assert!(server.core.active() <= config.server_streams as usize);
        let held: usize = server.streams.values().map(|told| told.held).sum();
        assert!(held <= config.connection_window as usize + config.buffered_cap as usize + 65_535);
        if !well {
            break;
        }
    }
});
