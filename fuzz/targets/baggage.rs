//! `baggage`: any bytes are read or refused, and what was read is read again from what is written of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use zspire_hbone::headers::Baggage;

fuzz_target!(|text: &str| {
    let mut read = Baggage::default();
    if read.merge(text).is_ok() {
        let mut again = Baggage::default();
        again.merge(&read.to_string()).expect("our own");
        // Without a workload there is nothing to name its kind.
        if read.workload.is_none() {
            again.kind = read.kind;
        }
        assert_eq!(again, read);
    }
});
