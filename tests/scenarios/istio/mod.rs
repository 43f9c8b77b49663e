//! Under a real istiod and a real Kubernetes API server, of the versions in `scripts/peers/istio/go.mod`, run by `make test-istio`.
//!
//! The test is kubelet and scheduler: it says which pods there are and that they run.

mod certificates;
mod chart;
mod cni;
mod dashboards;
mod discovery;
mod flows;
mod istioctl;
mod outages;
mod policy;
mod traffic;
mod waypoints;
mod ways;

use std::net::SocketAddr;

use serde_json::Value;
use zspire_testkit::app::Greeting;
use zspire_testkit::{Pod, until};

/// What the proxy of a pod's node shows of a certificate.
fn certificate_of(pod: &Pod, identity: &str) -> Option<Value> {
    let dump = pod.dump();
    let mut all = dump["certificates"].as_array().into_iter().flatten();
    all.find(|entry| entry["identity"] == identity).cloned()
}

/// Waits until the proxy of a pod's node says this of the state of a certificate.
#[track_caller]
fn wait_for_state(pod: &Pod, identity: &str, expected: &str) -> Value {
    until(&format!("the certificate of {identity} to be {expected}"), || match certificate_of(pod, identity) {
        Some(entry) if entry["state"].as_str().is_some_and(|state| state.contains(expected)) => Ok(entry),
        Some(entry) => Err(entry["state"].to_string()),
        None => Err("there is none".to_owned()),
    })
}

/// Waits until a pod reaches something: istiod and the proxies need a moment to hear of a change.
#[track_caller]
fn comes_to_reach(pod: &Pod, to: SocketAddr) -> Greeting {
    until(&format!("{} to reach {to}", pod.name()), || pod.ask(to))
}

/// Waits until a pod is refused something, by a connection that ends rather than hangs.
#[track_caller]
fn comes_to_be_refused(pod: &Pod, to: SocketAddr) {
    until(&format!("{} to be refused {to}", pod.name()), || match pod.ask(to) {
        Ok(greeting) => Err(format!("{greeting:?}")),
        Err(_) => Ok(()),
    });
    pod.is_refused(to);
}

/// What the proxy of a pod knows of something, by a field that names it.
fn known(pod: &Pod, list: &str, field: &str, value: &str) -> Option<Value> {
    let dump = pod.dump();
    let mut all = dump[list].as_array().into_iter().flatten();
    all.find(|it| it[field] == value).cloned()
}

/// Waits until the proxy of a pod knows something of which this is true.
#[track_caller]
fn comes_to_know(pod: &Pod, list: &str, (field, value): (&str, &str), is_it: impl Fn(&Value) -> bool) -> Value {
    until(&format!("{value} in {list}"), || match known(pod, list, field, value) {
        Some(it) if is_it(&it) => Ok(it),
        other => Err(format!("{other:?}")),
    })
}
