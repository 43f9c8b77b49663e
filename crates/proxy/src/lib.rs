//! The data plane: what happens to a captured connection, and to one that arrives in a tunnel.
//!
//! One [`Proxy`] serves one pod, with listeners on every worker. A connection lives on the worker that accepted it, as a chain of
//! types of which each is made from the one before:
//!
//! ```text
//!  15001, 15080   outbound   Accepted ─▶ Routed ─▶ Tunnelled | Direct ─▶ relayed
//!  15008          inbound    Accepted ─▶ Authenticated ─▶ Authorized ─▶ Connected ─▶ relayed
//!  15006          plaintext  Accepted ─────────────────▶ Authorized ─▶ Connected ─▶ relayed
//! ```
//! It does not know where workloads, policies and certificates come from: it reads the mesh's newest snapshot, and each pod's
//! proxy holds that pod's credentials and nobody else's. Start at [`Proxy::start`].
//!
//! Tasks: on each worker one for the pod, which owns the listeners, and one for each connection; all end with the pod's.
#![forbid(unsafe_code)]

mod accept;
mod admission;
mod config;
mod connect;
pub mod dns;
pub mod flow;
mod inbound;
mod live;
pub mod metrics;
mod outbound;
mod patience;
mod plaintext;
mod pod;
mod preamble;
mod proxy;
pub mod resolve;
mod socks5;
mod spread;
mod tasks;
mod tunnels;
mod verdicts;
mod watch;
pub mod workers;

pub use config::{Config, Keepalive, Listeners, OriginalSource};
pub use pod::{Known, Local, PodSpec};
pub use proxy::{OnDemand, Proxy, Shared, StartError};
pub use resolve::Resolver;
pub use spread::Begun;

/// What applications send and are sent before their own bytes, apart from connections: for tests with arbitrary input.
pub mod preambles {
    pub use crate::outbound::Asked;
    pub use crate::preamble::proxy_v2;
    pub use crate::socks5::negotiate as socks5;
}

/// Ports of the proxy itself, which nobody may be connected to through it.
pub const ILLEGAL_PORTS: [u16; 5] = [OUTBOUND_PORT, PLAINTEXT_PORT, zspire_model::HBONE_PORT, DNS_PORT, SOCKS5_PORT];

/// Where outgoing connections of the pod are redirected to.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where incoming connections that are not HBONE are redirected to.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Where name lookups of the pod are redirected to.
pub const DNS_PORT: u16 = 15053;
/// Where applications may ask for connections themselves, on loopback.
pub const SOCKS5_PORT: u16 = 15080;
