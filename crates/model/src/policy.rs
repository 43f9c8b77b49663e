//! Authorization policies, in the form in which they are enforced.

use ipnet::IpNet;

use crate::{Extension, NamespacedName, Str};

/// One policy, with every field of the wire contract.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// It matches if any of its groups does.
    pub groups: Vec<Group>,
    /// Whether it is only reported and never enforced.
    pub dry_run: bool,
    /// Extensions; a policy that has any cannot be evaluated.
    pub extensions: Vec<Extension>,
    /// Why it cannot be evaluated (something in it is unknown here). It then denies wherever it applies.
    pub unsupported: Option<Str>,
}

impl Policy {
    /// Its name.
    pub fn key(&self) -> NamespacedName {
        NamespacedName { namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

/// A group matches if all its rules do; a group without rules matches everything.
pub type Group = Vec<Rule>;

/// A rule matches if any of its matches does; a rule without matches matches nothing.
pub type Rule = Vec<Match>;

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scope {
    /// All.
    #[default]
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it.
    WorkloadSelector,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Action {
    /// The connection is allowed; and where any allow policy applies, one of them must match.
    #[default]
    Allow,
    /// The connection is denied.
    Deny,
}

/// Conditions on a connection. All fields that have values must match, each by any of its values (the `not_` fields by none
/// of them). A match without any value matches nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// Namespace of the peer's identity.
    pub namespaces: Vec<StringMatch>,
    /// The inverse.
    pub not_namespaces: Vec<StringMatch>,
    /// Service account of the peer's identity.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// The inverse.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The peer's whole identity without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// The inverse.
    pub not_principals: Vec<StringMatch>,
    /// The peer's address.
    pub source_ips: Vec<IpNet>,
    /// The inverse.
    pub not_source_ips: Vec<IpNet>,
    /// The address asked for.
    pub destination_ips: Vec<IpNet>,
    /// The inverse.
    pub not_destination_ips: Vec<IpNet>,
    /// The port asked for.
    pub destination_ports: Vec<u16>,
    /// The inverse.
    pub not_destination_ports: Vec<u16>,
    /// Extensions; a policy that has any cannot be evaluated.
    pub extensions: Vec<Extension>,
}

impl Match {
    /// Whether it has no value at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A condition on a text. Every character stands for itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// Is it.
    Exact(Str),
    /// Begins with it.
    Prefix(Str),
    /// Ends with it.
    Suffix(Str),
    /// There is something.
    Presence,
}

impl StringMatch {
    /// Whether a text fulfils the condition.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Presence => !text.is_empty(),
        }
    }
}

/// A service account, named exactly.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub service_account: Str,
}
