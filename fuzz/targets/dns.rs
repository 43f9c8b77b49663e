//! DNS: whatever an application sends is answered under its own id, in what it takes, or not at all.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use zspire_model::{Change, NetworkAddress, Service, Snapshot, Store, Workload};

static MESH: LazyLock<Snapshot> = LazyLock::new(|| {
    let (mut store, _) = Store::new();
    let service = |hostname: &str, vip: Option<&str>| Service {
        namespace: "ns".into(),
        hostname: hostname.into(),
        vips: vip
            .map(|it| NetworkAddress { network: "".into(), address: it.parse().expect("an address") })
            .into_iter()
            .collect(),
        ..Service::default()
    };
    let services = [
        service("a.ns.svc.cluster.local", Some("10.1.0.1")),
        service("*.b", Some("fd00::1")),
        service("h.ns.svc.cluster.local", None),
    ];
    store.apply(services.map(|it| Change::PutService(Arc::new(it))));
    store.snapshot().clone()
});

fuzz_target!(|bytes: &[u8]| {
    let client = Workload { namespace: "ns".into(), ..Workload::default() };
    if let Some(reply) = zspire_proxy::dns::reply("cluster.local", &MESH, &client, bytes) {
        assert!(reply.len() >= 12 && reply.len() <= 4096);
        assert!(reply[..2] == bytes[..2] && reply[2] & 0x80 != 0);
    }
});
