//! Bytes: all of them, in order, in both directions at once, whatever the other streams do.

use std::future::{Future, pending};
use std::rc::Rc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_local};
use zspire_hbone::{Config, Counters, End, copy};

use crate::support::{Client, Path, Server, client, open, pair, path, relay, run, run_paused, sockets, until};

const STEP: usize = 100_003;

/// Sends a pattern that its seed determines, then the end.
async fn send(mut socket: OwnedWriteHalf, seed: u64, total: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut left = total;
    let mut bytes = vec![0; STEP];
    while left > 0 {
        rng.fill_bytes(&mut bytes);
        let n = left.min(STEP);
        socket.write_all(&bytes[..n]).await.unwrap();
        left -= n;
    }
    socket.shutdown().await.unwrap();
}

/// Receives exactly that pattern, then the end.
async fn receive(mut socket: OwnedReadHalf, seed: u64, total: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut left = total;
    let (mut wanted, mut got) = (vec![0; STEP], vec![0; STEP]);
    while left > 0 {
        rng.fill_bytes(&mut wanted);
        let n = left.min(STEP);
        socket.read_exact(&mut got[..n]).await.unwrap();
        assert!(got[..n] == wanted[..n], "{left} bytes before the end");
        left -= n;
    }
    assert_eq!(socket.read(&mut got).await.unwrap(), 0, "nothing follows");
}

async fn both_ways(client: &Client, server: &mut Server, seed: u64, total: usize) {
    let path = path(client, server).await;
    let (app_in, app_out) = path.app.into_split();
    let (server_in, server_out) = path.server.into_split();
    tokio::join!(
        send(app_out, seed, total),
        receive(server_in, seed, total),
        send(server_out, seed + 1, total / 2),
        receive(app_in, seed + 1, total / 2),
    );
    assert!(matches!(path.app_end.task.await.unwrap(), End::Complete));
    assert!(matches!(path.server_end.task.await.unwrap(), End::Complete));
    assert_eq!(path.app_end.counters.load(), (total as u64, total as u64 / 2));
}

#[test]
fn large_transfers_both_ways_at_once_are_exact() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        both_ways(&client, &mut server, 1, 12 << 20).await;
    });
}

#[test]
fn small_windows_and_frames_change_nothing() {
    run(async {
        let small = Config {
            stream_window: 20_000,
            connection_window: 65_535,
            frame_size: 16 << 10,
            send_buffer: 5_000,
            ..Config::default()
        };
        let (client, mut server) = pair(&small, &small).await;
        both_ways(&client, &mut server, 3, 2 << 20).await;
        until("the stream is gone", || client.tunnel.streams() == 0).await;
        both_ways(&client, &mut server, 5, 2 << 20).await;
    });
}

#[test]
fn many_streams_do_not_mix() {
    run(async {
        let (client, mut server) = pair(&Config::default(), &Config::default()).await;
        let mut transfers = Vec::new();
        for seed in 0..20 {
            let path = path(&client, &mut server).await;
            let ((app_in, app_out), (server_in, server_out)) = (path.app.into_split(), path.server.into_split());
            let total = 300_000 + seed as usize;
            transfers.push(spawn_local(async move {
                tokio::join!(
                    send(app_out, seed, total),
                    receive(server_in, seed, total),
                    send(server_out, !seed, total),
                    receive(app_in, !seed, total),
                );
            }));
        }
        for transfer in transfers {
            transfer.await.unwrap();
        }
    });
}

/// Sockets between which the kernel holds little.
async fn narrow() -> (TcpStream, TcpStream) {
    let listening = TcpSocket::new_v4().unwrap();
    listening.set_recv_buffer_size(4096).unwrap();
    listening.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener: TcpListener = listening.listen(1).unwrap();
    let connecting = TcpSocket::new_v4().unwrap();
    connecting.set_send_buffer_size(4096).unwrap();
    let (near, far) = tokio::join!(connecting.connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

#[test]
fn stalled_readers_do_not_stall_the_others() {
    run(async {
        // Ten stalled streams hold more than the window of the whole connection.
        let config = Config { stream_window: 64 << 10, connection_window: 128 << 10, ..Config::default() };
        let (client, mut server) = pair(&config, &config).await;
        let mut stalled = Vec::new();
        for _ in 0..10 {
            let (ours, theirs) = open(&client, &mut server).await;
            let (mut app, of_relay) = crate::support::sockets().await;
            let (of_server, unread) = narrow().await;
            let (sender, receiver) = (relay(ours, of_relay), relay(theirs, of_server));
            let writer = spawn_local(async move { app.write_all(&vec![1; 16 << 20]).await });
            until("it has sent a window", || sender.counters.load().0 >= 64 << 10).await;
            stalled.push((unread, sender, receiver, writer));
        }
        both_ways(&client, &mut server, 7, 4 << 20).await;
        for (unread, _, _, writer) in &mut stalled {
            assert!(!writer.is_finished(), "it is stalled all the time");
            // And it goes on when somebody reads.
            unread.read_exact(&mut vec![0; 300 << 10]).await.unwrap();
        }
    });
}

#[test]
fn a_byte_does_not_wait_behind_what_others_could_have_under_way() {
    // In paused time the round trip is none, however busy the machine is.
    run_paused(async {
        // A connection that holds whatever is written, as sockets do, and a receiver that gets no more of it than a turn at a time.
        let config = Config::default();
        let (ours, theirs) = tokio::io::duplex(2 * config.connection_window as usize);
        let client = client(ours, &config).await;
        let mut server = Server::new(theirs, &config);
        let mut bulk = Vec::new();
        for _ in 0..4 {
            let Path { mut app, mut server, app_end, server_end } = path(&client, &mut server).await;
            let writer = spawn_local(async move { while app.write_all(&[1; STEP]).await.is_ok() {} });
            let reader = spawn_local(async move {
                let mut bytes = vec![0; 1 << 20];
                while server.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
            });
            bulk.push((app_end, server_end, writer, reader));
        }
        // Time goes by with the bytes.
        let _clock = spawn_local(async {
            loop {
                tokio::time::advance(Duration::from_millis(1)).await;
            }
        });
        let arrived = || bulk.iter().map(|(_, end, ..)| end.counters.load().1).sum::<u64>();
        until("the others fill the tunnel", || arrived() > 64 << 20).await;

        let mut single = path(&client, &mut server).await;
        for _ in 0..20 {
            let before = arrived();
            single.app.write_all(&[7]).await.unwrap();
            assert_eq!(single.server.read_u8().await.unwrap(), 7);
            let passed = arrived() - before;
            assert!(passed < u64::from(config.connection_window) / 4, "{passed} bytes were before it");
        }
    });
}

#[test]
fn a_reset_is_noticed_behind_bytes_that_nobody_reads() {
    run(async {
        let config = Config { stream_window: 64 << 10, ..Config::default() };
        let (client, mut server) = pair(&config, &config).await;
        let (ours, theirs) = open(&client, &mut server).await;
        let (mut app, of_relay) = crate::support::sockets().await;
        let (of_server, _unread) = narrow().await;
        let (sender, receiver) = (relay(ours, of_relay), relay(theirs, of_server));
        let writer = spawn_local(async move { app.write_all(&vec![1; 16 << 20]).await });
        until("it has sent a window", || sender.counters.load().0 >= 64 << 10).await;
        writer.abort();
        sender.task.abort();
        let end = receiver.task.await.unwrap();
        assert!(matches!(end, End::Reset(_)), "{end}");
    });
}

/// Plain copying between an application and a server, until it is done or cut.
async fn plain(cut: impl Future<Output = ()> + 'static) -> (TcpStream, TcpStream, JoinHandle<End>, Rc<Counters>) {
    let ((app, near), (far, server)) = tokio::join!(sockets(), sockets());
    let counters = Rc::new(Counters::default());
    let counted = counters.clone();
    let task = spawn_local(async move { copy(near, far, &counted, cut).await });
    (app, server, task, counters)
}

/// Small pieces are copied, much of it the kernel moves: nothing of that is to be seen.
#[test]
fn plain_copies_are_exact() {
    run(async {
        for (seed, total) in [(1, 0), (2, 1), (3, 70_000), (4, 32 << 20)] {
            let (app, server, task, counters) = plain(pending()).await;
            let (app_in, app_out) = app.into_split();
            let (server_in, server_out) = server.into_split();
            tokio::join!(
                send(app_out, seed, total),
                receive(server_in, seed, total),
                send(server_out, seed + 10, total / 2),
                receive(app_in, seed + 10, total / 2),
            );
            assert!(matches!(task.await.unwrap(), End::Complete));
            assert_eq!(counters.load(), (total as u64, total as u64 / 2));
        }
    });
}

/// What was under way to somebody who is gone goes to nobody else.
#[test]
fn bytes_of_a_plain_connection_that_failed_or_was_cut_are_gone() {
    run(async {
        for round in 0..20 {
            let (cut, told) = oneshot::channel::<()>();
            let (mut app, server, task, counters) = plain(async move { drop(told.await) }).await;
            // The server reads nothing: what it does not take is under way in between.
            let stalled = async {
                let bytes = vec![0xaa; 1 << 20];
                while app.write_all(&bytes).await.is_ok() {}
            };
            let seen = async {
                until("much to be under way", || counters.load().0 > 1 << 20).await;
                match round % 2 {
                    0 => drop(server.set_zero_linger().map(|()| server)),
                    _ => drop(cut.send(())),
                }
            };
            tokio::join!(stalled, seen);
            let end = task.await.unwrap();
            assert!(matches!(end, End::Other(_) | End::Cut), "{end}");

            let (app, server, task, _) = plain(pending()).await;
            let ((app_in, app_out), (server_in, server_out)) = (app.into_split(), server.into_split());
            let total = 4 << 20;
            tokio::join!(
                send(app_out, round, total),
                receive(server_in, round, total),
                send(server_out, 99, 0),
                receive(app_in, 99, 0)
            );
            assert!(matches!(task.await.unwrap(), End::Complete));
        }
    });
}
