//! Bytes: all of them, in order, in both directions at once, whatever the other streams do.

use std::future::{Future, pending};
use std::rc::Rc;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, spawn_local};
use zspire_hbone::{Config, Counters, End, StreamIo, copy};

use crate::support::{Client, Server, open, pair, path, relay, run, sockets, until};

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

/// What a stream of the crowd does.
#[derive(Clone, Copy, PartialEq)]
enum Course {
    /// The client sends, then the server answers.
    Turns,
    /// Both at once.
    Both,
    /// The client goes away in the middle.
    Reset,
    /// The server does not read before everybody else is done.
    Stalled,
}

/// The byte at each place of what one end of a stream sends.
fn pattern(seed: usize, at: usize) -> u8 {
    (at * 31 + at / 251 + seed * 7) as u8
}

async fn write_pattern(io: &mut WriteHalf<StreamIo>, seed: usize, total: usize) {
    let bytes: Vec<u8> = (0..total).map(|at| pattern(seed, at)).collect();
    io.write_all(&bytes).await.unwrap();
}

/// Reads to the end; how much it was, and whether the end was one.
async fn read_pattern(io: &mut ReadHalf<StreamIo>, seed: usize) -> (usize, bool) {
    let (mut at, mut bytes) = (0, vec![0; 20_000]);
    loop {
        match io.read(&mut bytes).await {
            Ok(0) => return (at, true),
            Ok(n) => {
                let right = bytes[..n].iter().enumerate().all(|(i, byte)| *byte == pattern(seed, at + i));
                assert!(right, "stream {seed}, from {at} on");
                at += n;
            }
            Err(_) => return (at, false),
        }
    }
}

async fn near_end(io: StreamIo, seed: usize, total: usize, course: Course) {
    let (mut read, mut write) = tokio::io::split(io);
    let answered = match course {
        Course::Reset => {
            write_pattern(&mut write, seed, total / 2).await;
            return;
        }
        Course::Turns | Course::Stalled => {
            write_pattern(&mut write, seed, total).await;
            write.shutdown().await.unwrap();
            read_pattern(&mut read, seed + 1000).await
        }
        Course::Both => {
            let send = async {
                write_pattern(&mut write, seed, total).await;
                write.shutdown().await.unwrap();
            };
            tokio::join!(send, read_pattern(&mut read, seed + 1000)).1
        }
    };
    assert_eq!(answered, (total / 3, true), "stream {seed}");
}

async fn far_end(io: StreamIo, seed: usize, total: usize, course: Course, mut others_done: watch::Receiver<bool>) {
    let (mut read, mut write) = tokio::io::split(io);
    if course == Course::Stalled {
        others_done.wait_for(|done| *done).await.unwrap();
    }
    let send = async |write: &mut WriteHalf<StreamIo>| {
        write_pattern(write, seed + 1000, total / 3).await;
        write.shutdown().await.unwrap();
    };
    let heard = match course {
        Course::Both => tokio::join!(send(&mut write), read_pattern(&mut read, seed)).1,
        _ => read_pattern(&mut read, seed).await,
    };
    if course == Course::Reset {
        assert!(heard.0 <= total / 2 && !heard.1, "a reset is no end: {heard:?}");
    } else {
        assert_eq!(heard, (total, true), "stream {seed}");
        if course != Course::Both {
            send(&mut write).await;
        }
    }
}

#[test]
fn a_thousand_streams_that_end_in_every_way_do_not_mix() {
    run(async {
        let many = Config {
            client_streams: 1000,
            server_streams: 1000,
            stream_window: 30_000,
            connection_window: 300_000,
            ..Config::default()
        };
        let (client, mut server) = pair(&many, &many).await;
        let mut rng = SmallRng::seed_from_u64(4711);
        let (all_others, others_done) = watch::channel(false);
        let (mut stalled, mut others) = (Vec::new(), Vec::new());
        for seed in 0..1000 {
            let course = [Course::Turns, Course::Both, Course::Reset, Course::Stalled][seed % 4];
            let total = if seed % 10 == 0 { 0 } else { rng.next_u32() as usize % 100_000 };
            let (ours, theirs) = open(&client, &mut server).await;
            let tasks = [
                spawn_local(near_end(ours.into_io(), seed, total, course)),
                spawn_local(far_end(theirs.into_io(), seed, total, course, others_done.clone())),
            ];
            if course == Course::Stalled { stalled.extend(tasks) } else { others.extend(tasks) }
        }
        for task in others {
            task.await.unwrap();
        }
        all_others.send(true).unwrap();
        for task in stalled {
            task.await.unwrap();
        }
        until("every stream is gone", || client.tunnel.streams() == 0).await;
        assert!(!client.task.is_finished() && !server.task.is_finished());
        both_ways(&client, &mut server, 11, 1 << 20).await;
    });
}
