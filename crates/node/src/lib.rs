//! The node proxy as a whole: configuration, assembly, admin side, readiness, drain.
//!
//! Start at [`config::Config::load`], then [`run`]. It does not know how bytes move (`proxy`), how
//! certificates are obtained (`identity`) or what the messages of discovery look like (`xds`): it builds
//! those parts, joins them and stops them.

#![forbid(unsafe_code)]

pub mod admin;
pub mod agent;
mod assembly;
pub mod config;
mod descriptor;
pub mod discovery;
pub mod doctor;
pub mod http_server;
pub mod identities;
pub mod mesh;
pub mod metrics;
pub mod pods;
pub mod readiness;
pub mod remedies;
pub mod shutdown;
pub mod spire;
mod supervision;
pub mod tasks;
pub mod telemetry;

pub use assembly::run;

use std::time::SystemTime;

use time::OffsetDateTime;
use time::macros::format_description;

/// What the program was built from.
#[derive(Debug, Clone)]
pub struct BuildInfo {
    pub version: &'static str,
    /// Git revision, or `unknown`.
    pub revision: &'static str,
    pub rustc: &'static str,
    pub profile: &'static str,
}

impl std::fmt::Display for BuildInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { version, revision, rustc, profile } = self;
        writeln!(f, "zspire {version} ({revision}, rustc {rustc}, {profile})")
    }
}

/// `2026-11-23T22:52:21Z`.
fn rfc3339_seconds(at: SystemTime) -> String {
    OffsetDateTime::from(at)
        .format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z"))
        .unwrap_or_default()
}

/// `2026-11-23T22:52:22.094597Z`.
fn rfc3339_micros(at: SystemTime) -> String {
    OffsetDateTime::from(at)
        .format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"))
        .unwrap_or_default()
}
