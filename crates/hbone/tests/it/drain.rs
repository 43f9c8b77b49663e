//! Tunnels that end in good order, and tunnels that are cut.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::spawn_local;
use tokio::time::Instant;
use zspire_hbone::{Config, Ended, OpenError, Reason};

use crate::support::{
    DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, Peer, SETTINGS, Server, client, connect_block, frame, hello,
    open, pair, request, run, run_paused, settle, until, wire,
};

#[test]
fn a_server_that_drains_keeps_its_streams_and_takes_no_more() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let (ours, theirs) = open(&client, &mut server).await;
        let (mut ours, mut theirs) = (ours.into_io(), theirs.into_io());
        server.drain();
        until("the client knows", || client.tunnel.free() == 0).await;
        let error = client.tunnel.open(&request("10.0.0.1:80")).await.unwrap_err();
        assert!(error.unprocessed(), "another tunnel may be tried: {error}");
        assert!(server.asked.try_recv().is_err());

        ours.write_all(b"still here").await.unwrap();
        let mut bytes = [0; 10];
        theirs.read_exact(&mut bytes).await.unwrap();
        theirs.write_all(b"and here").await.unwrap();
        ours.read_exact(&mut bytes[..8]).await.unwrap();
        settle().await;
        assert!(!server.task.is_finished(), "it ends with its last stream");

        ours.shutdown().await.unwrap();
        theirs.shutdown().await.unwrap();
        assert_eq!(theirs.read(&mut bytes).await.unwrap(), 0);
        assert_eq!(ours.read(&mut bytes).await.unwrap(), 0);
        drop((ours, theirs));
        assert!(matches!(server.task.await.unwrap(), Ended::Closed));
        assert!(matches!(client.task.await.unwrap(), Ended::Closed));
    });
}

#[test]
fn a_server_without_streams_drains_at_once() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        drop(open(&client, &mut server).await);
        until("the stream is gone", || client.tunnel.streams() == 0).await;
        server.drain();
        let ended = server.task.await.unwrap();
        assert!(matches!(ended, Ended::Closed), "{ended:?}");
        assert!(matches!(client.task.await.unwrap(), Ended::Closed));
        assert!(matches!(
            client.tunnel.open(&request("10.0.0.1:80")).await,
            Err(OpenError::Full | OpenError::Ended(_))
        ));
    });
}

#[test]
fn a_request_that_waits_for_its_answer_survives_the_drain() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let request = request("10.0.0.1:80");
        let (opened, accepted) = tokio::join!(client.tunnel.open(&request), async {
            let incoming = server.next().await;
            server.drain();
            settle().await;
            incoming.accept(&Default::default())
        });
        let (opened, accepted) = (opened.unwrap(), accepted.unwrap());
        drop((opened, accepted));
        assert!(matches!(server.task.await.unwrap(), Ended::Closed));
    });
}

#[test]
fn a_server_that_is_dropped_cuts_its_streams() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let (ours, theirs) = open(&client, &mut server).await;
        server.task.abort();
        let mut ours = ours.into_io();
        assert!(ours.read(&mut [0]).await.is_err(), "not an end, which would be a lie");
        assert!(theirs.into_io().read(&mut [0]).await.is_err());
        client.task.await.unwrap();
        assert!(client.tunnel.ended().is_some());
    });
}

#[test]
fn a_tunnel_ends_with_its_last_handle_and_stream() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let (ours, theirs) = open(&client, &mut server).await;
        drop(client.tunnel);
        settle().await;
        assert!(!client.task.is_finished());
        drop((ours, theirs));
        assert!(matches!(client.task.await.unwrap(), Ended::Closed));
        let ended = server.task.await.unwrap();
        assert!(matches!(ended, Ended::Closed), "{ended:?}");
    });
}

#[test]
fn a_retired_tunnel_opens_no_more_streams_and_keeps_those_it_has() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let (ours, theirs) = open(&client, &mut server).await;
        client.tunnel.retire();
        assert_eq!(client.tunnel.free(), 0);
        assert!(matches!(client.tunnel.open(&request("10.0.0.1:80")).await, Err(OpenError::Full)));
        let (mut ours, mut theirs) = (ours.into_io(), theirs.into_io());
        ours.write_all(b"x").await.unwrap();
        theirs.read_exact(&mut [0]).await.unwrap();
    });
}

#[test]
fn a_server_that_goes_away_with_an_error_says_which() {
    run(async {
        for (code, reason) in [(11u32, Reason::ENHANCE_YOUR_CALM), (2, Reason::INTERNAL_ERROR)] {
            let (near, far) = wire();
            let client = client(near, &Config::default()).await;
            let mut peer = Peer::server(far);
            let mut bytes = frame(SETTINGS, 0, 0, &[]);
            bytes.extend(frame(GOAWAY, 0, 0, &[[0; 4], code.to_be_bytes()].concat()));
            peer.send(&bytes).await;
            let opened = client.tunnel.open(&request("10.0.0.1:80")).await;
            assert!(opened.is_err());
            drop(peer);
            let ended = client.task.await.unwrap();
            assert!(matches!(ended, Ended::GoAway(got) if got == reason), "{ended:?}");
        }
    });
}

/// A peer whose kernel takes little at once, and our end of its connection: much of what is said to it waits.
async fn reluctant() -> (TcpStream, TcpStream) {
    let listening = TcpSocket::new_v4().unwrap();
    listening.set_recv_buffer_size(4096).unwrap();
    listening.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = listening.listen(1).unwrap();
    let connecting = TcpSocket::new_v4().unwrap();
    connecting.set_send_buffer_size(4096).unwrap();
    let (ours, accepted) = tokio::join!(connecting.connect(listener.local_addr().unwrap()), listener.accept());
    (accepted.unwrap().0, ours.unwrap())
}

/// A connection that is closed with bytes that were not read is reset, and what its other end has not read by then may be lost. So
/// the last words are followed by listening.
#[test]
fn what_was_said_last_arrives_though_the_peer_still_speaks() {
    const TOTAL: usize = 60_000;
    run(async {
        let (mut peer, ours) = reluctant().await;
        let mut server = Server::new(ours, &Config::default());
        let mut bytes = hello();
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &connect_block()));
        peer.write_all(&bytes).await.unwrap();
        let mut stream = server.accept().await.into_io();
        server.drain();
        spawn_local(async move {
            stream.write_all(&[7; TOTAL]).await.unwrap();
            stream.shutdown().await.unwrap();
        });

        let (mut received, mut goaways) = (0, 0);
        loop {
            let mut header = [0; 9];
            match peer.read(&mut header[..1]).await.expect("it is closed, not reset") {
                0 => break,
                _ => peer.read_exact(&mut header[1..]).await.unwrap(),
            };
            let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
            for piece in payload.chunks_mut(1000) {
                peer.read_exact(piece).await.expect("all of it arrives");
                // It has something to say all the time.
                peer.write_all(&frame(PING, 1, 0, &[9; 8])).await.unwrap();
            }
            match (header[3], header[4]) {
                (DATA, _) => received += payload.len(),
                (PING, 0) => peer.write_all(&frame(PING, 1, 0, &payload)).await.unwrap(),
                (GOAWAY, _) => goaways += 1,
                _ => {}
            }
        }
        assert_eq!((received, goaways), (TOTAL, 3), "the announcement, the drain and the end");
        drop(peer);
        assert!(matches!(server.task.await.unwrap(), Ended::Closed));
    });
}

/// What was under way to a peer that breaks the protocol arrives as well, and then why nothing follows: also if the peer has closed
/// its own side.
#[test]
fn what_was_under_way_and_the_reason_arrive_at_a_peer_that_broke_the_protocol() {
    const TOTAL: usize = 50_000;
    run(async {
        let (mut peer, ours) = reluctant().await;
        let mut server = Server::new(ours, &Config::default());
        let mut bytes = hello();
        bytes.extend(frame(HEADERS, END_HEADERS, 1, &connect_block()));
        peer.write_all(&bytes).await.unwrap();
        let mut stream = server.accept().await.into_io();
        stream.write_all(&[7; TOTAL]).await.unwrap();
        // More than the two kernels take is written by now.
        tokio::task::yield_now().await;
        peer.write_all(&frame(DATA, 0, 0, &[1])).await.unwrap();
        peer.shutdown().await.unwrap();
        while stream.write_all(&[8]).await.is_ok() {
            tokio::task::yield_now().await;
        }

        let mut received = Vec::new();
        peer.read_to_end(&mut received).await.expect("it is closed, not reset");
        let (mut rest, mut sevens, mut said) = (&received[..], 0, Vec::new());
        while let Some((header, after)) = rest.split_first_chunk::<9>() {
            let (payload, after) = after.split_at(u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize);
            match header[3] {
                DATA => sevens += payload.iter().filter(|byte| **byte == 7).count(),
                GOAWAY => said.push(payload[7]),
                _ => {}
            }
            rest = after;
        }
        assert_eq!((sevens, said), (TOTAL, vec![1]), "PROTOCOL_ERROR");
        assert!(matches!(server.task.await.unwrap(), Ended::Protocol(_)));
    });
}

/// A server that is done, and its peer, which has read that.
async fn done(config: &Config) -> (Peer, Server) {
    let (near, far) = wire();
    let mut server = Server::new(far, config);
    let mut peer = Peer::new(near);
    peer.send(&hello()).await;
    server.drain();
    let ping = peer.next(|frame| frame.kind == PING).await.unwrap();
    peer.send(&frame(PING, 1, 0, &ping.payload)).await;
    for _ in 0..2 {
        peer.next(|frame| frame.kind == GOAWAY).await.unwrap();
    }
    (peer, server)
}

#[test]
fn a_peer_that_does_not_close_is_not_waited_for_for_long() {
    run_paused(async {
        let (_peer, server) = done(&Config::default()).await;
        let started = Instant::now();
        assert!(matches!(server.task.await.unwrap(), Ended::Closed));
        assert_eq!(started.elapsed().as_secs(), 1);
    });
}

#[test]
fn a_peer_that_goes_on_and_on_is_not_listened_to() {
    run_paused(async {
        let config = Config { connection_window: 1 << 20, ..Config::default() };
        let (mut peer, server) = done(&config).await;
        let started = Instant::now();
        let mut sent = 0;
        while peer.try_send(&[0; 10_000]).await {
            sent += 10_000;
        }
        assert!((1 << 20..(1 << 20) + (200 << 10)).contains(&sent), "{sent} bytes");
        assert!(matches!(server.task.await.unwrap(), Ended::Closed));
        assert_eq!(started.elapsed().as_secs(), 0);
    });
}
