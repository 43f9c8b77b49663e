//! `zspire control-plane`: a certificate authority and workload discovery for machines without Kubernetes.
//!
//! One TLS port speaks what istiod speaks: `IstioCertificateService` and delta discovery. What the mesh is comes from
//! a folder of files, who may ask from client certificates, JWTs and single-use join tokens. It does not know pods, the
//! data plane or the node proxy: they meet on the wire.
//!
//! Start with [`ControlPlane`]. Threads: tokio's, [`ca`]'s signers, and one writer of the database in [`state`].
//! Tasks: one for each file or folder that is followed, one for the serving certificate, one for each listener.
//! All of them end with [`ControlPlane::run`].
#![forbid(unsafe_code)]

mod auth;
mod ca;
pub mod config;
mod discovery;
mod listener;
mod mesh;
mod metrics;
mod monitoring;
mod placement;
mod run;
mod serving;
mod shortage;
mod state;
mod time_text;

pub use auth::KeysError;
pub use config::Config;
pub use mesh::{Error as MeshError, Summary, Validated, validate};
pub use run::{ControlPlane, Error, run};
pub use state::{IssuedRecord, create_token, issued};
