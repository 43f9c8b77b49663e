//! Whether a connection may reach a workload: a function of the snapshot and the connection.
//!
//! Deny policies come first; then, if any allow policy applies to the workload, one of them must match. What cannot be evaluated
//! denies: a policy with parts that are unknown here, and a policy that the workload names and that is not known. Policies in dry
//! run are evaluated the same way and only reported.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::policy::{Action, Group, Match, Policy, Rule, StringMatch};
use crate::store::{Applying, Snapshot};
use crate::{IstioView, NamespacedName, SpiffeId, Workload};

/// A connection as policies see it.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The workload that is asked for.
    pub destination: &'a Workload,
    /// The address and port that are asked for.
    pub destination_address: SocketAddr,
    /// The identity that the peer proved; none if it came as plain TCP.
    pub peer: Option<&'a SpiffeId>,
    /// The peer's address.
    pub peer_address: IpAddr,
}

/// What the policies say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What is enforced.
    pub decision: Decision,
    /// The policies in dry run that match, with what they would have meant.
    pub dry_run: Vec<(NamespacedName, Action)>,
    /// How many policies were asked.
    pub asked: usize,
}

/// What is enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The connection is allowed: by a policy, or because no allow policy applies.
    Allowed {
        /// The policy.
        by: Option<NamespacedName>,
    },
    /// It is denied.
    Denied(Denied),
}

/// Why a connection is denied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A deny policy matches.
    #[error("explicitly denied by: {0}")]
    By(NamespacedName),
    /// Allow policies apply, and none matches.
    #[error("allow policies exist, but none allowed: {}", names(.0))]
    NotAllowed(Vec<NamespacedName>),
    /// A policy applies that cannot be evaluated.
    #[error("policy {policy} cannot be evaluated: {why}")]
    Unsupported {
        /// The policy.
        policy: NamespacedName,
        /// What is not understood.
        why: String,
    },
    /// The workload names a policy that is not known.
    #[error("policy {0} applies to the workload and is not known")]
    Missing(NamespacedName),
}

/// The first few, which is what a line has room for.
fn names(policies: &[NamespacedName]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = policies.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = policies.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

impl Verdict {
    /// Whether the connection is allowed.
    pub fn is_allowed(&self) -> bool {
        matches!(self.decision, Decision::Allowed { .. })
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed { by: Some(policy) } => write!(f, "allowed by: {policy}"),
            Self::Allowed { by: None } => f.write_str("allowed: no allow policy applies"),
            Self::Denied(denied) => denied.fmt(f),
        }
    }
}

/// Asks the policies of a snapshot about a connection.
pub fn authorize(snapshot: &Snapshot, connection: &Connection<'_>) -> Verdict {
    judge(|| snapshot.policies_for(connection.destination), connection)
}

fn judge<'a, I: Iterator<Item = Applying<'a>>>(policies: impl Fn() -> I, connection: &Connection<'_>) -> Verdict {
    let view = View::of(connection);
    let mut dry_run = Vec::new();
    let mut denied = None;
    let mut must_be_allowed = false;
    let mut allowed = None;
    let mut asked = 0;
    for applying in policies() {
        asked += 1;
        let policy = match applying {
            Applying::Known(policy) => policy,
            Applying::Missing(name) => {
                denied.get_or_insert_with(|| Denied::Missing(name.clone()));
                continue;
            }
        };
        let unsupported = unsupported(policy);
        let matches = unsupported.is_some() || policy.groups.iter().any(|group| view.group(group));
        if policy.dry_run {
            if matches {
                let meant = if unsupported.is_some() { Action::Deny } else { policy.action };
                dry_run.push((policy.key(), meant));
            }
            continue;
        }
        match (unsupported, policy.action) {
            (Some(why), _) => {
                denied.get_or_insert_with(|| Denied::Unsupported { policy: policy.key(), why });
            }
            // A policy that says no is the better answer, wherever it stands.
            (None, Action::Deny) if matches && !matches!(denied, Some(Denied::By(_))) => {
                denied = Some(Denied::By(policy.key()));
            }
            (None, Action::Deny) => {}
            (None, Action::Allow) => {
                if matches && allowed.is_none() {
                    allowed = Some(policy.key());
                }
                must_be_allowed = true;
            }
        }
    }
    let decision = match (denied, allowed) {
        (Some(denied), _) => Decision::Denied(denied),
        (None, None) if must_be_allowed => {
            Decision::Denied(Denied::NotAllowed(policies().filter_map(allowing).collect()))
        }
        (None, by) => Decision::Allowed { by },
    };
    Verdict { decision, dry_run, asked }
}

/// Its name, if it is an allow policy that is enforced.
fn allowing(applying: Applying<'_>) -> Option<NamespacedName> {
    match applying {
        Applying::Known(policy) => (policy.action == Action::Allow && !policy.dry_run).then(|| policy.key()),
        Applying::Missing(_) => None,
    }
}

/// The policies that apply to a workload, as one snapshot has them: what live connections were last asked by.
#[derive(Debug, Clone, Default)]
pub struct PolicySet {
    version: u64,
    known: Vec<Arc<Policy>>,
    missing: Vec<NamespacedName>,
}

/// What is different between two [`PolicySet`]s.
#[derive(Debug, Default)]
pub struct Difference {
    /// Policies that apply now and did not, or not in this form.
    new: Vec<Arc<Policy>>,
    /// Policies that applied and do not, or not in that form.
    old: HashSet<NamespacedName>,
    missing: Option<NamespacedName>,
}

/// What a [`Difference`] means for a connection that was allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recheck {
    /// It is still allowed, by what allowed it before.
    Same,
    /// It is now allowed by another policy, or denied.
    Decided(Decision),
    /// The policy that allowed it is no more: all of them have to be asked.
    AskAll,
}

impl PolicySet {
    /// The policies that apply to a workload. Costs in proportion to them.
    pub fn of(snapshot: &Snapshot, workload: &Workload) -> Self {
        let mut set = Self { version: snapshot.version(), ..Self::default() };
        for applying in snapshot.policies_for(workload) {
            match applying {
                Applying::Known(policy) => set.known.push(policy.clone()),
                Applying::Missing(name) => set.missing.push(name.clone()),
            }
        }
        set
    }

    /// Version of the snapshot.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether it has names of policies that are not known and were not in another one.
    pub fn misses_more_than(&self, other: &Self) -> bool {
        self.missing.iter().any(|name| !other.missing.contains(name))
    }

    /// What is different in a newer set. Policies are compared by where they are in memory, which snapshots share.
    pub fn until(&self, newer: &Self) -> Difference {
        let here = |set: &Self| set.known.iter().map(Arc::as_ptr).collect::<HashSet<_>>();
        let (before, after) = (here(self), here(newer));
        let new = newer.known.iter().filter(|policy| !before.contains(&Arc::as_ptr(policy))).cloned().collect();
        let old = self.known.iter().filter(|policy| !after.contains(&Arc::as_ptr(policy)));
        let old = old.map(|policy| policy.key()).collect();
        Difference { new, old, missing: newer.missing.first().cloned() }
    }

    /// Asks all of them.
    pub fn authorize(&self, connection: &Connection<'_>) -> Verdict {
        let known = || self.known.iter().map(Applying::Known);
        judge(|| known().chain(self.missing.iter().map(Applying::Missing)), connection)
    }
}

impl Difference {
    /// Whether nothing is different, so that no connection needs to be looked at.
    pub fn is_empty(&self) -> bool {
        self.new.is_empty() && self.old.is_empty() && self.missing.is_none()
    }

    /// What it means for a connection that the older set allowed (`by` a policy, or because no allow policy applied). Asks
    /// only the policies that are different, which decides nearly always:
    /// - one that denies and matches now denies;
    /// - what was allowed by a policy that is as it was stays allowed by it;
    /// - where no allow policy applied, the new ones are all there are.
    pub fn recheck(&self, connection: &Connection<'_>, by: Option<&NamespacedName>) -> Recheck {
        let view = View::of(connection);
        let mut denied = None;
        let mut allow_policies = Vec::new();
        let mut allowed = None;
        for policy in self.new.iter().filter(|policy| !policy.dry_run) {
            let matches = || policy.groups.iter().any(|group| view.group(group));
            match (unsupported(policy), policy.action) {
                (Some(why), _) => {
                    denied.get_or_insert_with(|| Denied::Unsupported { policy: policy.key(), why });
                }
                (None, Action::Deny) if matches() => {
                    return Recheck::Decided(Decision::Denied(Denied::By(policy.key())));
                }
                (None, Action::Deny) => {}
                (None, Action::Allow) => {
                    if allowed.is_none() && matches() {
                        allowed = Some(policy.key());
                    }
                    allow_policies.push(policy.key());
                }
            }
        }
        if let Some(denied) = denied.or_else(|| self.missing.clone().map(Denied::Missing)) {
            return Recheck::Decided(Decision::Denied(denied));
        }
        match (by, allowed) {
            (Some(by), _) if !self.old.contains(by) => Recheck::Same,
            (_, Some(allowed)) => Recheck::Decided(Decision::Allowed { by: Some(allowed) }),
            (Some(_), None) => Recheck::AskAll,
            (None, None) if allow_policies.is_empty() => Recheck::Same,
            (None, None) => Recheck::Decided(Decision::Denied(Denied::NotAllowed(allow_policies))),
        }
    }
}

/// What of a policy is not understood here.
fn unsupported(policy: &Policy) -> Option<String> {
    if let Some(why) = &policy.unsupported {
        return Some(why.to_string());
    }
    let matches = policy.groups.iter().flatten().flatten();
    let extensions = policy.extensions.iter().chain(matches.flat_map(|conditions| &conditions.extensions));
    extensions.map(|extension| format!("unknown extension {}", extension.name)).next()
}

/// A connection, taken apart once for all policies.
struct View<'a> {
    principal: Option<&'a str>,
    istio: Option<IstioView<'a>>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

impl<'a> View<'a> {
    fn of(connection: &Connection<'a>) -> Self {
        Self {
            principal: connection.peer.map(SpiffeId::principal),
            istio: connection.peer.and_then(SpiffeId::istio_view),
            source: connection.peer_address.to_canonical(),
            destination: connection.destination_address.ip().to_canonical(),
            port: connection.destination_address.port(),
        }
    }

    /// A group without rules matches everything: `all` of nothing is what is meant here.
    fn group(&self, group: &Group) -> bool {
        group.iter().all(|rule| self.rule(rule))
    }

    fn rule(&self, rule: &Rule) -> bool {
        rule.iter().any(|conditions| self.conditions(conditions))
    }

    fn conditions(&self, conditions: &Match) -> bool {
        let namespace = self.istio.map(|view| view.namespace);
        let account = |wanted: &crate::ServiceAccountMatch| {
            self.istio.is_some_and(|view| {
                view.namespace == &*wanted.namespace && view.service_account == &*wanted.service_account
            })
        };
        let namespace = |wanted: &StringMatch| namespace.is_some_and(|namespace| wanted.matches(namespace));
        let principal = |wanted: &StringMatch| self.principal.is_some_and(|it| principal_matches(wanted, it));
        let source = |net: &IpNet| net.contains(&self.source);
        let destination = |net: &IpNet| net.contains(&self.destination);
        let port = |wanted: &u16| *wanted == self.port;
        !conditions.is_empty()
            && any_or_none(&conditions.namespaces, namespace)
            && !conditions.not_namespaces.iter().any(namespace)
            && any_or_none(&conditions.service_accounts, account)
            && !conditions.not_service_accounts.iter().any(account)
            && any_or_none(&conditions.principals, principal)
            && !conditions.not_principals.iter().any(principal)
            && any_or_none(&conditions.source_ips, source)
            && !conditions.not_source_ips.iter().any(source)
            && any_or_none(&conditions.destination_ips, destination)
            && !conditions.not_destination_ips.iter().any(destination)
            && any_or_none(&conditions.destination_ports, port)
            && !conditions.not_destination_ports.iter().any(port)
    }
}

/// A field without values is no condition.
fn any_or_none<T>(values: &[T], matches: impl Fn(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(matches)
}

/// Principals are named without `spiffe://`; whoever writes it means the same.
fn principal_matches(wanted: &StringMatch, principal: &str) -> bool {
    match wanted {
        StringMatch::Exact(exact) => exact.strip_prefix("spiffe://").unwrap_or(exact) == principal,
        StringMatch::Prefix(prefix) => principal.starts_with(prefix.strip_prefix("spiffe://").unwrap_or(prefix)),
        StringMatch::Suffix(_) | StringMatch::Presence => wanted.matches(principal),
    }
}

#[cfg(test)]
mod tests;
