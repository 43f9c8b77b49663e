//! ZDS: any sequence of messages with any number of descriptors is answered one by one, and the set of pods stays whole.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use zspire_node::pods::zds::{self, Packet};
use zspire_node::pods::{Launcher, Namespace, PodInfo, Pods};

/// Starts nothing; every third pod does not start at once.
struct Nothing;

impl Launcher for Nothing {
    type Proxy = ();

    fn start(&self, uid: &str, _: &PodInfo, _: &Namespace) -> Result<(), anyhow::Error> {
        if uid.len() % 3 == 0 { Err(anyhow::anyhow!("not now")) } else { Ok(()) }
    }

    fn drain(&self, _: &str, (): ()) {}
}

fuzz_target!(|packets: Vec<(Vec<u8>, u8, bool)>| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let mut pods = Pods::new(Nothing);
        pods.begin_snapshot();
        let mut now = tokio::time::Instant::now();
        for (message, descriptors, truncated) in packets.into_iter().take(64) {
            let opened = (0..descriptors % 4).filter_map(|_| File::open("/dev/null").ok().map(OwnedFd::from));
            let packet = Packet { message, descriptors: opened.collect(), truncated };
            let handled = zds::handle(&mut pods, packet, |_| Ok(7), now);
            assert!(!handled.answer.is_empty());
            now += Duration::from_millis(50);
            pods.retry(now);
        }
        pods.end_snapshot();
        let left = pods.view().len();
        pods.drain_all();
        assert!(pods.view().is_empty(), "{left} pods");
    });
});
