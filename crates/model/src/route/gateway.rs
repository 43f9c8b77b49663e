//! Waypoints and network gateways: the part of a route that leads through something else first.

use std::sync::Arc;

use rand_core::RngCore;

use super::{
    Authority, Destination, Path, Reject, Router, Step, Target, Tunnel, Upstream, address, expected, own_port,
};
use crate::store::below;
use crate::{Gateway, GatewayDestination, NamespacedHostname, Service, Workload};

/// A gateway that can be connected to.
struct Found {
    workload: Arc<Workload>,
    service: Option<Arc<Service>>,
    target: Target,
}

impl<R: RngCore> Router<'_, R> {
    /// The waypoint of a service; one of several is drawn by weight.
    pub(super) fn waypoint_of(&mut self, service: &Service) -> Option<Gateway> {
        let total: u64 = service.weighted_waypoints.iter().map(|weighted| u64::from(weighted.weight)).sum();
        if total == 0 {
            return service.waypoint.clone();
        }
        let mut point = below(self.rng, total);
        for weighted in &service.weighted_waypoints {
            match point.checked_sub(u64::from(weighted.weight)) {
                Some(rest) => point = rest,
                None => return Some(weighted.waypoint.clone()),
            }
        }
        None
    }

    /// Whether the client is (an instance of) this gateway: what comes out of a waypoint must not go into it again.
    pub(super) fn is_from(&self, gateway: &Gateway) -> bool {
        let source = self.request.source;
        match &gateway.destination {
            GatewayDestination::Hostname(name) => source.membership(name).is_some(),
            GatewayDestination::Address(at) => {
                let network = &at.network;
                (*network == source.network && source.addresses.contains(&at.address))
                    || self
                        .snapshot
                        .services_at(network, at.address)
                        .iter()
                        .any(|service| source.membership(&service.key()).is_some())
            }
        }
    }

    pub(super) fn through_waypoint(&mut self, waypoint: &Gateway) -> Result<Upstream, Reject> {
        let missing = || Reject::NoWaypoint(waypoint.clone());
        let found = self.find_gateway(waypoint).ok_or_else(missing)?;
        self.why.push(Step::Waypoint(found.workload.clone()));
        let authority = self.asked_for();
        if found.workload.network != self.request.source.network
            && let Some(gateway) = found.workload.network_gateway.clone()
        {
            return self.through_network_gateway(&gateway, &found.workload);
        }
        let expected = expected(&found.workload, found.service.as_deref())?;
        Ok(Upstream {
            connect: found.target,
            path: Path::Hbone(Tunnel { authority, expected }),
            workload: Some(found.workload),
        })
    }

    /// One tunnel to the gateway of the endpoint's network, and in it another one to whatever serves the service there: the
    /// gateway chooses again, so that the inner tunnel asks for the service by name and expects any of its identities.
    pub(super) fn through_network_gateway(&mut self, gateway: &Gateway, behind: &Workload) -> Result<Upstream, Reject> {
        let service = self.service.clone().ok_or_else(|| Reject::NotAddressable(behind.uid.clone()))?;
        let inner = expected(behind, Some(&service))?;
        let missing = || Reject::NoNetworkGateway { gateway: gateway.clone(), network: behind.network.clone() };
        let found = self.find_gateway(gateway).ok_or_else(missing)?;
        self.why.push(Step::NetworkGateway { workload: found.workload.clone(), network: behind.network.clone() });
        let authority = Authority::Host(service.hostname.clone(), self.request.destination.port());
        let outer = expected(&found.workload, found.service.as_deref())?;
        Ok(Upstream {
            connect: found.target,
            path: Path::DoubleHbone {
                outer: Tunnel { authority: authority.clone(), expected: outer },
                inner: Tunnel { authority, expected: inner },
            },
            workload: Some(found.workload),
        })
    }

    /// What a waypoint is asked for: exactly what the client asked for.
    fn asked_for(&self) -> Authority {
        match self.request.destination {
            Destination::Address(address) => Authority::Address(address),
            Destination::Hostname(name, port) => Authority::Host(name.into(), port),
        }
    }

    fn find_gateway(&mut self, gateway: &Gateway) -> Option<Found> {
        match &gateway.destination {
            GatewayDestination::Hostname(name) => match self.snapshot.service(name) {
                Some(service) => self.choose_instance(service.clone(), gateway.hbone_port),
                None => self.by_hostname(name, gateway.hbone_port),
            },
            GatewayDestination::Address(at) => {
                // The lookup is by the gateway's own network: nothing says that it is the client's.
                let service = self.visible(self.snapshot.services_at(&at.network, at.address)).cloned();
                match service {
                    Some(service) => self.choose_instance(service, gateway.hbone_port),
                    None => {
                        let workload = self.snapshot.workload_at(&at.network, at.address)?.clone();
                        if self.is_excluded(&workload) {
                            return None;
                        }
                        let target = Target::Address((at.address, gateway.hbone_port).into());
                        Some(Found { workload, service: None, target })
                    }
                }
            }
        }
    }

    fn by_hostname(&self, name: &NamespacedHostname, port: u16) -> Option<Found> {
        let named = self.snapshot.workloads_named(&name.hostname);
        let is_it = |workload: &&Arc<Workload>| workload.namespace == name.namespace && !self.is_excluded(workload);
        let workload = named.iter().find(is_it)?.clone();
        let target = match workload.addresses.first() {
            Some(address) => Target::Address((*address, port).into()),
            None => Target::Resolve { hostname: workload.hostname.clone(), port },
        };
        Some(Found { workload, service: None, target })
    }

    /// An endpoint of a gateway's service. One with an application tunnel needs no such port in the service: the tunnel is taken
    /// by the node proxy in front of it, at the port that was asked for.
    fn choose_instance(&mut self, service: Arc<Service>, number: u16) -> Option<Found> {
        let key = service.key();
        let target = |workload: &Workload| {
            own_port(workload, &key, number)
                .or(service.port(number).and_then(|port| port.target))
                .or(workload.application_tunnel.map(|_| number))
        };
        let v6 = self.request.destination.is_v6();
        let excluded = self.request.excluded;
        let eligible = |workload: &Workload| {
            target(workload).is_some()
                && (address(workload, &service, v6).is_some() || !workload.hostname.is_empty())
                && !excluded.contains(&workload.uid)
        };
        let endpoints = self.snapshot.endpoints(&key)?;
        self.choices = self.choices.max(endpoints.len());
        let workload = endpoints.choose(self.request.source, self.rng, eligible)?.workload.clone();
        let port = target(&workload)?;
        let target = match address(&workload, &service, v6) {
            Some(address) => Target::Address((address, port).into()),
            None => Target::Resolve { hostname: workload.hostname.clone(), port },
        };
        Some(Found { workload, service: Some(service), target })
    }
}
