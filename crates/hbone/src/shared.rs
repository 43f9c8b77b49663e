//! What the streams of a tunnel share with its driver.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Waker;

use tokio::time::Instant;

use crate::error::Ended;

/// Names a tunnel among all of its thread, also when it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TunnelId(u64);

impl TunnelId {
    fn new() -> Self {
        thread_local! {
            static NEXT: Cell<u64> = const { Cell::new(0) };
        }
        NEXT.with(|next| Self(next.replace(next.get() + 1)))
    }
}

/// One tunnel, seen by its streams, its handles and its driver.
pub(crate) struct Shared {
    pub(crate) id: TunnelId,
    /// Streams that are open or being opened.
    pub(crate) streams: Cell<usize>,
    /// When the last stream was closed.
    pub(crate) idle_since: Cell<Instant>,
    /// Bytes that came in and that stalled applications have not taken.
    pub(crate) held: Cell<usize>,
    /// Streams that the peer reset before they were answered.
    pub(crate) abandoned: Cell<u32>,
    /// No new streams.
    pub(crate) closing: Cell<bool>,
    /// The peer's settings are known, and with them how many streams it takes.
    pub(crate) settled: Cell<bool>,
    ended: RefCell<Option<Ended>>,
    driver: RefCell<Option<Waker>>,
    /// Called when more streams may be free than before.
    freed: RefCell<Option<Rc<dyn Fn()>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("streams", &self.streams).field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            id: TunnelId::new(),
            streams: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            held: Cell::new(0),
            abandoned: Cell::new(0),
            closing: Cell::new(false),
            settled: Cell::new(false),
            ended: RefCell::new(None),
            driver: RefCell::new(None),
            freed: RefCell::new(None),
        })
    }

    /// The tunnel ended; streams that still find out by themselves can say why.
    pub(crate) fn end(&self, why: &Ended) {
        self.closing.set(true);
        *self.ended.borrow_mut() = Some(why.clone());
    }

    /// Why the tunnel ended, if it has; else what an error of `h2` on a stream says.
    pub(crate) fn explain(&self, error: h2::Error) -> Ended {
        self.ended.borrow().clone().unwrap_or_else(|| Ended::from_h2(error, None))
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// The driver's task, to be woken when something changes that it decides about.
    pub(crate) fn driven_by(&self, waker: &Waker) {
        let mut driver = self.driver.borrow_mut();
        if !driver.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *driver = Some(waker.clone());
        }
    }

    /// Calls `f` whenever more streams may be free than before.
    pub(crate) fn on_freed(&self, f: Rc<dyn Fn()>) {
        *self.freed.borrow_mut() = Some(f);
    }

    pub(crate) fn notify_freed(&self) {
        let freed = self.freed.borrow().clone();
        if let Some(freed) = freed {
            freed();
        }
    }

    pub(crate) fn wake_driver(&self) {
        if let Some(driver) = &*self.driver.borrow() {
            driver.wake_by_ref();
        }
    }
}

/// One of the streams of a tunnel, from before it is opened until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot(pub(crate) Rc<Shared>);

impl Slot {
    pub(crate) fn new(shared: &Rc<Shared>) -> Self {
        shared.streams.set(shared.streams.get() + 1);
        Self(shared.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let left = self.0.streams.get() - 1;
        self.0.streams.set(left);
        if left == 0 {
            self.0.idle_since.set(Instant::now());
            self.0.wake_driver();
        }
        self.0.notify_freed();
    }
}

/// Bytes that a stream holds for a stalled application, while it does.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    shared: &'a Shared,
    bytes: usize,
}

impl<'a> Held<'a> {
    pub(crate) fn new(shared: &'a Shared) -> Self {
        Self { shared, bytes: 0 }
    }

    pub(crate) fn set(&mut self, bytes: usize) {
        if bytes != self.bytes {
            self.shared.held.set(self.shared.held.get() - self.bytes + bytes);
            self.bytes = bytes;
            self.shared.wake_driver();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.set(0);
    }
}
