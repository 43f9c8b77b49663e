//! Peers that waste our time end their own tunnel and nobody else's.

use h2::server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_local;
use tokio::time::Instant;
use zspire_hbone::{Config, Ended, Flood, Incoming, Malformed, Reason};

use crate::support::{
    CONTINUATION, Client, DATA, END_HEADERS, GOAWAY, HEADERS, PING, PRIORITY, Peer, RST_STREAM, SETTINGS, Server,
    WINDOW_UPDATE, accept_all, block, client, connect_block, frame, hello, open, pair, relay, run, run_long, soak,
    sockets, wire,
};

fn config() -> Config {
    Config { idle_frames: 100, ..Config::default() }
}

/// How a server ends that is sent `start`, and then `again` over and over, while another of its tunnels stays as it is.
async fn flooded(start: Vec<u8>, again: impl Fn(u32) -> Vec<u8>, handle: impl Fn(Incoming) + 'static) -> Ended {
    let (other_client, mut other_server) = pair(&config(), &config()).await;
    let (near, far) = wire();
    let Server { mut asked, mut task, drain: _drain, .. } = Server::new(far, &config());
    spawn_local(async move {
        while let Some(incoming) = asked.recv().await {
            handle(incoming);
        }
    });
    let mut peer = Peer::new(near);
    peer.send(&start).await;
    for round in 0..100_000 {
        if task.is_finished() || !peer.try_send(&again(round)).await {
            let ended = (&mut task).await.unwrap();
            open(&other_client, &mut other_server).await;
            return ended;
        }
    }
    panic!("the server takes it all");
}

fn ignore(incoming: Incoming) {
    std::mem::forget(incoming);
}

fn assert_flood(ended: &Ended, by: Flood) {
    assert!(matches!(ended, Ended::Flood(flood) if *flood == by), "{by:?}: {ended:?}");
}

#[test]
fn frames_that_carry_nothing() {
    for (flood, kind, payload) in [
        (Flood::Ping, PING, &[0u8; 8][..]),
        (Flood::Settings, SETTINGS, &[]),
        (Flood::Priority, PRIORITY, &[0; 5]),
        (Flood::Unknown, 99, &[]),
    ] {
        let stream = if kind == PRIORITY { 1 } else { 0 };
        run(async {
            let ended = flooded(hello(), |_| frame(kind, 0, stream, payload), ignore).await;
            assert_flood(&ended, flood);
        });
    }
}

#[test]
fn acknowledgements_that_nobody_asked_for() {
    run(async {
        let ended = flooded(hello(), |_| frame(PING, 1, 0, &[9; 8]), ignore).await;
        assert_flood(&ended, Flood::Ping);
    });
}

fn opened() -> Vec<u8> {
    let mut bytes = hello();
    bytes.extend(frame(HEADERS, END_HEADERS, 1, &connect_block()));
    bytes
}

#[test]
fn empty_data_to_a_stream_that_nobody_reads() {
    run(async {
        let ended = flooded(
            opened(),
            |_| frame(DATA, 0, 1, &[]),
            |incoming| {
                std::mem::forget(incoming.accept(&Default::default()));
            },
        )
        .await;
        assert_flood(&ended, Flood::Data);
    });
}

#[test]
fn empty_data_to_a_stream_that_is_relayed() {
    run(async {
        let (_unread, socket) = sockets().await;
        let socket = std::cell::Cell::new(Some(socket));
        let ended = flooded(
            opened(),
            |_| frame(DATA, 0, 1, &[]),
            move |incoming| {
                let stream = incoming.accept(&Default::default()).unwrap();
                std::mem::forget(relay(stream, socket.take().unwrap()));
            },
        )
        .await;
        assert_flood(&ended, Flood::Data);
    });
}

/// CVE-2023-44487.
#[test]
fn rapid_reset() {
    let again = |round: u32| {
        let stream = 2 * round + 1;
        let mut bytes = frame(HEADERS, END_HEADERS, stream, &connect_block());
        bytes.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
        bytes
    };
    run(async {
        // The handler connects, and is told that nobody waits.
        let ended = flooded(hello(), again, |mut incoming| {
            spawn_local(async move { incoming.abandoned().await });
        })
        .await;
        assert_flood(&ended, Flood::Abandoned);
    });
}

/// The same, by a peer that waits until each request is with its handler, so that no queue in HTTP/2 grows.
#[test]
fn patient_rapid_reset() {
    run(async {
        let (near, far) = wire();
        let mut server = Server::new(far, &config());
        let mut peer = Peer::new(near);
        peer.send(&hello()).await;
        for round in 0..10_000 {
            let stream = 2 * round + 1;
            if server.task.is_finished() || !peer.try_send(&frame(HEADERS, END_HEADERS, stream, &connect_block())).await
            {
                break;
            }
            let Some(mut incoming) = server.asked.recv().await else { break };
            if !peer.try_send(&frame(RST_STREAM, 0, stream, &8u32.to_be_bytes())).await {
                break;
            }
            incoming.abandoned().await;
        }
        let ended = server.task.await.unwrap();
        assert_flood(&ended, Flood::Abandoned);
        let goaway = peer.next(|frame| frame.kind == GOAWAY).await.expect("the peer is told");
        assert_eq!(goaway.payload[4..8], u32::from(Reason::ENHANCE_YOUR_CALM).to_be_bytes());
    });
}

#[test]
fn continuation_without_end() {
    run(async {
        let mut start = hello();
        start.extend(frame(HEADERS, 0, 1, &connect_block()));
        let some = block(&[("x-padding", &"x".repeat(100))]);
        let ended = flooded(start, |_| frame(CONTINUATION, 0, 1, &some), ignore).await;
        assert_flood(&ended, Flood::Continuation);
    });
    run(async {
        let mut start = hello();
        start.extend(frame(HEADERS, 0, 1, &connect_block()));
        let ended = flooded(start, |_| frame(CONTINUATION, 0, 1, &[]), ignore).await;
        assert_flood(&ended, Flood::Continuation);
    });
}

#[test]
fn a_header_list_that_is_too_large_reaches_no_handler() {
    run(async {
        let (near, far) = wire();
        let mut server = Server::new(far, &config());
        let mut peer = Peer::new(near);
        let value = "x".repeat(120);
        let mut headers = connect_block();
        for _ in 0..200 {
            headers.extend(block(&[("x-padding", &value)]));
        }
        let mut bytes = hello();
        let (first, rest) = headers.split_at(16 << 10);
        bytes.extend(frame(HEADERS, 0, 1, first));
        bytes.extend(frame(CONTINUATION, END_HEADERS, 1, rest));
        peer.send(&bytes).await;
        let answer = peer.next(|frame| frame.stream == 1 || frame.kind == GOAWAY).await.unwrap();
        assert_eq!((answer.kind, server.malformed.take()), (HEADERS, vec![Malformed::TooLarge]), "431");
        let reset = peer.next(|frame| frame.stream == 1 || frame.kind == GOAWAY).await.unwrap();
        assert_eq!((reset.kind, reset.code()), (RST_STREAM, 0), "and nothing more is wanted of it");
        assert!(server.asked.try_recv().is_err());
        assert!(!server.task.is_finished());
    });
}

#[test]
fn garbage_instead_of_http() {
    run(async {
        for garbage in
            [vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), vec![0xff; 100]]
        {
            let (near, far) = wire();
            let server = Server::new(far, &config());
            let mut peer = Peer::new(near);
            peer.send(&garbage).await;
            peer.send(&[0; 24]).await;
            let ended = server.task.await.unwrap();
            assert!(matches!(ended, Ended::Protocol(_)), "{ended:?}");
        }
    });
}

#[test]
fn a_server_that_floods_its_client() {
    run(async {
        let (near, far) = wire();
        let Client { tunnel, mut task } = client(near, &config()).await;
        let mut peer = Peer::server(far);
        peer.send(&frame(SETTINGS, 0, 0, &[])).await;
        while !task.is_finished() && peer.try_send(&frame(PING, 0, 0, &[1; 8])).await {}
        assert_flood(&(&mut task).await.unwrap(), Flood::Ping);
        assert_flood(&tunnel.ended().unwrap(), Flood::Ping);
        assert_eq!(tunnel.free(), 0);
    });
}

#[test]
fn an_honest_peer_is_not_taken_for_a_flood() {
    run(async {
        // A foreign server that pings, changes its settings, and opens and closes thousands of streams.
        let (near, far) = wire();
        let Client { tunnel, task } = client(near, &Config::default()).await;
        spawn_local(async move {
            let mut connection = server::handshake(far).await.unwrap();
            let mut pings = connection.ping_pong().unwrap();
            spawn_local(async move {
                for _ in 0..1000 {
                    pings.ping(h2::Ping::opaque()).await.unwrap();
                }
            });
            let mut window = 70_000;
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                window += 1;
                connection.set_initial_window_size(window).ok();
                respond
                    .send_response(http::Response::new(()), false)
                    .unwrap()
                    .send_data(Default::default(), true)
                    .unwrap();
            }
        });
        for _ in 0..1000 {
            tunnel.open(&crate::support::request("10.0.0.1:80")).await.unwrap();
        }
        assert!(!task.is_finished(), "{:?}", tunnel.ended());
        let (client, server) = pair(&config(), &config()).await;
        let streams = accept_all(server);
        for _ in 0..1000 {
            drop(client.tunnel.open(&crate::support::request("10.0.0.1:80")).await.unwrap());
            streams.borrow_mut().clear();
        }
    });
}

/// MadeYouReset (CVE-2025-8671): the peer does not reset its requests, but makes us do so.
#[test]
fn requests_that_are_spoilt() {
    type Spoil = fn(u32) -> Vec<u8>;
    // The budget for updates is the smaller one.
    let spoils: [(Flood, Spoil); 3] = [
        (Flood::WindowUpdate, |stream| frame(WINDOW_UPDATE, 0, stream, &[0; 4])),
        (Flood::WindowUpdate, |stream| frame(WINDOW_UPDATE, 0, stream, &[0x7f, 0xff, 0xff, 0xff])),
        (Flood::Abandoned, |stream| frame(DATA, 0, stream, &[1])),
    ];
    for (flood, spoil) in spoils {
        run(async {
            let again = move |round: u32| {
                let stream = 2 * round + 1;
                [frame(HEADERS, END_HEADERS, stream, &connect_block()), spoil(stream)].concat()
            };
            let ended = flooded(hello(), again, |mut incoming| {
                spawn_local(async move { incoming.abandoned().await });
            })
            .await;
            assert_flood(&ended, flood);
        });
    }
}

#[test]
fn windows_that_nobody_has_used() {
    run(async {
        let ended = flooded(opened(), |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]), ignore).await;
        assert_flood(&ended, Flood::WindowUpdate);
    });
}

#[test]
fn frames_for_streams_that_are_gone() {
    let done = || [opened(), frame(RST_STREAM, 0, 1, &8u32.to_be_bytes())].concat();
    run(async {
        let ended = flooded(done(), |_| frame(RST_STREAM, 0, 1, &8u32.to_be_bytes()), ignore).await;
        assert_flood(&ended, Flood::Reset);
    });
    run(async {
        let ended = flooded(done(), |_| frame(HEADERS, END_HEADERS, 1, &connect_block()), ignore).await;
        assert_flood(&ended, Flood::Headers);
    });
}

#[test]
fn requests_beyond_the_limit_of_streams_and_requests_that_are_none() {
    run(async {
        let again = |round: u32| frame(HEADERS, END_HEADERS, 2 * round + 1, &connect_block());
        let ended = flooded(hello(), again, ignore).await;
        assert_flood(&ended, Flood::Headers);
    });
    run(async {
        let get = block(&[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")]);
        let again = move |round: u32| frame(HEADERS, END_HEADERS, 2 * round + 1, &get);
        let ended = flooded(hello(), again, ignore).await;
        assert_flood(&ended, Flood::Headers);
    });
}

/// An HPACK bomb: a large field in the table, and a byte for each time that it is meant.
#[test]
fn a_block_that_unfolds() {
    run(async {
        let mut bomb = connect_block();
        bomb.extend([0x40, 1, b'x', 0x7f, 0xa1, 0x1e]);
        bomb.extend([b'y'; 4000]);
        bomb.extend([0xbe; 8000]);
        let (near, far) = wire();
        let mut server = Server::new(far, &config());
        let mut peer = Peer::new(near);
        peer.send(&[hello(), frame(HEADERS, END_HEADERS, 1, &bomb)].concat()).await;
        assert_flood(&(&mut server.task).await.unwrap(), Flood::Headers);
        assert!(server.asked.try_recv().is_err());
    });
}

/// It asks for answers as fast as it may and takes none: neither they nor anything else is piled up for it.
#[test]
fn a_peer_that_reads_nothing_is_not_read_from() {
    run(async {
        // A budget that it does not exhaust.
        let config = Config { idle_frames: u32::MAX, ..Config::default() };
        let (mut near, far) = tokio::io::duplex(1000);
        let server = Server::new(far, &config);
        near.write_all(&hello()).await.unwrap();
        let ping = frame(PING, 0, 0, &[1; 8]).repeat(1000);
        let mut taken = 0;
        loop {
            let write = tokio::time::timeout(std::time::Duration::from_millis(500), near.write_all(&ping));
            if write.await.is_err() {
                break;
            }
            taken += ping.len();
            assert!(taken < 4 << 20, "it is read from for ever");
        }
        assert!(!server.task.is_finished());
    });
}

/// The smallest frames there are, of a thousand streams at once and both ways: nobody takes that for a flood. Every day some streams
/// at a time for three thousand rounds, in the long form all of them for as many seconds as are asked for.
#[test]
fn single_bytes_on_many_streams() {
    let seconds = soak("ZSPIRE_SOAK_SINGLE_BYTES", 0);
    run_long(async {
        let many = Config { client_streams: 1000, server_streams: 1000, ..config() };
        let (client, mut server) = pair(&many, &many).await;
        let mut streams = Vec::new();
        for _ in 0..1000 {
            let (ours, theirs) = open(&client, &mut server).await;
            streams.push((ours.into_io(), theirs.into_io()));
        }
        let (began, at_once) = (Instant::now(), if seconds > 0 { 1000 } else { 50 });
        let mut round = 0usize;
        while round < 3000 || began.elapsed().as_secs() < seconds as u64 {
            let byte = [round as u8];
            streams.rotate_left(at_once % 1000);
            for (ours, theirs) in &mut streams[..at_once] {
                ours.write_all(&byte).await.unwrap();
                theirs.write_all(&byte).await.unwrap();
            }
            for (ours, theirs) in &mut streams[..at_once] {
                let mut got = [0; 2];
                theirs.read_exact(&mut got[..1]).await.unwrap();
                ours.read_exact(&mut got[1..]).await.unwrap();
                assert_eq!(got, [byte[0]; 2]);
            }
            round += 1;
        }
        assert!(!client.task.is_finished() && !server.task.is_finished());
        println!("{} single bytes each way in {:?}", round * at_once, began.elapsed());
    });
}

/// And those of a foreign server.
#[test]
fn single_bytes_of_a_foreign_peer() {
    run(async {
        let (near, far) = wire();
        let Client { tunnel, task } = client(near, &config()).await;
        let foreign = spawn_local(async move {
            let mut connection = server::handshake(far).await.unwrap();
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut send = respond.send_response(http::Response::new(()), false).unwrap();
            drop(respond);
            for _ in 0..5000 {
                send.send_data("x".into(), false).unwrap();
            }
            while connection.accept().await.is_some() {}
        });
        let (stream, _) = tunnel.open(&crate::support::request("10.0.0.1:80")).await.unwrap();
        let mut stream = stream.into_io();
        let mut received = vec![0; 5000];
        stream.read_exact(&mut received).await.unwrap();
        assert!(!task.is_finished(), "{:?}", tunnel.ended());
        foreign.abort();
    });
}
