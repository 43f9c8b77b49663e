//! `baggage`: the source workload, as OpenTelemetry resource attributes.

use std::fmt;
use std::sync::Arc;

use super::{Malformed, is_plain};

/// What a `baggage` header says about a workload. Absent and empty are the same.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Baggage {
    /// `k8s.cluster.name`
    pub cluster: Option<Arc<str>>,
    /// `k8s.namespace.name`
    pub namespace: Option<Arc<str>>,
    /// The kind of the workload, in `k8s.<kind>.name`: `deployment`, `cronjob`, `pod` or `job`.
    pub kind: Kind,
    /// `k8s.<kind>.name`
    pub workload: Option<Arc<str>>,
    /// `service.name`
    pub service: Option<Arc<str>>,
    /// `service.version`
    pub revision: Option<Arc<str>>,
    /// `cloud.region`
    pub region: Option<Arc<str>>,
    /// `cloud.availability_zone`
    pub zone: Option<Arc<str>>,
}

/// Kinds of workloads that have an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// `k8s.deployment.name`
    #[default]
    Deployment,
    /// `k8s.cronjob.name`
    CronJob,
    /// `k8s.pod.name`
    Pod,
    /// `k8s.job.name`
    Job,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Deployment, Self::CronJob, Self::Pod, Self::Job];

    /// Of a workload type as discovery names it; anything unknown counts as a deployment, as elsewhere in Istio.
    pub fn of(workload_type: &str) -> Self {
        Self::ALL.into_iter().find(|kind| kind.name() == workload_type).unwrap_or_default()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

impl Baggage {
    /// Adds the entries of one header value. Unknown keys are skipped; the last of equal keys wins.
    pub fn merge(&mut self, value: &str) -> Result<(), Malformed> {
        const MALFORMED: Malformed = Malformed("baggage");
        // W3C Baggage allows 64 entries.
        if value.split(',').count() > 64 {
            return Err(MALFORMED);
        }
        for entry in value.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let (key, rest) = entry.split_once('=').ok_or(MALFORMED)?;
            // Properties after `;` are metadata of the entry.
            let value = rest.split(';').next().unwrap_or_default().trim();
            if let Some(slot) = self.slot(key.trim()) {
                if !is_plain(value) {
                    return Err(MALFORMED);
                }
                *slot = (!value.is_empty()).then(|| value.into());
            }
        }
        Ok(())
    }

    fn slot(&mut self, key: &str) -> Option<&mut Option<Arc<str>>> {
        match key {
            "k8s.cluster.name" => Some(&mut self.cluster),
            "k8s.namespace.name" => Some(&mut self.namespace),
            "service.name" => Some(&mut self.service),
            "service.version" => Some(&mut self.revision),
            "cloud.region" => Some(&mut self.region),
            "cloud.availability_zone" => Some(&mut self.zone),
            _ => {
                let name = key.strip_prefix("k8s.")?.strip_suffix(".name")?;
                self.kind = Kind::ALL.into_iter().find(|kind| kind.name() == name)?;
                Some(&mut self.workload)
            }
        }
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut entry = |key: fmt::Arguments<'_>, value: &Option<Arc<str>>| {
            let Some(value) = value else { return Ok(()) };
            write!(f, "{separator}{key}={value}")?;
            separator = ",";
            Ok(())
        };
        entry(format_args!("k8s.cluster.name"), &self.cluster)?;
        entry(format_args!("k8s.namespace.name"), &self.namespace)?;
        entry(format_args!("k8s.{}.name", self.kind.name()), &self.workload)?;
        entry(format_args!("service.name"), &self.service)?;
        entry(format_args!("service.version"), &self.revision)?;
        entry(format_args!("cloud.region"), &self.region)?;
        entry(format_args!("cloud.availability_zone"), &self.zone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &str) -> Result<Baggage, Malformed> {
        let mut baggage = Baggage::default();
        baggage.merge(value).map(|()| baggage)
    }

    #[test]
    fn round_trip() {
        let text = "k8s.cluster.name=c,k8s.namespace.name=ns,k8s.job.name=w,service.name=s,service.version=v1,\
                    cloud.region=r,cloud.availability_zone=z";
        assert_eq!(parse(text).unwrap().to_string(), text);
        assert_eq!(Baggage::default().to_string(), "");
        assert_eq!(parse("k8s.cluster.name=,service.name=").unwrap(), Baggage::default());
    }

    #[test]
    fn strict_and_bounded() {
        assert_eq!(parse("other=1;p=2, k8s.pod.name = x ;a=b").unwrap().workload.as_deref(), Some("x"));
        for bad in ["novalue", "service.name=a\"b", "service.name=a b", &format!("service.name={}", "x".repeat(254))] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse(&"a=b,".repeat(65)).is_err());
    }
}
