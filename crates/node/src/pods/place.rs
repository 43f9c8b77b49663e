//! Whether a pod's network namespace is the pod's: an identity is used only in a namespace that holds an address of its workload.
//!
//! Whoever hands over namespaces may be wrong about them, and a proxy that believed it would show one pod's identity for what
//! another one sends. What discovery says of the pod passes through here: it is held back while it does not fit, and looked at
//! again when discovery says something else or the namespace's addresses change.
//!
//! One task for each pod, which ends when nobody reads what passes through, or discovery has ended.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use zspire_model::Str;
use zspire_proxy::{Known, Local};
use zspire_sys::addresses::{self, Changes};
use zspire_sys::netns::Visit;

use crate::descriptor::watched;

/// What has been let through.
pub type Passed = watch::Receiver<Known>;

/// Lets through what discovery says of a pod, as far as it fits the namespace. The future does it until it is dropped;
/// `on_refusal` is called for each refusal that is new.
pub fn check(
    visit: Visit,
    said: watch::Receiver<Known>,
    on_refusal: impl Fn(&str) + Send + 'static,
) -> io::Result<(Passed, impl Future<Output = ()> + Send + 'static)> {
    // First: what changes after the first look is heard of.
    let changes = watched(visit.run(Changes::new)??)?;
    let (passed, receiver) = watch::channel(Known::Waiting);
    let mut gate = Gate { visit, said, passed, on_refusal };
    gate.look();
    Ok((receiver, async move { gate.follow(changes).await }))
}

struct Gate<F> {
    visit: Visit,
    said: watch::Receiver<Known>,
    passed: watch::Sender<Known>,
    on_refusal: F,
}

impl<F: Fn(&str)> Gate<F> {
    async fn follow(&mut self, changes: AsyncFd<Changes>) {
        loop {
            tokio::select! {
                changed = self.said.changed() => if changed.is_err() { return },
                () = self.passed.closed() => return,
                ready = changes.readable() => match ready {
                    Ok(mut ready) => if ready.try_io(|changes| changes.get_ref().take()).is_err() { continue },
                    Err(_) => return,
                },
            }
            self.look();
        }
    }

    fn look(&mut self) {
        let said = self.said.borrow_and_update().clone();
        let now = match said {
            Known::Here(local) => self.judge(local),
            other => other,
        };
        let refusal = match &now {
            Known::Refused(why) => Some(why.clone()),
            _ => None,
        };
        let changed = self.passed.send_if_modified(|before| {
            let same = same(before, &now);
            *before = now;
            !same
        });
        if let Some(why) = refusal.filter(|_| changed) {
            (self.on_refusal)(&why);
        }
    }

    fn judge(&self, local: Arc<Local>) -> Known {
        match self.visit.run(addresses::all).and_then(|held| held) {
            Ok(held) => match mismatch(&local.workload.addresses, &held) {
                None => Known::Here(local),
                Some(why) => Known::Refused(why),
            },
            Err(error) => Known::Refused(format!("cannot read the addresses of its network namespace: {error}").into()),
        }
    }
}

/// Why a namespace with these addresses is not the workload's.
fn mismatch(workload: &[IpAddr], held: &[IpAddr]) -> Option<Str> {
    if workload.iter().any(|address| held.contains(&address.to_canonical())) {
        return None;
    }
    if workload.is_empty() {
        return Some("discovery gives the workload no address that its network namespace could be known by".into());
    }
    let list = |all: &[IpAddr]| all.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
    let own: Vec<IpAddr> = held.iter().copied().filter(|ip| !ip.is_loopback()).collect();
    let (expected, own) = (list(workload), if own.is_empty() { "none".to_owned() } else { list(&own) });
    Some(
        format!("its network namespace holds no address of the workload (expected one of {expected}; it has {own})")
            .into(),
    )
}

fn same(a: &Known, b: &Known) -> bool {
    match (a, b) {
        (Known::Waiting, Known::Waiting) => true,
        (Known::Here(a), Known::Here(b)) => Arc::ptr_eq(a, b),
        (Known::Refused(a), Known::Refused(b)) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> Vec<IpAddr> {
        text.split_whitespace().map(|ip| ip.parse().unwrap()).collect()
    }

    #[test]
    fn one_address_is_enough_and_none_is_not() {
        let why = |workload: &str, held: &str| mismatch(&ips(workload), &ips(held)).map(|why| why.to_string());
        assert_eq!(why("10.0.0.1", "127.0.0.1 10.0.0.1"), None);
        assert_eq!(why("10.0.0.1 fd00::1", "::1 fd00::1"), None);
        assert_eq!(why("::ffff:10.0.0.1", "10.0.0.1"), None);
        assert_eq!(
            why("10.0.0.1", "127.0.0.1 10.0.0.2").unwrap(),
            "its network namespace holds no address of the workload (expected one of 10.0.0.1; it has 10.0.0.2)"
        );
        assert!(why("10.0.0.1", "127.0.0.1").unwrap().contains("it has none"));
        assert!(why("", "10.0.0.1").unwrap().contains("no address"));
    }
}
