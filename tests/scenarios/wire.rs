//! What is on the wire between two nodes.

use zspire_testkit::{hear, mesh, say, uncaptured};

use crate::scenario;

const CANARY: &str = "a-text-that-nobody-else-says";

#[test]
fn nothing_of_a_tunnelled_connection_can_be_read_between_the_nodes() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod("server").pod(uncaptured("outsider")).start();
        // Plain TCP is recorded as well, to show that the recording sees what there is to be seen.
        for (to, port, readable) in [("server", 15008_u16, 0), ("outsider", 8080, 2)] {
            let server = mesh.pod(to);
            let recording = mesh.record();
            let app = server.listen();
            let client = mesh.pod("client").open(server.app());
            let served = app.accept();
            for (from, to) in [(&client, &served), (&served, &client)] {
                say(from, CANARY);
                hear(to, CANARY);
            }
            let packets = recording.end();
            assert!(packets.with(&port.to_be_bytes()) > 4, "{packets:?}");
            assert_eq!(packets.with(CANARY.as_bytes()), readable, "{to}");
        }
    });
}
