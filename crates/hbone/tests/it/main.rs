//! Tests of tunnels: both ends against each other, and each against foreign and hostile peers.
//!
//! Everything runs on one thread, as in the proxy. Tests about time are paused and run over [`tokio::io::duplex`]; tests about
//! the ends of TCP connections use real sockets.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod connect;
mod crowd;
mod drain;
mod ends;
mod flood;
mod liveness;
mod pool;
mod support;
mod transfer;
