//! The crate from outside: recordings, files, and client and server against each other.

#![allow(clippy::unwrap_used, reason = "a test that fails")]

mod codec;
mod discovery;
mod fake;
mod fields;
mod file;
mod golden;
mod on_demand;
mod server;
mod support;
mod watch;
