//! What the service manager is told of the proxy and the node agent, where there is one.
//!
//! A sign of life of the proxy has been through every data-plane thread: one that hangs is told by the silence, and the manager
//! starts the process anew.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use zspire_proxy::workers::Workers;
use zspire_sys::supervisor::Supervisor;

use crate::readiness::Readiness;

/// Between two looks at what the proxy waits for.
const LOOK: Duration = Duration::from_millis(500);

/// Says when the proxy is ready for the first time, and what it waits for, until `stop`.
pub(crate) async fn follow(supervisor: Supervisor, readiness: Readiness, stop: CancellationToken) {
    if !supervisor.is_there() {
        return;
    }
    let (mut ready, mut told) = (false, None);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        let (waiting, _) = readiness.told();
        if waiting.is_empty() && !ready {
            ready = true;
            supervisor.ready();
        }
        let status = match &waiting[..] {
            [] => "ready".to_owned(),
            parts => parts.iter().map(|(part, why)| format!("{part}: {why}")).collect::<Vec<_>>().join("; "),
        };
        if told.as_ref() != Some(&status) {
            supervisor.status(&status);
            told = Some(status);
        }
    }
}

/// Gives signs of life until `stop`, each when `answered` has come to its end.
pub(crate) async fn live<F: Future<Output = ()>>(
    supervisor: Supervisor,
    stop: CancellationToken,
    answered: impl Fn() -> F,
) {
    let Some(pulse) = supervisor.pulse() else { return };
    let mut pulse = interval(pulse);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = async { pulse.tick().await; answered().await; } => supervisor.alive(),
        }
    }
}

/// Ends when every worker has done something.
pub(crate) async fn all_work(workers: Arc<Workers>) {
    for worker in workers.iter() {
        let (done, doing) = oneshot::channel();
        worker.run(move || {
            // Nobody waits for it after the end.
            let _ = done.send(());
        });
        // One that has ended drops what it was asked: it is stopping, and no reason for alarm.
        let _ = doing.await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_thread_that_hangs_keeps_the_sign_of_life_back() {
        let workers = Arc::new(Workers::start(2).unwrap());
        all_work(workers.clone()).await;
        let (release, hang) = mpsc::channel::<()>();
        workers.iter().last().unwrap().run(move || {
            let _ = hang.recv();
        });
        let mut asked = std::pin::pin!(all_work(workers.clone()));
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut asked).await.is_err());
        drop(release);
        asked.await;
    }
}
