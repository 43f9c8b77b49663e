//! The credentials of each pod, where the source gives every workload its own: asked for when the pod is added, not only when
//! discovery knows it, and given up, with the key, when the pod has gone.

use std::sync::Arc;

use anyhow::Context as _;
use zspire_identity::{Priority, Source, Watch, WorkloadKey};
use zspire_model::spiffe::template::Names;
use zspire_model::{IdTemplate, SpiffeId, TrustDomain};

use super::references::References;
use super::{Namespace, PodInfo};

/// Which identity is expected of a pod of this node.
#[derive(Debug, Clone)]
pub struct Expected {
    pub trust_domain: TrustDomain,
    /// None: Istio's.
    pub template: Option<IdTemplate>,
    pub node: String,
}

impl Expected {
    /// The identity of a pod. Fails where its names cannot be a part of one.
    pub fn of(&self, pod: &PodInfo) -> anyhow::Result<SpiffeId> {
        let PodInfo { name, namespace, service_account } = pod;
        let names = Names { namespace, service_account, pod: name, node: &self.node };
        let id = match &self.template {
            Some(template) => template.id(&names),
            None => SpiffeId::istio(&self.trust_domain, namespace, service_account),
        };
        id.with_context(|| format!("pod {pod} has no SPIFFE ID"))
    }
}

/// How pods get credentials of their own.
#[derive(Debug, Clone)]
pub struct PerPod {
    pub source: Arc<dyn Source>,
    pub references: Arc<References>,
    pub expected: Expected,
}

/// The credentials of one pod; given up with the value.
#[derive(Debug)]
pub struct Held {
    per_pod: PerPod,
    key: WorkloadKey,
    generation: u64,
    pub watch: Watch,
}

impl PerPod {
    /// Asks for a pod's credentials; never waits for them.
    pub fn ask(&self, uid: &str, pod: &PodInfo, namespace: &Namespace) -> anyhow::Result<Held> {
        let key = WorkloadKey { id: self.expected.of(pod)?, workload: Some(uid.into()) };
        let (generation, replaced) = self.references.insert(uid, pod, namespace, &key);
        if let Some(replaced) = replaced {
            // The same pod in a new sandbox: what was attested of the old one says nothing about it.
            self.source.forget(&replaced);
        }
        let watch = self.source.watch(&key, Priority::WarmUp);
        Ok(Held { per_pod: self.clone(), key, generation, watch })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let uid = self.key.workload.as_deref().unwrap_or_default();
        if self.per_pod.references.remove(uid, self.generation) {
            self.per_pod.source.forget(&self.key);
        }
    }
}
