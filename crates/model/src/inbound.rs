//! Where a tunnel that came in may end: a function of the snapshot and the request.
//!
//! A node proxy hands a tunnel only to the workload that it was opened to. What a CONNECT asks for must therefore be that
//! workload: by the address that was connected to, by the hostname of a service that it is an endpoint of, or, if the
//! workload is a waypoint, by whatever is behind that waypoint.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use crate::route::{Authority, Settings};
use crate::store::Snapshot;
use crate::{ApplicationTunnel, Gateway, GatewayDestination, NamespacedHostname, Service, Str, Workload};

/// A CONNECT that came in.
#[derive(Debug, Clone, Copy)]
pub struct InboundRequest<'a> {
    /// The local workload that was connected to.
    pub local: &'a Workload,
    /// The address of it that was connected to.
    pub local_address: IpAddr,
    /// What the CONNECT asks for.
    pub authority: &'a Authority,
    /// Where the workload is the proxy itself: the one port of it that tunnels may lead to.
    pub only: Option<u16>,
    /// The proxy's settings.
    pub settings: &'a Settings,
}

/// Where the tunnel ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Inbound {
    /// What was asked for: what policies see, and what is connected to where there is no application tunnel.
    pub destination: SocketAddr,
    /// How the application wants it instead (it is a waypoint behind a node proxy).
    pub tunnel: Option<ApplicationTunnel>,
    /// The service that was asked for by name.
    pub service: Option<Arc<Service>>,
}

/// Why a tunnel ends nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// The proxy itself was asked for.
    #[error("port {0} belongs to the proxy itself")]
    OwnPort(u16),
    /// The proxy itself was asked for, at another port than the one that it offers to the mesh.
    #[error("the proxy offers port {only} to the mesh, not {asked}")]
    NotOffered {
        /// The port asked for.
        asked: u16,
        /// The port that there is.
        only: u16,
    },
    /// An address was asked for that is not the workload's.
    #[error("{asked} was asked for at {local}, and workload {workload} is not a waypoint for it")]
    NotHere {
        /// What was asked for.
        asked: IpAddr,
        /// Where.
        local: IpAddr,
        /// The workload there.
        workload: Str,
    },
    /// No service has the hostname, or the workload is not an endpoint of it.
    #[error("workload {workload} is not an endpoint of a service {hostname}")]
    NotAnEndpoint {
        /// The hostname asked for.
        hostname: Str,
        /// The workload.
        workload: Str,
    },
    /// The service has no such port, or its endpoint does not say which of its own ports is meant.
    #[error("service {service} has no port {port} at this endpoint")]
    UnknownPort {
        /// The service.
        service: NamespacedHostname,
        /// The port asked for.
        port: u16,
    },
}

/// Decides where a tunnel ends.
pub fn resolve(snapshot: &Snapshot, request: &InboundRequest<'_>) -> Result<Inbound, Reject> {
    // The proxy takes nothing for others.
    let tunnel = request.local.application_tunnel.filter(|_| request.only.is_none());
    match request.authority {
        Authority::Address(asked) => {
            let destination = SocketAddr::new(asked.ip().to_canonical(), asked.port());
            refuse_own_ports(request, destination.port(), tunnel)?;
            check_address(snapshot, request, destination.ip())?;
            Ok(Inbound { destination, tunnel, service: None })
        }
        Authority::Host(hostname, port) => {
            let (service, port) = service_port(snapshot, request, hostname, *port)?;
            refuse_own_ports(request, port, tunnel)?;
            let destination = (request.local_address.to_canonical(), port).into();
            Ok(Inbound { destination, tunnel, service: Some(service) })
        }
        // No CONNECT can ask for it: it is what a route says before a name is resolved.
        Authority::Resolved(_) => Err(Reject::NotHere {
            asked: request.local_address,
            local: request.local_address,
            workload: request.local.uid.clone(),
        }),
    }
}

/// An application tunnel ends at the tunnel's port, whatever was asked for.
fn refuse_own_ports(request: &InboundRequest<'_>, asked: u16, tunnel: Option<ApplicationTunnel>) -> Result<(), Reject> {
    let port = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(asked);
    match request.only {
        Some(only) if only == port => Ok(()),
        Some(only) => Err(Reject::NotOffered { asked: port, only }),
        None if request.settings.own_ports.contains(&port) => Err(Reject::OwnPort(port)),
        None => Ok(()),
    }
}

fn check_address(snapshot: &Snapshot, request: &InboundRequest<'_>, asked: IpAddr) -> Result<(), Reject> {
    let InboundRequest { local, local_address, only, .. } = *request;
    if asked == local_address.to_canonical() || (only.is_none() && local.application_tunnel.is_some()) {
        return Ok(());
    }
    if only.is_some() {
        return Err(Reject::NotHere { asked, local: local_address, workload: local.uid.clone() });
    }
    let serves = |service: &Service| {
        let weighted = service.weighted_waypoints.iter().map(|weighted| &weighted.waypoint);
        service.waypoint.iter().chain(weighted).any(|waypoint| is_instance(snapshot, local, waypoint))
    };
    let mut exactly = snapshot.services_at(&local.network, asked).iter();
    // As on the way out: a workload with the address comes before a service whose range holds it.
    let behind = exactly.any(|service| serves(service))
        || match snapshot.workload_at(&local.network, asked) {
            Some(workload) => {
                workload.waypoint.as_deref().is_some_and(|waypoint| is_instance(snapshot, local, waypoint))
            }
            None => snapshot.services_around(&local.network, asked).flatten().any(|service| serves(service)),
        };
    if behind {
        return Ok(());
    }
    Err(Reject::NotHere { asked, local: local_address, workload: local.uid.clone() })
}

fn is_instance(snapshot: &Snapshot, workload: &Workload, gateway: &Gateway) -> bool {
    match &gateway.destination {
        GatewayDestination::Hostname(name) => workload.membership(name).is_some(),
        GatewayDestination::Address(at) => {
            (at.network == workload.network && workload.addresses.contains(&at.address))
                || snapshot
                    .services_at(&at.network, at.address)
                    .iter()
                    .any(|service| workload.membership(&service.key()).is_some())
        }
    }
}

fn service_port(
    snapshot: &Snapshot,
    request: &InboundRequest<'_>,
    hostname: &Str,
    port: u16,
) -> Result<(Arc<Service>, u16), Reject> {
    let mut services = snapshot.services_named(hostname).iter();
    let found = services.find_map(|service| Some((service, request.local.membership(&service.key())?)));
    let Some((service, membership)) = found else {
        return Err(Reject::NotAnEndpoint { hostname: hostname.clone(), workload: request.local.uid.clone() });
    };
    let own = membership.ports.iter().find(|own| own.number == port).and_then(|own| own.target);
    match own.or(service.port(port).and_then(|port| port.target)) {
        Some(target) => Ok((service.clone(), target)),
        None => Err(Reject::UnknownPort { service: service.key(), port }),
    }
}

/// The text is not `host:port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadAuthority;

impl fmt::Display for BadAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the authority is neither address:port nor hostname:port")
    }
}

impl std::error::Error for BadAuthority {}

/// What a CONNECT may ask for: an address without a zone, or a DNS name, always with a port other than 0.
impl FromStr for Authority {
    type Err = BadAuthority;

    fn from_str(text: &str) -> Result<Self, BadAuthority> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            // A zone means something on the machine that wrote it only.
            let scoped = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0) || text.contains('%');
            return if scoped || address.port() == 0 { Err(BadAuthority) } else { Ok(Self::Address(address)) };
        }
        let (host, port) = text.rsplit_once(':').ok_or(BadAuthority)?;
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|port| digits && *port != 0).ok_or(BadAuthority)?;
        if is_hostname(host) { Ok(Self::Host(host.into(), port)) } else { Err(BadAuthority) }
    }
}

/// A DNS name as services have them; numbers alone would be an address written in an unusual way.
fn is_hostname(host: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    host.len() <= 253 && host.split('.').all(label) && host.bytes().any(|byte| byte.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests;
