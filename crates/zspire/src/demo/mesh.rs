//! Who is in the demo: pods, a service and two policies, and the file that the control plane reads.

use std::net::IpAddr;

/// The namespace that everything is in.
pub(super) const NAMESPACE: &str = "demo";
/// The name of the service and of its pod.
pub(super) const SERVER: &str = "api";
/// The pod that may call it.
pub(super) const CLIENT: &str = "web";
/// The pod that may not.
pub(super) const INTRUDER: &str = "intruder";
/// The policy that says so.
pub(super) const POLICY: &str = "demo/deny-intruder";
/// The port of the service, and of the application behind it.
pub(super) const SERVICE_PORT: u16 = 80;
pub(super) const APPLICATION_PORT: u16 = 8080;

/// One pod of the demo. Its service account has its name.
#[derive(Debug, Clone, Copy)]
pub(super) struct PodPlan {
    pub(super) name: &'static str,
    /// 1 or 2.
    pub(super) node: u8,
}

/// The pods.
pub(super) const PODS: [PodPlan; 3] =
    [PodPlan { name: CLIENT, node: 1 }, PodPlan { name: INTRUDER, node: 1 }, PodPlan { name: SERVER, node: 2 }];

impl PodPlan {
    /// The name of its node.
    pub(super) fn node_name(self) -> String {
        format!("node-{}", self.node)
    }

    /// The identity that it should get.
    pub(super) fn spiffe_id(self) -> String {
        format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{}", self.name)
    }
}

/// The mesh as a file. `addresses` are the pods', in the order of [`PODS`].
pub(super) fn file(addresses: &[IpAddr], vip: IpAddr) -> String {
    let mut text = String::from("workloads:\n");
    for (pod, address) in PODS.iter().zip(addresses) {
        let name = pod.name;
        let services = if name == SERVER {
            format!(
                "{{\"{NAMESPACE}/{SERVER}.{NAMESPACE}.svc.cluster.local\": {{{SERVICE_PORT}: {APPLICATION_PORT}}}}}"
            )
        } else {
            "{}".to_owned()
        };
        text += &format!(
            "- uid: Kubernetes//Pod/{NAMESPACE}/{name}\n  name: {name}\n  namespace: {NAMESPACE}\n  serviceAccount: {name}\n  \
             trustDomain: cluster.local\n  workloadName: {name}\n  canonicalName: {name}\n  node: {}\n  protocol: HBONE\n  \
             workloadIps: [\"{address}\"]\n  services: {services}\n",
            pod.node_name()
        );
    }
    text += &format!(
        "services:\n- name: {SERVER}\n  namespace: {NAMESPACE}\n  hostname: {SERVER}.{NAMESPACE}.svc.cluster.local\n  \
         vips: [\"/{vip}\"]\n  ports: {{{SERVICE_PORT}: {APPLICATION_PORT}}}\n"
    );
    text += &format!(
        "policies:\n- name: deny-intruder\n  namespace: {NAMESPACE}\n  action: Deny\n  scope: Namespace\n  \
         rules: [[[{{principals: [!Exact cluster.local/ns/{NAMESPACE}/sa/{INTRUDER}]}}]]]\n"
    );
    text
}
