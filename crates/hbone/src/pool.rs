//! The tunnels of one worker, by what they may be used for.
//!
//! Whoever needs a stream takes one of a tunnel that has one free, or waits for the tunnel that is being made for its key;
//! a second is made at the same time only when more wait than the first can take. A waiting connection is woken alone.
//! Making a tunnel is a task of the pool: it goes on when the connection that first asked for it has gone away.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::{Future, poll_fn};
use std::hash::Hash;
use std::ops::ControlFlow;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::OpenError;
use crate::link::{Slot, TunnelId};
use crate::request::{Request, ResponseHead};
use crate::stream::Stream;
use crate::tunnel::Tunnel;

/// A tunnel without streams is closed after this time if there is another one like it: a burst leaves one behind, not a hundred.
const SURPLUS_RELEASE: Duration = Duration::from_secs(10);

/// Settings of a pool.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// A tunnel without streams is closed after this time (`POOL_UNUSED_RELEASE_TIMEOUT`).
    pub unused_release: Duration,
}

/// A tunnel that was made.
pub struct Connected {
    /// To open streams with.
    pub tunnel: Tunnel,
    /// Drives it; run by the pool.
    pub driver: Pin<Box<dyn Future<Output = ()>>>,
    /// No stream is opened on it after this time (its certificates are too old).
    pub until: Option<Instant>,
}

impl fmt::Debug for Connected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connected").field("tunnel", &self.tunnel).finish_non_exhaustive()
    }
}

/// How many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolStats {
    /// Tunnels.
    pub tunnels: usize,
    /// Connections that wait for one.
    pub waiting: usize,
}

/// A pool. Clones are the same pool.
pub struct Pool<K, E>(Rc<Inner<K, E>>);

struct Inner<K, E> {
    config: PoolConfig,
    entries: RefCell<HashMap<K, Entry<E>>>,
    /// Told of every tunnel that came or went.
    changed: Box<dyn Fn(i64)>,
    closed: Cell<bool>,
    /// How often all tunnels were retired.
    generation: Cell<u64>,
}

struct Entry<E> {
    tunnels: Vec<Pooled>,
    /// Tunnels that are being made.
    making: usize,
    waiting: VecDeque<oneshot::Sender<Answer<E>>>,
    /// Streams that a tunnel to this peer is expected to take.
    expected: usize,
}

/// What somebody who waits is told: a stream, nothing (look again, and make a tunnel if need be), or why there is none.
type Answer<E> = Result<Option<Lease>, E>;

impl<E> Default for Entry<E> {
    fn default() -> Self {
        Self { tunnels: Vec::new(), making: 0, waiting: VecDeque::new(), expected: 100 }
    }
}

struct Pooled {
    tunnel: Tunnel,
    until: Option<Instant>,
}

/// One stream of a pooled tunnel, to be opened.
pub struct Lease {
    tunnel: Tunnel,
    slot: Slot,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lease").field(&self.tunnel).finish()
    }
}

impl Lease {
    /// Sends CONNECT on it.
    pub async fn open(self, request: &Request) -> Result<(Stream, ResponseHead), OpenError> {
        self.tunnel.open_in(self.slot, request).await
    }
}

impl<K, E> Clone for Pool<K, E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, E> fmt::Debug for Pool<K, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("keys", &self.0.entries.borrow().len()).finish_non_exhaustive()
    }
}

impl<K: Clone + Eq + Hash + 'static, E: Clone + 'static> Pool<K, E> {
    /// An empty pool; `changed` is told of every tunnel that comes (1) or goes (-1).
    pub fn new(config: PoolConfig, changed: impl Fn(i64) + 'static) -> Self {
        Self(Rc::new(Inner {
            config,
            entries: RefCell::default(),
            changed: Box::new(changed),
            closed: Cell::new(false),
            generation: Cell::new(0),
        }))
    }

    /// A stream of a tunnel for `key`; `make` makes the tunnel if one is needed. Safe to cancel.
    ///
    /// `waits` is called when there is no tunnel at hand.
    pub async fn lease<F>(&self, key: &K, make: impl Fn() -> F, waits: impl FnOnce()) -> Result<Lease, E>
    where
        F: Future<Output = Result<Connected, E>> + 'static,
    {
        let mut waits = Some(waits);
        loop {
            let waiting = match self.take_or_wait(key, &make) {
                Ok(lease) => return Ok(lease),
                Err(waiting) => waiting,
            };
            if let Some(waits) = waits.take() {
                waits();
            }
            // The sender lives in the pool, and the task that makes the tunnel holds the pool.
            if let Some(lease) = waiting.await.expect("whoever waits is answered")? {
                return Ok(lease);
            }
        }
    }

    fn take_or_wait<F>(&self, key: &K, make: &impl Fn() -> F) -> Result<Lease, oneshot::Receiver<Answer<E>>>
    where
        F: Future<Output = Result<Connected, E>> + 'static,
    {
        let mut entries = self.0.entries.borrow_mut();
        let entry = entries.entry(key.clone()).or_default();
        if let Some(lease) = entry.take() {
            return Ok(lease);
        }
        let (sender, receiver) = oneshot::channel();
        entry.waiting.push_back(sender);
        let unsettled = entry.tunnels.iter().filter(|pooled| !pooled.tunnel.is_settled()).count();
        if entry.waiting.len() > (entry.making + unsettled) * entry.expected {
            entry.making += 1;
            self.begin(key, make());
        }
        Err(receiver)
    }

    /// Makes one more tunnel for a key, unless one is being made: the ones there are will soon not be used any more.
    pub fn renew<F>(&self, key: &K, make: impl FnOnce() -> F)
    where
        F: Future<Output = Result<Connected, E>> + 'static,
    {
        let mut entries = self.0.entries.borrow_mut();
        let entry = entries.entry(key.clone()).or_default();
        if entry.making == 0 {
            entry.making += 1;
            self.begin(key, make());
        }
    }

    fn begin(&self, key: &K, making: impl Future<Output = Result<Connected, E>> + 'static) {
        let (pool, key, generation) = (self.clone(), key.clone(), self.0.generation.get());
        tokio::task::spawn_local(async move {
            let result = making.await;
            pool.made(key, result, generation);
        });
    }

    /// A stream of `key` may be free.
    fn freed(&self, key: &K) {
        // Whoever holds the entries now looks for free streams itself.
        let Ok(mut entries) = self.0.entries.try_borrow_mut() else { return };
        if let Some(entry) = entries.get_mut(key) {
            entry.answer();
        }
    }

    fn made(&self, key: K, result: Result<Connected, E>, generation: u64) {
        let mut entries = self.0.entries.borrow_mut();
        let entry = entries.entry(key.clone()).or_default();
        entry.making -= 1;
        match result {
            Err(error) => {
                // All of them: they asked for the same, and whoever tries again makes a new attempt.
                for waiting in entry.waiting.drain(..) {
                    let _ = waiting.send(Err(error.clone()));
                }
                if entry.is_unused() {
                    entries.remove(&key);
                }
            }
            Ok(Connected { tunnel, driver, until }) => {
                let (pool, of) = (Rc::downgrade(&self.0), key.clone());
                tunnel.on_freed(move || {
                    if let Some(pool) = pool.upgrade() {
                        Self(pool).freed(&of);
                    }
                });
                entry.tunnels.push(Pooled { tunnel: tunnel.clone(), until });
                entry.answer();
                // Who waited for it may use it all the same.
                if self.0.closed.get() || self.0.generation.get() != generation {
                    tunnel.retire();
                }
                drop(entries);
                (self.0.changed)(1);
                let pool = self.clone();
                tokio::task::spawn_local(async move {
                    pool.tend(key, tunnel, driver, until).await;
                });
            }
        }
    }

    /// Drives a tunnel to its end, and takes it out of the pool when it is unused, too old or retired.
    async fn tend(
        &self,
        key: K,
        tunnel: Tunnel,
        mut driver: Pin<Box<dyn Future<Output = ()>>>,
        until: Option<Instant>,
    ) {
        loop {
            // A tunnel that carries something says itself when it no longer does.
            let unused = (tunnel.streams() == 0).then(|| self.unused_at(&key, &tunnel));
            let next = unused.into_iter().chain(until).min();
            if attend(&tunnel, driver.as_mut(), next).await.is_break() {
                self.remove(&key, &tunnel);
                return;
            }
            let now = Instant::now();
            let unused = tunnel.streams() == 0 && now >= self.unused_at(&key, &tunnel);
            let old = until.is_some_and(|until| now >= until);
            if unused || old || tunnel.is_retired() {
                break;
            }
        }
        tunnel.retire();
        self.remove(&key, &tunnel);
        // Without a handle it ends with its last stream.
        drop(tunnel);
        driver.await;
    }

    /// When a tunnel without streams is to be closed: soon, if there is another one for the same key.
    fn unused_at(&self, key: &K, tunnel: &Tunnel) -> Instant {
        let entries = self.0.entries.borrow();
        let others = entries.get(key).map_or(0, |entry| {
            entry.tunnels.iter().filter(|pooled| pooled.tunnel.streams() == 0 && !pooled.tunnel.is(tunnel)).count()
        });
        let unused_release = self.0.config.unused_release;
        tunnel.idle_since() + if others > 0 { unused_release.min(SURPLUS_RELEASE) } else { unused_release }
    }

    fn remove(&self, key: &K, tunnel: &Tunnel) {
        let mut entries = self.0.entries.borrow_mut();
        let Some(entry) = entries.get_mut(key) else { return };
        let before = entry.tunnels.len();
        entry.tunnels.retain(|pooled| !pooled.tunnel.is(tunnel));
        let gone = before - entry.tunnels.len();
        entry.answer();
        if entry.is_unused() {
            entries.remove(key);
        }
        drop(entries);
        if gone > 0 {
            (self.0.changed)(-(gone as i64));
        }
    }

    /// Retires the tunnels that are no longer wanted: they take no new streams, and end with their last.
    pub fn retire(&self, unwanted: impl Fn(&K, TunnelId) -> bool) {
        let mut gone = 0;
        self.0.entries.borrow_mut().retain(|key, entry| {
            let before = entry.tunnels.len();
            entry.tunnels.retain(|pooled| {
                let unwanted = unwanted(key, pooled.tunnel.id());
                if unwanted {
                    pooled.tunnel.retire();
                }
                !unwanted
            });
            if entry.tunnels.len() == before {
                return true;
            }
            gone += (before - entry.tunnels.len()) as i64;
            entry.answer();
            !entry.is_unused()
        });
        if gone > 0 {
            (self.0.changed)(-gone);
        }
    }

    /// Retires every tunnel, also those that are being made.
    pub fn retire_all(&self) {
        self.0.generation.set(self.0.generation.get() + 1);
        self.retire(|_, _| true);
    }

    /// Retires every tunnel, and all that will be made.
    pub fn close(&self) {
        self.0.closed.set(true);
        self.retire(|_, _| true);
    }

    /// How many there are now.
    pub fn stats(&self) -> PoolStats {
        let entries = self.0.entries.borrow();
        PoolStats {
            tunnels: entries.values().map(|entry| entry.tunnels.len()).sum(),
            waiting: entries.values().map(|entry| entry.waiting.len()).sum(),
        }
    }
}

impl<E> Entry<E> {
    fn is_unused(&self) -> bool {
        self.tunnels.is_empty() && self.making == 0 && self.waiting.is_empty()
    }

    /// A free stream. The tunnel that is used most comes first, so that the others become unused.
    fn take(&mut self) -> Option<Lease> {
        let now = Instant::now();
        self.tunnels.iter().find_map(|pooled| {
            if pooled.until.is_some_and(|until| now >= until) {
                return None;
            }
            let slot = pooled.tunnel.slot()?;
            Some(Lease { tunnel: pooled.tunnel.clone(), slot })
        })
    }

    /// Gives free streams to those who wait, each woken alone. Who cannot be served by the tunnels there are is told to
    /// look again.
    fn answer(&mut self) {
        let settled = |pooled: &Pooled| pooled.tunnel.is_settled().then(|| pooled.tunnel.limit());
        if let Some(limit) = self.tunnels.iter().rev().find_map(settled) {
            self.expected = limit.max(1);
        }
        while !self.waiting.is_empty() {
            let Some(lease) = self.take() else { break };
            let mut lease = Ok(Some(lease));
            // Those who have gone away leave theirs to the next.
            while let Some(waiting) = self.waiting.pop_front() {
                match waiting.send(lease) {
                    Ok(()) => break,
                    Err(back) => lease = back,
                }
            }
        }
        let under_way = self.making > 0 || self.tunnels.iter().any(|pooled| !pooled.tunnel.is_settled());
        if !under_way {
            for waiting in self.waiting.drain(..) {
                let _ = waiting.send(Ok(None));
            }
        }
    }
}

/// Drives a tunnel until it ends (break), is retired, begins to be unused, or `next` comes; while it is unused, it is looked
/// at now and then, since what becomes of it depends on the others for its key.
async fn attend(
    tunnel: &Tunnel,
    mut driver: Pin<&mut dyn Future<Output = ()>>,
    next: Option<Instant>,
) -> ControlFlow<()> {
    let unused = tunnel.streams() == 0;
    let look = Instant::now() + SURPLUS_RELEASE;
    let next = if unused { Some(next.map_or(look, |next| next.min(look))) } else { next };
    let mut sleep = pin!(async {
        match next {
            Some(next) => tokio::time::sleep_until(next).await,
            None => std::future::pending().await,
        }
    });
    poll_fn(|cx| {
        if driver.as_mut().poll(cx).is_ready() {
            return Poll::Ready(ControlFlow::Break(()));
        }
        // Retiring wakes the driver, which is this task; so does the end of the last stream.
        let no_longer_used = !unused && tunnel.streams() == 0;
        if tunnel.is_retired() || no_longer_used || sleep.as_mut().poll(cx).is_ready() {
            return Poll::Ready(ControlFlow::Continue(()));
        }
        Poll::Pending
    })
    .await
}
