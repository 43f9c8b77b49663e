//! What an operator does about what keeps a workload from its identity: commands and lines of agent configuration, as text.
//!
//! `zspire identity explain` and `zspire doctor` print the same. Nothing here is done, only said.

use zspire_identity::spire::broker::{KUBERNETES_REFERENCE, PROCESS_REFERENCE};

/// A registration entry, as a command.
#[derive(Debug, Clone)]
pub struct Registration<'a> {
    /// SPIFFE ID of the agent or its node alias, if that is known.
    pub parent: Option<&'a str>,
    pub id: &'a str,
    /// At least one.
    pub selectors: &'a [String],
}

/// What stands for a parent that is not known.
pub const PARENT: &str = "PARENT";

impl Registration<'_> {
    /// The command; if it has [`PARENT`] in it, [`about_parent`](Self::about_parent) says what to write there.
    pub fn command(&self) -> String {
        let parent = self.parent.unwrap_or(PARENT);
        let selectors: String = self.selectors.iter().map(|selector| format!(" \\\n  -selector {selector}")).collect();
        format!("spire-server entry create \\\n  -parentID {parent} \\\n  -spiffeID {}{selectors}", self.id)
    }

    /// How to find the parent.
    pub fn about_parent(&self) -> Option<String> {
        let said = "PARENT is the SPIFFE ID of this node's agent (`spire-server agent list`), or its node alias";
        self.parent.is_none().then(|| said.to_owned())
    }
}

/// Lines of agent.conf that make a SPIFFE ID a delegate.
pub fn delegate(id: &str) -> String {
    format!("agent {{\n  authorized_delegates = [\"{id}\"]\n}}")
}

/// Lines of agent.conf that make a SPIFFE ID a broker.
pub fn broker(id: &str, by_process: bool) -> String {
    let reference = if by_process { PROCESS_REFERENCE } else { KUBERNETES_REFERENCE };
    let mut lines = format!(
        "agent {{\n  experimental {{\n    broker {{\n      brokers = [\n        {{ id = \"{id}\"\n          \
         allowed_reference_types = [\n            {{ type_url = \"{reference}\" }} ] }} ]\n    }}\n  }}\n}}"
    );
    if !by_process {
        lines.push('\n');
        lines.push_str(&attestor(id));
    }
    lines
}

/// Lines of agent.conf by which the attestor of pods takes a broker's references.
pub fn attestor(id: &str) -> String {
    format!(
        "plugins {{\n  WorkloadAttestor \"k8s\" {{ plugin_data {{ experimental {{ broker {{\n    access_policy = \"permissive\"\n    \
         brokers = [ {{ id = \"{id}\" pod_reference_scope = \"agent_node\" }} ] }} }} }} }}\n}}"
    )
}

/// What Kubernetes has to be told where the attestor asks it (`access_policy = "enforced"`).
pub fn impersonation(id: &str) -> String {
    format!(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {{ name: zspire-broker }}\nrules:\n- apiGroups: [\"\"]\n  \
         resources: [pods]\n  verbs: [impersonate-via-spire]\n---\napiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\n\
         metadata: {{ name: zspire-broker }}\nroleRef: {{ apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: zspire-broker }}\n\
         subjects:\n- {{ apiGroup: rbac.authorization.k8s.io, kind: User, name: \"{id}\" }}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_is_a_command_that_can_be_run() {
        let selectors = ["k8s:ns:shop".to_owned(), "k8s:sa:web".to_owned()];
        let known = Registration {
            parent: Some("spiffe://td/spire/agent/x"),
            id: "spiffe://td/ns/shop/sa/web",
            selectors: &selectors,
        };
        assert_eq!(
            known.command(),
            "spire-server entry create \\\n  -parentID spiffe://td/spire/agent/x \\\n  -spiffeID spiffe://td/ns/shop/sa/web \\\n  \
             -selector k8s:ns:shop \\\n  -selector k8s:sa:web"
        );
        assert_eq!(known.about_parent(), None);
        let unknown = Registration { parent: None, ..known };
        assert!(unknown.command().contains("-parentID PARENT "));
        assert!(unknown.about_parent().unwrap().contains("spire-server agent list"));
    }

    #[test]
    fn a_broker_by_process_needs_no_attestor_of_pods() {
        let id = "spiffe://td/ztunnel";
        assert!(broker(id, true).contains("WorkloadPIDReference") && !broker(id, true).contains("k8s"));
        assert!(broker(id, false).contains("KubernetesObjectReference") && broker(id, false).contains("agent_node"));
    }
}
