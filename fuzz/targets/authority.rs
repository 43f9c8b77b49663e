//! What CONNECT asks for: the two readers of it agree on what an address is, and each reads again what it writes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use zspire_hbone::Target;
use zspire_model::route::Authority;

fuzz_target!(|text: &str| {
    let target = text.parse::<Target>();
    if let Ok(target) = &target {
        assert_eq!(target.to_string().parse(), Ok(target.clone()));
    }
    if let Ok(authority) = text.parse::<Authority>() {
        assert_eq!(authority.to_string().parse(), Ok(authority.clone()));
        match (&authority, &target) {
            (Authority::Address(address), Ok(Target::Address(same))) => assert_eq!(address, same),
            (Authority::Address(address), other) => panic!("{address} is no address but {other:?}"),
            (_, Ok(Target::Address(address))) => panic!("{address} is no address but {authority}"),
            _ => {}
        }
    }
});
