//! The packets on a link, as they are.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use zspire_sys::netns::Netns;
use zspire_sys::packets::{self, MAX_PACKET};

/// How soon a recording notices that it is to end.
const LOOK: Duration = Duration::from_millis(20);

/// A recording of everything that crosses a link, in both directions.
#[derive(Debug)]
pub struct Recording {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Packets>,
}

/// What was recorded.
#[derive(Debug, Default)]
pub struct Packets(Vec<Vec<u8>>);

impl Recording {
    /// Records from now on.
    #[track_caller]
    pub(crate) fn start(netns: &Netns, link: &str) -> Self {
        let opened = netns.run(|| packets::Packets::of(link)).expect("the namespace can be entered");
        let mut from = opened.expect("the link is there");
        let stop = Arc::<AtomicBool>::default();
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut kept, mut buffer) = (Packets::default(), vec![0; MAX_PACKET]);
            loop {
                // What has crossed before the end is read before the end.
                let ending = told.load(Relaxed);
                match from.read(&mut buffer, LOOK) {
                    Ok(n) => kept.0.push(buffer[..n].to_vec()),
                    Err(error) if error.kind() == ErrorKind::WouldBlock && ending => return kept,
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                    Err(error) => panic!("cannot read packets: {error}"),
                }
            }
        });
        Self { stop, thread }
    }

    /// Ends it; everything that has crossed the link by now is in it.
    #[track_caller]
    pub fn end(self) -> Packets {
        self.stop.store(true, Relaxed);
        self.thread.join().expect("packets can be read")
    }
}

impl Packets {
    /// How many TCP packets over IPv4 have these bytes as their last, and tell that nothing follows (FIN).
    pub fn with_last(&self, bytes: &[u8]) -> usize {
        // After the header of the link and one of IP without options: the byte of the flags.
        const FLAGS: usize = 14 + 20 + 13;
        const FIN: u8 = 1;
        let last =
            |packet: &&Vec<u8>| packet.ends_with(bytes) && packet.get(FLAGS).is_some_and(|flags| flags & FIN != 0);
        self.0.iter().filter(last).count()
    }

    /// How many packets hold these bytes.
    pub fn with(&self, bytes: &[u8]) -> usize {
        self.0.iter().filter(|packet| packet.windows(bytes.len()).any(|window| window == bytes)).count()
    }
}
