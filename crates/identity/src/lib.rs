//! Identities: SVIDs and their keys, trust bundles, TLS between workloads, and where identities come from.
//!
//! This is the only crate that names rustls, X.509 or a certificate library, and the only one that holds private keys.
//! It does not know pods, policies or configuration files; `node` and `control-plane` put it together.
//!
//! Start with [`source`]: the contract that proxies use. Then [`Credentials`] and [`tls`] for what a connection does with an
//! identity, and [`per_identity`] for how certificates are obtained, renewed and retried.
#![forbid(unsafe_code)]

pub mod authority;
pub mod bundle;
pub mod clock;
pub mod credentials;
pub mod files;
pub mod grpc;
pub mod https;
pub mod istio_ca;
pub mod join;
pub mod key;
pub mod local;
pub mod pem;
pub mod per_identity;
pub mod revocation;
pub mod serving;
pub mod source;
pub mod spire;
pub mod stats;
pub mod story;
pub mod tls;
pub mod x509;

pub use bundle::{Bundle, Bundles};
pub use clock::{Clock, SystemClock};
pub use credentials::{Credentials, Invalid, Svid};
pub use key::PrivateKey;
pub use revocation::Revocation;
pub use source::{Entry, NotReady, Priority, Source, State, Watch, WorkloadKey};
pub use stats::Stats;
pub use story::Story;
pub use tls::{Evidence, ExpectedPeers, Peer};
