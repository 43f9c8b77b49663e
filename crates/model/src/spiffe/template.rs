//! The pattern by which a workload's SPIFFE id follows from what it is called.
//!
//! Istio's is `spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}`. Another one may be used where identities are not
//! Istio's; it speaks of one trust domain only, that of whoever has set it, since nobody knows the patterns of others.

use std::fmt;
use std::sync::Arc;

use super::{Error, MAX_ID, SpiffeId, TrustDomain, check_path, check_segment};

/// Istio's pattern.
pub const ISTIO: &str = "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}";

/// A pattern for one trust domain. Cloning is cheap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdTemplate(Arc<Pattern>);

#[derive(Debug, PartialEq, Eq)]
struct Pattern {
    trust_domain: TrustDomain,
    /// Of the path.
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Name(Name),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Namespace,
    ServiceAccount,
    Pod,
    Node,
}

/// What a workload is called.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its service account.
    pub service_account: &'a str,
    /// Name of the pod.
    pub pod: &'a str,
    /// The node that it runs on.
    pub node: &'a str,
}

/// Why a text is not a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// A brace without its counterpart.
    #[error("a brace is not closed, or not opened")]
    Brace,
    /// A placeholder that there is not.
    #[error(
        "there is no {{{0}}}: {{trust_domain}}, {{namespace}}, {{service_account}}, {{pod}} and {{node}} can be used"
    )]
    Unknown(String),
    /// It names another trust domain, or none.
    #[error(
        "it has to begin with spiffe://{{trust_domain}}/ (or spiffe://{0}/): an identity of another trust domain is never issued here"
    )]
    TrustDomain(TrustDomain),
    /// Every workload would be the same.
    #[error("nothing in it tells one workload from another: use {{namespace}} and {{service_account}}")]
    Constant,
    /// Where SPIRE keeps its own.
    #[error("paths below /spire belong to SPIRE itself")]
    Reserved,
    /// Whatever it is filled with, it is not a SPIFFE id.
    #[error("it does not make a SPIFFE id: {0}")]
    Id(Error),
}

impl IdTemplate {
    /// Parses a pattern for this trust domain.
    pub fn new(text: &str, trust_domain: &TrustDomain) -> Result<Self, TemplateError> {
        let whole = text.replace("{trust_domain}", trust_domain.as_str());
        let path = whole.strip_prefix("spiffe://").and_then(|rest| rest.strip_prefix(trust_domain.as_str()));
        let path = path.filter(|path| path.starts_with('/'));
        let path = path.ok_or_else(|| TemplateError::TrustDomain(trust_domain.clone()))?;
        let parts = parts(path)?;
        if !parts.iter().any(|part| matches!(part, Part::Name(_))) {
            return Err(TemplateError::Constant);
        }
        if path == "/spire" || path.starts_with("/spire/") {
            return Err(TemplateError::Reserved);
        }
        let template = Self(Arc::new(Pattern { trust_domain: trust_domain.clone(), parts }));
        let any = Names { namespace: "a", service_account: "a", pod: "a", node: "a" };
        template.id(&any).map_err(TemplateError::Id)?;
        Ok(template)
    }

    /// The trust domain of its ids.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// Whether the node's name is a part of it.
    pub fn names_node(&self) -> bool {
        self.0.parts.contains(&Part::Name(Name::Node))
    }

    /// The id of a workload.
    pub fn id(&self, of: &Names<'_>) -> Result<SpiffeId, Error> {
        let mut path = String::new();
        for part in &self.0.parts {
            match part {
                Part::Text(text) => path.push_str(text),
                Part::Name(name) => {
                    let name = name.of(of);
                    // A slash inside would otherwise pass as one more path segment.
                    check_segment(name)?;
                    path.push_str(name);
                }
            }
            if path.len() > MAX_ID {
                return Err(Error::Length(path.len()));
            }
        }
        check_path(&path)?;
        SpiffeId::new(&self.0.trust_domain, &path)
    }
}

/// With the trust domain filled in.
impl fmt::Display for IdTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.0.trust_domain)?;
        self.0.parts.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Name(name) => write!(f, "{{{}}}", name.as_str()),
        })
    }
}

impl Name {
    const ALL: [Self; 4] = [Self::Namespace, Self::ServiceAccount, Self::Pod, Self::Node];

    fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "namespace",
            Self::ServiceAccount => "service_account",
            Self::Pod => "pod",
            Self::Node => "node",
        }
    }

    fn of<'a>(self, names: &Names<'a>) -> &'a str {
        match self {
            Self::Namespace => names.namespace,
            Self::ServiceAccount => names.service_account,
            Self::Pod => names.pod,
            Self::Node => names.node,
        }
    }
}

fn parts(mut path: &str) -> Result<Vec<Part>, TemplateError> {
    let mut parts = Vec::new();
    while !path.is_empty() {
        let text = path.find(['{', '}']).map_or(path, |at| &path[..at]);
        if !text.is_empty() {
            parts.push(Part::Text(text.to_owned()));
            path = &path[text.len()..];
            continue;
        }
        let (name, rest) = path.strip_prefix('{').and_then(|rest| rest.split_once('}')).ok_or(TemplateError::Brace)?;
        if name.contains('{') {
            return Err(TemplateError::Brace);
        }
        let known = Name::ALL.into_iter().find(|known| known.as_str() == name);
        parts.push(Part::Name(known.ok_or_else(|| TemplateError::Unknown(name.to_owned()))?));
        path = rest;
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(template: &str) -> String {
        let domain = "td".parse().unwrap();
        let names = Names { namespace: "shop", service_account: "web", pod: "web-1", node: "n1" };
        match IdTemplate::new(template, &domain) {
            Ok(template) => template.id(&names).unwrap().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn patterns() {
        assert_eq!(id(ISTIO), "spiffe://td/ns/shop/sa/web");
        assert_eq!(id("spiffe://td/{namespace}.{service_account}/x"), "spiffe://td/shop.web/x");
        let shown = IdTemplate::new("spiffe://{trust_domain}/n/{node}", &"td".parse().unwrap()).unwrap();
        assert_eq!(shown.to_string(), "spiffe://td/n/{node}");
        assert_eq!(id("spiffe://{trust_domain}/n/{node}/p/{pod}"), "spiffe://td/n/n1/p/web-1");
    }

    #[test]
    fn what_is_no_pattern_says_why() {
        for (template, why) in [
            ("spiffe://other/{pod}", "has to begin with spiffe://{trust_domain}/ (or spiffe://td/)"),
            ("spiffe://td.more/{pod}", "has to begin with"),
            ("{trust_domain}/{pod}", "has to begin with"),
            ("spiffe://td/web", "nothing in it tells one workload from another"),
            ("spiffe://td/{pod", "a brace is not closed"),
            ("spiffe://td/pod}", "a brace is not closed"),
            ("spiffe://td/{{pod}}", "a brace is not closed"),
            ("spiffe://td/{name}", "there is no {name}: {trust_domain}, {namespace}"),
            ("spiffe://td/spire/agent/{pod}", "belong to SPIRE"),
            ("spiffe://td//{pod}", "a path segment is empty"),
            ("spiffe://td/{pod}/", "a path segment is empty"),
            ("spiffe://td/a b/{pod}", "' ' cannot stand in a path segment"),
        ] {
            assert!(id(template).contains(why), "{template}: {}", id(template));
        }
    }

    #[test]
    fn a_name_is_never_more_than_a_part_of_one_segment() {
        let template = IdTemplate::new("spiffe://{trust_domain}/{namespace}/{pod}", &"td".parse().unwrap()).unwrap();
        let of = |namespace, pod| template.id(&Names { namespace, service_account: "", pod, node: "" });
        assert_eq!(of("a", "b/c"), Err(Error::PathCharacter('/')));
        assert_eq!(of("", "b"), Err(Error::EmptySegment));
        assert_eq!(of("..", "b"), Err(Error::DotSegment("..".into())));
        assert!(matches!(of("a", &"x".repeat(3000)), Err(Error::Length(_))));
    }
}
