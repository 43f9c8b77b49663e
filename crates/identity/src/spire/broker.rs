//! The SPIFFE Broker API: SVIDs of referenced workloads, over mutual TLS with the proxy's own SVID, also on a Unix socket.
//!
//! The proxy's own SVID comes from the Workload API and is renewed there; every connection is made with the newest. Whoever
//! answers must prove to be an agent: SPIRE shows the agent's SVID, whose ID is below `/spire/agent/`, where no workload can be
//! registered.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::StreamExt as _;
use http::{HeaderName, HeaderValue};
use prost_types::Any;
use tokio::time::{Duration, Instant, timeout};
use tonic::Code;
use zspire_model::SpiffeId;
use zspire_wire::broker::api_client::ApiClient;
use zspire_wire::broker::{
    KubernetesObjectReference, KubernetesObjectType, SubscribeToX509svidRequest, SubscribeToX509svidResponse,
    WorkloadPidReference, WorkloadReference,
};

use super::decode::{self, MAX_MESSAGE, Malformed, Sent};
use super::{Agent, Endpoint, Meaning, Reference, Refusal, Update, Updates};
use crate::grpc::Channel;
use crate::source::Watch;
use crate::tls::{Error as TlsError, ExpectedPeers, Stream};

/// How long a connection waits for the proxy's own SVID, and until it is there.
const OWN_SVID: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(15);
/// How long a server that speaks first is waited for: HTTP/2 lets it, and SPIRE's does.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// What a reference to a pod is called; compared to the letter.
pub const KUBERNETES_REFERENCE: &str = "type.googleapis.com/spiffe.broker.KubernetesObjectReference";
/// What a reference to a process is called.
pub const PROCESS_REFERENCE: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";

/// Who may answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectedAgent {
    /// Any agent of the proxy's own trust domain: `spiffe://<trust domain>/spire/agent/…`
    AnyOfTrustDomain,
    /// Exactly this one.
    Exactly(SpiffeId),
}

/// Asks the Broker API.
#[derive(Debug, Clone)]
pub struct Broker {
    channel: Channel,
    /// Who has answered last.
    answers: Arc<Mutex<Option<SpiffeId>>>,
}

impl Broker {
    /// Connects when it is first asked. `own` are the proxy's own credentials.
    pub fn new(endpoint: Endpoint, own: Watch, expected: ExpectedAgent) -> Self {
        let answers = Arc::new(Mutex::new(None));
        let answered = answers.clone();
        let connect = move || {
            let (to, own, expected, answered) = (endpoint.clone(), own.clone(), expected.clone(), answered.clone());
            async move {
                let opened = timeout(CONNECT, open(&to, &own, &expected)).await;
                let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("the agent at {to} says nothing"));
                let (stream, agent) = opened.map_err(late)??;
                *answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent);
                Ok(stream)
            }
        };
        let header = (HeaderName::from_static("broker.spiffe.io"), HeaderValue::from_static("true"));
        Self { channel: Channel::over(connect, None, vec![header]), answers }
    }
}

type Opened = (Stream<super::endpoint::Io>, SpiffeId);

async fn open(to: &Endpoint, own: &Watch, expected: &ExpectedAgent) -> io::Result<Opened> {
    let own = own.ready(Instant::now() + OWN_SVID).await;
    let own = own.map_err(|e| io::Error::other(format!("the proxy's own SVID (SPIFFE_ENDPOINT_SOCKET): {e}")))?;
    let socket = to.connect().await?;
    let expected = match expected {
        ExpectedAgent::Exactly(id) => ExpectedPeers::one(id.clone()),
        ExpectedAgent::AnyOfTrustDomain => ExpectedPeers::below(own.id().trust_domain(), "/spire/agent/"),
    };
    let told = |error: TlsError| io::Error::other(format!("TLS with the SPIRE agent at {to}: {}", chain(&error)));
    let (mut stream, peer) = own.connect(socket, &expected).await.map_err(told)?;
    // Who listens for the client to speak first is not waited for: its refusal is then told in the words of HTTP/2.
    if let Ok(Err(error)) = timeout(FIRST_WORD, stream.heard()).await {
        let error = match TlsError::from_io(error) {
            closed @ TlsError::Io(_) => told(closed),
            alert => {
                let (id, alert) = (own.id(), chain(&alert));
                let what = format!("the SPIRE agent at {to} refuses the proxy's own SVID, {id}");
                io::Error::other(format!("{what}: is it in the agent's list of brokers? ({alert})"))
            }
        };
        return Err(error);
    }
    Ok((stream, peer.id))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[async_trait]
impl Agent for Broker {
    fn name(&self) -> &'static str {
        "spire-broker"
    }

    fn id(&self) -> Option<SpiffeId> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn subscribe(&self, reference: &Reference) -> Result<Updates, Refusal> {
        let reference = WorkloadReference { reference: Some(packed(reference)?) };
        let request = SubscribeToX509svidRequest { reference: Some(reference) };
        let about_workload = |code| matches!(code, Code::NotFound | Code::PermissionDenied);
        let refusal = move |status: &tonic::Status| Refusal::from_status(status, about_workload);
        let mut client = ApiClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        let opened = client.subscribe_to_x509svid(request).await;
        let stream = opened.map_err(|status| refusal(&status))?.into_inner();
        let updates = stream.map(move |message| match message {
            Ok(message) => update(message).map_err(|e| Refusal::outage("Malformed", e.to_string())),
            Err(status) => Err(refusal(&status)),
        });
        Ok(Box::pin(updates))
    }
}

fn packed(reference: &Reference) -> Result<Any, Refusal> {
    use prost::Message as _;
    let any = |kind: &str, value: Vec<u8>| Any { type_url: kind.to_owned(), value };
    match reference {
        Reference::Pod { uid } => {
            let kind = KubernetesObjectType { plural: "pods".into(), group: "core".into() };
            let pod = KubernetesObjectReference { r#type: Some(kind), key: None, uid: uid.to_string() };
            Ok(any(KUBERNETES_REFERENCE, pod.encode_to_vec()))
        }
        Reference::Process(process) => {
            Ok(any(PROCESS_REFERENCE, WorkloadPidReference { pid: process.pid() }.encode_to_vec()))
        }
        Reference::Selectors(_) | Reference::Own => {
            let why = "the Broker API takes pods and process IDs only";
            Err(Refusal { meaning: Meaning::Mistake, code: "InvalidArgument", why: why.into() })
        }
    }
}

fn update(message: SubscribeToX509svidResponse) -> Result<Update, Malformed> {
    let sent = message.svids.into_iter().map(|svid| Sent {
        id: svid.spiffe_id,
        chain: svid.x509_svid,
        key: svid.x509_svid_key,
        bundle: svid.bundle,
        hint: svid.hint,
    });
    decode::update(sent, &message.federated_bundles)
}
