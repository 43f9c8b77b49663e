//! Authorization policies, as the mesh file has them. All are of the mesh's one namespace.

use serde_json::{Value, json};

use crate::plan::NAMESPACE;

/// A policy with a name.
#[derive(Debug, Clone)]
pub struct Policy {
    pub(crate) name: String,
    action: &'static str,
    rules: Value,
}

/// `deny-all`: denies every connection.
pub fn deny_all() -> Policy {
    // A rule without conditions matches whatever comes.
    Policy { name: "deny-all".into(), action: "Deny", rules: json!([[[{ "notDestinationPorts": [1] }]]]) }
}

/// `deny-<account>`: denies connections of a service account.
pub fn deny_from(account: &str) -> Policy {
    Policy { name: format!("deny-{account}"), action: "Deny", rules: principal(account) }
}

/// `allow-<account>`: allows connections of a service account, and so no others.
pub fn allow_from(account: &str) -> Policy {
    Policy { name: format!("allow-{account}"), action: "Allow", rules: principal(account) }
}

/// `allow-identified`: allows connections of whoever has proved to be somebody, and so no others.
pub fn allow_identified() -> Policy {
    Policy {
        name: "allow-identified".into(),
        action: "Allow",
        rules: json!([[[{ "principals": [{ "Presence": null }] }]]]),
    }
}

fn principal(account: &str) -> Value {
    json!([[[{ "principals": [{ "Exact": format!("cluster.local/ns/{NAMESPACE}/sa/{account}") }] }]]])
}

impl Policy {
    /// As logs name it.
    pub fn key(&self) -> String {
        format!("{NAMESPACE}/{}", self.name)
    }

    pub(crate) fn entry(&self) -> Value {
        json!({
            "name": self.name, "namespace": NAMESPACE, "scope": "Namespace", "action": self.action, "rules": self.rules,
        })
    }
}
