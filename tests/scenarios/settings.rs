//! Settings that change what others see.

use zspire_testkit::plan::captured;
use zspire_testkit::{mesh, uncaptured};

use crate::scenario;

#[test]
fn source_address_can_be_left_to_the_pod() {
    scenario(|| {
        let server = captured("server").with("ENABLE_ORIG_SRC", "false");
        let mesh = mesh().node("a").pod("client").pod(uncaptured("stranger")).node("b").pod(server).start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        let _app = server.greet();
        assert_eq!(client.reaches(server.app()).from, server.address());
        assert_eq!(stranger.reaches(server.app()).from, server.address());
    });
}

#[test]
fn post_quantum_key_exchange_can_be_demanded() {
    scenario(|| {
        let strict = |name| captured(name).with("COMPLIANCE_POLICY", "pqc");
        let mesh = mesh().node("a").pod("client").pod(uncaptured("stranger")).node("b").pod(strict("server")).start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        let _app = server.greet();
        // Others prefer it, so that they are understood.
        client.reaches(server.app());
        let address = server.at(15008).to_string();
        let arguments = ["s_client", "-connect", &address, "-alpn", "h2", "-groups", "X25519", "-ign_eof"];
        let output = stranger.command("openssl", &arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("alert handshake failure"), "{said}");
    });
}

#[test]
fn what_is_discovered_on_demand_is_asked_for_before_it_is_routed_to() {
    scenario(|| {
        let asking = captured("client").with("XDS_ON_DEMAND", "true");
        let mesh =
            mesh().control_plane().node("a").pod(asking).node("b").pod("server").service("api", &["server"]).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        // By the service's address and by the pod's own, neither of which the proxy knows before; in a tunnel both times.
        client.reaches(mesh.service("api"));
        client.reaches(server.app());
        for _ in 0..2 {
            let line = server.access("inbound", |line| line["error"].is_null());
            assert_eq!(line["src.identity"], client.spiffe_id());
        }
    });
}
