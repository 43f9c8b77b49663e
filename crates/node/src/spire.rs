//! Builds the source of identities that asks a SPIRE agent, from settings.

use std::sync::Arc;

use anyhow::Context as _;
use zspire_identity::spire::{Agent, Config as Settings, broker, delegated, subscriptions, workload_api};
use zspire_identity::tls::Policy;
use zspire_identity::{Priority, Source, WorkloadKey};
use zspire_model::{SpiffeId, TrustDomain};

use crate::config::{Config, IdentitySource};
use crate::pods::references::{Kind, References};
use crate::tasks::Tasks;

/// The source, and what it has to be told of the pods that it is asked about.
#[derive(Debug)]
pub struct Spire {
    pub source: Arc<dyn Source>,
    /// None where the identity is that of the process.
    pub references: Option<Arc<References>>,
    /// The proxy's own SVID, where it shows one to anybody.
    pub own: Option<Arc<dyn Source>>,
}

/// Starts the source that IDENTITY_SOURCE names.
pub fn start(config: &Config, policy: &Policy, tasks: &Tasks) -> anyhow::Result<Spire> {
    let mut settings = Settings {
        policy: policy.clone(),
        hint: config.spire.hint.as_deref().map(Into::into),
        accept_other_id: config.spire.accept_other_id,
        ..Settings::default()
    };
    if config.identity == IdentitySource::WorkloadApi {
        let source = own(config, settings, tasks)?;
        return Ok(Spire { source, references: None, own: None });
    }
    let mut own_source = None;
    let agent: Arc<dyn Agent> = match config.identity {
        IdentitySource::SpireDelegated => {
            let admin = config.spire.admin.clone().context("SPIRE_ADMIN_ENDPOINT_SOCKET is not set")?;
            let (agent, bundles) = delegated::new(admin);
            tasks.spawn("trust bundles", bundles.run(tasks.stop.clone()));
            if config.own_workload().is_some() && config.spire.workload_api.is_some() {
                // The agent is not shown it: peers are, who ask for the proxy's metrics.
                let own = own(config, settings.clone(), tasks)?;
                settings.own = Some(own.watch(&own_key(config)?, Priority::WarmUp));
                own_source = Some(own);
            }
            Arc::new(agent)
        }
        _ => {
            // Whoever the agent says this process is: nothing but the agent's `brokers` depends on it.
            let own = own(config, Settings { accept_other_id: true, ..settings.clone() }, tasks)?;
            let broker = broker(config, &*own)?;
            settings.own = Some(own.watch(&own_key(config)?, Priority::OnDemand));
            own_source = Some(own);
            Arc::new(broker)
        }
    };
    if config.spire.unattested_selectors {
        tracing::warn!("SPIRE_UNATTESTED_SELECTORS=true: the SPIRE agent attests no workload, it believes this proxy");
    }
    let references = Arc::new(References::new(kind(config)));
    let (source, driver) = subscriptions::new(agent, references.clone(), settings);
    tasks.spawn("SVIDs", driver.run(tasks.stop.clone()));
    Ok(Spire { source: Arc::new(source), references: Some(references), own: own_source })
}

fn kind(config: &Config) -> Kind {
    match (config.spire.unattested_selectors, config.spire.by_process) {
        (true, _) => Kind::UnattestedSelectors,
        (false, true) => Kind::Process,
        (false, false) => Kind::Pod,
    }
}

/// The identity of this process, from the Workload API.
fn own(config: &Config, settings: Settings, tasks: &Tasks) -> anyhow::Result<Arc<dyn Source>> {
    let endpoint = config.spire.workload_api.clone().context("SPIFFE_ENDPOINT_SOCKET is not set")?;
    let agent = Arc::new(workload_api::WorkloadApi::new(endpoint));
    let (source, driver) = subscriptions::new(agent, Arc::new(workload_api::Own), settings);
    tasks.spawn("own SVID", driver.run(tasks.stop.clone()));
    Ok(Arc::new(source))
}

/// What the proxy's own SVID is asked for by.
pub fn own_key(config: &Config) -> anyhow::Result<WorkloadKey> {
    let domain: TrustDomain = config.trust_domain.parse().context("TRUST_DOMAIN")?;
    let (namespace, account) = match (&*config.pod_namespace, &*config.service_account) {
        ("", _) | (_, "") => ("istio-system", "ztunnel"),
        known => known,
    };
    let id = SpiffeId::istio(&domain, namespace, account).context("POD_NAMESPACE, SERVICE_ACCOUNT")?;
    Ok(WorkloadKey { id, workload: None })
}

/// The Broker API, which is shown the proxy's own SVID.
fn broker(config: &Config, own: &dyn Source) -> anyhow::Result<broker::Broker> {
    let endpoint = config.spire.broker.clone().context("SPIFFE_BROKER_SOCKET is not set")?;
    let own = own.watch(&own_key(config)?, Priority::OnDemand);
    Ok(broker::Broker::new(endpoint, own, expected_agent(config)))
}

/// Who has to answer at the Broker API.
pub fn expected_agent(config: &Config) -> broker::ExpectedAgent {
    match &config.spire.agent {
        Some(id) => broker::ExpectedAgent::Exactly(id.clone()),
        None => broker::ExpectedAgent::AnyOfTrustDomain,
    }
}
