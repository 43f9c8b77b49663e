//! A thousand streams of one tunnel that send and end in every way at once: each gets exactly its own bytes, and its own end.

use std::sync::LazyLock;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::task::{spawn_local, yield_now};
use tokio::time::Instant;
use zspire_hbone::{Config, StreamIo};

use crate::support::{open, pair, run_long, soak, until};

const STREAMS: usize = 1000;

/// What the two ends of a stream do.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Course {
    /// The client sends and ends, then the server.
    ClientFirst,
    /// The other way round.
    ServerFirst,
    /// Both at once.
    Both,
    /// The client goes away when it has sent half.
    ClientGoes,
    /// The server goes away when it has read half.
    ServerGoes,
    /// The server does not read before all the others are done.
    Stalled,
}

const COURSES: [Course; 6] =
    [Course::ClientFirst, Course::ServerFirst, Course::Both, Course::ClientGoes, Course::ServerGoes, Course::Stalled];

/// A stream of the crowd.
#[derive(Debug, Clone, Copy)]
struct Plan {
    course: Course,
    /// Bytes from the client, and to it.
    up: usize,
    down: usize,
}

/// A prime number of bytes, twice; what a stream sends begins somewhere in it, and goes round and round.
const ROUND: usize = 65_521;
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; ROUND];
    SmallRng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes.repeat(2)
});

/// What comes at this place of one direction of a stream.
fn pattern(direction: usize, at: usize, n: usize) -> &'static [u8] {
    let start = (at + direction * 4099) % ROUND;
    &BYTES[start..start + n]
}

/// One end of a stream: it sends and receives in pieces of any size, and is now and then busy with something else.
struct Side {
    read: ReadHalf<StreamIo>,
    write: WriteHalf<StreamIo>,
    rng: [SmallRng; 2],
    /// Of what it receives, and of what it sends.
    directions: [usize; 2],
}

async fn pause(rng: &mut SmallRng) {
    if rng.random_ratio(1, 8) {
        for _ in 0..rng.random_range(1..20) {
            yield_now().await;
        }
    }
}

async fn send(write: &mut WriteHalf<StreamIo>, rng: &mut SmallRng, direction: usize, total: usize) {
    let mut at = 0;
    while at < total {
        let n = rng.random_range(1..=ROUND).min(total - at);
        write.write_all(pattern(direction, at, n)).await.unwrap();
        at += n;
        pause(rng).await;
    }
}

/// Reads as much as there is, at most `limit`; how much it was, and whether it was all.
async fn receive(read: &mut ReadHalf<StreamIo>, rng: &mut SmallRng, direction: usize, limit: usize) -> (usize, bool) {
    let (mut at, mut bytes) = (0, vec![0; ROUND]);
    while at < limit {
        let room = rng.random_range(1..=ROUND).min(limit - at);
        match read.read(&mut bytes[..room]).await {
            Ok(0) => return (at, true),
            Ok(n) => {
                assert!(bytes[..n] == *pattern(direction, at, n), "direction {direction}, from {at} on");
                at += n;
            }
            Err(_) => return (at, false),
        }
        pause(rng).await;
    }
    (at, false)
}

impl Side {
    fn new(io: StreamIo, of: usize, directions: [usize; 2]) -> Self {
        let (read, write) = tokio::io::split(io);
        let rng = [2 * of, 2 * of + 1].map(|seed| SmallRng::seed_from_u64(seed as u64));
        Self { read, write, rng, directions }
    }

    async fn send(&mut self, total: usize) {
        send(&mut self.write, &mut self.rng[1], self.directions[1], total).await;
    }

    async fn send_all(&mut self, total: usize) {
        self.send(total).await;
        self.write.shutdown().await.unwrap();
    }

    async fn receive(&mut self, limit: usize) -> (usize, bool) {
        receive(&mut self.read, &mut self.rng[0], self.directions[0], limit).await
    }

    async fn receive_all(&mut self, total: usize) {
        assert_eq!(self.receive(usize::MAX).await, (total, true), "direction {}", self.directions[0]);
    }

    async fn both(&mut self, sends: usize, receives: usize) {
        let Self { read, write, rng: [reads, writes], directions } = self;
        let sending = async {
            send(write, writes, directions[1], sends).await;
            write.shutdown().await.unwrap();
        };
        let (received, ()) = tokio::join!(receive(read, reads, directions[0], usize::MAX), sending);
        assert_eq!(received, (receives, true), "direction {}", directions[0]);
    }
}

async fn near_end(mut side: Side, plan: Plan) {
    let Plan { course, up, down } = plan;
    match course {
        Course::ClientFirst | Course::Stalled => {
            side.send_all(up).await;
            side.receive_all(down).await;
        }
        Course::ServerFirst => {
            side.receive_all(down).await;
            side.send_all(up).await;
        }
        Course::Both => side.both(up, down).await,
        Course::ClientGoes => side.send(up / 2).await,
        Course::ServerGoes => {
            side.send(up / 2).await;
            assert_eq!(side.receive(usize::MAX).await, (0, false), "a reset is no end");
        }
    }
}

async fn far_end(mut side: Side, plan: Plan, mut others_done: watch::Receiver<bool>) {
    let Plan { course, up, down } = plan;
    match course {
        Course::ClientFirst => {
            side.receive_all(up).await;
            side.send_all(down).await;
        }
        Course::Stalled => {
            others_done.wait_for(|done| *done).await.unwrap();
            side.receive_all(up).await;
            side.send_all(down).await;
        }
        Course::ServerFirst => {
            side.send_all(down).await;
            side.receive_all(up).await;
        }
        Course::Both => side.both(down, up).await,
        Course::ClientGoes => {
            let (received, all) = side.receive(usize::MAX).await;
            assert!(received <= up / 2 && !all, "a reset is no end");
        }
        Course::ServerGoes => {
            assert_eq!(side.receive(up / 2).await, (up / 2, false));
        }
    }
}

fn plan(number: usize, largest: usize, rng: &mut SmallRng) -> Plan {
    // As many of a few bytes as of many.
    let mut size = |limit: usize| match rng.random_range(0..10) {
        0 => 0,
        _ => (limit as f64).powf(rng.random()) as usize,
    };
    let (up, down) = match number {
        0 => (largest, largest / 8),
        _ => (size(largest / 64), size(largest / 128)),
    };
    let course = if number == 0 { Course::Both } else { *COURSES.choose(rng).expect("there are some") };
    Plan { course, up, down }
}

/// From nothing to `ZSPIRE_SOAK_MEBIBYTES` in one stream, every day 12.
#[test]
fn a_thousand_streams_that_end_in_every_way_do_not_mix() {
    let largest = soak("ZSPIRE_SOAK_MEBIBYTES", 12) << 20;
    run_long(async {
        let config = Config { client_streams: STREAMS, server_streams: STREAMS as u32, ..Config::default() };
        // Neither side has the limits of the other.
        let near = Config { stream_window: 30_000, connection_window: 300_000, frame_size: 16 << 10, ..config.clone() };
        let far = Config { stream_window: 50_000, connection_window: 200_000, send_buffer: 20_000, ..config };
        let (client, mut server) = pair(&near, &far).await;
        let mut rng = SmallRng::seed_from_u64(4711);
        let (all_others, others_done) = watch::channel(false);
        let (mut stalled, mut others) = (Vec::new(), Vec::new());
        let (began, mut carried) = (Instant::now(), 0);
        for number in 0..STREAMS {
            let plan = plan(number, largest, &mut rng);
            let (ours, theirs) = open(&client, &mut server).await;
            let (up, down) = (2 * number, 2 * number + 1);
            let ours = Side::new(ours.into_io(), up, [down, up]);
            let theirs = Side::new(theirs.into_io(), down, [up, down]);
            let tasks = [spawn_local(near_end(ours, plan)), spawn_local(far_end(theirs, plan, others_done.clone()))];
            carried += plan.up + plan.down;
            if plan.course == Course::Stalled { stalled.extend(tasks) } else { others.extend(tasks) }
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
        println!("{} MiB on {STREAMS} streams in {:?}", carried >> 20, began.elapsed());

        // Nothing of the windows is lost: they carry more than they hold once more.
        let (ours, theirs) = open(&client, &mut server).await;
        let (mut ours, mut theirs) = (Side::new(ours.into_io(), 0, [1, 0]), Side::new(theirs.into_io(), 1, [0, 1]));
        tokio::join!(ours.both(1 << 20, 2 << 20), theirs.both(2 << 20, 1 << 20));
    });
}
