//! The steps of a decision, as values: cheap to note on every connection, put into words only when someone asks.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::{Protocol, Service, Str, Workload};

/// The steps of a decision, in order.
pub type Why = SmallVec<[Step; 4]>;

/// One step of a decision. It prints as a sentence.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// A service was asked for.
    Service(Arc<Service>, Found),
    /// A workload was asked for.
    Workload(Arc<Workload>),
    /// The mesh does not know the destination.
    Unknown,
    /// The service leaves the address as it is.
    PassthroughService,
    /// The client is the waypoint that would have to be passed.
    FromWaypoint,
    /// A waypoint has to be passed.
    Waypoint(Arc<Workload>),
    /// The endpoint is in another network.
    NetworkGateway {
        /// The gateway.
        workload: Arc<Workload>,
        /// The network behind it.
        network: Str,
    },
    /// An endpoint was drawn.
    Endpoint {
        /// The endpoint.
        workload: Arc<Workload>,
        /// How many preferred scopes it shares with the client.
        shared: usize,
        /// How many there are.
        of: usize,
    },
    /// The endpoint is connected to directly.
    Direct(Protocol),
}

/// How a service was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// By its virtual address.
    Vip,
    /// By a range of virtual addresses.
    Range,
    /// By its hostname.
    Hostname,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(service, found) => {
                let found = match found {
                    Found::Vip => "its virtual address",
                    Found::Range => "its virtual address range",
                    Found::Hostname => "its hostname",
                };
                write!(f, "the destination is service {}/{}, by {found}", service.namespace, service.hostname)
            }
            Self::Workload(workload) => write!(f, "the destination is workload {}", workload.uid),
            Self::Unknown => f.write_str("the mesh does not know the destination: the connection passes through"),
            Self::PassthroughService => {
                f.write_str("the service chooses no endpoint: the connection goes to the address asked for")
            }
            Self::FromWaypoint => f.write_str("the client is the waypoint itself: it is not passed again"),
            Self::Waypoint(workload) => write!(f, "a waypoint has to be passed: {}", workload.uid),
            Self::NetworkGateway { workload, network } => {
                write!(f, "the endpoint is in network {network:?}, behind gateway {}", workload.uid)
            }
            Self::Endpoint { workload, of: 0, .. } => write!(f, "endpoint {} was drawn by weight", workload.uid),
            Self::Endpoint { workload, shared, of } => {
                write!(f, "endpoint {} was drawn by weight; it shares {shared} of {of} preferred scopes", workload.uid)
            }
            Self::Direct(Protocol::Hbone) => f.write_str("it takes HBONE"),
            Self::Direct(Protocol::Tcp) => f.write_str("it does not take HBONE: plain TCP"),
        }
    }
}
