//! A few threads for signing, with a bound on what may wait: CPU work stays off the tasks that serve connections.
//!
//! The threads end when [`Pool`] is dropped; what still waits is dropped, and its callers are told that it was refused.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    limit: usize,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("nothing panics while holding it")
    }
}

/// The threads.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `threads` threads; at most `limit` jobs wait for them.
    pub(crate) fn start(threads: usize, limit: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new(), limit });
        let start = |number| {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("ca-sign-{number}")).spawn(move || work(&shared))
        };
        let threads = (0..threads.max(1)).map(start).collect::<std::io::Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Runs `job` on one of the threads. It runs also if nobody waits for it any more.
    pub(crate) async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T, Refused> {
        let (reply, answer) = oneshot::channel();
        {
            let mut queue = self.shared.queue();
            if queue.jobs.len() >= self.shared.limit {
                return Err(Refused);
            }
            queue.jobs.push_back(Box::new(move || drop(reply.send(job()))));
        }
        self.shared.wake.notify_one();
        answer.await.map_err(|_| Refused)
    }
}

fn work(shared: &Shared) {
    loop {
        let idle = |queue: &mut Queue| queue.jobs.is_empty() && !queue.closed;
        let mut queue = shared.wake.wait_while(shared.queue(), idle).expect("nothing panics while holding it");
        if queue.closed {
            return;
        }
        let Some(job) = queue.jobs.pop_front() else { continue };
        drop(queue);
        // A job that panics costs its caller an answer, not everybody a thread.
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("signing a certificate panicked");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let mut queue = self.shared.queue();
            queue.closed = true;
            queue.jobs.clear();
        }
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

/// Too much waits already, or the pool is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many certificates are being signed, try again later")]
pub(crate) struct Refused;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn runs_jobs_and_survives_one_that_panics() {
        let pool = Pool::start(1, 4).unwrap();
        assert_eq!(pool.run(|| 1).await, Ok(1));
        assert_eq!(pool.run(|| panic!("as asked")).await, Err::<(), _>(Refused));
        assert_eq!(pool.run(|| 2).await, Ok(2));
    }

    #[tokio::test]
    async fn what_is_too_much_is_refused_at_once() {
        let pool = Pool::start(1, 1).unwrap();
        let (started, begun) = oneshot::channel();
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let busy = pool.run(move || {
            started.send(()).unwrap();
            gate.recv().unwrap();
        });
        let mut busy = Box::pin(busy);
        assert!(futures_poll(&mut busy).await);
        begun.await.unwrap();
        let mut waiting = Box::pin(pool.run(|| 1));
        assert!(futures_poll(&mut waiting).await);
        assert_eq!(pool.run(|| 2).await, Err(Refused));
        release.send(()).unwrap();
        busy.await.unwrap();
        assert_eq!(waiting.await, Ok(1));
    }

    /// Polls once; whether it is pending.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await
    }
}
