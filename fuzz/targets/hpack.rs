//! HPACK: any blocks of one connection are read or refused, and unfold to no more than was allowed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use zspire_hbone::core::hpack::Decoder;

const LIMIT: usize = 10_000;

fuzz_target!(|blocks: Vec<&[u8]>| {
    let mut decoder = Decoder::default();
    for block in blocks {
        let mut size = 0;
        let read = decoder.decode(block, LIMIT, &mut |name, value| size += name.len() + value.len() + 32);
        assert!(size <= LIMIT);
        if read.is_err() {
            break;
        }
    }
});
