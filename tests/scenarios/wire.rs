//! What is on the wire between two nodes.

use zspire_testkit::app::finish;
use zspire_testkit::process::{pause, resume};
use zspire_testkit::{Ending, ending, hear, mesh, say, uncaptured};

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

/// Who is told the end with the last bytes wakes once, and answers one packet.
#[test]
fn last_bytes_and_the_end_are_one_packet() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let app = server.listen();
        let (asking, recording) = (client.open(server.app()), client.record());
        let served = app.accept();
        let proxy = server.proxy(|proxy| proxy.id());
        // It learns of both at once.
        pause(proxy);
        say(&served, CANARY);
        finish(&served);
        resume(proxy);
        hear(&asking, CANARY);
        assert_eq!(ending(&asking), Ending::Orderly);
        say(&asking, "the other direction goes on");
        hear(&served, "the other direction goes on");
        let packets = recording.end();
        // Over loopback each is seen on its way out and on its way in.
        assert_eq!((packets.with(CANARY.as_bytes()), packets.with_last(CANARY.as_bytes())), (2, 2));
    });
}
