//! What keeps this proxy from its work, found by trying: the checks of `zspire doctor`.
//!
//! Works from the settings of the proxy and needs none to run. It asks what the proxy would ask (sockets, the Workload API, the
//! Broker or Delegated Identity API, the servers), changes nothing, and says of each thing found wanting what to do. A check
//! that cannot be made because an earlier one failed is said to be skipped, never passed.

mod servers;
mod spire;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::config::{Config, IdentitySource, LocalXds};
use crate::remedies::Step;

/// Longest time for one question.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    pub outcome: Outcome,
    pub what: String,
    /// What to do, in order.
    pub next: Vec<Step>,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Ok,
    /// It works, but not as it should.
    Warn,
    Fail,
    /// It was not looked at.
    Skip,
}

impl Finding {
    pub fn new(check: &'static str, outcome: Outcome, what: impl Into<String>) -> Self {
        Self { check, outcome, what: what.into(), next: Vec::new() }
    }

    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Outcome::Ok, what)
    }

    fn warn(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Outcome::Warn, what)
    }

    fn fail(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Outcome::Fail, what)
    }

    fn skip(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Outcome::Skip, what)
    }

    /// One more thing to do.
    #[must_use]
    pub fn next(self, what: impl Into<String>) -> Self {
        self.step(Step::new(what))
    }

    /// One more thing to do.
    #[must_use]
    fn step(mut self, step: Step) -> Self {
        self.next.push(step);
        self
    }
}

/// Makes every check that these settings call for.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let settings = format!("IDENTITY_SOURCE={}, TRUST_DOMAIN={}", config.identity.name(), config.trust_domain);
    let mut all = vec![Finding::ok("settings", settings)];
    all.extend(config.warnings.iter().map(|warning| Finding::warn("settings", warning.clone())));
    match config.identity {
        IdentitySource::SpireBroker | IdentitySource::SpireDelegated | IdentitySource::WorkloadApi => {
            all.extend(spire::examine(config).await);
        }
        IdentitySource::IstioCa => all.extend(servers::ca(config).await),
        IdentitySource::Local => {
            let what = "a development CA in this process: whoever can read its key can be anyone";
            all.push(Finding::warn("certificates", what));
        }
    }
    match &config.local_xds {
        Some(source) => all.extend(mesh_file(config, source)),
        None => all.extend(servers::discovery(config).await),
    }
    all
}

fn mesh_file(config: &Config, source: &LocalXds) -> Vec<Finding> {
    const CHECK: &str = "mesh file";
    let (name, text) = match source {
        LocalXds::Text(text) => ("LOCAL_XDS".to_owned(), Ok(text.clone())),
        LocalXds::Path(path) => (path.display().to_string(), std::fs::read_to_string(path)),
    };
    let text = match text {
        Ok(text) => text,
        Err(error) => {
            return vec![Finding::fail(CHECK, format!("cannot read {name}: {error}")).next("See LOCAL_XDS_PATH.")];
        }
    };
    let Ok(domain) = config.trust_domain.parse() else { return Vec::new() };
    match zspire_xds::file::parse_in(&text, &name, &domain) {
        Ok(resources) => {
            let changes = resources.iter().map(zspire_xds::Resource::put);
            let workloads = changes.filter_map(|change| match change {
                zspire_model::Change::PutWorkload(workload) => Some(workload),
                _ => None,
            });
            let mut domains: BTreeMap<String, usize> = BTreeMap::new();
            for workload in workloads {
                *domains.entry(workload.trust_domain.to_string()).or_default() += 1;
            }
            let count: usize = domains.values().sum();
            vec![
                Finding::ok(CHECK, format!("{name}, workloads: {count}")),
                trust_domains_of(&domains, &config.trust_domain),
            ]
        }
        Err(error) => {
            let what = "The proxy keeps the last good mesh; a proxy that starts now has none. `zspire validate` names the line.";
            vec![Finding::fail(CHECK, error.to_string()).next(what)]
        }
    }
}

/// The check of [`trust_domains_of`].
pub const MESH: &str = "trust domain of the mesh";

/// Whether the mesh is of the trust domain that this proxy believes to be in; `domains` are those of its workloads, counted.
pub fn trust_domains_of(domains: &BTreeMap<String, usize>, ours: &str) -> Finding {
    let list: Vec<String> = domains.iter().map(|(domain, count)| format!("{domain} ({count})")).collect();
    match domains.get(ours) {
        _ if domains.is_empty() => Finding::skip(MESH, "discovery names no workload"),
        None => Finding::fail(MESH, format!("no workload is of {ours}: discovery says {}", list.join(", "))).next(
            "Set TRUST_DOMAIN to the mesh's trust domain (Istio: meshConfig.trustDomain), or the mesh's to SPIRE's.",
        ),
        Some(_) if domains.len() == 1 => Finding::ok(MESH, format!("every workload is of {ours}")),
        Some(_) => Finding::ok(MESH, list.join(", ") + ": others than our own have to be federated"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_of_another_trust_domain_is_found() {
        let of = |domains: &[(&str, usize)]| {
            let domains = domains.iter().map(|(domain, count)| ((*domain).to_owned(), *count)).collect();
            let finding = trust_domains_of(&domains, "example.org");
            (finding.outcome, finding.what)
        };
        assert_eq!(of(&[("example.org", 2)]).0, Outcome::Ok);
        assert_eq!(of(&[("example.org", 2), ("other", 1)]).0, Outcome::Ok);
        assert_eq!(of(&[]).0, Outcome::Skip);
        let (outcome, what) = of(&[("cluster.local", 3)]);
        assert_eq!(outcome, Outcome::Fail);
        assert_eq!(what, "no workload is of example.org: discovery says cluster.local (3)");
    }
}
