//! How connections end: a FIN stays a FIN and a reset stays a reset, on every way that a connection can take.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use zspire_testkit::app::{finish, reset};
use zspire_testkit::{Ending, ending, hear, mesh, say, uncaptured};

use crate::scenario;

/// Shows that the two are the ends of one connection.
fn converse(client: &TcpStream, server: &TcpStream) {
    say(client, "question");
    hear(server, "question");
    say(server, "answer");
    hear(client, "answer");
}

/// Makes a connection in a tunnel, one out of the mesh and one into it, and checks each.
fn on_every_way(check: fn(client: TcpStream, server: TcpStream)) {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("stranger"))
            .node("b")
            .pod("server")
            .pod(uncaptured("outsider"))
            .start();
        for (from, to) in [("client", "server"), ("client", "outsider"), ("stranger", "server")] {
            let server = mesh.pod(to);
            let app = server.listen();
            let client = mesh.pod(from).open(server.app());
            let served = app.accept();
            converse(&client, &served);
            check(client, served);
        }
        for name in ["client", "server"] {
            let pod = mesh.pod(name);
            zspire_testkit::until("the table of connections to be empty", || {
                let state = pod.dump()["workloadState"].clone();
                let of_pod = |state: &&serde_json::Value| state["info"]["name"] == name;
                let pods = state.as_object().into_iter().flat_map(|pods| pods.values());
                let connections = pods.clone().find(of_pod).expect("the pod is served")["connections"].clone();
                let empty =
                    ["inbound", "outbound"].iter().all(|way| connections[way].as_array().is_some_and(Vec::is_empty));
                if empty { Ok(()) } else { Err(state) }
            });
        }
    });
}

#[test]
fn client_ends_first() {
    on_every_way(|client, server| {
        finish(&client);
        assert_eq!(ending(&server), Ending::Orderly);
        say(&server, "and another thing");
        hear(&client, "and another thing");
        finish(&server);
        assert_eq!(ending(&client), Ending::Orderly);
    });
}

#[test]
fn server_ends_first() {
    on_every_way(|client, server| {
        finish(&server);
        assert_eq!(ending(&client), Ending::Orderly);
        say(&client, "and another thing");
        hear(&server, "and another thing");
        finish(&client);
        assert_eq!(ending(&server), Ending::Orderly);
    });
}

#[test]
fn client_resets() {
    on_every_way(|client, server| {
        reset(client);
        assert_eq!(ending(&server), Ending::Reset);
    });
}

#[test]
fn server_resets() {
    on_every_way(|client, server| {
        reset(server);
        assert_eq!(ending(&client), Ending::Reset);
    });
}

#[test]
fn client_resets_after_the_server_has_ended() {
    on_every_way(|client, server| {
        finish(&server);
        assert_eq!(ending(&client), Ending::Orderly);
        reset(client);
        assert_eq!(ending(&server), Ending::Reset);
    });
}

#[test]
fn server_resets_after_the_client_has_ended() {
    on_every_way(|client, server| {
        finish(&client);
        assert_eq!(ending(&server), Ending::Orderly);
        reset(server);
        assert_eq!(ending(&client), Ending::Reset);
    });
}

#[test]
fn everything_arrives_before_the_end() {
    on_every_way(|client, server| {
        let sent: Vec<u8> = (0..8 << 20u32).map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
            let received = std::thread::scope(|scope| {
                scope.spawn(|| {
                    from.write_all(&sent).unwrap();
                    finish(from);
                });
                let mut received = Vec::new();
                to.read_to_end(&mut received).unwrap();
                received
            });
            assert!(received == sent, "{} of {} bytes, or others", received.len(), sent.len());
        }
    });
}
