//! How connections are carried: addresses and ports, limits of tunnels, keepalive, and how long they may outlive the proxy.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use zspire_proxy::dns::Listen;

use super::options::{self as opt, Values, Variable};
use super::{Error, value};

/// Ports and addresses. A port of 0 asks the kernel for one.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// Data-plane listeners; `None` binds every address.
    pub bind: Option<IpAddr>,
    pub admin: u16,
    pub stats: u16,
    pub readiness: u16,
}

/// Original source addresses: keep them?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OriginalSource {
    WhenAllowed,
    Required,
    Off,
}

/// Limits and sizes of tunnels.
#[derive(Debug, Clone, Copy)]
pub struct Http2 {
    pub stream_window: u32,
    pub connection_window: u32,
    /// See `ZSPIRE_TUNNEL_BUFFER_SIZE`.
    pub buffered_cap: u32,
    pub frame_size: u32,
    pub pool_max_streams: usize,
    pub pool_unused_release: Duration,
}

/// TCP keepalive and user timeout.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    pub enabled: bool,
    pub time: Duration,
    pub interval: Duration,
    pub retries: u32,
    pub user_timeout: bool,
}

pub(super) fn dns(v: &Values) -> Result<Listen, Error> {
    if !value::flag(v, &opt::ISTIO_META_DNS_CAPTURE, true)? {
        return Ok(Listen::OFF);
    }
    let text = v.get(&opt::ISTIO_META_DNS_PROXY_ADDR).unwrap_or("localhost:15053");
    let expected = || value::error(&opt::ISTIO_META_DNS_PROXY_ADDR, text, "expected localhost:port, or address:port");
    if let Some(port) = text.strip_prefix("localhost:") {
        let port = port.parse().map_err(|_| expected())?;
        let ipv6 = value::flag(v, &opt::IPV6_ENABLED, true)?;
        // With an address of its own a proxy shares a namespace with others, and loopback with them too.
        let bind: Option<IpAddr> = value::parsed(v, &opt::ZSPIRE_BIND_ADDRESS, "an IP address")?;
        return Ok(match bind.filter(IpAddr::is_loopback) {
            Some(own) => Listen::on(SocketAddr::new(own, port)),
            None => Listen::on_loopback(port, ipv6),
        });
    }
    text.parse().map(Listen::on).map_err(|_| expected())
}

pub(super) fn http2(v: &Values) -> Result<Http2, Error> {
    let between = |variable: &Variable, default: u32, low: u32, high: u32| {
        let set = value::parsed::<u32>(v, variable, "a number of bytes")?.unwrap_or(default);
        if (low..=high).contains(&set) {
            Ok(set)
        } else {
            Err(value::error(variable, &set.to_string(), &format!("expected {low} to {high}")))
        }
    };
    const MAX_WINDOW: u32 = (1 << 31) - 1;
    let pool_max_streams =
        value::parsed(v, &opt::POOL_MAX_STREAMS_PER_CONNECTION, "a number of at least 1")?.unwrap_or(100usize);
    if pool_max_streams == 0 {
        return Err(value::error(&opt::POOL_MAX_STREAMS_PER_CONNECTION, "0", "expected a number of at least 1"));
    }
    Ok(Http2 {
        stream_window: between(&opt::HTTP2_STREAM_WINDOW_SIZE, 4 << 20, 65_535, MAX_WINDOW)?,
        connection_window: between(&opt::HTTP2_CONNECTION_WINDOW_SIZE, 16 << 20, 65_535, MAX_WINDOW)?,
        buffered_cap: between(&opt::ZSPIRE_TUNNEL_BUFFER_SIZE, 64 << 20, 0, MAX_WINDOW)?,
        frame_size: between(&opt::HTTP2_FRAME_SIZE, 1 << 20, 16_384, (1 << 24) - 1)?,
        pool_max_streams,
        pool_unused_release: value::duration(v, &opt::POOL_UNUSED_RELEASE_TIMEOUT, Duration::from_secs(300))?,
    })
}

pub(super) fn keepalive(v: &Values) -> Result<Keepalive, Error> {
    Ok(Keepalive {
        enabled: value::flag(v, &opt::KEEPALIVE_ENABLED, true)?,
        time: value::duration(v, &opt::KEEPALIVE_TIME, Duration::from_secs(180))?,
        interval: value::duration(v, &opt::KEEPALIVE_INTERVAL, Duration::from_secs(180))?,
        retries: value::parsed(v, &opt::KEEPALIVE_RETRIES, "a number")?.unwrap_or(9),
        user_timeout: value::flag(v, &opt::USER_TIMEOUT_ENABLED, false)?,
    })
}

pub(super) fn termination_deadline(v: &Values) -> Result<Duration, Error> {
    let default = match value::parsed::<u64>(v, &opt::TERMINATION_GRACE_PERIOD_SECONDS, "a number of seconds")? {
        Some(grace) if grace > 10 => grace - 5,
        Some(grace) => grace.saturating_sub(1),
        None => 5,
    };
    value::duration(v, &opt::CONNECTION_TERMINATION_DEADLINE, Duration::from_secs(default))
}
