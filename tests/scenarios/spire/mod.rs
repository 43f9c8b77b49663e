//! Identities from a real SPIRE: servers and agents of the version in `scripts/peers/spire/go.mod`, run by `make test-spire`.
//!
//! Each test runs once for each [`Way`] that it is about, and is called after it. They need root: agents tell workloads apart by
//! user. What SPIRE cannot be made to do is tested in `zspire-identity`, against a fake agent.

mod entries;
mod operating;
mod own;
mod refusals;
mod serving;
mod trust;

use serde_json::Value;
use zspire_testkit::{Pod, until};

/// Tests that run once for each of some ways of asking about the pods of a node, and are called after it.
macro_rules! by {
    (each way: $($test:ident),+ $(,)?) => { $($crate::spire::by!(
        $test: broker_by_process = BrokerByProcess, broker_by_pod = BrokerByPod, delegated_by_process = DelegatedByProcess
    );)+ };
    (process: $($test:ident),+ $(,)?) => { $($crate::spire::by!(
        $test: broker_by_process = BrokerByProcess, delegated_by_process = DelegatedByProcess
    );)+ };
    ($test:ident: $($name:ident = $way:ident),+) => {
        mod $test {
            $(#[test]
            fn $name() {
                crate::scenario(|| super::$test(zspire_testkit::spire::Way::$way));
            })+
        }
    };
}
use by;

/// What the pod's proxy shows of its certificate.
fn certificate(pod: &Pod) -> Value {
    let dump = pod.dump();
    let mut all = dump["certificates"].as_array().into_iter().flatten();
    let own = all.find(|entry| entry["workload"] == pod.uid() || entry["identity"] == pod.spiffe_id());
    own.cloned().unwrap_or_default()
}

/// Waits until the state of a pod's certificate says this.
#[track_caller]
fn wait_for_state(pod: &Pod, expected: &str) -> Value {
    until(&format!("the certificate of {} to be {expected}", pod.name()), || match certificate(pod) {
        certificate if certificate["state"].as_str().is_some_and(|state| state.contains(expected)) => Ok(certificate),
        certificate => Err(certificate["state"].clone()),
    })
}

/// The serial number of the pod's certificate.
fn serial(pod: &Pod) -> Value {
    certificate(pod)["certChain"][0]["serialNumber"].clone()
}

/// Waits until the pod has another certificate than the one with this serial number.
#[track_caller]
fn wait_for_another(pod: &Pod, before: &Value) -> Value {
    until(&format!("{} to have another certificate", pod.name()), || match serial(pod) {
        now if now != *before && !now.is_null() => Ok(now),
        now => Err(now),
    })
}
