//! HBONE: TCP connections as CONNECT streams of an HTTP/2 connection, the tunnel.
//!
//! This crate owns the tunnel: the request and its headers, opening and answering streams, limits on what a peer can do, the pool of
//! tunnels of a worker, and the byte path between a stream and an application's socket. It does not know TLS, identities,
//! workloads or policies: it runs over any byte stream, and who may do what is decided by whoever answers an [`Incoming`].
//!
//! Everything here lives on one thread (a tokio `LocalRuntime` or `LocalSet`): nothing is `Send`, and nothing needs to be.
//! Tasks: a [`Driver`] per client tunnel, spawned by its creator or by the [`Pool`]; [`serve`] owns the tasks of its streams.
//! An idle stream has no task, timer or buffer of its own here.
//!
//! Start with [`Tunnel`] and [`serve`], then [`Stream::relay`]. Underneath is [`core`], HTTP/2 as far as CONNECT needs it, without
//! any I/O; `driver` moves its bytes.
#![forbid(unsafe_code)]

mod config;
mod copy;
pub mod core;
mod driver;
mod error;
pub mod headers;
mod keepalive;
mod lend;
mod link;
mod meter;
mod pipe;
mod pool;
mod reason;
mod relay;
mod request;
mod server;
mod stream;
mod tunnel;
mod unread;

pub use config::Config;
pub use copy::copy;
pub use error::{Ended, Flood, OpenError, Violation};
pub use http::StatusCode;
pub use link::TunnelId;
pub use meter::{Counters, End};
pub use pool::{Connected, Lease, Pool, PoolConfig, PoolStats};
pub use reason::Reason;
pub use request::{Malformed, Request, RequestHead, ResponseHead, Target};
pub use server::{Handler, Incoming, serve};
pub use stream::{Stream, StreamIo};
pub use tunnel::{Driver, Tunnel};
