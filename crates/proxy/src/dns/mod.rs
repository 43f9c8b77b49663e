//! DNS for the pod (15053, UDP and TCP): names of the mesh are answered from the mesh, all others by the servers that this process
//! itself uses.
//!
//! [`answer`] decides, [`server`] talks to the pod, [`forward`] to other servers. A pod's queries are redirected here; those that
//! are forwarded carry the mark by which redirection leaves them alone. Where that fails, and a forwarded query comes back, it is
//! recognized and refused, so that no query goes in circles.
//!
//! Tasks: one loop for each socket, and one for each query that waits for another server, on the pod's worker.

mod answer;
mod forward;
pub(crate) mod metrics;
mod server;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use zspire_model::{Snapshot, Str, Workload};

pub(crate) use server::{Sockets, datagrams, serve};

/// DNS of all pods.
#[derive(Debug, Clone)]
pub struct Config {
    /// The cluster's domain, `cluster.local`.
    pub domain: String,
    /// Namespace whose service is meant when several have a hostname.
    pub preferred_namespace: Option<Str>,
    /// Who is asked for everything else.
    pub upstreams: Upstreams,
    /// The queries that all pods' proxies have sent to others: shared by what is cloned from one configuration.
    pub(crate) queries: forward::Own,
}

impl Config {
    /// Names of a cluster's domain, and other servers for the rest.
    pub fn new(domain: impl Into<String>, upstreams: Upstreams) -> Self {
        Self { domain: domain.into(), preferred_namespace: None, upstreams, queries: forward::Own::default() }
    }
}

/// What is said over UDP to whatever bytes a pod's application sends, by the mesh alone; nothing to what would be forwarded. For
/// fuzzing: the server does the same.
pub fn reply(domain: &str, snapshot: &Snapshot, client: &Workload, bytes: &[u8]) -> Option<Vec<u8>> {
    server::reply(&answer::Zone::new(domain, None)?, snapshot, client, bytes)
}

/// Servers of other names.
#[derive(Debug, Clone)]
pub enum Upstreams {
    /// Those of a `resolv.conf`.
    ResolvConf(PathBuf),
    /// These, in this order.
    These(Vec<SocketAddr>),
}

impl Default for Config {
    fn default() -> Self {
        Self::new("cluster.local", Upstreams::ResolvConf("/etc/resolv.conf".into()))
    }
}

/// Where a pod's proxy listens for queries. IPv6 is a matter of luck: not every pod has it on loopback.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Listen {
    /// Always needed.
    pub first: Option<SocketAddr>,
    /// Used if it can be.
    pub second: Option<SocketAddr>,
}

impl Listen {
    /// Nowhere.
    pub const OFF: Self = Self { first: None, second: None };

    /// On loopback: answers must come from the address that redirection has sent the query to.
    pub fn on_loopback(port: u16, ipv6: bool) -> Self {
        Self {
            first: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)),
            second: ipv6.then_some(SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port)),
        }
    }

    /// On one address.
    pub fn on(address: SocketAddr) -> Self {
        Self { first: Some(address), second: None }
    }
}
