//! Authorization policies, as the mesh file has them. All are of the mesh's one namespace.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::plan::NAMESPACE;

/// A policy with a name.
#[derive(Debug, Clone)]
pub struct Policy {
    pub(crate) name: String,
    action: &'static str,
    rules: Value,
    scope: &'static str,
}

const NAMESPACE_SCOPE: &str = "Namespace";

/// `deny-all`: denies every connection.
pub fn deny_all() -> Policy {
    // A rule without conditions matches whatever comes.
    Policy {
        name: "deny-all".into(),
        action: "Deny",
        rules: json!([[[{ "notDestinationPorts": [1] }]]]),
        scope: NAMESPACE_SCOPE,
    }
}

/// `deny-<account>`: denies connections of a service account.
pub fn deny_from(account: &str) -> Policy {
    Policy { name: format!("deny-{account}"), action: "Deny", rules: principal(account), scope: NAMESPACE_SCOPE }
}

/// `deny-principal`: denies connections of an identity, which is named without `spiffe://`.
pub fn deny_principal(principal: &str) -> Policy {
    let rules = json!([[[{ "principals": [{ "Exact": principal }] }]]]);
    Policy { name: "deny-principal".into(), action: "Deny", rules, scope: NAMESPACE_SCOPE }
}

/// `allow-<account>`: allows connections of a service account, and so no others.
pub fn allow_from(account: &str) -> Policy {
    Policy { name: format!("allow-{account}"), action: "Allow", rules: principal(account), scope: NAMESPACE_SCOPE }
}

/// `allow-identified`: allows connections of whoever has proved to be somebody, and so no others.
pub fn allow_identified() -> Policy {
    Policy {
        name: "allow-identified".into(),
        action: "Allow",
        rules: json!([[[{ "principals": [{ "Presence": null }] }]]]),
        scope: NAMESPACE_SCOPE,
    }
}

fn principal(account: &str) -> Value {
    json!([[[{ "principals": [{ "Exact": format!("cluster.local/ns/{NAMESPACE}/sa/{account}") }] }]]])
}

/// `allow-address`: allows connections from an address, and so no others.
pub fn allow_address(address: IpAddr) -> Policy {
    Policy {
        name: "allow-address".into(),
        action: "Allow",
        rules: json!([[[{ "sourceIps": [format!("{address}/32")] }]]]),
        scope: NAMESPACE_SCOPE,
    }
}

impl Policy {
    /// The same, for pods that are [selected](crate::plan::Plan::select) by it alone.
    #[must_use]
    pub fn for_selected(self) -> Self {
        Self { scope: "WorkloadSelector", ..self }
    }

    /// As logs name it.
    pub fn key(&self) -> String {
        format!("{NAMESPACE}/{}", self.name)
    }

    pub(crate) fn entry(&self) -> Value {
        json!({
            "name": self.name, "namespace": NAMESPACE, "scope": self.scope, "action": self.action, "rules": self.rules,
        })
    }
}
