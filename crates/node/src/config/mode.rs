//! Whom the proxy serves: the pods of a node, or one workload.

use super::options::{self as opt, Values};
use super::{Error, value};

/// Whom the proxy serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// The pods of a node, handed over by a CNI node agent.
    Shared,
    /// One workload, in the network namespace of this process.
    Dedicated(WorkloadName),
}

/// A workload by name, as `PROXY_WORKLOAD_INFO` gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadName {
    pub namespace: String,
    pub name: String,
    pub service_account: String,
}

pub(super) fn mode(v: &Values) -> Result<Mode, Error> {
    match v.get(&opt::PROXY_MODE).unwrap_or("shared") {
        "shared" => Ok(Mode::Shared),
        "dedicated" => {
            let info = v.get(&opt::PROXY_WORKLOAD_INFO).ok_or_else(|| {
                Error::Combination(
                    "PROXY_MODE=dedicated needs PROXY_WORKLOAD_INFO=namespace/name/service-account".into(),
                )
            })?;
            let parts: Vec<&str> = info.split('/').collect();
            match parts[..] {
                [namespace, name, service_account] if parts.iter().all(|p| !p.is_empty()) => {
                    Ok(Mode::Dedicated(WorkloadName {
                        namespace: namespace.into(),
                        name: name.into(),
                        service_account: service_account.into(),
                    }))
                }
                _ => Err(value::error(&opt::PROXY_WORKLOAD_INFO, info, "expected namespace/name/service-account")),
            }
        }
        other => Err(value::error(&opt::PROXY_MODE, other, "expected shared or dedicated")),
    }
}
