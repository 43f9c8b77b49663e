//! Too much at once.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use zspire_testkit::app::greeting;
use zspire_testkit::plan::captured;
use zspire_testkit::{mesh, uncaptured, until};

use crate::scenario;

/// How long CPU time is watched. It is a measurement: there is no state to wait for.
const WATCHED: Duration = Duration::from_secs(1);

#[test]
fn too_few_descriptors_turn_connections_away_and_nothing_spins() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod(uncaptured("stranger"))
            .pod("client")
            .node("b")
            .pod(captured("server").descriptors(80))
            .start();
        let (stranger, client, server) = (mesh.pod("stranger"), mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        // Each takes two descriptors of the proxy: the client's side and the application's.
        let open: Vec<TcpStream> = (0..80).filter_map(|_| stranger.connect(server.app()).ok()).collect();
        let served = open.iter().filter(|socket| greeting(socket).is_ok()).count();
        assert!((5..40).contains(&served), "{served} connections are served");
        server.proxy(|proxy| {
            proxy.line("the shortage", |line| line["message"].as_str().is_some_and(|it| it.contains("ulimit -n")));
        });
        // Who asks how it is gets an answer all the same.
        assert_eq!(server.readiness(), Ok(()));
        server.metric(&["process_open_fds"]);
        let (before, started) = (server.proxy(|proxy| proxy.cpu_ticks()), Instant::now());
        std::thread::sleep(WATCHED);
        let used = server.proxy(|proxy| proxy.cpu_ticks()) - before;
        let ticks = started.elapsed().as_millis() / 10;
        assert!(u128::from(used) < ticks / 4, "{used} of {ticks} ticks");
        drop(open);
        until("plain connections to be served again", || stranger.ask(server.app()));
        until("tunnels to be served again", || client.ask(server.app()));
        assert_eq!(server.readiness(), Ok(()));
    });
}

#[test]
fn many_connections_at_once_are_all_served() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        // More than fit into one tunnel, on either worker.
        let open: Vec<TcpStream> = (0..300).map(|_| client.open(server.app())).collect();
        for socket in &open {
            assert_eq!(greeting(socket).unwrap().from, client.address());
        }
    });
}

/// More than all windows and socket buffers on the way together.
const MUCH: usize = 96 << 20;
/// How much more memory a proxy may take for it, kilobytes. The window of a connection in a tunnel is 4 MiB.
const MORE_MEMORY: u64 = 16 << 10;

#[test]
fn application_that_does_not_read_stops_its_client_and_nobody_else() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _greeter = server.greet_at(8081);
        client.reaches(server.at(8081));
        let memory = || [&client, &server].map(|pod| pod.proxy(|proxy| proxy.memory()));
        let before = memory();
        let app = server.listen();
        let mut sender = client.open(server.app());
        let mut receiver = app.accept();
        // A write that makes no progress in this time is what it looks like to be stopped.
        sender.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let (chunk, mut sent) = (vec![7; 64 << 10], 0);
        while let Ok(n) = sender.write(&chunk) {
            sent += n;
            assert!(sent < MUCH, "the client is never stopped");
        }
        for (before, after) in before.into_iter().zip(memory()) {
            assert!(after < before + MORE_MEMORY, "{before} kB, then {after} kB");
        }
        // By the same tunnels.
        for _ in 0..10 {
            client.reaches(server.at(8081));
        }
        drop(sender);
        let received = std::io::copy(&mut receiver, &mut std::io::sink()).unwrap();
        assert_eq!(received, sent as u64);
    });
}

/// Standard output is a pipe that nobody reads: lines are lost, and nobody waits for that.
#[test]
fn log_that_nobody_reads_stops_nothing() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod(captured("server").not_started()).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        let mut proxy = server.proxy_command();
        proxy.env("RUST_LOG", "trace");
        let mut proxy = mesh.process_unread("unread", proxy);
        until("the proxy to be ready", || server.readiness());
        until("lines to be lost", || {
            let began = Instant::now();
            for _ in 0..50 {
                client.reaches(server.app());
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
            let page = server.metrics();
            let lost = page.lines().find_map(|line| line.strip_prefix("zspire_log_lines_dropped_total "));
            match lost.and_then(|lost| lost.parse::<u64>().ok()) {
                Some(lost) if lost > 0 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        client.reaches(server.app());
        // It can also be stopped.
        proxy.terminate();
        assert_eq!(proxy.ended().code(), Some(0));
    });
}
