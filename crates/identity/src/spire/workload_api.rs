//! The SPIFFE Workload API: the identity of the process that asks, attested by its socket peer.
//!
//! It serves a proxy that has one workload, and gives the proxy of a node the SVID that it shows to the Broker API.

use async_trait::async_trait;
use futures::StreamExt as _;
use http::{HeaderName, HeaderValue};
use tonic::Code;
use zspire_model::Str;
use zspire_wire::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use zspire_wire::workload_api::{X509svidRequest, X509svidResponse};

use super::decode::{self, MAX_MESSAGE, Malformed, Sent};
use super::{Agent, Endpoint, Locate, Meaning, Reference, Refusal, Update, Updates};
use crate::grpc::Channel;
use crate::source::WorkloadKey;

/// Asks the Workload API.
#[derive(Debug, Clone)]
pub struct WorkloadApi {
    channel: Channel,
}

impl WorkloadApi {
    /// Connects when it is first asked.
    pub fn new(endpoint: Endpoint) -> Self {
        let connect = move || {
            let to = endpoint.clone();
            async move { to.connect().await }
        };
        let header = (HeaderName::from_static("workload.spiffe.io"), HeaderValue::from_static("true"));
        Self { channel: Channel::over(connect, None, vec![header]) }
    }
}

#[async_trait]
impl Agent for WorkloadApi {
    fn name(&self) -> &'static str {
        "workload-api"
    }

    async fn subscribe(&self, _: &Reference) -> Result<Updates, Refusal> {
        let mut client = SpiffeWorkloadApiClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        // SPIRE says PermissionDenied when nothing is registered, and also for a moment after it has started anew.
        let refusal = |status: &tonic::Status| {
            let refusal = Refusal::from_status(status, |code| code == Code::PermissionDenied);
            let unregistered = refusal.meaning == Meaning::Gone;
            Refusal { meaning: if unregistered { Meaning::Unregistered } else { refusal.meaning }, ..refusal }
        };
        let stream = client.fetch_x509svid(X509svidRequest {}).await.map_err(|status| refusal(&status))?.into_inner();
        let mut served = false;
        let updates = stream.map(move |message| match message {
            Ok(message) => {
                served = true;
                update(message).map_err(|e| Refusal::outage("Malformed", e.to_string()))
            }
            // On a stream that has served, it is how an answer without SVIDs is given.
            Err(status) if served && status.code() == Code::PermissionDenied => Ok(Update::default()),
            Err(status) => Err(refusal(&status)),
        });
        Ok(Box::pin(updates))
    }
}

fn update(message: X509svidResponse) -> Result<Update, Malformed> {
    let sent = message.svids.into_iter().map(|svid| Sent {
        id: svid.spiffe_id,
        chain: svid.x509_svid,
        key: svid.x509_svid_key,
        bundle: svid.bundle,
        hint: svid.hint,
    });
    decode::update(sent, &message.federated_bundles)
}

/// Asks about the process itself, whatever workload it is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Own;

impl Locate for Own {
    fn locate(&self, _: &WorkloadKey, _: usize) -> Result<Reference, Str> {
        Ok(Reference::Own)
    }
}
