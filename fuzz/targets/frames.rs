//! Frames: whatever a peer sends, and however it is cut, a tunnel takes it the same way, and no bytes appear or get lost.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use zspire_hbone::core::{Broken, Core, Event};
use zspire_hbone::{Config, ResponseHead};

/// What came: for each stream its bytes, and everything else.
#[derive(Debug, Default, PartialEq)]
struct Story {
    events: Vec<String>,
    data: Vec<(u32, Vec<u8>)>,
    broken: Option<Broken>,
}

fn feed(input: &[u8], step: usize) -> Story {
    let config = Config { stream_window: 3000, connection_window: 9000, idle_frames: 50, server_streams: 3, ..Config::default() };
    let mut core = Core::<()>::server(&config);
    let mut story = Story::default();
    for piece in input.chunks(step) {
        let mut at = 0;
        loop {
            match core.receive(piece, &mut at, Duration::ZERO) {
                Ok(None) => break,
                Ok(Some(Event::Data { stream, range, end })) => {
                    // Nothing is taken: the credit that is returned goes by the pieces that are taken at once.
                    match story.data.last_mut() {
                        Some((last, bytes)) if *last == stream => bytes.extend(&piece[range]),
                        _ => story.data.push((stream, piece[range].to_vec())),
                    }
                    if end {
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
                    return story;
                }
            }
        }
        assert_eq!(at, piece.len());
    }
    story
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, frames) = input;
    // The fuzzer need not find out how a connection begins.
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    bytes.extend(frames);
    assert_eq!(feed(&bytes, bytes.len()), feed(&bytes, usize::from(step).max(1)));
});
