//! What the mesh is made of, as values: SPIFFE ids, workloads, services, policies, and what follows from them.
//!
//! Owns the meaning of the mesh: the [`store`] that turns discovery changes into immutable snapshots, [`route`] that says where
//! a connection goes and why, [`inbound`] that says where a tunnel may end, and [`authorize`] that says whether it may be.
//!
//! It deliberately does not know protobuf (see `xds::codec`), sockets, tasks, clocks or random sources: whatever is not a
//! function of its arguments lives elsewhere. Start with [`Workload`], [`Service`] and [`Policy`], then [`store::Snapshot`].
#![forbid(unsafe_code)]

use std::sync::Arc;

pub mod address;
pub mod authorize;
#[cfg(test)]
mod fixture;
pub mod inbound;
pub mod intern;
pub mod policy;
pub mod route;
pub mod service;
pub mod spiffe;
pub mod store;
pub mod workload;

pub use address::{Gateway, GatewayDestination, NamespacedHostname, NamespacedName, NetworkAddress, NetworkCidr};
pub use intern::Interner;
pub use policy::{Match, Policy, ServiceAccountMatch, StringMatch};
pub use service::{AppProtocol, LoadBalancer, Port, Service};
pub use spiffe::template::IdTemplate;
pub use spiffe::{IstioView, SpiffeId, TrustDomain};
pub use store::{Applied, Change, Reader, Snapshot, Store};
pub use workload::{ApplicationTunnel, Extension, Locality, Membership, Protocol, Workload};

/// Shared immutable text: names occur in many places of a mesh, their bytes once.
pub type Str = Arc<str>;

/// The port on which a node proxy takes HBONE.
pub const HBONE_PORT: u16 = 15008;
