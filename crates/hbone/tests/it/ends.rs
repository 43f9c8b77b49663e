//! How connections end, over real sockets with two relays between them: an end stays an end and a reset stays a reset.

use std::io::ErrorKind;

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use zspire_hbone::{Config, Counters, End, Reason, copy};

use crate::support::{
    DATA, END_HEADERS, END_STREAM, HEADERS, Path, Peer, RST_STREAM, SETTINGS, client, frame, open, pair, path, relay,
    request, run, sockets, until, wire,
};

/// What a reader sees at the end of its connection.
#[derive(Debug, PartialEq)]
enum Seen {
    Eof,
    Reset,
}

async fn read_all(socket: &mut TcpStream) -> (Vec<u8>, Seen) {
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes).await {
        Ok(_) => (bytes, Seen::Eof),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (bytes, Seen::Reset),
        Err(error) => panic!("neither an end nor a reset: {error}"),
    }
}

/// A reset of a connection whose end was read already is no longer seen by reading; Linux keeps it as the socket's error.
async fn assert_broken(socket: &TcpStream) {
    socket.ready(Interest::ERROR).await.unwrap();
    assert_eq!(socket.take_error().unwrap().unwrap().kind(), ErrorKind::BrokenPipe);
}

fn reset(socket: TcpStream) {
    socket.set_zero_linger().unwrap();
    drop(socket);
}

async fn with_path(test: impl AsyncFnOnce(Path)) {
    let (client, mut server) = pair(&Config::default(), &Config::default()).await;
    let path = path(&client, &mut server).await;
    test(path).await;
    until("the streams are gone", || client.tunnel.streams() == 0).await;
    assert!(!client.task.is_finished() && !server.task.is_finished(), "the tunnel lives on");
    open(&client, &mut server).await;
}

#[test]
fn the_applications_end_leaves_the_other_direction_open() {
    run(with_path(async |mut path: Path| {
        path.app.write_all(b"question").await.unwrap();
        path.app.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.server).await, (b"question".to_vec(), Seen::Eof));
        path.server.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        path.app.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer");
        path.server.write_all(b" more").await.unwrap();
        path.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.app).await, (b" more".to_vec(), Seen::Eof));
        assert!(matches!(path.app_end.task.await.unwrap(), End::Complete));
        assert!(matches!(path.server_end.task.await.unwrap(), End::Complete));
        assert_eq!(path.app_end.counters.load(), (8, 11));
        assert_eq!(path.server_end.counters.load(), (11, 8));
    }));
}

#[test]
fn the_servers_end_leaves_the_other_direction_open() {
    run(with_path(async |mut path: Path| {
        path.server.write_all(b"banner").await.unwrap();
        path.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.app).await, (b"banner".to_vec(), Seen::Eof));
        path.app.write_all(b"still here").await.unwrap();
        path.app.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.server).await, (b"still here".to_vec(), Seen::Eof));
        assert!(matches!(path.app_end.task.await.unwrap(), End::Complete));
        assert!(matches!(path.server_end.task.await.unwrap(), End::Complete));
    }));
}

#[test]
fn the_applications_reset_reaches_the_server() {
    run(with_path(async |mut path: Path| {
        path.app.write_all(b"x").await.unwrap();
        path.server.read_exact(&mut [0]).await.unwrap();
        reset(path.app);
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Reset));
        let end = path.app_end.task.await.unwrap();
        assert!(matches!(end, End::Application(_)), "{end}");
        let end = path.server_end.task.await.unwrap();
        assert!(matches!(end, End::Reset(Reason::CONNECT_ERROR)), "{end}");
    }));
}

#[test]
fn the_servers_reset_reaches_the_application() {
    run(with_path(async |mut path: Path| {
        reset(path.server);
        assert_eq!(read_all(&mut path.app).await, (vec![], Seen::Reset));
        let end = path.app_end.task.await.unwrap();
        assert!(matches!(end, End::Reset(Reason::CONNECT_ERROR)), "{end}");
    }));
}

#[test]
fn a_reset_after_the_applications_end_is_a_reset_in_both_directions() {
    run(with_path(async |mut path: Path| {
        path.app.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Eof));
        reset(path.server);
        assert_eq!(read_all(&mut path.app).await, (vec![], Seen::Reset));
    }));
    run(with_path(async |mut path: Path| {
        path.app.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Eof));
        reset(path.app);
        let end = path.server_end.task.await.unwrap();
        assert!(matches!(end, End::Reset(Reason::CONNECT_ERROR)), "{end}");
        assert_broken(&path.server).await;
    }));
}

#[test]
fn a_reset_after_the_servers_end_is_a_reset_in_both_directions() {
    run(with_path(async |mut path: Path| {
        path.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.app).await, (vec![], Seen::Eof));
        reset(path.app);
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Reset));
    }));
    run(with_path(async |mut path: Path| {
        path.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut path.app).await, (vec![], Seen::Eof));
        reset(path.server);
        let end = path.app_end.task.await.unwrap();
        assert!(matches!(end, End::Reset(Reason::CONNECT_ERROR)), "{end}");
        assert_broken(&path.app).await;
    }));
}

#[test]
fn a_relay_that_is_cut_resets_both_ends() {
    run(with_path(async |mut path: Path| {
        path.app_end.cut.take().unwrap().send(()).unwrap();
        assert_eq!(read_all(&mut path.app).await, (vec![], Seen::Reset));
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Reset));
        assert!(matches!(path.app_end.task.await.unwrap(), End::Cut));
        let end = path.server_end.task.await.unwrap();
        assert!(matches!(end, End::Reset(Reason::CANCEL)), "{end}");
    }));
}

#[test]
fn a_relay_that_is_dropped_resets_the_stream() {
    run(with_path(async |mut path: Path| {
        path.app_end.task.abort();
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Reset));
    }));
}

#[test]
fn a_stream_that_is_dropped_or_reset_is_a_reset() {
    for drop_it in [true, false] {
        run(async {
            let (client, mut server) = pair(&Config::default(), &Config::default()).await;
            let (ours, theirs) = open(&client, &mut server).await;
            let (mut app, socket) = sockets().await;
            let relay = relay(ours, socket);
            if drop_it {
                drop(theirs)
            } else {
                theirs.reset()
            }
            assert_eq!(read_all(&mut app).await, (vec![], Seen::Reset));
            let end = relay.task.await.unwrap();
            assert!(matches!(end, End::Reset(Reason::CANCEL)), "{end}");
        });
    }
}

#[test]
fn a_tunnel_that_breaks_resets_the_applications_at_both_ends() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let mut path = path(&client, &mut server).await;
        path.app.write_all(b"x").await.unwrap();
        path.server.read_exact(&mut [0]).await.unwrap();
        // The connection below is cut: neither end has said anything.
        server.task.abort();
        assert_eq!(read_all(&mut path.app).await, (vec![], Seen::Reset));
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Reset));
        let end = path.app_end.task.await.unwrap();
        assert!(matches!(end, End::Tunnel(_) | End::Reset(_)), "{end}");
    });
}

#[test]
fn an_application_that_closes_while_bytes_come_resets_the_server() {
    run(with_path(async |mut path: Path| {
        // Closing with unread bytes is a reset in TCP.
        path.server.write_all(&[7; 1000]).await.unwrap();
        path.app.read_exact(&mut [0; 10]).await.unwrap();
        drop(path.app);
        assert_eq!(read_all(&mut path.server).await, (vec![], Seen::Reset));
    }));
}

/// An application, a server, and plain copying between them.
async fn plain() -> (TcpStream, TcpStream, tokio::task::JoinHandle<End>) {
    let ((app, near), (far, server)) = tokio::join!(sockets(), sockets());
    let task = tokio::task::spawn_local(async move {
        let counters = Counters::default();
        copy(near, far, &counters, std::future::pending()).await
    });
    (app, server, task)
}

#[test]
fn without_a_tunnel_the_ends_are_told_the_same_way() {
    run(async {
        let (mut app, mut server, task) = plain().await;
        app.write_all(b"question").await.unwrap();
        app.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await, (b"question".to_vec(), Seen::Eof));
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut app).await, (b"answer".to_vec(), Seen::Eof));
        assert!(matches!(task.await.unwrap(), End::Complete));

        let (app, mut server, task) = plain().await;
        reset(app);
        assert_eq!(read_all(&mut server).await, (vec![], Seen::Reset));
        assert!(matches!(task.await.unwrap(), End::Application(_)));

        let (mut app, server, task) = plain().await;
        reset(server);
        assert_eq!(read_all(&mut app).await, (vec![], Seen::Reset));
        assert!(matches!(task.await.unwrap(), End::Other(_)));

        let (mut app, mut server, task) = plain().await;
        app.shutdown().await.unwrap();
        assert_eq!(read_all(&mut server).await, (vec![], Seen::Eof));
        reset(server);
        assert_eq!(read_all(&mut app).await, (vec![], Seen::Reset));
        assert!(matches!(task.await.unwrap(), End::Other(_)));
    });
}

/// The same reset before the end is none: something may be missing.
#[test]
fn a_reset_without_an_error_before_the_end_is_a_reset() {
    run(async {
        let (near, far) = wire();
        let client = client(near, &Config::default()).await;
        let mut peer = Peer::server(far);
        peer.send(&frame(SETTINGS, 0, 0, &[])).await;
        // `:status: 200`.
        let mut all = frame(HEADERS, END_HEADERS, 1, &[0x88]);
        all.extend(frame(DATA, 0, 1, b"half of it"));
        let request = request("10.0.0.1:80");
        let (opened, ()) = tokio::join!(client.tunnel.open(&request), peer.send(&all));
        let (mut app, socket) = sockets().await;
        let relay = relay(opened.unwrap().0, socket);
        let mut half = [0; 10];
        app.read_exact(&mut half).await.unwrap();
        peer.send(&frame(RST_STREAM, 0, 1, &[0; 4])).await;
        assert_eq!(read_all(&mut app).await, (vec![], Seen::Reset));
        assert!(matches!(relay.task.await.unwrap(), End::Reset(Reason::NO_ERROR)));
    });
}

/// RFC 9113 §8.1: a server that has said everything may reset a stream without an error. Nothing of what it said is lost by that,
/// and nothing of the tunnel's window, which is soon used up here.
#[test]
fn a_reset_without_an_error_after_the_end_is_a_close() {
    run(async {
        let (near, far) = wire();
        let config = Config { connection_window: 400_000, buffered_cap: 0, ..Config::default() };
        let client = client(near, &config).await;
        let mut peer = Peer::server(far);
        let bytes = vec![7; 100_000];
        peer.send(&frame(SETTINGS, 0, 0, &[])).await;
        for stream in (1..40).step_by(2) {
            // `:status: 200`.
            let mut all = frame(HEADERS, END_HEADERS, stream, &[0x88]);
            for piece in bytes.chunks(10_000) {
                all.extend(frame(DATA, 0, stream, piece));
            }
            all.extend(frame(DATA, END_STREAM, stream, &[]));
            all.extend(frame(RST_STREAM, 0, stream, &[0; 4]));
            let request = request("10.0.0.1:80");
            let (opened, ()) = tokio::join!(client.tunnel.open(&request), peer.send(&all));
            let (mut app, socket) = sockets().await;
            let relay = relay(opened.unwrap().0, socket);
            assert_eq!(read_all(&mut app).await, (bytes.clone(), Seen::Eof));
            let end = relay.task.await.unwrap();
            assert!(matches!(end, End::Closed), "stream {stream}: {end}");
        }
    });
}

/// The last bytes wait for the end, so that both are one packet, and for nothing else: however the connection goes on, also while the
/// application has sent what nobody reads, it hears them first.
#[test]
fn what_is_followed_by_a_reset_or_by_nothing_is_heard_first() {
    run(async {
        const NO_ERROR: u8 = 0;
        const CONNECT_ERROR: u8 = 10;
        for end in [Some(NO_ERROR), Some(CONNECT_ERROR), None] {
            let (near, far) = wire();
            let client = client(near, &Config::default()).await;
            let mut peer = Peer::server(far);
            let begin =
                [frame(SETTINGS, 0, 0, &[]), frame(HEADERS, END_HEADERS, 1, &[0x88]), frame(DATA, 0, 1, b"question")];
            let request = request("10.0.0.1:80");
            let begin = begin.concat();
            let (opened, ()) = tokio::join!(client.tunnel.open(&request), peer.send(&begin));
            let (mut app, socket) = sockets().await;
            let relay = relay(opened.unwrap().0, socket);
            let mut question = [0; 8];
            app.read_exact(&mut question).await.unwrap();
            // The window that every stream has before anybody has said anything of it.
            until("the window is used up", || {
                let _ = app.try_write(&[7; 64 << 10]);
                relay.counters.load().0 == 65_535
            })
            .await;
            let mut last = [frame(DATA, 0, 1, b"answer"), frame(DATA, END_STREAM, 1, &[])].concat();
            last.extend(end.iter().flat_map(|code| frame(RST_STREAM, 0, 1, &[0, 0, 0, *code])));
            peer.send(&last).await;
            drop(peer);
            let heard = read_all(&mut app).await.0;
            assert_eq!(heard, b"answer", "{end:?}");
        }
    });
}

/// What a stream has no room for is not read, and so neither is a reset behind it.
#[test]
fn the_applications_reset_is_noticed_while_there_is_no_window() {
    run(async {
        let config = Config { stream_window: 64 << 10, ..Config::default() };
        let (client, mut server) = pair(&config, &config).await;
        let (ours, theirs) = open(&client, &mut server).await;
        let (app, of_relay) = sockets().await;
        let sender = relay(ours, of_relay);
        until("the window is used up and more waits", || {
            let taken = app.try_write(&[7; 64 << 10]);
            sender.counters.load().0 == 64 << 10 && taken.is_err()
        })
        .await;
        reset(app);
        let end = sender.task.await.unwrap();
        assert!(matches!(end, End::Application(_)), "{end}");
        let mut theirs = theirs.into_io();
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).await.expect_err("not an end");
        assert!(bytes.iter().all(|byte| *byte == 7) && bytes.len() <= 64 << 10);
    });
}
