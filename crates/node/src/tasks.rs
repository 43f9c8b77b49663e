//! The tasks of the control side: each has a name and ends when the proxy stops.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Where control tasks are started and waited for.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    /// Cancelled when the proxy stops.
    pub stop: CancellationToken,
    tracker: TaskTracker,
}

impl Tasks {
    /// Starts a task that ends by itself once [`Tasks::stop`] is cancelled. One that panics stops the proxy: going on
    /// without it would be a proxy that looks alive and is not.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        let running = tokio::spawn(task);
        self.tracker.spawn(async move {
            if let Err(error) = running.await
                && error.is_panic()
            {
                tracing::error!(task = name, "a control task panicked, stopping");
                stop.cancel();
            }
        });
    }

    /// Waits until all have ended.
    pub async fn finished(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}
