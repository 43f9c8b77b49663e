//! The credentials of each pod, where the source gives every workload its own: asked for when the pod is added, not only when
//! discovery knows it, and given up, with the key, when the pod has gone.

use std::sync::Arc;

use anyhow::Context as _;
use zspire_identity::{Priority, Source, Watch, WorkloadKey};
use zspire_model::{SpiffeId, TrustDomain};

use super::references::References;
use super::{Namespace, PodInfo};

/// How pods get credentials of their own.
#[derive(Debug, Clone)]
pub struct PerPod {
    pub source: Arc<dyn Source>,
    pub references: Arc<References>,
    /// Of the identity that is expected of a pod.
    pub trust_domain: TrustDomain,
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
        let id = SpiffeId::istio(&self.trust_domain, &pod.namespace, &pod.service_account)
            .with_context(|| format!("pod {pod} has no SPIFFE ID"))?;
        let key = WorkloadKey { id, workload: Some(uid.into()) };
        let generation = self.references.insert(uid, pod, namespace);
        if generation > 0 {
            // The same pod in a new sandbox: what was attested of the old one says nothing about it.
            self.source.forget(&key);
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
