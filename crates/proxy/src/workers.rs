//! Thread per core: each worker is a thread with a single-threaded runtime of its own.
//!
//! A connection lives on one worker from its first byte to its close, and so do its tunnels: nothing of the byte path crosses
//! threads. Work comes to a worker as a closure that starts tasks there; a worker ends when [`Workers`] is dropped
//! and its tasks with it.

use std::future::Future;
use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, RuntimeMetrics};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::patience;

type Job = Box<dyn FnOnce() + Send>;

/// The data-plane threads.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
}

/// One data-plane thread, to send work to.
#[derive(Debug)]
pub struct Worker {
    jobs: Option<mpsc::UnboundedSender<Job>>,
    metrics: RuntimeMetrics,
    thread: Option<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads, at least one.
    pub fn start(count: usize) -> io::Result<Self> {
        let workers = (0..count.max(1)).map(Worker::start).collect::<io::Result<_>>()?;
        Ok(Self { workers })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// The threads, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter()
    }

    /// Numbers of the runtimes, for metrics.
    pub fn metrics(&self) -> Vec<RuntimeMetrics> {
        self.workers.iter().map(|w| w.metrics.clone()).collect()
    }
}

impl Worker {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let metrics = runtime.metrics();
        // Unbounded: senders are the control side's few (a pod came or went), never a peer.
        let (jobs, mut incoming) = mpsc::unbounded_channel::<Job>();
        let thread = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            LocalSet::new().block_on(&runtime, async move {
                tokio::task::spawn_local(patience::keep());
                while let Some(job) = incoming.recv().await {
                    job();
                }
            });
            // Else it would be there for as long as the servers of a name that is looked up are silent.
            runtime.shutdown_background();
        })?;
        Ok(Self { jobs: Some(jobs), metrics, thread: Some(thread) })
    }

    /// Runs `start` on the worker, where it may spawn local tasks.
    pub fn run(&self, start: impl FnOnce() + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            // A worker that has ended has been stopped with all the others.
            let _ = jobs.send(Box::new(start));
        }
    }

    /// Starts the future that `make` makes on the worker.
    pub fn spawn<F: Future<Output = ()> + 'static>(&self, make: impl FnOnce() -> F + Send + 'static) {
        self.run(move || {
            tokio::task::spawn_local(make());
        });
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A worker that panicked has said so already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_run_on_their_worker_and_end_with_it() {
        let workers = Workers::start(2).unwrap();
        let (names, heard) = std::sync::mpsc::channel();
        for worker in workers.iter() {
            let names = names.clone();
            worker.spawn(move || async move {
                // Not `Send`: held across an await.
                let name = std::rc::Rc::new(std::thread::current().name().unwrap().to_owned());
                tokio::task::yield_now().await;
                names.send(name.to_string()).unwrap();
                std::future::pending::<()>().await;
            });
        }
        let mut all = [heard.recv().unwrap(), heard.recv().unwrap()];
        all.sort();
        assert_eq!(all, ["worker-0", "worker-1"]);
        drop(workers);
        drop(names);
        assert!(heard.recv().is_err(), "the tasks and what they held are gone");
    }
}
