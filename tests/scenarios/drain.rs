//! Stopping a proxy: live connections have their time, and not more.

use std::fs;
use std::net::{TcpStream, UdpSocket};

use zspire_testkit::app::finish;
use zspire_testkit::plan::captured;
use zspire_testkit::{DEADLINE, Ending, Mesh, ending, hear, mesh, say, uncaptured, until};

use crate::scenario;

/// A live connection between the two pods.
fn connected(mesh: &Mesh) -> (TcpStream, TcpStream) {
    let server = mesh.pod("server");
    let app = server.listen();
    let client = mesh.pod("client").open(server.app());
    let served = app.accept();
    say(&client, "hello");
    hear(&served, "hello");
    (client, served)
}

#[test]
fn live_connection_completes_and_new_ones_are_refused() {
    for draining in ["client", "server"] {
        scenario(|| {
            let mesh = mesh().node("a").pod("client").node("b").pod("server").start();
            let (client, served) = connected(&mesh);
            mesh.pod(draining).drain();
            until("the proxy to say that it drains", || match mesh.pod(draining).readiness() {
                Err(why) if why.contains("told to stop") => Ok(()),
                other => Err(format!("{other:?}")),
            });
            let _app = mesh.pod("server").greet();
            until("new connections to be refused", || match mesh.pod("client").ask(mesh.pod("server").app()) {
                Ok(greeting) => Err(format!("{greeting:?}")),
                Err(_) => Ok(()),
            });
            say(&client, "still here");
            hear(&served, "still here");
            finish(&client);
            assert_eq!(ending(&served), Ending::Orderly);
            say(&served, "goodbye");
            hear(&client, "goodbye");
            drop(served);
            assert_eq!(ending(&client), Ending::Orderly);
            assert_eq!(mesh.pod(draining).ended().code(), Some(0));
        });
    }
}

#[test]
fn deadline_cuts_what_is_left() {
    scenario(|| {
        let server = captured("server").with("CONNECTION_TERMINATION_DEADLINE", "1s");
        let mesh = mesh().node("a").pod("client").node("b").pod(server).start();
        let (client, served) = connected(&mesh);
        mesh.pod("server").drain();
        assert_eq!((ending(&client), ending(&served)), (Ending::Reset, Ending::Reset));
        assert_eq!(mesh.pod("server").ended().code(), Some(0));
        mesh.pod("server").refusal("inbound", "shutting down");
    });
}

#[test]
fn second_signal_cuts_at_once() {
    scenario(|| {
        let server = captured("server").with("CONNECTION_TERMINATION_DEADLINE", "10m");
        let mesh = mesh().node("a").pod("client").node("b").pod(server).start();
        let (client, _served) = connected(&mesh);
        let server = mesh.pod("server");
        server.drain();
        server.proxy(|proxy| proxy.line("draining", |line| line["message"] == "draining"));
        server.drain();
        assert_eq!(ending(&client), Ending::Reset);
        assert_eq!(server.ended().code(), Some(0));
    });
}

#[test]
fn admin_port_can_stop_it() {
    scenario(|| {
        let mesh = mesh().node("a").pod("server").start();
        let server = mesh.pod("server");
        assert_eq!(server.admin("GET /quitquitquit", &[]).status, 405);
        assert_eq!(server.admin("POST /quitquitquit", &[]).status, 200);
        assert_eq!(server.ended().code(), Some(0));
    });
}

#[test]
fn proxy_that_waits_for_its_control_plane_can_be_stopped() {
    scenario(|| {
        let mesh = mesh().control_plane_down().node("a").pod("server").start();
        let server = mesh.pod("server");
        until("the proxy to wait", || match server.readiness() {
            Err(why) if why.contains("cannot join") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        server.drain();
        assert_eq!(server.ended().code(), Some(0));
    });
}

#[test]
fn name_that_nobody_answers_for_does_not_keep_it() {
    scenario(|| {
        let mesh = mesh().node("a").pod(uncaptured("resolver")).pod(uncaptured("client")).start();
        let (resolver, client) = (mesh.pod("resolver"), mesh.pod("client"));
        let silent = resolver.run(|| UdpSocket::bind((resolver.address(), 53))).unwrap();
        let servers = format!("nameserver {}\noptions timeout:30\n", resolver.address());
        fs::write(mesh.path("resolv.conf"), servers).unwrap();
        let program = client.program(&[]).get_program().to_str().unwrap().to_owned();
        let script = "mount --bind resolv.conf /etc/resolv.conf && exec \"$0\" proxy";
        let mut command = client.command("unshare", &["--mount", "sh", "-c", script, &program]);
        command.env("FAKE_CA", "true").env("XDS_ADDRESS", "https://istiod.example.org:15012");
        command.env("PROXY_MODE", "dedicated").env("PROXY_WORKLOAD_INFO", "test/client/client");
        let mut proxy = mesh.process_of("asking", command);
        // It asks, and would do so for a minute.
        silent.set_read_timeout(Some(DEADLINE)).unwrap();
        silent.recv_from(&mut [0; 512]).unwrap();
        proxy.terminate();
        assert_eq!(proxy.ended().code(), Some(0));
    });
}
