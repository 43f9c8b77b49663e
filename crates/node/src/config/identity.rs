//! Where certificates come from, in which trust domain, and what is asked of them beyond the default. How SPIRE is asked is
//! `spire`'s.

use super::options::{self as opt, Values};
use super::{Error, value};

/// Which source certificates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdentitySource {
    IstioCa,
    Local,
    SpireBroker,
    SpireDelegated,
    WorkloadApi,
}

impl IdentitySource {
    /// Every workload has credentials of its own, which nobody shares.
    pub fn is_per_workload(self) -> bool {
        matches!(self, Self::SpireBroker | Self::SpireDelegated | Self::WorkloadApi)
    }

    /// As it is written in IDENTITY_SOURCE.
    pub fn name(self) -> &'static str {
        match self {
            Self::IstioCa => "istio-ca",
            Self::Local => "local",
            Self::SpireBroker => "spire-broker",
            Self::SpireDelegated => "spire-delegated",
            Self::WorkloadApi => "workload-api",
        }
    }
}

/// What is asked of key exchange beyond the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compliance {
    None,
    /// Post-quantum key exchange only.
    Pqc,
}

/// Certificates of which no current revocation list says anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownStatus {
    Deny,
    Allow,
}

pub(super) fn source(v: &Values, in_kubernetes: bool) -> Result<IdentitySource, Error> {
    let fake = value::flag(v, &opt::FAKE_CA, false)?;
    let source = match v.get(&opt::IDENTITY_SOURCE) {
        None if fake => IdentitySource::Local,
        None | Some("istio-ca") if !fake => IdentitySource::IstioCa,
        Some("local") => IdentitySource::Local,
        Some("spire-broker") => IdentitySource::SpireBroker,
        Some("spire-delegated") => IdentitySource::SpireDelegated,
        Some("workload-api") => IdentitySource::WorkloadApi,
        Some("istio-ca") | None => {
            return Err(Error::Combination("FAKE_CA=true and IDENTITY_SOURCE=istio-ca contradict each other".into()));
        }
        Some(other) => {
            return Err(value::error(
                &opt::IDENTITY_SOURCE,
                other,
                "expected istio-ca, spire-broker, spire-delegated, workload-api or local",
            ));
        }
    };
    if source == IdentitySource::Local && in_kubernetes {
        return Err(Error::Combination(
            "the local development CA (FAKE_CA, IDENTITY_SOURCE=local) is refused inside Kubernetes: \
             whoever reads its key can be anyone; use istio-ca"
                .into(),
        ));
    }
    Ok(source)
}

pub(super) fn trust_domain(v: &Values) -> Result<String, Error> {
    let name = value::text(v, &opt::TRUST_DOMAIN, "cluster.local");
    match name.parse::<zspire_model::TrustDomain>() {
        Ok(_) => Ok(name),
        Err(why) => Err(value::error(&opt::TRUST_DOMAIN, &name, &why.to_string())),
    }
}

pub(super) fn unknown_status(v: &Values) -> Result<UnknownStatus, Error> {
    match v.get(&opt::CRL_UNKNOWN_STATUS) {
        None | Some("deny") => Ok(UnknownStatus::Deny),
        Some("allow") => Ok(UnknownStatus::Allow),
        Some(other) => Err(value::error(&opt::CRL_UNKNOWN_STATUS, other, "expected deny or allow")),
    }
}

pub(super) fn compliance(v: &Values) -> Result<Compliance, Error> {
    match v.get(&opt::COMPLIANCE_POLICY) {
        None => Ok(Compliance::None),
        Some("pqc") => Ok(Compliance::Pqc),
        Some(other) => Err(value::error(&opt::COMPLIANCE_POLICY, other, "expected pqc, or nothing")),
    }
}
