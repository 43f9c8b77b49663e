//! The whole system: real proxies, a real control plane and real applications in network namespaces.
//!
//! Each test makes a network of its own, so that all can run at the same time. They need root or user namespaces, and fail
//! without. `zspire_testkit` is what they are written in; a failed test shows the logs of all its processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod closing;
mod control;
mod cutting;
mod drain;
mod enroll;
mod foreign;
mod handover;
mod istio;
mod limits;
mod names;
mod paths;
mod peers;
mod policy;
mod ports;
mod retrying;
mod settings;
mod socks5;
mod spire;
mod starting;
mod supervised;
mod surviving;
mod systemd;
mod telling;
mod traffic;
mod waypoints;
mod wire;
mod zds;

/// The same once more with one proxy on each node, at whose agent the pods are enrolled: what a test is called says it.
#[path = "."]
#[allow(clippy::duplicate_mod, reason = "a scenario is about what a connection comes to, not about who serves it")]
mod shared {
    #[path = "closing.rs"]
    mod closing;
    #[path = "control.rs"]
    mod control;
    #[path = "cutting.rs"]
    mod cutting;
    #[path = "drain.rs"]
    mod drain;
    #[path = "names.rs"]
    mod names;
    #[path = "paths.rs"]
    mod paths;
    #[path = "peers.rs"]
    mod peers;
    #[path = "policy.rs"]
    mod policy;
    #[path = "ports.rs"]
    mod ports;
    #[path = "retrying.rs"]
    mod retrying;
    #[path = "settings.rs"]
    mod settings;
    #[path = "socks5.rs"]
    mod socks5;
    #[path = "surviving.rs"]
    mod surviving;
    #[path = "telling.rs"]
    mod telling;
    #[path = "waypoints.rs"]
    mod waypoints;
    #[path = "wire.rs"]
    mod wire;
}

use std::path::Path;

/// Runs a test's body as root.
#[track_caller]
fn scenario(body: impl FnOnce()) {
    zspire_testkit::scenario(Path::new(env!("CARGO_BIN_EXE_zspire-enter")), body);
}

/// How much more than usual is asked for: see `make soak`.
fn soak(name: &str, usual: usize) -> usize {
    std::env::var(name).ok().and_then(|asked| asked.parse().ok()).unwrap_or(usual)
}
