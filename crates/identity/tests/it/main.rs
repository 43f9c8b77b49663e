//! Integration tests of the identity crate: TLS between peers, issuance and renewal, the control channel.

#![allow(clippy::unwrap_used, reason = "a test that fails")]

mod channel;
mod issuance;
mod local;
mod revocation;
mod schedule;
mod spire;
mod support;
mod tls;
