//! SPIRE's Delegated Identity API: an authorized delegate asks for the SVIDs of other processes.
//!
//! The agent knows the delegate by its socket peer, without TLS. SVIDs and bundles come on separate streams and are joined
//! here: `federates_with` of the workload's message says which bundles are its own, whatever else the bundle stream holds (an
//! open one goes on holding domains whose federation was removed).
//!
//! Tasks: one, [`Bundler::run`], which keeps the bundle stream.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use rand::Rng as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use zspire_model::TrustDomain;
use zspire_wire::delegated_identity::delegated_identity_client::DelegatedIdentityClient;
use zspire_wire::delegated_identity::{
    SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509sviDsRequest,
    SubscribeToX509sviDsResponse,
};
use zspire_wire::spire_types::Selector;

use super::decode::{self, MAX_MESSAGE, Malformed};
use super::{Agent, Endpoint, Offer, Reference, Refusal, Update, Updates};
use crate::bundle::{Bundle, Bundles};
use crate::grpc::{self, Channel};

/// Pauses before the bundle stream is opened again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Bundles by trust domain; `None` before the first message.
type Known = Option<Arc<BTreeMap<TrustDomain, Bundle>>>;

/// Asks the Delegated Identity API.
#[derive(Debug, Clone)]
pub struct Delegated {
    channel: Channel,
    bundles: watch::Receiver<Known>,
}

/// Keeps the bundle stream.
#[derive(Debug)]
pub struct Bundler {
    channel: Channel,
    bundles: watch::Sender<Known>,
}

/// Connects when it is first asked.
pub fn new(endpoint: Endpoint) -> (Delegated, Bundler) {
    let connect = move || {
        let to = endpoint.clone();
        async move { to.connect().await }
    };
    let channel = Channel::over(connect, None, Vec::new());
    let (sender, bundles) = watch::channel(None);
    (Delegated { channel: channel.clone(), bundles }, Bundler { channel, bundles: sender })
}

fn client(channel: &Channel) -> DelegatedIdentityClient<Channel> {
    DelegatedIdentityClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE)
}

impl Bundler {
    /// Runs until `shutdown`. What is known stays known while the agent is away.
    pub async fn run(self, shutdown: CancellationToken) {
        let follow = async {
            let (mut pause, mut told) = (PAUSES.0, String::new());
            loop {
                let (why, served) = self.follow().await;
                if served {
                    (pause, told) = (PAUSES.0, String::new());
                }
                if why == told {
                    tracing::debug!(%why, "no trust bundles from the SPIRE agent");
                } else {
                    tracing::warn!(%why, "no trust bundles from the SPIRE agent, what is known is kept");
                    told = why;
                }
                // The generator must not be held while it sleeps.
                let part: f64 = rand::rng().random_range(0.5..=1.0);
                tokio::time::sleep(pause.mul_f64(part)).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        };
        tokio::select! {
            () = follow => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Follows one stream to its end: why it ended, and whether it had said anything.
    async fn follow(&self) -> (String, bool) {
        let opened = client(&self.channel).subscribe_to_x509_bundles(SubscribeToX509BundlesRequest {}).await;
        let mut stream = match opened {
            Ok(stream) => stream.into_inner(),
            Err(status) => return (grpc::explain(&status), false),
        };
        let mut served = false;
        loop {
            match stream.message().await {
                Ok(Some(message)) => {
                    self.bundles.send_replace(Some(Arc::new(bundles(&message))));
                    served = true;
                }
                Ok(None) => return ("the agent has ended their stream".into(), served),
                Err(status) => return (grpc::explain(&status), served),
            }
        }
    }
}

fn bundles(message: &SubscribeToX509BundlesResponse) -> BTreeMap<TrustDomain, Bundle> {
    let all = message.ca_certificates.iter().map(|(name, der)| (name.as_str(), &der[..]));
    decode::bundles(all).iter().map(|(domain, bundle)| (domain.clone(), bundle.clone())).collect()
}

#[async_trait]
impl Agent for Delegated {
    fn name(&self) -> &'static str {
        "spire-delegated"
    }

    async fn subscribe(&self, reference: &Reference) -> Result<Updates, Refusal> {
        let request = match reference {
            Reference::Process(process) => SubscribeToX509sviDsRequest { pid: process.pid(), selectors: Vec::new() },
            Reference::Selectors(selectors) => {
                let selector = |(kind, value): &(zspire_model::Str, zspire_model::Str)| Selector {
                    r#type: kind.to_string(),
                    value: value.to_string(),
                };
                SubscribeToX509sviDsRequest { pid: 0, selectors: selectors.iter().map(selector).collect() }
            }
            Reference::Pod { .. } | Reference::Own => {
                let why = "the Delegated Identity API takes process IDs (SPIFFE_REFERENCE=pid), not pods";
                return Err(Refusal { meaning: super::Meaning::Mistake, code: "InvalidArgument", why: why.into() });
            }
        };
        // PermissionDenied is about the delegate here, never about the workload.
        let refusal = |status: &tonic::Status| Refusal::from_status(status, |code| code == Code::NotFound);
        let opened = client(&self.channel).subscribe_to_x509svi_ds(request).await;
        let stream = opened.map_err(|status| refusal(&status))?.into_inner();
        let stream = stream.map(move |message| match message {
            Ok(message) => offers(message).map_err(|e| Refusal::outage("Malformed", e.to_string())),
            Err(status) => Err(refusal(&status)),
        });
        Ok(join(Box::pin(stream), self.bundles.clone()))
    }
}

/// A workload's SVIDs, and the names of the trust domains that it federates with.
type Offers = (Vec<Offer>, Vec<TrustDomain>);

fn offers(message: SubscribeToX509sviDsResponse) -> Result<Offers, Malformed> {
    decode::bounded(message.x509_svids.len())?;
    let mut offers = Vec::new();
    for entry in message.x509_svids {
        let svid = entry.x509_svid.ok_or_else(|| Malformed("an SVID without certificate".into()))?;
        let id = svid.id.ok_or_else(|| Malformed("an SVID without SPIFFE ID".into()))?;
        let id = format!("spiffe://{}{}", id.trust_domain, id.path);
        let chain = decode::chain_of(&id, &svid.cert_chain)?;
        offers.push(decode::offer(&id, chain, &entry.x509_svid_key, &svid.hint)?);
    }
    let federated = message.federates_with.iter().map(|name| decode::trust_domain(name)).collect::<Result<_, _>>()?;
    Ok((offers, federated))
}

type SvidStream = std::pin::Pin<Box<dyn futures::Stream<Item = Result<Offers, Refusal>> + Send>>;

/// An update whenever either of the two has changed and both are known. A bundle that is missing then is told.
fn join(svids: SvidStream, bundles: watch::Receiver<Known>) -> Updates {
    struct Join {
        svids: SvidStream,
        bundles: watch::Receiver<Known>,
        last: Option<Offers>,
    }
    let state = Join { svids, bundles, last: None };
    Box::pin(futures::stream::unfold(state, |mut state| async move {
        loop {
            tokio::select! {
                biased;
                message = state.svids.next() => match message? {
                    Ok(offers) => state.last = Some(offers),
                    Err(refusal) => return Some((Err(refusal), state)),
                },
                // Ends only with the process.
                changed = state.bundles.changed() => changed.ok()?,
            }
            let known = state.bundles.borrow_and_update().clone();
            if let (Some(last), known) = (&state.last, known.as_deref())
                && (known.is_some() || last.0.is_empty())
            {
                return Some((combine(last, known), state));
            }
        }
    }))
}

/// Refused while a bundle is missing that the SVIDs cannot do without.
fn combine((offers, federated): &Offers, known: Option<&BTreeMap<TrustDomain, Bundle>>) -> Result<Update, Refusal> {
    let Some(known) = known.filter(|_| !offers.is_empty()) else { return Ok(Update::default()) };
    let own = offers.iter().map(|offer| offer.id.trust_domain());
    if let Some(domain) = own.clone().find(|domain| !known.contains_key(*domain)) {
        return Err(Refusal::outage("NoBundle", format!("the SPIRE agent has no usable trust bundle of {domain}")));
    }
    let named = federated.iter().chain(own).filter_map(|domain| Some((domain.clone(), known.get(domain)?.clone())));
    let bundles: Bundles = named.collect();
    Ok(Update { offers: offers.clone(), bundles: Arc::new(bundles) })
}
