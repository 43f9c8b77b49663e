//! Who may have which identity: a function of who asks, what is asked for, and what runs where.
//!
//! A node asks for the workloads on it, everybody else for itself; a workload that shows its certificate only as long as the
//! mesh has a workload with that identity, or certificates of what was removed would live for ever. istiod renews whatever
//! certificate it is shown, and takes the requested trust domain as it comes; here it must be ours.

use std::collections::{HashMap, HashSet};

use zspire_model::{SpiffeId, Str, TrustDomain, Workload};

use crate::auth::{Account, Caller};
use crate::config::ServiceAccount;
use crate::state::node_id;

/// What runs where, from the mesh.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Placement {
    nodes: HashMap<Str, HashSet<SpiffeId>>,
    pods: HashMap<(Str, Str), Pod>,
    /// Of workloads on no node too.
    identities: HashSet<SpiffeId>,
}

#[derive(Debug, PartialEq)]
struct Pod {
    node: Str,
    service_account: Str,
}

impl Placement {
    /// Indexes the workloads that have an identity.
    pub(crate) fn new<'a>(workloads: impl Iterator<Item = &'a Workload>) -> Self {
        let mut placement = Self::default();
        for workload in workloads {
            let Some(id) = workload.identity() else { continue };
            placement.identities.insert(id.clone());
            if workload.node.is_empty() {
                continue;
            }
            placement.nodes.entry(workload.node.clone()).or_default().insert(id);
            let pod = Pod { node: workload.node.clone(), service_account: workload.service_account.clone() };
            placement.pods.insert((workload.namespace.clone(), workload.name.clone()), pod);
        }
        placement
    }

    fn runs(&self, node: &str, id: &SpiffeId) -> bool {
        self.nodes.get(node).is_some_and(|ids| ids.contains(id))
    }

    /// Nodes that anything runs on.
    pub(crate) fn nodes(&self) -> usize {
        self.nodes.len()
    }
}

/// What does not change while the control plane runs.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) domain: TrustDomain,
    pub(crate) node_accounts: Vec<ServiceAccount>,
}

impl Rules {
    /// The identity that `caller` gets when it asks for `asked`, or for nothing in particular.
    pub(crate) fn subject(
        &self,
        caller: &Caller,
        asked: Option<&str>,
        placement: &Placement,
    ) -> Result<SpiffeId, Denied> {
        let own = self.own(caller, placement)?;
        let Some(asked) = asked else { return Ok(own) };
        let id: SpiffeId = asked.parse().map_err(Denied::Malformed)?;
        if id == own {
            return Ok(own);
        }
        if *id.trust_domain() != self.domain {
            return Err(Denied::TrustDomain);
        }
        if id.istio_view().is_none() {
            return Err(Denied::NotAWorkload);
        }
        let node = self.node_of(caller, placement)?;
        if placement.runs(&node, &id) { Ok(id) } else { Err(Denied::NotOnNode { node }) }
    }

    fn own(&self, caller: &Caller, placement: &Placement) -> Result<SpiffeId, Denied> {
        match caller {
            Caller::Node(name) => node_id(&self.domain, name).ok_or(Denied::NodeName),
            Caller::Joining(join) => node_id(&self.domain, &join.node).ok_or(Denied::NodeName),
            Caller::Workload(id) if !placement.identities.contains(id) => Err(Denied::NotInMesh),
            Caller::Workload(id) => Ok(id.clone()),
            Caller::Account(account) => Ok(account.id.clone()),
        }
    }

    /// The node whose workloads the caller may ask for.
    fn node_of(&self, caller: &Caller, placement: &Placement) -> Result<Str, Denied> {
        match caller {
            Caller::Node(name) => Ok(name.clone()),
            Caller::Joining(_) | Caller::Workload(_) => Err(Denied::NotANode),
            Caller::Account(account) => self.node_of_account(account, placement),
        }
    }

    /// A node proxy's token is bound to its pod, and the pod to a node: by the token itself, or by the mesh. Where both
    /// say something they must agree.
    fn node_of_account(&self, account: &Account, placement: &Placement) -> Result<Str, Denied> {
        let trusted = |it: &ServiceAccount| it.namespace == *account.namespace && it.name == *account.name;
        if !self.node_accounts.iter().any(trusted) {
            return Err(Denied::NotANode);
        }
        let pod = account.pod.as_ref().ok_or(Denied::NoPod)?;
        let known = placement.pods.get(&(account.namespace.clone(), pod.clone()));
        if known.is_some_and(|known| known.service_account != account.name) {
            return Err(Denied::OtherPod);
        }
        match (known, &account.node) {
            (Some(known), Some(node)) if known.node != *node => Err(Denied::OtherPod),
            (_, Some(node)) => Ok(node.clone()),
            (Some(known), None) => Ok(known.node.clone()),
            (None, None) => Err(Denied::NoPod),
        }
    }
}

/// Why an identity is refused. For the log; callers are not told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error("the caller is no node: only nodes may ask for identities of others")]
    NotANode,
    #[error("what is asked for is not a SPIFFE ID")]
    Malformed(#[source] zspire_model::spiffe::Error),
    #[error("the identity is of another trust domain")]
    TrustDomain,
    #[error("the identity is not that of a workload (/ns/<namespace>/sa/<service account>)")]
    NotAWorkload,
    #[error("no workload with this identity runs on node {node}: check the mesh files")]
    NotOnNode { node: Str },
    #[error("no workload has the identity of the client certificate any more: check the mesh files")]
    NotInMesh,
    #[error("the token names neither a node nor a pod that the mesh knows")]
    NoPod,
    #[error("the pod that the token names has another service account or another node in the mesh")]
    OtherPod,
    #[error("the name of the node is not one that an identity can hold")]
    NodeName,
}

impl Denied {
    pub(crate) fn is_malformed(&self) -> bool {
        matches!(self, Self::Malformed(_) | Self::NotAWorkload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Join;

    fn workload(namespace: &str, name: &str, account: &str, node: &str) -> Workload {
        Workload {
            namespace: namespace.into(),
            name: name.into(),
            service_account: account.into(),
            node: node.into(),
            ..Workload::default()
        }
    }

    fn account(namespace: &str, name: &str, pod: Option<&str>, node: Option<&str>) -> Caller {
        Caller::Account(Account {
            id: format!("spiffe://cluster.local/ns/{namespace}/sa/{name}").parse().unwrap(),
            namespace: namespace.into(),
            name: name.into(),
            pod: pod.map(Into::into),
            node: node.map(Into::into),
        })
    }

    fn ask(caller: &Caller, asked: Option<&str>) -> Result<String, Denied> {
        let mesh = [
            workload("shop", "web-1", "web", "a"),
            workload("shop", "db-1", "db", "b"),
            workload("shop", "entry", "entry", ""),
            workload("istio-system", "ztunnel-a", "ztunnel", "a"),
            workload("istio-system", "other", "other", "a"),
            Workload { trust_domain: "elsewhere".parse().unwrap(), ..workload("shop", "far", "far", "a") },
        ];
        let rules = Rules {
            domain: "cluster.local".parse().unwrap(),
            node_accounts: vec![ServiceAccount { namespace: "istio-system".into(), name: "ztunnel".into() }],
        };
        let placement = Placement::new(mesh.iter());
        rules.subject(caller, asked, &placement).map(|id| id.to_string())
    }

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
    const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";

    #[test]
    fn a_node_gets_itself_and_what_runs_on_it() {
        let node = Caller::Node("a".into());
        let own = "spiffe://cluster.local/zspire/node/a";
        assert_eq!(ask(&node, None).unwrap(), own);
        assert_eq!(ask(&node, Some(own)).unwrap(), own);
        assert_eq!(ask(&node, Some(WEB)).unwrap(), WEB);
        let elsewhere = Denied::NotOnNode { node: "a".into() };
        for (asked, why) in [
            (DB, elsewhere.clone()),
            ("spiffe://cluster.local/ns/shop/sa/entry", elsewhere.clone()),
            ("spiffe://cluster.local/ns/shop/sa/WEB", elsewhere),
            ("spiffe://other.domain/ns/shop/sa/web", Denied::TrustDomain),
            ("spiffe://elsewhere/ns/shop/sa/far", Denied::TrustDomain),
            ("spiffe://cluster.local/zspire/node/b", Denied::NotAWorkload),
            ("spiffe://cluster.local", Denied::NotAWorkload),
            ("?", Denied::Malformed(zspire_model::spiffe::Error::Scheme)),
            ("spiffe://cluster.local/ns/shop/sa/web/", Denied::Malformed(zspire_model::spiffe::Error::EmptySegment)),
        ] {
            assert_eq!(ask(&node, Some(asked)), Err(why), "{asked}");
        }
    }

    #[test]
    fn a_node_that_joins_gets_nothing_but_itself() {
        let hash = crate::state::TokenHash::of(&format!("zs1.{}.{}", "0".repeat(64), "x".repeat(43)).parse().unwrap());
        let joining = Caller::Joining(Join { node: "a".into(), hash });
        assert_eq!(ask(&joining, None).unwrap(), "spiffe://cluster.local/zspire/node/a");
        assert_eq!(ask(&joining, Some(WEB)), Err(Denied::NotANode));
    }

    #[test]
    fn a_workload_gets_itself() {
        let web = Caller::Workload(WEB.parse().unwrap());
        assert_eq!(ask(&web, None).unwrap(), WEB);
        assert_eq!(ask(&web, Some(WEB)).unwrap(), WEB);
        assert_eq!(ask(&web, Some(DB)), Err(Denied::NotANode));
        assert_eq!(ask(&web, Some("spiffe://cluster.local/zspire/node/a")), Err(Denied::NotAWorkload));
        assert_eq!(ask(&account("shop", "web", Some("web-1"), Some("a")), Some(DB)), Err(Denied::NotANode));
        assert_eq!(ask(&account("shop", "web", None, None), None).unwrap(), WEB);
        let entry = "spiffe://cluster.local/ns/shop/sa/entry";
        assert_eq!(ask(&Caller::Workload(entry.parse().unwrap()), None).unwrap(), entry, "on no node");
    }

    #[test]
    fn a_workload_that_left_the_mesh_gets_nothing() {
        let gone = "spiffe://cluster.local/ns/shop/sa/gone";
        let caller = Caller::Workload(gone.parse().unwrap());
        for asked in [None, Some(gone), Some(WEB)] {
            assert_eq!(ask(&caller, asked), Err(Denied::NotInMesh), "{asked:?}");
        }
    }

    #[test]
    fn a_node_proxys_token_counts_for_the_node_of_its_pod() {
        let by = |pod, node| account("istio-system", "ztunnel", pod, node);
        assert_eq!(ask(&by(Some("ztunnel-a"), None), Some(WEB)).unwrap(), WEB, "by the mesh");
        assert_eq!(ask(&by(Some("ztunnel-x"), Some("a")), Some(WEB)).unwrap(), WEB, "by the token");
        assert_eq!(ask(&by(Some("ztunnel-x"), Some("b")), Some(WEB)), Err(Denied::NotOnNode { node: "b".into() }));
        assert_eq!(ask(&by(Some("ztunnel-a"), Some("b")), Some(DB)), Err(Denied::OtherPod), "they disagree");
        assert_eq!(ask(&by(Some("other"), Some("a")), Some(WEB)), Err(Denied::OtherPod), "another account");
        assert_eq!(ask(&by(Some("ztunnel-x"), None), Some(WEB)), Err(Denied::NoPod));
        assert_eq!(ask(&by(None, Some("a")), Some(WEB)), Err(Denied::NoPod));
    }
}
