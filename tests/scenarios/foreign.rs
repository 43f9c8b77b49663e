//! Tunnels with HTTP/2 of others at the other end, in both directions: Envoy's, and libnghttp2 in nghttpx and nghttp.
//!
//! What each of them cannot do is said where a test would ask for it. `make soak` sends more.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::process::Command;

use serde_json::Value;
use zspire_testkit::app::{finish, reset};
use zspire_testkit::envoy::{self, Envoy};
use zspire_testkit::plan::Plan;
use zspire_testkit::policy::deny_from;
use zspire_testkit::{
    Ending, Listener, Mesh, Nghttpx, Pod, captured, ending, hear, mesh, nghttpx, say, transfer, uncaptured, until,
};

use crate::{scenario, soak};

/// Where Envoy takes an application's connections.
const TAKES: u16 = 15001;
/// As many bytes as a frame of most peers holds.
const FRAME: u64 = 16 << 10;
/// A few more.
const MANY_FRAMES: u64 = 1 << 20;
/// Many windows full, in MiB.
const MANY_WINDOWS: usize = 64;
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

/// Envoy at the client's end of a tunnel, and the way through it.
fn envoy_as_client(mesh: &Mesh) -> (Envoy, Way<'static>) {
    let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
    let certificate = mesh.certificate("envoy", &client.spiffe_id());
    let listener = envoy::opens_tunnels("outbound", Some(TAKES), server.app());
    let envoy = Envoy::start(mesh, &client, &[listener], &[envoy::tunnel(&certificate, &server)]);
    (envoy, Way::new(&server, move || client.open(([127, 0, 0, 1], TAKES).into())))
}

/// Envoy at the server's end, which leads everything to the application, and the way through it; its listener may be another.
fn envoy_as_server(mesh: &Mesh, change: impl FnOnce(Value) -> Value) -> (Envoy, Way<'static>) {
    let way = Way::from_captured(mesh);
    let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
    let certificate = mesh.certificate("envoy", &server.spiffe_id());
    let listener = change(envoy::takes_tunnels(&certificate, &client.spiffe_id(), "application"));
    let leads = envoy::leads_to("application", server.app());
    (Envoy::start(mesh, &server, &[listener], &[leads]), way)
}

/// A way to open connections, and the application where they arrive.
struct Way<'a> {
    open: Box<dyn Fn() -> TcpStream + 'a>,
    app: Listener,
}

impl<'a> Way<'a> {
    /// To the server's application, which listens from now on.
    #[track_caller]
    fn new(server: &Pod, open: impl Fn() -> TcpStream + 'a) -> Self {
        Self { open: Box::new(open), app: server.listen() }
    }

    /// From a client that the mesh captures.
    #[track_caller]
    fn from_captured(mesh: &Mesh) -> Self {
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let to = server.app();
        Self::new(&server, move || client.open(to))
    }

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
    fn carries(&self, end: fn(client: &TcpStream, server: &TcpStream)) {
        let most = soak("ZSPIRE_SOAK_MEBIBYTES", MANY_WINDOWS) as u64;
        for size in [0, 1, FRAME, MANY_FRAMES, most << 20] {
            let (client, server) = self.connection();
            transfer::both_ways(&client, &server, size);
            end(&client, &server);
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

/// The server's end, after which nothing is asked of its client any more.
#[track_caller]
fn server_ends(client: &TcpStream, server: &TcpStream) {
    finish(server);
    assert_eq!(ending(client), Ending::Orderly);
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
        let (envoy, way) = envoy_as_client(&mesh);
        way.carries(transfer::end);
        way.carries_many_at_once(FRAME * 16);
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
        let (envoy, way) = envoy_as_server(&mesh, |listener| listener);
        way.carries(transfer::end);
        way.carries_many_at_once(FRAME * 16);
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
        server_ends(&asking, &served);
        client.access("outbound", |line| line["bytes_recv"] == MANY_FRAMES + 6 && line["error"].is_null());
        let (asking, served) = way.connection();
        reset(served);
        assert_eq!(ending(&asking), Ending::Reset);
        let (asking, _served) = way.connection();
        reset(asking);
        counts(&envoy, "http2.rx_reset", 1);
    });
}

#[test]
fn envoy_takes_few_streams_in_a_tunnel_and_sends_it_away() {
    for (at_once, in_all, tunnels) in [(8, 1000, MANY as u64 / 8), (100, 8, MANY as u64 / 8)] {
        scenario(|| {
            let mesh = foreign_server();
            let (envoy, way) = envoy_as_server(&mesh, |listener| envoy::with_limits(listener, at_once, in_all));
            // All of them live on, also in the tunnels that take no more.
            way.carries_many_at_once(FRAME);
            assert_eq!(envoy.count("http.hbone.downstream_cx_total"), tunnels);
        });
    }
}

#[test]
fn refusals_by_envoy_and_of_envoy_are_told() {
    let account = |name: &str| format!("spiffe://cluster.local/ns/test/sa/{name}");
    for (shows, asks_for, told) in [
        // Nobody listens behind it.
        ("server", "client", "503"),
        ("server", "another", "received fatal alert"),
        ("another", "client", &*format!("expected {}", account("server"))),
    ] {
        scenario(|| {
            let mesh = foreign_server();
            let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
            let certificate = mesh.certificate("envoy", &account(shows));
            let listener = envoy::takes_tunnels(&certificate, &account(asks_for), "application");
            let _envoy = Envoy::start(&mesh, &server, &[listener], &[envoy::leads_to("application", server.app())]);
            client.is_refused(server.app());
            client.refusal("outbound", told);
        });
    }
}

#[test]
fn envoy_is_told_that_a_proxy_stops_and_that_a_connection_is_cut() {
    scenario(|| {
        let mesh = foreign_client();
        let server = mesh.pod("server");
        let (envoy, way) = envoy_as_client(&mesh);
        let (_asking, served) = way.connection();
        mesh.edit(|plan| plan.add_policy(deny_from("client")));
        assert_eq!(ending(&served), Ending::Reset);
        counts(&envoy, "cluster.tunnel.http2.rx_reset", 1);
        mesh.edit(Plan::remove_policies);
        until("the policy to be gone", || match server.dump()["policies"].take() {
            Value::Array(policies) if policies.is_empty() => Ok(()),
            policies => Err(policies),
        });
        let (asking, served) = way.connection();
        server.drain();
        counts(&envoy, "cluster.tunnel.upstream_cx_close_notify", 1);
        transfer::both_ways(&asking, &served, MANY_FRAMES);
        transfer::end(&asking, &served);
        assert_eq!(server.ended().code(), Some(0));
    });
}

/// From where the server's proxy was called so far, and how often.
fn callers(server: &Pod) -> BTreeMap<String, usize> {
    let log = server.proxy(|proxy| proxy.log());
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let inbound = lines.filter(|line| line["scope"] == "access" && line["direction"] == "inbound");
    let mut callers = BTreeMap::new();
    for line in inbound {
        *callers.entry(line["src.addr"].to_string()).or_default() += 1;
    }
    callers
}

/// A request that nghttpx sends to its peer as HTTP/2.
fn ordinary(method: &str, content: &str) -> String {
    format!("{method} http://other/ HTTP/1.1\r\nHost: other\r\nContent-Length: {}\r\n\r\n{content}", content.len())
}

/// nghttpx knows a reset, but no end of one direction alone: a client that ends has gone for it, and when a server ends, it forgets
/// the stream without a word.
#[test]
fn nghttp2_opens_tunnels_and_everything_arrives() {
    scenario(|| {
        let mesh = foreign_client();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let nghttpx = Nghttpx::client(&mesh, &client, &server, &["--padding=256"]);
        let way = Way::new(&server, || nghttpx.open(server.app()));
        way.carries(server_ends);
        way.carries_many_at_once(FRAME * 16);
        let (asking, served) = way.connection();
        reset(asking);
        assert_eq!(ending(&served), Ending::Reset);
        let (asking, served) = way.connection();
        reset(served);
        // As nghttpx tells its client of a reset.
        assert_eq!(ending(&asking), Ending::Orderly);
        server.refusal("inbound", "the application's connection failed");
        let callers = callers(&server);
        assert_eq!(callers.len(), 1, "one tunnel carries all: {callers:?}");
    });
}

#[test]
fn nghttp2_takes_tunnels_and_everything_arrives() {
    scenario(|| {
        let mesh = foreign_server();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let way = Way::from_captured(&mesh);
        let _running = nghttpx::server(&mesh, &server, &["--padding=256"]);
        way.carries(server_ends);
        way.carries_many_at_once(FRAME * 16);
        let line = client.access("outbound", |line| line["error"].is_null());
        assert_eq!(line["dst.identity"], server.spiffe_id());
    });
}

#[test]
fn refusals_are_told_in_statuses() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod(uncaptured("client"))
            .pod(uncaptured("intruder"))
            .node("b")
            .pod("server")
            .policy(deny_from("intruder"))
            .start();
        let [client, intruder, server] = ["client", "intruder", "server"].map(|name| mesh.pod(name));
        let _app = server.greet();
        let nghttpx = Nghttpx::client(&mesh, &client, &server, &[]);
        for (target, status) in [
            (server.app(), 200),
            (server.at(8081), 503),
            (client.app(), 400),
            (server.at(15008), 400),
            (server.app(), 200),
        ] {
            assert_eq!(nghttpx.connect(target).1, status, "{target}");
        }
        let denied = Nghttpx::client(&mesh, &intruder, &server, &[]);
        assert_eq!(denied.connect(server.app()).1, 401);
        server.refusal("inbound", &deny_from("intruder").key());
    });
}

#[test]
fn ordinary_requests_harm_nothing() {
    const REQUESTS: usize = 2000;
    scenario(|| {
        let mesh = foreign_client();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let nghttpx = Nghttpx::client(&mesh, &client, &server, &[]);
        let way = Way::new(&server, || nghttpx.open(server.app()));
        let (asking, served) = way.connection();
        // In the tunnel that the connection is in.
        assert_eq!(nghttpx.ask(&ordinary("GET", "")).unwrap().1, 400);
        assert_eq!(nghttpx.ask(&ordinary("POST", "content")).unwrap().1, 400);
        let (many, at) = (REQUESTS.to_string(), nghttpx.url());
        let said = run(client.command("h2load", &["-n", &many, "-c", "4", "-m", "10", &at]));
        assert!(said.contains(&format!("0 2xx, 0 3xx, {many} 4xx, 0 5xx")), "{said}");
        transfer::both_ways(&asking, &served, MANY_FRAMES);
        reset(asking);
        assert_eq!(ending(&served), Ending::Reset);
        server.access("inbound", |line| line["dst.workload"] == "server");
        let callers = callers(&server);
        assert_eq!(callers.into_values().collect::<Vec<_>>(), [REQUESTS + 3], "lines of one tunnel");

        // In one of their own, in which nghttp says what is to come first (PRIORITY), and more than a frame holds (CONTINUATION).
        let [chain, key, _] = mesh.certificate("nghttp", &client.spiffe_id()).map(|file| file.display().to_string());
        let content = mesh.path("content");
        std::fs::write(&content, vec![b'.'; 100_000]).unwrap();
        let (content, at) = (content.display().to_string(), format!("https://{}/", server.at(15008)));
        let common = ["--verbose", "--no-verify-peer", "--multiply=20", "--cert", &chain, "--key", &key];
        let (asking, served) = way.connection();
        for (more, shows, status) in [
            (vec!["--no-push"], "send PRIORITY frame", 400),
            (vec!["--padding=256", "--data", &content], "send DATA frame", 400),
            // A setting that we do not know.
            (vec!["--no-rfc7540-pri"], "SETTINGS_NO_RFC7540_PRIORITIES(0x09):1", 400),
            (vec!["--continuation"], "continuation-test-6", 431),
        ] {
            let said = run(client.command("nghttp", &[&common, &more[..], &[&at]].concat()));
            let answers = said.matches(&format!(":status: {status}")).count();
            assert_eq!(answers, 20, "{said}");
            assert!(said.contains(shows) && !said.contains("recv GOAWAY frame"), "{said}");
        }
        transfer::both_ways(&asking, &served, MANY_FRAMES);
    });
}

/// What a program says; it has to end well.
#[track_caller]
fn run(mut command: Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}
