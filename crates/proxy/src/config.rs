//! Settings of the data plane, the same for all pods of the process.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use zspire_model::HBONE_PORT;
use zspire_model::route::Settings;

use crate::{OUTBOUND_PORT, PLAINTEXT_PORT, SOCKS5_PORT};

/// Settings of the data plane.
#[derive(Debug, Clone)]
pub struct Config {
    /// What routing depends on besides the mesh.
    pub routing: Settings,
    /// Limits and sizes of tunnels.
    pub tunnel: zspire_hbone::Config,
    /// A pooled tunnel without streams is closed after this time.
    pub unused_release: Duration,
    /// `SO_MARK` of every socket of the proxy, by which redirection knows them.
    pub packet_mark: Option<u32>,
    /// Whether connections carry on with the address that they came from.
    pub original_source: OriginalSource,
    /// TCP keepalive of every connection.
    pub keepalive: Option<Keepalive>,
    /// Whether an application that takes a tunnel's connections itself is reached on loopback (`LOCALHOST_APP_TUNNEL`).
    pub localhost_app_tunnel: bool,
    /// Whether answers to CONNECT describe the workload (`ENABLE_RESPONSE_BAGGAGE`).
    pub response_baggage: bool,
    /// Whether decisions of policies are logged at level info instead of debug (`AUTHZ_POLICY_INFO_LOGGING`).
    pub policy_info_logging: bool,
    /// How names are resolved for pods whose queries are redirected.
    pub dns: crate::dns::Config,
    /// For connecting, for a TLS handshake, and for an answer over SOCKS.
    pub handshake_timeout: Duration,
    /// How long a connection waits for discovery to have told everything and to know the pod it belongs to.
    pub workload_timeout: Duration,
    /// TLS handshakes under way at once, on each worker for each pod.
    pub handshakes: usize,
    /// Those of one source address among them, so that one that stalls leaves room for the others.
    pub handshakes_per_source: usize,
    /// Tunnels that came in, on each worker for each pod.
    pub tunnels: usize,
    /// Those of one source address among them.
    pub tunnels_per_source: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            routing: Settings::default(),
            tunnel: zspire_hbone::Config::default(),
            unused_release: Duration::from_secs(300),
            packet_mark: None,
            original_source: OriginalSource::WhenAllowed,
            keepalive: None,
            localhost_app_tunnel: true,
            response_baggage: true,
            policy_info_logging: false,
            dns: crate::dns::Config::default(),
            handshake_timeout: Duration::from_secs(10),
            workload_timeout: Duration::from_secs(5),
            handshakes: 1024,
            handshakes_per_source: 256,
            tunnels: 16_384,
            tunnels_per_source: 1024,
        }
    }
}

/// Whether connections carry on with the address that they came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OriginalSource {
    /// Where the kernel lets us.
    WhenAllowed,
    /// A connection for which it cannot be kept is refused.
    Required,
    /// They carry the pod's own.
    Off,
}

/// TCP keepalive.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub time: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Probes without an answer after which the connection is dead.
    pub retries: u32,
    /// Whether unacknowledged data counts as silence too (`TCP_USER_TIMEOUT`).
    pub user_timeout: bool,
}

/// Where a pod's proxy listens. Port 0 asks the kernel for one.
#[derive(Debug, Clone, Copy)]
pub struct Listeners {
    /// Outgoing connections, redirected.
    pub outbound: Option<SocketAddr>,
    /// Tunnels.
    pub inbound: SocketAddr,
    /// Incoming connections that are no tunnels, redirected.
    pub plaintext: Option<SocketAddr>,
    /// Applications that ask by SOCKS5; never anything but a loopback address.
    pub socks5: Option<SocketAddr>,
    /// DNS queries, redirected.
    pub dns: crate::dns::Listen,
}

impl Listeners {
    /// The well-known ports, on one address or on all.
    pub fn well_known(bind: Option<IpAddr>, ipv6: bool, socks5: bool) -> Self {
        let ip = bind.unwrap_or(any(ipv6));
        // With an address of its own a proxy shares a namespace with others, and loopback with them too.
        let loopback = bind.filter(IpAddr::is_loopback).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        Self {
            outbound: Some(SocketAddr::new(ip, OUTBOUND_PORT)),
            inbound: SocketAddr::new(ip, HBONE_PORT),
            plaintext: Some(SocketAddr::new(ip, PLAINTEXT_PORT)),
            socks5: socks5.then_some(SocketAddr::new(loopback, SOCKS5_PORT)),
            dns: crate::dns::Listen::OFF,
        }
    }

    /// The port for tunnels alone, on one address or on all.
    pub fn tunnels(bind: Option<IpAddr>, ipv6: bool) -> Self {
        let inbound = SocketAddr::new(bind.unwrap_or(any(ipv6)), HBONE_PORT);
        Self { outbound: None, inbound, plaintext: None, socks5: None, dns: crate::dns::Listen::OFF }
    }
}

fn any(ipv6: bool) -> IpAddr {
    if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) }
}
