//! What the tests of the whole system are written in: meshes of namespaces with real processes, and peers that misbehave.
//!
//! Owns nothing that ships. A scenario reads as prose:
//! `mesh().node("a").pod("client").node("b").pod("server").policy(deny_from("client")).start()`. Start reading at [`plan`] for
//! what can be asked for, at [`mesh`] and [`pod`] for what runs then, at [`app`] for the applications in pods. Everything ends
//! with the test: namespaces are held by descriptor, processes die with the thread that started them.
//!
//! Helpers fail by panicking where a test would only unwrap.

#![forbid(unsafe_code)]

pub mod app;
pub mod capture;
pub mod discovery;
pub mod envoy;
pub mod fake_agent;
pub mod flows;
pub mod gateway;
mod host;
pub mod http;
pub mod istio;
pub mod mesh;
pub mod nghttpx;
mod openssl;
pub mod peer;
mod peers;
pub mod plan;
pub mod pod;
pub mod policy;
pub mod process;
pub mod revocation;
pub mod scenario;
pub mod spire;
pub mod transfer;
pub mod wait;
pub mod zds;

pub use app::{Ending, Listener, ending, hear, say};
pub use discovery::Discovery;
pub use gateway::Gateway;
pub use mesh::Mesh;
pub use nghttpx::Nghttpx;
pub use openssl::Certificate;
pub use peer::Peer;
pub use peers::installed;
pub use plan::{captured, mesh, uncaptured};
pub use pod::Pod;
pub use scenario::scenario;
pub use wait::{DEADLINE, until};
