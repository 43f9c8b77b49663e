//! Tunnels with HTTP/2 of others at the other end, in both directions: Envoy's, and libnghttp2 in nghttpx and nghttp.
//!
//! The other proxies are real, and so are the applications: sockets in pods. What each of them cannot do is said where a test
//! would ask for it.

use std::net::TcpStream;

use zspire_testkit::app::{finish, reset};
use zspire_testkit::envoy::{self, Envoy};
use zspire_testkit::{Ending, Listener, Mesh, captured, ending, hear, mesh, say, transfer, uncaptured, until};

use crate::scenario;

/// Where Envoy takes an application's connections.
const TAKES: u16 = 15001;
/// How much is sent, each way: nothing, a byte, a frame, many frames, many windows.
const SIZES: [u64; 5] = [0, 1, 16 << 10, 1 << 20, 64 << 20];
/// The last but one.
const MANY_FRAMES: u64 = SIZES[3];
/// How many connections there are at once.
const MANY: usize = 32;

/// A client without a proxy of the mesh, and a server with one.
fn foreign_client() -> Mesh {
    mesh().node("a").pod(uncaptured("client")).node("b").pod("server").start()
}

/// A client with a proxy of the mesh, whose one worker makes one tunnel, and a server that takes tunnels without one.
fn foreign_server() -> Mesh {
    mesh()
        .node("a")
        .pod(captured("client").with("ZTUNNEL_WORKER_THREADS", "1"))
        .node("b")
        .pod(uncaptured("server").taking_tunnels_itself())
        .start()
}

/// Envoy at the client's end of a tunnel, for the server's application.
fn envoy_as_client(mesh: &Mesh) -> Envoy {
    let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
    let certificate = mesh.certificate("envoy", &client.spiffe_id());
    let listener = envoy::opens_tunnels("outbound", Some(TAKES), server.app());
    Envoy::start(mesh, &client, &[listener], &[envoy::tunnel(&certificate, &server)])
}

/// Envoy at the server's end, which leads everything to the application.
fn envoy_as_server(mesh: &Mesh) -> Envoy {
    let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
    let certificate = mesh.certificate("envoy", &server.spiffe_id());
    let listener = envoy::takes_tunnels(&certificate, &client.spiffe_id(), "application");
    Envoy::start(mesh, &server, &[listener], &[envoy::leads_to("application", server.app())])
}

/// A way to open connections, and the application where they arrive.
struct Way<'a> {
    open: &'a dyn Fn() -> TcpStream,
    app: Listener,
}

impl Way<'_> {
    /// The two ends of a connection that works.
    #[track_caller]
    fn connection(&self) -> (TcpStream, TcpStream) {
        let client = (self.open)();
        let server = self.app.accept();
        say(&client, "question");
        hear(&server, "question");
        say(&server, "answer");
        hear(&client, "answer");
        (client, server)
    }

    /// Everything arrives, and then the end.
    #[track_caller]
    fn carries(&self, sizes: &[u64]) {
        for size in sizes {
            let (client, server) = self.connection();
            transfer::both_ways(&client, &server, *size);
            transfer::end(&client, &server);
        }
    }

    /// The same with many at once.
    #[track_caller]
    fn carries_many_at_once(&self, size: u64) {
        let connections: Vec<_> = (0..MANY).map(|_| self.connection()).collect();
        std::thread::scope(|scope| {
            for (client, server) in &connections {
                scope.spawn(|| transfer::both_ways(client, server, size));
            }
        });
    }

    /// The end of one direction leaves the other as it is.
    #[track_caller]
    fn half_closes(&self) {
        let (client, server) = self.connection();
        half_closes(&client, &server);
        let (client, server) = self.connection();
        half_closes(&server, &client);
    }
}

/// One end ends first, and hears the other to the end.
#[track_caller]
fn half_closes(first: &TcpStream, last: &TcpStream) {
    finish(first);
    assert_eq!(ending(last), Ending::Orderly);
    transfer::one_way(last, first, MANY_FRAMES);
    finish(last);
    assert_eq!(ending(first), Ending::Orderly);
}

/// Waits until Envoy has counted something so often.
#[track_caller]
fn counts(envoy: &Envoy, name: &str, times: u64) {
    until(name, || match envoy.count(name) {
        count if count == times => Ok(()),
        count => Err(count),
    });
}

#[test]
fn envoy_opens_tunnels_and_everything_arrives() {
    scenario(|| {
        let mesh = foreign_client();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let envoy = envoy_as_client(&mesh);
        let open = || client.open(([127, 0, 0, 1], TAKES).into());
        let way = Way { open: &open, app: server.listen() };
        way.carries(&SIZES);
        way.carries_many_at_once(256 << 10);
        way.half_closes();
        assert_eq!(envoy.count("cluster.tunnel.upstream_cx_total"), 1, "one tunnel carries all");
        assert_eq!(envoy.count("cluster.tunnel.http2.rx_reset"), 0);
        let line = server.access("inbound", |line| line["error"].is_null());
        assert_eq!(line["src.identity"], client.spiffe_id());
        // What its application gets to see of a reset, which is a FIN, is Envoy's own choice.
        let (_asking, served) = way.connection();
        reset(served);
        counts(&envoy, "cluster.tunnel.http2.rx_reset", 1);
        let (asking, served) = way.connection();
        reset(asking);
        assert_eq!(ending(&served), Ending::Reset);
    });
}

#[test]
fn envoy_takes_tunnels_and_everything_arrives() {
    scenario(|| {
        let mesh = foreign_server();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let app = server.listen();
        let envoy = envoy_as_server(&mesh);
        let open = || client.open(server.app());
        let way = Way { open: &open, app };
        way.carries(&SIZES);
        way.carries_many_at_once(256 << 10);
        let (asking, served) = way.connection();
        half_closes(&asking, &served);
        assert_eq!(envoy.count("http.hbone.downstream_cx_total"), 1, "one tunnel carries all");
        assert_eq!(envoy.count("http2.rx_reset"), 0);
        let line = client.access("outbound", |line| line["error"].is_null());
        assert_eq!(line["dst.identity"], server.spiffe_id());
        // An application that ends first is gone for Envoy: it ends the stream and resets it without an error (RFC 9113 §8.1),
        // and its client hears all that was said, and an end in order.
        let (asking, served) = way.connection();
        transfer::one_way(&served, &asking, MANY_FRAMES);
        finish(&served);
        assert_eq!(ending(&asking), Ending::Orderly);
        let (asking, served) = way.connection();
        reset(served);
        assert_eq!(ending(&asking), Ending::Reset);
        let (asking, _served) = way.connection();
        reset(asking);
        counts(&envoy, "http2.rx_reset", 1);
    });
}
