//! `traceparent`: any bytes are read or refused, and what was read is read again from what is written of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use zspire_hbone::headers::TraceParent;

fuzz_target!(|text: &str| {
    if let Ok(read) = text.parse::<TraceParent>() {
        assert_eq!(read.to_string().parse(), Ok(read));
    }
});
