//! The connections of a pod on one worker, as tasks: counted, waited for, and ended together.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::rc::Rc;

use slab::Slab;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// A group of local tasks. Clones are the same group.
#[derive(Clone, Default)]
pub(crate) struct Tasks(Rc<Inner>);

#[derive(Default)]
struct Inner {
    running: RefCell<Slab<Option<AbortHandle>>>,
    ended: Notify,
}

impl Tasks {
    /// Starts a task on this worker.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let key = self.0.running.borrow_mut().insert(None);
        let entry = Entry { tasks: self.0.clone(), key };
        let handle = tokio::task::spawn_local(async move {
            let _entry = entry;
            task.await;
        });
        // It has not run yet: a local task runs when this one waits.
        if let Some(slot) = self.0.running.borrow_mut().get_mut(key) {
            *slot = Some(handle.abort_handle());
        }
    }

    /// Waits until none runs. Safe to cancel.
    pub(crate) async fn finished(&self) {
        while !self.0.running.borrow().is_empty() {
            self.0.ended.notified().await;
        }
    }

    /// Drops them all.
    pub(crate) fn abort(&self) {
        // The handles are taken out first: a task that ends takes itself out of the table.
        let handles: Vec<_> = self.0.running.borrow_mut().iter_mut().filter_map(|(_, handle)| handle.take()).collect();
        for handle in handles {
            handle.abort();
        }
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks").field("running", &self.0.running.borrow().len()).finish()
    }
}

struct Entry {
    tasks: Rc<Inner>,
    key: usize,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut running = self.tasks.running.borrow_mut();
        running.try_remove(self.key);
        if running.is_empty() {
            running.shrink_to_fit();
            self.tasks.ended.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;

    #[tokio::test]
    async fn tasks_are_waited_for_and_can_be_dropped() {
        LocalSet::new()
            .run_until(async {
                let tasks = Tasks::default();
                tasks.finished().await;
                let (release, wait) = tokio::sync::oneshot::channel::<()>();
                tasks.spawn(async move { drop(wait.await) });
                let (dropped, heard) = tokio::sync::oneshot::channel::<()>();
                tasks.spawn(async move {
                    let _dropped = dropped;
                    std::future::pending::<()>().await;
                });
                release.send(()).unwrap();
                tasks.abort();
                tasks.finished().await;
                assert!(heard.await.is_err());
            })
            .await;
    }
}
