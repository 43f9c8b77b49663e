//! Policies from the wire. Whatever is not understood makes the policy deny, and never makes it disappear.

use ipnet::IpNet;
use prost::bytes::Bytes;
use zspire_model::policy::{Action, Scope};
use zspire_model::{Interner, Match, Policy, ServiceAccountMatch, StringMatch};
use zspire_wire::security;

use super::decode::{check_part, extension, range};
use super::{Error, unknown};

/// A policy that stands for one that cannot be decoded, under the name that it was sent under. It denies where the policy says
/// that it applies, if that much can be read, else everywhere.
pub(super) fn unreadable(name: &str, value: &Bytes, why: &Error) -> Policy {
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    let scope = unknown::scope(value).and_then(|scope| security::Scope::try_from(scope).ok());
    Policy {
        namespace: namespace.into(),
        name: name.into(),
        scope: match scope {
            Some(security::Scope::Namespace) => Scope::Namespace,
            Some(security::Scope::WorkloadSelector) => Scope::WorkloadSelector,
            Some(security::Scope::Global) | None => Scope::Global,
        },
        action: Action::Deny,
        unsupported: Some(why.to_string().into()),
        ..Policy::default()
    }
}

/// A policy without its name can be neither kept nor removed: that alone is an error. `unknown_field` is what the message has
/// beside the fields that are known here.
pub(super) fn decode(
    shared: &mut Interner,
    from: security::Authorization,
    unknown_field: Option<String>,
) -> Result<Policy, Error> {
    if from.name.is_empty() {
        return Err(Error::Missing("name"));
    }
    check_part("namespace", &from.namespace)?;
    let mut reader = Reader { shared, unsupported: unknown_field };
    let scope = reader.scope(from.scope);
    let action = reader.action(from.action);
    let groups = from.groups.into_iter().map(|group| reader.group(group)).collect();
    let extensions = from.extensions.into_iter().map(|it| extension(reader.shared, it.name, it.config)).collect();
    Ok(Policy {
        unsupported: reader.unsupported.map(Into::into),
        namespace: shared.text(&from.namespace),
        name: shared.text(&from.name),
        scope,
        action,
        groups,
        dry_run: from.dry_run,
        extensions,
    })
}

struct Reader<'a> {
    shared: &'a mut Interner,
    /// The first thing that is not understood.
    unsupported: Option<String>,
}

impl Reader<'_> {
    fn unsupported(&mut self, what: impl FnOnce() -> String) {
        self.unsupported.get_or_insert_with(what);
    }

    /// Where a policy of an unknown scope applies cannot be known, so it applies everywhere: a guess that leaves a workload out
    /// would allow what it denies.
    fn scope(&mut self, from: i32) -> Scope {
        match security::Scope::try_from(from) {
            Ok(security::Scope::Global) => Scope::Global,
            Ok(security::Scope::Namespace) => Scope::Namespace,
            Ok(security::Scope::WorkloadSelector) => Scope::WorkloadSelector,
            Err(_) => {
                self.unsupported(|| format!("unknown scope {from}"));
                Scope::Global
            }
        }
    }

    fn action(&mut self, from: i32) -> Action {
        match security::Action::try_from(from) {
            Ok(security::Action::Allow) => Action::Allow,
            Ok(security::Action::Deny) => Action::Deny,
            Err(_) => {
                self.unsupported(|| format!("unknown action {from}"));
                Action::Deny
            }
        }
    }

    fn group(&mut self, from: security::Group) -> Vec<Vec<Match>> {
        let mut rule = |rules: security::Rules| rules.matches.into_iter().map(|it| self.conditions(it)).collect();
        from.rules.into_iter().map(&mut rule).collect()
    }

    fn conditions(&mut self, from: security::Match) -> Match {
        Match {
            namespaces: self.texts(from.namespaces),
            not_namespaces: self.texts(from.not_namespaces),
            service_accounts: self.accounts(from.service_accounts),
            not_service_accounts: self.accounts(from.not_service_accounts),
            principals: self.texts(from.principals),
            not_principals: self.texts(from.not_principals),
            source_ips: self.ranges("source_ips", from.source_ips),
            not_source_ips: self.ranges("not_source_ips", from.not_source_ips),
            destination_ips: self.ranges("destination_ips", from.destination_ips),
            not_destination_ips: self.ranges("not_destination_ips", from.not_destination_ips),
            destination_ports: self.ports(from.destination_ports),
            not_destination_ports: self.ports(from.not_destination_ports),
            extensions: from.extensions.into_iter().map(|it| extension(self.shared, it.name, it.config)).collect(),
        }
    }

    fn texts(&mut self, from: Vec<security::StringMatch>) -> Vec<StringMatch> {
        from.into_iter().filter_map(|it| self.text(it)).collect()
    }

    fn text(&mut self, from: security::StringMatch) -> Option<StringMatch> {
        use security::string_match::MatchType;
        match from.match_type {
            Some(MatchType::Exact(text)) => Some(StringMatch::Exact(self.shared.text(&text))),
            Some(MatchType::Prefix(text)) => Some(StringMatch::Prefix(self.shared.text(&text))),
            Some(MatchType::Suffix(text)) => Some(StringMatch::Suffix(self.shared.text(&text))),
            Some(MatchType::Presence(())) => Some(StringMatch::Presence),
            None => {
                self.unsupported(|| "unknown kind of string match".into());
                None
            }
        }
    }

    fn ranges(&mut self, field: &'static str, from: Vec<security::Address>) -> Vec<IpNet> {
        let mut one = |it: security::Address| match range(field, &it.address, it.length) {
            Ok(net) => Some(net),
            Err(why) => {
                self.unsupported(|| why.to_string());
                None
            }
        };
        from.into_iter().filter_map(&mut one).collect()
    }

    fn ports(&mut self, from: Vec<u32>) -> Vec<u16> {
        let mut one = |port: u32| match u16::try_from(port) {
            Ok(port) => Some(port),
            Err(_) => {
                self.unsupported(|| format!("{port} is not a port"));
                None
            }
        };
        from.into_iter().filter_map(&mut one).collect()
    }

    fn accounts(&mut self, from: Vec<security::ServiceAccountMatch>) -> Vec<ServiceAccountMatch> {
        let one = |it: security::ServiceAccountMatch| ServiceAccountMatch {
            namespace: self.shared.text(&it.namespace),
            service_account: self.shared.text(&it.service_account),
        };
        from.into_iter().map(one).collect()
    }
}
