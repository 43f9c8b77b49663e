//! Kubelets of which there is nothing but port-forward (`scripts/peers/istio/kubelet`), so that `kubectl` and `istioctl` reach the
//! proxies of nodes, and istiod.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use zspire_sys::netns::Netns;
use zspire_sys::process::in_netns;

use crate::peers::program;
use crate::process::Process;

/// Where each listens, on its node's own address.
const PORT: u16 = 10250;

/// Starts the kubelet of a node; it ends with the value.
#[track_caller]
pub(super) fn start(node: &str, (netns, address): (&Netns, Ipv4Addr), folder: &Path, programs: &Path) -> Process {
    let mut kubelet = program(programs, "kubelet");
    kubelet.arg(format!("--address={address}:{PORT}"));
    Process::start(&format!("kubelet-{node}"), folder, in_netns(netns, kubelet))
}

/// What a node says of where its kubelet is.
pub(super) fn status(node: &str, address: Ipv4Addr) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node }, "status": {
        "addresses": [{ "type": "InternalIP", "address": address }],
        "daemonEndpoints": { "kubeletEndpoint": { "Port": PORT } },
    } })
}

/// `istioctl` names itself by an address that is not on the loopback device, where all of a machine's are here.
#[track_caller]
pub(super) fn show_address((netns, address): (&Netns, Ipv4Addr)) {
    let mut ip = in_netns(netns, Command::new("ip"));
    let done = ip.args(["address", "add", &format!("{address}/32"), "dev", "node-1"]).output().expect("iproute2");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}
