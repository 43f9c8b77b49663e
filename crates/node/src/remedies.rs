//! What an operator does about what keeps a workload from its identity: commands and lines of agent configuration, as text.
//!
//! `zspire identity explain` and `zspire doctor` print the same. Nothing here is done, only said.

use serde::Serialize;
use zspire_identity::spire::broker::{KUBERNETES_REFERENCE, PROCESS_REFERENCE};

/// Something to do: a sentence, and a command or lines of configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    pub what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Step {
    /// A sentence.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), text: None }
    }

    /// A sentence, and what it speaks of.
    pub fn with_text(what: impl Into<String>, text: String) -> Self {
        Self { what: what.into(), text: Some(text) }
    }
}

/// What to do when an agent does not answer the proxy, `proxy` being the proxy's own SPIFFE ID; nothing if it is not the agent's
/// configuration that is wrong.
pub fn of_refusal(code: &str, why: &str, proxy: &str, by_process: bool) -> Option<Step> {
    let why = why.to_lowercase();
    let says = |words: &str| why.contains(words);
    Some(match code {
        "PermissionDenied" if says("delegate") => {
            Step::with_text("agent.conf has to name the proxy; restart the agent after that:", delegate(proxy))
        }
        "PermissionDenied" if says("impersonate") || says("authorizer") => {
            let what = "Kubernetes has to let the proxy act for pods (access_policy = \"enforced\"):";
            Step::with_text(what, impersonation(proxy))
        }
        "PermissionDenied" => {
            let what = "agent.conf has to name the proxy and the type of reference; restart the agent after that:";
            Step::with_text(what, broker(proxy, by_process))
        }
        "Internal" if says("broker configuration missing") => {
            let what =
                "The agent's attestor of pods takes no references of brokers. Configure it, and restart the agent:";
            Step::with_text(what, attestor(proxy))
        }
        "Internal" if says("kubernetes client") => Step::new(
            "access_policy = \"enforced\" asks Kubernetes, and the agent cannot reach it. See the agent's log.",
        ),
        "Unimplemented" => Step::new(
            "The agent is too old: the Broker API needs SPIRE 1.15.2, the Delegated Identity API by process 1.10.2. Or the socket is \
             another one's.",
        ),
        "Unavailable" if says("refuses the proxy's own svid") || says("bad certificate") => {
            let what = "The proxy is not among the agent's brokers. Name it in agent.conf, and restart the agent:";
            Step::with_text(what, broker(proxy, by_process))
        }
        "Unavailable" if says("tls with the spire agent") => Step::new(
            "Whoever answers there has not proved to be the agent: see SPIFFE_BROKER_SOCKET, SPIRE_AGENT_ID and TRUST_DOMAIN.",
        ),
        _ => return None,
    })
}

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
    fn each_refusal_has_its_remedy() {
        for (code, why, remedy) in [
            (
                "PermissionDenied",
                "caller not configured as an authorized delegate",
                "authorized_delegates = [\"spiffe://td/proxy\"]",
            ),
            ("PermissionDenied", "Kubernetes authorizer does not allow …", "verbs: [impersonate-via-spire]"),
            ("PermissionDenied", "reference type not allowed", "allowed_reference_types"),
            ("Internal", "broker configuration missing", "WorkloadAttestor \"k8s\""),
            ("Internal", "unable to set up Kubernetes client", "cannot reach it"),
            (
                "Unavailable",
                "the SPIRE agent at unix:///b refuses the proxy's own SVID, spiffe://td/proxy",
                "id = \"spiffe://td/proxy\"",
            ),
            ("Unavailable", "remote error: tls: bad certificate", "id = \"spiffe://td/proxy\""),
            ("Unavailable", "TLS with the SPIRE agent at unix:///b: another was expected", "SPIRE_AGENT_ID"),
            ("Unimplemented", "", "1.15.2"),
        ] {
            let step = of_refusal(code, why, "spiffe://td/proxy", false).unwrap();
            let said = format!("{} {}", step.what, step.text.unwrap_or_default());
            assert!(said.contains(remedy), "{code} {why}: {said}");
        }
        assert_eq!(of_refusal("Unavailable", "connection refused", "spiffe://td/proxy", false), None);
    }

    #[test]
    fn a_broker_by_process_needs_no_attestor_of_pods() {
        let id = "spiffe://td/ztunnel";
        assert!(broker(id, true).contains("WorkloadPIDReference") && !broker(id, true).contains("k8s"));
        assert!(broker(id, false).contains("KubernetesObjectReference") && broker(id, false).contains("agent_node"));
    }
}
