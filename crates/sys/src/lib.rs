//! The kernel interface: sockets, network namespaces, privileges, descriptor passing, redirection rules; and the service manager's.
//!
//! Owns every `unsafe` block of the project and every call that is particular to Linux. It knows nothing of meshes,
//! identities or protocols, starts no task, and does not depend on an async runtime: its faces are descriptors and
//! `std` types, which the caller gives to the runtime it uses.
//!
//! Start reading at [`socket`] for what a data plane needs, at [`netns`] for where its sockets are made, and at
//! [`topology`] for the small networks of namespaces that tests and the demo run in.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod addresses;
#[cfg(feature = "jemalloc")]
pub mod allocator;
mod link;
pub mod netns;
pub mod nft;
pub mod packets;
pub mod pidfd;
pub mod privileges;
pub mod process;
pub mod program;
pub mod sched;
pub mod scm;
pub mod socket;
pub mod supervisor;
pub mod topology;
pub mod userns;
