//! The pool: who waits, who is woken, and when a tunnel is made or given up.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::Instant;
use zspire_hbone::{
    Config, Connected, Ended, Lease, Pool, PoolConfig, PoolStats, ResponseHead, Stream, StreamIo, Tunnel,
};

use crate::support::{Server, request, run, run_paused, settle, until, wire};

type Key = &'static str;
type Failure = Rc<str>;

/// A pool and the servers that it connects to.
#[derive(Clone)]
struct World {
    pool: Pool<Key, Failure>,
    inner: Rc<Inner>,
}

struct Inner {
    theirs: Config,
    /// Tunnels that may be made; who makes one waits for its turn.
    gate: Semaphore,
    /// Tunnels that were begun.
    made: Cell<usize>,
    /// What `changed` was told, added up.
    counted: Cell<i64>,
    /// How long a tunnel is used.
    age: Cell<Option<Duration>>,
    /// What the next tunnels fail by.
    failures: RefCell<VecDeque<Failure>>,
    servers: RefCell<Vec<Running>>,
}

/// A server that accepts every stream.
struct Running {
    drain: Option<oneshot::Sender<()>>,
    task: JoinHandle<Ended>,
    streams: Rc<RefCell<Vec<Stream>>>,
}

impl World {
    fn new(theirs: Config) -> Self {
        let inner = Rc::new(Inner {
            theirs,
            gate: Semaphore::new(1000),
            made: Cell::new(0),
            counted: Cell::new(0),
            age: Cell::new(None),
            failures: RefCell::default(),
            servers: RefCell::default(),
        });
        let counter = inner.clone();
        let pool = Pool::new(PoolConfig { unused_release: Duration::from_secs(300) }, move |n| {
            counter.counted.set(counter.counted.get() + n);
        });
        Self { pool, inner }
    }

    fn with_streams(server_streams: u32) -> Self {
        Self::new(Config { server_streams, ..Config::default() })
    }

    /// From now on whoever makes a tunnel waits for [`World::let_one_through`].
    fn close_gate(&self) {
        self.inner.gate.forget_permits(1000);
    }

    fn let_one_through(&self) {
        self.inner.gate.add_permits(1);
    }

    async fn lease(&self, key: Key) -> Result<Lease, Failure> {
        let make = || {
            self.inner.made.set(self.inner.made.get() + 1);
            let inner = self.inner.clone();
            async move { inner.make().await }
        };
        self.pool.lease(&key, make, || {}).await
    }

    /// A stream, opened.
    async fn open(&self, key: Key) -> Result<Stream, Failure> {
        Ok(self.lease(key).await?.open(&request("10.0.0.1:80")).await.map_err(|error| error.to_string())?.0)
    }

    fn spawn(&self, key: Key) -> JoinHandle<Result<Stream, Failure>> {
        let world = self.clone();
        spawn_local(async move { world.open(key).await })
    }

    fn made(&self) -> usize {
        self.inner.made.get()
    }

    fn tunnels(&self) -> usize {
        let tunnels = self.pool.stats().tunnels;
        assert_eq!(self.inner.counted.get(), tunnels as i64, "what `changed` was told");
        tunnels
    }

    fn waiting(&self) -> usize {
        self.pool.stats().waiting
    }

    fn ended(&self, server: usize) -> bool {
        self.inner.servers.borrow()[server].task.is_finished()
    }
}

impl Inner {
    async fn make(&self) -> Result<Connected, Failure> {
        self.gate.acquire().await.unwrap().forget();
        if let Some(failure) = self.failures.borrow_mut().pop_front() {
            return Err(failure);
        }
        let (near, far) = wire();
        self.servers.borrow_mut().push(Running::new(Server::new(far, &self.theirs)));
        let (tunnel, driver) = Tunnel::connect(near, &Config::default()).await.map_err(|ended| ended.to_string())?;
        let until = self.age.get().map(|age| Instant::now() + age);
        Ok(Connected { tunnel, driver: Box::pin(async move { drop(driver.await) }), until })
    }
}

impl Running {
    fn new(server: Server) -> Self {
        let Server { mut asked, drain, task, .. } = server;
        let streams = Rc::<RefCell<Vec<Stream>>>::default();
        let kept = streams.clone();
        spawn_local(async move {
            while let Some(incoming) = asked.recv().await {
                if let Ok(stream) = incoming.accept(&ResponseHead::default()) {
                    kept.borrow_mut().push(stream);
                }
            }
        });
        Self { drain, task, streams }
    }
}

/// Whether a stream still carries bytes.
async fn lives(ours: Stream, server: &World, at: usize) -> StreamIo {
    let theirs = server.inner.servers.borrow()[at].streams.borrow_mut().remove(0);
    let (mut ours, mut theirs) = (ours.into_io(), theirs.into_io());
    ours.write_all(b"x").await.unwrap();
    theirs.read_exact(&mut [0]).await.unwrap();
    ours
}

#[test]
fn many_share_one_tunnel() {
    run(async {
        let world = World::with_streams(200);
        let opening: Vec<_> = (0..50).map(|_| world.spawn("a")).collect();
        let mut streams = Vec::new();
        for opening in opening {
            streams.push(opening.await.unwrap().unwrap());
        }
        assert_eq!((world.made(), world.tunnels(), world.waiting()), (1, 1, 0));
        streams.push(world.open("b").await.unwrap());
        assert_eq!((world.made(), world.tunnels()), (2, 2), "another key, another tunnel");
    });
}

#[test]
fn whoever_waits_is_told_so_once() {
    run(async {
        let world = World::with_streams(200);
        let waited = Cell::new(0);
        let inner = world.inner.clone();
        let make = || {
            let inner = inner.clone();
            async move { inner.make().await }
        };
        let first = world.pool.lease(&"a", make, || waited.set(waited.get() + 1)).await.unwrap();
        assert_eq!(waited.get(), 1);
        let _stream = first.open(&request("10.0.0.1:80")).await.unwrap();
        let _second = world.pool.lease(&"a", make, || waited.set(waited.get() + 1)).await.unwrap();
        assert_eq!(waited.get(), 1, "there was a tunnel at hand");
    });
}

#[test]
fn a_second_tunnel_is_made_when_more_wait_than_one_can_take() {
    run(async {
        let world = World::with_streams(200);
        world.close_gate();
        let hundred: Vec<_> = (0..100).map(|_| world.spawn("a")).collect();
        until("all wait", || world.waiting() == 100).await;
        assert_eq!(world.made(), 1);
        let one_more = world.spawn("a");
        until("all wait", || world.waiting() == 101).await;
        assert_eq!(world.made(), 2);
        world.let_one_through();
        world.let_one_through();
        let mut streams = Vec::new();
        for opening in hundred.into_iter().chain([one_more]) {
            streams.push(opening.await.unwrap().unwrap());
        }
        assert_eq!((world.made(), world.tunnels()), (2, 2));
    });
}

#[test]
fn a_peer_that_takes_one_stream_gets_a_tunnel_for_each() {
    run(async {
        let world = World::with_streams(1);
        let mut streams = Vec::new();
        for wanted in 1..=3 {
            streams.push(world.open("a").await.unwrap());
            assert_eq!(world.tunnels(), wanted);
        }
        streams.remove(1);
        until("its stream is gone", || world.tunnels() == 3).await;
        streams.push(world.open("a").await.unwrap());
        assert_eq!(world.made(), 3, "the free one is used again");
        let opening: Vec<_> = (0..4).map(|_| world.spawn("a")).collect();
        for opening in opening {
            streams.push(opening.await.unwrap().unwrap());
        }
        assert_eq!(world.made(), 7, "what is known of the peer is used");
    });
}

#[test]
fn a_peer_that_takes_few_streams_gets_as_many_tunnels_as_it_needs() {
    run(async {
        let world = World::with_streams(3);
        let opening: Vec<_> = (0..10).map(|_| world.spawn("a")).collect();
        let mut streams = Vec::new();
        for opening in opening {
            streams.push(opening.await.unwrap().unwrap());
        }
        assert_eq!((world.made(), world.tunnels()), (4, 4));
    });
}

#[test]
fn a_freed_stream_wakes_one_who_waits_alone() {
    run(async {
        let world = World::with_streams(2);
        let mut full = vec![world.open("a").await.unwrap(), world.open("a").await.unwrap()];
        world.close_gate();
        let (first, second) = (world.spawn("a"), world.spawn("a"));
        until("both wait", || world.waiting() == 2).await;
        full.pop();
        until("one does not", || first.is_finished()).await;
        settle().await;
        assert!(!second.is_finished() && world.waiting() == 1);
        assert_eq!(world.tunnels(), 1);
        world.let_one_through();
        second.await.unwrap().unwrap();
        assert_eq!(world.tunnels(), 2);
    });
}

#[test]
fn the_first_may_go_away_while_the_tunnel_is_made() {
    run(async {
        let world = World::with_streams(200);
        world.close_gate();
        let first = world.spawn("a");
        until("it waits", || world.waiting() == 1).await;
        let second = world.spawn("a");
        until("both wait", || world.waiting() == 2).await;
        first.abort();
        settle().await;
        world.let_one_through();
        second.await.unwrap().unwrap();
        assert_eq!((world.made(), world.tunnels()), (1, 1));
    });
}

#[test]
fn a_tunnel_that_nobody_waits_for_any_more_is_there_for_the_next() {
    run(async {
        let world = World::with_streams(200);
        world.close_gate();
        let first = world.spawn("a");
        until("it waits", || world.waiting() == 1).await;
        first.abort();
        settle().await;
        world.let_one_through();
        until("it is made", || world.tunnels() == 1).await;
        world.open("a").await.unwrap();
        assert_eq!(world.made(), 1);
    });
}

#[test]
fn one_who_goes_away_leaves_the_stream_to_the_next() {
    run(async {
        let world = World::with_streams(1);
        let full = world.open("a").await.unwrap();
        world.close_gate();
        let (first, second) = (world.spawn("a"), world.spawn("a"));
        until("both wait", || world.waiting() == 2).await;
        first.abort();
        settle().await;
        drop(full);
        second.await.unwrap().unwrap();
        assert_eq!(world.tunnels(), 1);
    });
}

#[test]
fn a_stream_that_was_given_to_one_who_went_away_is_not_lost() {
    run(async {
        let world = World::with_streams(1);
        let full = world.open("a").await.unwrap();
        world.close_gate();
        let first = world.spawn("a");
        until("it waits", || world.waiting() == 1).await;
        // It is answered, and goes away before it can look at the answer.
        drop(full);
        first.abort();
        settle().await;
        world.open("a").await.unwrap();
        assert_eq!(world.tunnels(), 1);
    });
}

#[test]
fn all_who_wait_share_an_error_and_the_next_tries_again() {
    run(async {
        let world = World::with_streams(200);
        let refused: Failure = "connection refused".into();
        world.inner.failures.borrow_mut().push_back(refused.clone());
        let opening: Vec<_> = (0..5).map(|_| world.spawn("a")).collect();
        for opening in opening {
            assert!(Rc::ptr_eq(&opening.await.unwrap().unwrap_err(), &refused));
        }
        assert_eq!((world.made(), world.pool.stats()), (1, PoolStats::default()));
        world.open("a").await.unwrap();
        assert_eq!(world.made(), 2);
    });
}

#[test]
fn an_unused_tunnel_is_closed_and_a_used_one_is_not() {
    run_paused(async {
        let world = World::with_streams(200);
        let stream = world.open("a").await.unwrap();
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(world.tunnels(), 1);
        drop(stream);
        tokio::time::sleep(Duration::from_secs(299)).await;
        assert_eq!(world.tunnels(), 1);
        // Using it begins the time anew.
        drop(world.open("a").await.unwrap());
        tokio::time::sleep(Duration::from_secs(299)).await;
        assert_eq!(world.tunnels(), 1);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(world.tunnels(), 0);
        assert!(world.ended(0), "the peer is told");
        world.open("a").await.unwrap();
        assert_eq!(world.made(), 2);
    });
}

#[test]
fn a_burst_leaves_one_tunnel_behind() {
    run_paused(async {
        let world = World::with_streams(1);
        let mut streams = Vec::new();
        for _ in 0..4 {
            streams.push(world.open("a").await.unwrap());
        }
        let _other = world.open("b").await.unwrap();
        assert_eq!(world.tunnels(), 5);
        drop(streams);
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(world.tunnels(), 5);
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!(world.tunnels(), 2, "one that is unused, and the one that is used");
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(world.tunnels(), 1);
    });
}

#[test]
fn a_tunnel_that_is_too_old_keeps_its_streams_and_gets_no_more() {
    run_paused(async {
        let world = World::with_streams(200);
        world.inner.age.set(Some(Duration::from_secs(100)));
        let stream = world.open("a").await.unwrap();
        tokio::time::sleep(Duration::from_secs(99)).await;
        let second = world.open("a").await.unwrap();
        assert_eq!(world.made(), 1);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let third = world.open("a").await.unwrap();
        assert_eq!(world.made(), 2);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(world.tunnels(), 1, "the old one is no longer the pool's");
        let old = lives(stream, &world, 0).await;
        assert!(!world.ended(0));
        drop((old, second));
        world.inner.servers.borrow()[0].streams.borrow_mut().clear();
        until("it ends with its last stream", || world.ended(0)).await;
        drop(third);
    });
}

#[test]
fn what_is_retired_keeps_its_streams_and_gets_no_more() {
    run(async {
        let world = World::with_streams(200);
        let (stream, _other) = (world.open("a").await.unwrap(), world.open("b").await.unwrap());
        world.pool.retire(|key, _| *key == "a");
        assert_eq!(world.tunnels(), 1);
        let stream = lives(stream, &world, 0).await;
        let _next = world.open("a").await.unwrap();
        let _next_other = world.open("b").await.unwrap();
        assert_eq!((world.made(), world.tunnels()), (3, 2));
        drop(stream);
        world.inner.servers.borrow()[0].streams.borrow_mut().clear();
        until("it ends with its last stream", || world.ended(0)).await;
    });
}

#[test]
fn a_closed_pool_lets_its_tunnels_end() {
    run(async {
        let world = World::with_streams(200);
        drop(world.open("a").await.unwrap());
        let stream = world.open("b").await.unwrap();
        world.pool.close();
        assert_eq!(world.tunnels(), 0);
        until("the unused one ends", || world.ended(0)).await;
        let stream = lives(stream, &world, 1).await;
        drop(stream);
        world.inner.servers.borrow()[1].streams.borrow_mut().clear();
        until("the used one ends", || world.ended(1)).await;
    });
}

#[test]
fn who_waits_when_the_pool_is_closed_is_served_and_nothing_is_kept() {
    run(async {
        let world = World::with_streams(200);
        world.close_gate();
        let opening: Vec<_> = (0..3).map(|_| world.spawn("a")).collect();
        until("all wait", || world.waiting() == 3).await;
        world.pool.close();
        for _ in 0..3 {
            world.let_one_through();
        }
        for opening in opening {
            opening.await.unwrap().unwrap();
        }
        until("no tunnel is kept", || world.tunnels() == 0).await;
        assert_eq!(world.made(), 3, "one for each, since none is shared");
    });
}

#[test]
fn a_server_that_drains_is_replaced_and_its_streams_live_on() {
    run(async {
        let world = World::with_streams(200);
        let stream = world.open("a").await.unwrap();
        world.inner.servers.borrow_mut()[0].drain.take().unwrap().send(()).unwrap();
        settle().await;
        let _next = world.open("a").await.unwrap();
        assert_eq!(world.made(), 2);
        lives(stream, &world, 0).await;
        until("only the new one is left", || world.ended(0) && world.tunnels() == 1).await;
    });
}

#[test]
fn a_tunnel_that_breaks_is_replaced() {
    run(async {
        let world = World::with_streams(200);
        let stream = world.open("a").await.unwrap();
        world.inner.servers.borrow()[0].task.abort();
        until("it is gone", || world.tunnels() == 0).await;
        assert!(stream.into_io().read(&mut [0]).await.is_err());
        world.open("a").await.unwrap();
        assert_eq!(world.made(), 2);
    });
}

#[test]
fn a_tunnel_that_breaks_before_its_settings_leaves_nobody_waiting() {
    run(async {
        let world = World::with_streams(200);
        world.close_gate();
        let opening: Vec<_> = (0..3).map(|_| world.spawn("a")).collect();
        until("all wait", || world.waiting() == 3).await;
        world.let_one_through();
        until("a server is there", || !world.inner.servers.borrow().is_empty()).await;
        world.inner.servers.borrow()[0].task.abort();
        world.let_one_through();
        world.let_one_through();
        let mut opened = 0;
        for opening in opening {
            opened += usize::from(opening.await.unwrap().is_ok());
        }
        assert!(opened >= 2, "at most the one that was under way fails");
    });
}
