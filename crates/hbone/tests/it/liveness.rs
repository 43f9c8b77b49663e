//! Peers that say nothing, or nothing any more.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use zspire_hbone::{Config, Ended, OpenError};

use crate::support::{PING, Peer, SETTINGS, Server, client, frame, hello, open, pair, request, run_paused, wire};

#[test]
fn a_client_that_says_nothing() {
    run_paused(async {
        let (_near, far) = wire();
        let started = Instant::now();
        let ended = Server::new(far, &Config::default()).task.await.unwrap();
        assert!(matches!(ended, Ended::Handshake), "{ended:?}");
        assert_eq!(started.elapsed().as_secs(), 10);
    });
}

#[test]
fn a_client_that_says_its_preface_and_nothing_else() {
    run_paused(async {
        let (mut near, far) = wire();
        let started = Instant::now();
        near.write_all(&hello()[..24]).await.unwrap();
        let ended = Server::new(far, &Config::default()).task.await.unwrap();
        assert!(matches!(ended, Ended::Handshake), "{ended:?}");
        assert!(started.elapsed().as_secs() <= 20, "{:?}", started.elapsed());
    });
}

#[test]
fn a_server_that_says_nothing() {
    run_paused(async {
        let (near, _far) = wire();
        let started = Instant::now();
        let client = client(near, &Config::default()).await;
        let opened = client.tunnel.open(&request("10.0.0.1:80")).await;
        assert!(matches!(opened, Err(OpenError::Ended(Ended::Handshake) | OpenError::TimedOut)), "{opened:?}");
        let ended = client.task.await.unwrap();
        assert!(matches!(ended, Ended::Handshake), "{ended:?}");
        assert_eq!(started.elapsed().as_secs(), 10);
    });
}

#[test]
fn a_peer_that_dies_is_noticed_by_its_silence() {
    run_paused(async {
        let (near, far) = wire();
        let client = client(near, &Config::default()).await;
        let mut peer = Peer::server(far);
        peer.send(&frame(SETTINGS, 0, 0, &[])).await;
        let started = Instant::now();
        let ended = client.task.await.unwrap();
        assert!(matches!(ended, Ended::Silent), "{ended:?}");
        assert_eq!(started.elapsed().as_secs(), 30, "ten seconds, a ping, and twenty to answer it");
        assert!(matches!(client.tunnel.ended(), Some(Ended::Silent)));
        assert!(peer.next(|frame| frame.kind == PING).await.is_some(), "it was asked");
    });
    run_paused(async {
        let (near, far) = wire();
        let server = Server::new(far, &Config::default());
        let mut peer = Peer::new(near);
        peer.send(&hello()).await;
        let ended = server.task.await.unwrap();
        assert!(matches!(ended, Ended::Silent), "{ended:?}");
    });
}

#[test]
fn a_peer_that_reads_nothing_dies_too() {
    run_paused(async {
        // Its side of the wire is full, so that not even a ping goes out.
        let (near, mut far) = tokio::io::duplex(128);
        let client = client(near, &Config::default()).await;
        far.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        let ended = client.task.await.unwrap();
        assert!(matches!(ended, Ended::Silent), "{ended:?}");
    });
}

#[test]
fn two_that_have_nothing_to_say_stay_connected() {
    run_paused(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let _stream = open(&client, &mut server).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(!client.task.is_finished() && !server.task.is_finished());
        open(&client, &mut server).await;
    });
}

/// A byte now and then is a sign of life, and no excuse for taking more time than the others have.
#[test]
fn a_client_that_says_its_settings_very_slowly() {
    run_paused(async {
        let (mut near, far) = wire();
        let started = Instant::now();
        let mut server = Server::new(far, &Config::default());
        for byte in hello() {
            if near.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let ended = (&mut server.task).await.unwrap();
        assert!(matches!(ended, Ended::Handshake), "{ended:?}");
        assert_eq!(started.elapsed().as_secs(), 11, "ten seconds, and one until that is noticed here");
    });
}
