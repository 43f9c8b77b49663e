//! The PROXY protocol's header: for any addresses and any identity it has the lengths that it says it has.
#![no_main]

use std::net::{IpAddr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use zspire_model::SpiffeId;
use zspire_proxy::preambles::proxy_v2;

type Input<'a> = ((IpAddr, u16), (IpAddr, u16), Option<&'a str>);

fuzz_target!(|input: (bool, bool, [u8; 16], [u8; 16], u16, u16, Option<&str>)| {
    let (v6_source, v6_destination, source, destination, from, to, id) = input;
    let ip = |v6: bool, bytes: [u8; 16]| match v6 {
        true => IpAddr::from(bytes),
        false => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
    };
    let input: Input<'_> = ((ip(v6_source, source), from), (ip(v6_destination, destination), to), id);
    let id: Option<SpiffeId> = input.2.and_then(|id| format!("spiffe://{id}").parse().ok());
    let header = proxy_v2(SocketAddr::from(input.0), SocketAddr::from(input.1), id.as_ref());
    let addresses = match header[13] {
        0x11 => 12,
        0x21 => 36,
        other => panic!("family {other:#x}"),
    };
    assert_eq!(usize::from(u16::from_be_bytes([header[14], header[15]])), header.len() - 16);
    let more = &header[16 + addresses..];
    match &id {
        None => assert!(more.is_empty()),
        Some(id) => {
            assert_eq!((more[0], usize::from(u16::from_be_bytes([more[1], more[2]]))), (0xd0, more.len() - 3));
            assert_eq!(&more[3..], id.as_str().as_bytes());
        }
    }
});
