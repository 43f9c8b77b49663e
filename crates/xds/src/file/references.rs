//! References that lead nowhere: found when all files have been read, and looked up in their files for the line.

use std::collections::HashSet;
use std::path::Path;

use zspire_model::{Gateway, GatewayDestination, NamespacedHostname, NamespacedName, Service, Str, Workload};

use super::builder::Built;
use super::load;
use crate::resource::{Kind, Resource};

/// Findings that are told; more are counted.
const TOLD: usize = 50;

/// Says what names something that is not there.
pub(super) fn check(built: &Built) -> Vec<String> {
    let known = Known::of(built);
    let mut found = Vec::new();
    for resource in &built.resources {
        let mut find = |reference: String, what: String| {
            found.push(Finding { kind: resource.kind(), name: resource.name(), reference, what });
        };
        match resource {
            Resource::Workload(workload) => known.of_workload(workload, &mut find),
            Resource::Service(service) => known.of_service(service, &mut find),
            Resource::Policy(_) => {}
        }
    }
    let mut told: Vec<String> = found.iter().take(TOLD).map(|finding| finding.told(built)).collect();
    if found.len() > TOLD {
        told.push(format!("and {} more", found.len() - TOLD));
    }
    told
}

/// One reference that leads nowhere.
struct Finding {
    kind: Kind,
    name: Str,
    /// As it stands in the file.
    reference: String,
    what: String,
}

struct Known<'a> {
    built: &'a Built,
    services: HashSet<NamespacedHostname>,
    policies: HashSet<NamespacedName>,
    hostnames: HashSet<&'a str>,
}

impl<'a> Known<'a> {
    fn of(built: &'a Built) -> Self {
        let mut known = Self { built, services: HashSet::new(), policies: HashSet::new(), hostnames: HashSet::new() };
        for resource in &built.resources {
            match resource {
                Resource::Workload(it) if it.hostname.is_empty() => {}
                Resource::Workload(it) => drop(known.hostnames.insert(&it.hostname)),
                Resource::Service(it) => drop(known.services.insert(it.key())),
                Resource::Policy(it) => drop(known.policies.insert(it.key())),
            }
        }
        known
    }

    fn of_workload(&self, workload: &Workload, find: &mut impl FnMut(String, String)) {
        for membership in workload.services.iter().filter(|it| !self.services.contains(&it.service)) {
            let name = membership.service.to_string();
            find(name.clone(), format!("services: there is no service {name}: define it, or take it out"));
        }
        for policy in workload.authorization_policies.iter().filter(|policy| !self.policies.contains(*policy)) {
            let why = "until it is there, every connection to the workload is denied";
            let what = format!("authorizationPolicies: there is no policy {policy}: define it, or take it out; {why}");
            find(policy.to_string(), what);
        }
        let gateways = [("waypoint", &workload.waypoint), ("networkGateway", &workload.network_gateway)];
        for (field, gateway) in gateways {
            self.gateway(field, gateway.as_deref(), find);
        }
    }

    fn of_service(&self, service: &Service, find: &mut impl FnMut(String, String)) {
        self.gateway("waypoint", service.waypoint.as_ref(), find);
        for weighted in &service.weighted_waypoints {
            self.gateway("weightedWaypoints", Some(&weighted.waypoint), find);
        }
    }

    fn gateway(&self, field: &str, gateway: Option<&Gateway>, find: &mut impl FnMut(String, String)) {
        let Some(gateway) = gateway else { return };
        let there = match &gateway.destination {
            GatewayDestination::Hostname(name) => {
                self.services.contains(name) || self.hostnames.contains(&*name.hostname)
            }
            GatewayDestination::Address(address) => self.built.has_address(address),
        };
        if !there {
            let name = gateway.destination.to_string();
            let what = format!("{field}: neither a service nor a workload is {name}: define it, or take it out");
            find(name, what);
        }
    }
}

impl Finding {
    /// With its place: an entry is read as a whole, so the line is looked for only when there is something to say.
    fn told(&self, built: &Built) -> String {
        let Some(file) = built.file_of(self.kind, &self.name) else { return self.what.clone() };
        let line = load::read(Path::new(file)).ok().and_then(|text| self.line(&text));
        match line {
            Some(line) => format!("{file}:{line}: {}", self.what),
            None => format!("{file}: {} {}: {}", self.kind.word(), self.name, self.what),
        }
    }

    /// The first line with the reference, from the line that names the entry on.
    fn line(&self, text: &str) -> Option<usize> {
        let own = match self.kind {
            Kind::Workload => &*self.name,
            Kind::Service | Kind::Policy => self.name.split_once('/').map_or(&*self.name, |(_, name)| name),
        };
        let holds = |line: &str, text: &str| {
            let end = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || "-._/".contains(c));
            line.match_indices(text).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                end(&line[at + text.len()..])
                    && !before.is_some_and(|c| c.is_ascii_alphanumeric() || "-._/".contains(c))
            })
        };
        let named = text.lines().position(|line| {
            let key = line.contains("uid") || line.contains("hostname") || line.contains("name");
            key && holds(line, own)
        })?;
        let referring = text.lines().enumerate().skip(named).find(|(_, line)| holds(line, &self.reference));
        Some(referring.map_or(named, |(number, _)| number) + 1)
    }
}
