//! How a SPIRE agent is asked: the variables of the sources that take identities from SPIRE.

use zspire_identity::spire::{Endpoint, EndpointError};
use zspire_model::spiffe::template;
use zspire_model::{IdTemplate, SpiffeId, TrustDomain};

use super::options::{self as opt, Values, Variable};
use super::{Error, IdentitySource, Mode, value};

/// How SPIRE is asked.
#[derive(Debug, Clone, Default)]
pub struct Spire {
    pub workload_api: Option<Endpoint>,
    pub broker: Option<Endpoint>,
    pub admin: Option<Endpoint>,
    /// By process, not by pod.
    pub by_process: bool,
    pub unattested_selectors: bool,
    /// Who must answer at the broker's socket; none: any agent of the trust domain.
    pub agent: Option<SpiffeId>,
    /// How identities follow from names; none: as Istio's do.
    pub template: Option<IdTemplate>,
    pub hint: Option<String>,
    pub accept_other_id: bool,
}

impl Spire {
    /// Reads them. `source` decides what is asked about when nothing is set.
    pub(super) fn parse(v: &Values, source: IdentitySource, trust_domain: &str) -> Result<Self, Error> {
        let endpoint = |variable: &'static Variable| -> Result<Option<Endpoint>, Error> {
            let parse =
                |text: &str| text.parse().map_err(|e: EndpointError| value::error(variable, text, &e.to_string()));
            v.get(variable).map(parse).transpose()
        };
        let by_process = match v.get(&opt::SPIFFE_REFERENCE) {
            None => source == IdentitySource::SpireDelegated,
            Some("pid") => true,
            Some("pod") if source == IdentitySource::SpireDelegated => {
                let why = "SPIFFE_REFERENCE=pod: the Delegated Identity API takes processes only; use IDENTITY_SOURCE=spire-broker";
                return Err(Error::Combination(why.into()));
            }
            Some("pod") => false,
            Some(other) => return Err(value::error(&opt::SPIFFE_REFERENCE, other, "expected pod or pid")),
        };
        let agent = v.get(&opt::SPIRE_AGENT_ID);
        let agent =
            agent.map(|id| id.parse().map_err(|_| value::error(&opt::SPIRE_AGENT_ID, id, "expected a SPIFFE ID")));
        Ok(Self {
            workload_api: endpoint(&opt::SPIFFE_ENDPOINT_SOCKET)?,
            broker: endpoint(&opt::SPIFFE_BROKER_SOCKET)?,
            admin: endpoint(&opt::SPIRE_ADMIN_ENDPOINT_SOCKET)?,
            by_process,
            unattested_selectors: value::flag(v, &opt::SPIRE_UNATTESTED_SELECTORS, false)?,
            agent: agent.transpose()?,
            template: id_template(v, trust_domain)?,
            hint: v.get(&opt::SPIFFE_HINT).map(str::to_owned),
            accept_other_id: value::flag(v, &opt::SPIFFE_ACCEPT_OTHER_ID, false)?,
        })
    }

    /// What contradicts itself, or is missing for a source.
    pub(super) fn check(&self, source: IdentitySource, mode: &Mode, node: &str) -> Result<(), Error> {
        let Self { workload_api, broker, admin, unattested_selectors, .. } = self;
        let needs = |name: &str, there: bool| match there {
            true => Ok(()),
            false => Err(Error::Combination(format!("IDENTITY_SOURCE={} needs {name}", source.name()))),
        };
        match source {
            IdentitySource::IstioCa | IdentitySource::Local => {}
            IdentitySource::SpireBroker => {
                needs("SPIFFE_BROKER_SOCKET", broker.is_some())?;
                needs("SPIFFE_ENDPOINT_SOCKET, where the proxy's own SVID comes from", workload_api.is_some())?;
            }
            IdentitySource::SpireDelegated => needs("SPIRE_ADMIN_ENDPOINT_SOCKET", admin.is_some())?,
            IdentitySource::WorkloadApi => {
                needs("SPIFFE_ENDPOINT_SOCKET", workload_api.is_some())?;
                needs("PROXY_MODE=dedicated: it has one identity for the process", *mode != Mode::Shared)?;
            }
        }
        if let Some(template) = &self.template {
            if !source.is_per_workload() {
                let why = "SPIFFE_ID_TEMPLATE is for identities from SPIRE: a CA of Istio's protocol issues Istio's pattern only";
                return Err(Error::Combination(why.into()));
            }
            if template.names_node() && node.is_empty() {
                return Err(Error::Combination("SPIFFE_ID_TEMPLATE uses {node}: set NODE_NAME".into()));
            }
        }
        if *unattested_selectors && source != IdentitySource::SpireDelegated {
            let why = "SPIRE_UNATTESTED_SELECTORS is for IDENTITY_SOURCE=spire-delegated alone";
            return Err(Error::Combination(why.into()));
        }
        Ok(())
    }
}

fn id_template(v: &Values, trust_domain: &str) -> Result<Option<IdTemplate>, Error> {
    let Some(text) = v.get(&opt::SPIFFE_ID_TEMPLATE).filter(|text| *text != template::ISTIO) else { return Ok(None) };
    let wrong = |why: String| value::error(&opt::SPIFFE_ID_TEMPLATE, text, &why);
    let domain: TrustDomain = trust_domain.parse().map_err(|e| wrong(format!("TRUST_DOMAIN: {e}")))?;
    IdTemplate::new(text, &domain).map(Some).map_err(|e| wrong(e.to_string()))
}
