//! Tunnels that end in good order, and tunnels that are cut.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use zspire_hbone::{Config, Ended, OpenError, Reason};

use crate::support::{GOAWAY, Peer, SETTINGS, client, frame, open, pair, request, run, settle, until, wire};

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
