//! Names and addresses by which the parts of a mesh refer to each other.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::Str;

/// An address in a network: two clusters may use the same address for different things.
///
/// Written `network/address`, and `/address` in the network without a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkAddress {
    /// Name of the network; empty is a network too.
    pub network: Str,
    /// Address in it.
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

/// A range of addresses in a network; the host bits are zero.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkCidr {
    /// Name of the network.
    pub network: Str,
    /// The range.
    pub net: IpNet,
}

impl fmt::Display for NetworkCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.net)
    }
}

/// The name of a service: one namespace may define a hostname that another defines too.
///
/// Written `namespace/hostname`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NamespacedHostname {
    /// Namespace that defines the service.
    pub namespace: Str,
    /// Its hostname.
    pub hostname: Str,
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// The name of a policy, written `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NamespacedName {
    /// Namespace of the policy.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Where a waypoint or a network gateway is found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Gateway {
    /// Service or address.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    pub hbone_port: u16,
}

/// What a [`Gateway`] refers to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service (or a workload's hostname).
    Hostname(NamespacedHostname),
    /// An address of a service or a workload.
    Address(NetworkAddress),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(name) => name.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl fmt::Display for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}", self.destination, self.hbone_port)
    }
}
