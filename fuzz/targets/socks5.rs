//! SOCKS5: whatever an application sends, it is read to its end without waiting for more than was said to come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokio::io::{join, sink};
use zspire_proxy::preambles::{Asked, socks5};

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let mut application = join(bytes, sink());
    if let Ok(asked) = runtime.block_on(socks5(&mut application)) {
        match asked {
            Asked::Address(address) => assert!(address.ip().to_canonical() == address.ip()),
            Asked::Hostname(name, _) => assert!(name.len() <= 255 && name.parse::<std::net::IpAddr>().is_err()),
        }
    }
});
