//! What a plan is in Kubernetes: nodes, pods, service accounts, services, and what a kubelet would say of them.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{PROXY, SYSTEM, proxy_pod};
use crate::plan::{APPLICATION_PORT, Mode, NAMESPACE, Plan, PodPlan, ServicePlan};

/// The namespaces; the test's is part of the mesh.
pub(super) fn namespaces() -> Vec<Value> {
    let of = |name: &str, labels: Value| json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } });
    vec![of(SYSTEM, json!({})), of(NAMESPACE, json!({ "istio.io/dataplane-mode": "ambient" }))]
}

/// Everything else of a plan.
#[track_caller]
pub(super) fn objects(plan: &Plan) -> Vec<Value> {
    assert!(plan.policies.is_empty(), "under Istio policies are objects: see Cluster::apply");
    let mut all = vec![service_account(SYSTEM, PROXY), service_account(SYSTEM, "default")];
    for node in &plan.nodes {
        all.push(node_object(node));
        all.push(proxy(node));
    }
    for pod in plan.pods.iter().filter(|pod| pod.listed) {
        all.extend(pod_objects(plan, pod, &plan.nodes[pod.node]));
    }
    all.extend(plan.services.iter().map(service));
    all
}

fn service_account(namespace: &str, name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "namespace": namespace, "name": name } })
}

fn node_object(name: &str) -> Value {
    let labels =
        json!({ "topology.kubernetes.io/region": "region", "topology.kubernetes.io/zone": format!("zone-{name}") });
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": labels } })
}

/// The pod of a node's proxy, as Istio's chart has it.
fn proxy(node: &str) -> Value {
    let metadata = json!({ "namespace": SYSTEM, "name": proxy_pod(node), "labels": { "app": PROXY } });
    let mut pod = pod_of(metadata, node, PROXY, &[15020]);
    pod["spec"]["hostNetwork"] = true.into();
    pod["spec"]["containers"][0]["ports"][0]["hostPort"] = 15020.into();
    pod
}

/// The machine that istiod is on, where tools want to find it as a pod.
pub(super) const CONTROL_PLANE: &str = "control-plane";

/// That machine, istiod's pod, and the daemon set of the proxies.
pub(super) fn control_plane() -> Vec<Value> {
    let metadata = json!({
        "namespace": SYSTEM, "name": "istiod-0", "labels": { "app": "istiod", "istio": "pilot", "istio.io/rev": "default" },
    });
    let mut istiod = pod_of(metadata, CONTROL_PLANE, "istiod", &[15014]);
    istiod["spec"]["containers"][0]["name"] = "discovery".into();
    let labels = json!({ "app": PROXY });
    let set = json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "namespace": SYSTEM, "name": PROXY }, "spec": {
        "selector": { "matchLabels": labels },
        "template": { "metadata": { "labels": labels }, "spec": { "containers": [{ "name": "istio-proxy", "image": "none" }] } },
    } });
    vec![node_object(CONTROL_PLANE), service_account(SYSTEM, "istiod"), istiod, set]
}

/// A pod on some node, and its service account.
pub(super) fn pod_objects(plan: &Plan, pod: &PodPlan, node: &str) -> [Value; 2] {
    [service_account(NAMESPACE, &pod.name), pod_object(plan, pod, node)]
}

fn pod_object(plan: &Plan, pod: &PodPlan, node: &str) -> Value {
    let mut metadata = json!({ "namespace": NAMESPACE, "name": pod.name, "labels": { "app": pod.name } });
    let services = plan.services.iter().filter(|service| service.endpoints.contains(&pod.name));
    for service in services {
        metadata["labels"][label_of(service)] = "yes".into();
    }
    if pod.native_tunnel {
        metadata["labels"]["networking.istio.io/tunnel"] = "http".into();
    }
    if !pod.captured {
        metadata["labels"]["istio.io/dataplane-mode"] = "none".into();
    } else if plan.mode != Mode::IstioCni {
        metadata["annotations"] = json!({ "ambient.istio.io/redirection": "enabled" });
    }
    pod_of(metadata, node, &pod.name, &[APPLICATION_PORT])
}

fn pod_of(metadata: Value, node: &str, account: &str, ports: &[u16]) -> Value {
    let ports: Vec<_> = ports.iter().map(|port| json!({ "name": "main", "containerPort": port })).collect();
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {
        "nodeName": node,
        "serviceAccountName": account,
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 0,
        "containers": [{ "name": "main", "image": "none", "ports": ports }],
    } })
}

fn service(service: &ServicePlan) -> Value {
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": NAMESPACE, "name": service.name }, "spec": {
        "clusterIP": service.vip,
        "selector": { label_of(service): "yes" },
        "ports": [{ "name": "main", "port": service.port, "targetPort": service.target.unwrap_or(APPLICATION_PORT) }],
    } })
}

/// Pods with this label are endpoints of the service.
fn label_of(service: &ServicePlan) -> String {
    format!("endpoint-of-{}", service.name)
}

/// What the kubelet of its node says of a pod that runs.
pub(super) fn status(namespace: &str, name: &str, addresses: &[IpAddr], ready: bool) -> Value {
    let ready = if ready { "True" } else { "False" };
    let ips: Vec<_> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "namespace": namespace, "name": name }, "status": {
        "phase": "Running",
        "podIP": addresses[0],
        "podIPs": ips,
        "conditions": [{ "type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z" }],
    } })
}
