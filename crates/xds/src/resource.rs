//! One thing that discovery is about, whichever kind it is.

use std::sync::Arc;

use zspire_model::{Change, NamespacedHostname, NamespacedName, Policy, Service, Str, Workload};

use crate::codec::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// One resource of the mesh.
#[derive(Debug, Clone, PartialEq)]
pub enum Resource {
    /// A workload.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
    /// An authorization policy.
    Policy(Arc<Policy>),
}

/// Which kind of resource a name belongs to: names of different kinds may be equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A workload.
    Workload,
    /// A service.
    Service,
    /// An authorization policy.
    Policy,
}

impl Resource {
    /// Its name in discovery: the UID of a workload, `namespace/hostname` of a service, `namespace/name` of a policy.
    pub fn name(&self) -> Str {
        match self {
            Self::Workload(workload) => workload.uid.clone(),
            Self::Service(service) => format!("{}/{}", service.namespace, service.hostname).into(),
            Self::Policy(policy) => format!("{}/{}", policy.namespace, policy.name).into(),
        }
    }

    /// Its type in discovery; workloads and services have the same.
    pub fn type_url(&self) -> &'static str {
        self.kind().type_url()
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Workload(_) => Kind::Workload,
            Self::Service(_) => Kind::Service,
            Self::Policy(_) => Kind::Policy,
        }
    }

    /// The change that makes it known.
    pub fn put(&self) -> Change {
        match self {
            Self::Workload(workload) => Change::PutWorkload(workload.clone()),
            Self::Service(service) => Change::PutService(service.clone()),
            Self::Policy(policy) => Change::PutPolicy(policy.clone()),
        }
    }

    /// The change that makes it unknown.
    pub fn remove(&self) -> Change {
        match self {
            Self::Workload(workload) => Change::RemoveWorkload(workload.uid.clone()),
            Self::Service(service) => Change::RemoveService(service.key()),
            Self::Policy(policy) => Change::RemovePolicy(policy.key()),
        }
    }
}

impl Kind {
    /// What it is called in messages.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Workload => "workload",
            Self::Service => "service",
            Self::Policy => "policy",
        }
    }

    /// The type in discovery.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Workload | Self::Service => ADDRESS_TYPE,
            Self::Policy => AUTHORIZATION_TYPE,
        }
    }

    /// The change that makes the resource with a name unknown; none if no resource of this kind can have that name.
    pub fn remove(self, name: &Str) -> Option<Change> {
        let parts = || name.split_once('/');
        Some(match self {
            Self::Workload => Change::RemoveWorkload(name.clone()),
            Self::Service => {
                let (namespace, hostname) = parts()?;
                Change::RemoveService(NamespacedHostname { namespace: namespace.into(), hostname: hostname.into() })
            }
            Self::Policy => {
                // One that cannot be read is kept under whatever name it was sent under.
                let (namespace, name) = parts().unwrap_or(("", name));
                Change::RemovePolicy(NamespacedName { namespace: namespace.into(), name: name.into() })
            }
        })
    }
}
