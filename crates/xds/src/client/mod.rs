//! The client of a discovery server: one stream for both types, kept up for as long as [`Client::run`] runs.
//!
//! What is to be said and what an answer means is decided in `state`, which neither awaits nor knows of streams; this file
//! carries it out. The state survives the stream, so that a new one continues where the last one ended. There are no tasks
//! and one channel: the [`Demand`] handles ask, and the running client answers.

mod backoff;
mod config;
mod demand;
mod known;
mod state;
mod stats;

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::{Status as GrpcStatus, Streaming};
use zspire_model::Change;
use zspire_wire::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use zspire_wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use crate::codec::Decoder;
use backoff::Backoff;
pub use config::Config;
use demand::Ask;
pub use demand::{Answer, Demand, Error as DemandError};
use state::State;
pub use stats::{Snapshot, Stats, Termination};

/// Requests that wait for the server to read them. A server that is sending may not read, so the client goes on reading while
/// requests wait; but not for ever.
const MAX_UNSENT: usize = 100_000;
/// Requests for single resources that wait for the client.
const ASKS: usize = 1024;
/// Resources that are decoded before other tasks get their turn.
const DECODE_AT_ONCE: usize = 512;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What is done with what is discovered. All calls come from [`Client::run`], in order.
pub trait Sink: Send + 'static {
    /// The mesh changed: apply all of it before anybody sees some of it.
    fn apply(&mut self, changes: Vec<Change>);
    /// The first answers of all types have been applied. Called once.
    fn synced(&mut self);
    /// The connection has another state.
    fn state(&mut self, state: Status);
}

/// State of the connection to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// There is none; a connection is being made, or waited for.
    Connecting {
        /// How many attempts failed since the last one that did not.
        attempt: u32,
        /// Why the last connection ended.
        last_error: Option<String>,
    },
    /// The server has answered.
    Connected,
}

/// A client that is not running yet.
#[derive(Debug)]
pub struct Client<S> {
    config: Config,
    service: S,
    decoder: Decoder,
    state: State,
    stats: Stats,
    demand: Option<Demand>,
    asks: mpsc::Receiver<Ask>,
}

/// Why a stream ended.
struct End {
    reason: Termination,
    why: String,
}

enum Event {
    Response(Result<Option<DeltaDiscoveryResponse>, GrpcStatus>),
    Ask(Ask),
    Late,
}

impl<S> Client<S>
where
    S: GrpcService<Body> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    S::ResponseBody: http_body::Body<Data = Bytes> + Send + 'static,
    <S::ResponseBody as http_body::Body>::Error: Into<BoxError> + Send,
{
    /// A client of the server that a channel leads to.
    pub fn new(config: Config, service: S) -> Self {
        let (sender, asks) = mpsc::channel(ASKS);
        Self {
            state: State::new(config.on_demand, config.max_request),
            demand: config.on_demand.then(|| Demand::new(sender)),
            decoder: Decoder::default(),
            stats: Stats::default(),
            config,
            service,
            asks,
        }
    }

    /// The handle by which single resources are asked for; none unless the client discovers on demand.
    pub fn demand(&self) -> Option<Demand> {
        self.demand.clone()
    }

    /// The counters, also while the client runs.
    pub fn stats(&self) -> Stats {
        self.stats.clone()
    }

    /// Discovers until shutdown. Whatever was applied stays valid while there is no connection.
    pub async fn run(mut self, mut sink: impl Sink, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(self.config.backoff_min, self.config.backoff_max);
        let mut last_error = None;
        loop {
            sink.state(Status::Connecting { attempt: backoff.attempt(), last_error: last_error.clone() });
            let started = Instant::now();
            let end = tokio::select! {
                () = shutdown.cancelled() => return,
                end = self.stream(&mut sink) => end,
            };
            self.stats.terminated(end.reason);
            let wait = backoff.after(started.elapsed());
            let (server, reason) = (&self.config.server, end.reason.as_str());
            tracing::warn!(server, reason, error = %end.why, retry_in = ?wait, "discovery stream ended");
            last_error = Some(end.why);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// One stream, from its opening to its end.
    async fn stream(&mut self, sink: &mut impl Sink) -> End {
        let (requests, outgoing) = mpsc::channel(MAX_UNSENT);
        let opening = self.state.open(&self.config.node());
        let outgoing = futures::stream::iter(opening).chain(ReceiverStream::new(outgoing));
        let mut client = AggregatedDiscoveryServiceClient::new(self.service.clone())
            .max_decoding_message_size(self.config.max_message);
        let begun = Instant::now();
        let deadline = begun + self.config.answer_timeout;
        let mut responses = match timeout(self.config.answer_timeout, client.delta_aggregated_resources(outgoing)).await
        {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return End { reason: Termination::ConnectionError, why: explain(&status) },
            Err(_) => return self.late(),
        };
        let mut connected = false;
        loop {
            let deadline = (!connected).then_some(deadline);
            let request = match self.next(&mut responses, deadline).await {
                Event::Response(Ok(Some(response))) => {
                    if !connected {
                        connected = true;
                        self.stats.connected(begun.elapsed());
                        sink.state(Status::Connected);
                    }
                    Some(self.receive(response, sink).await)
                }
                Event::Response(Ok(None)) => {
                    return End { reason: Termination::Complete, why: "the server ended the stream".into() };
                }
                Event::Response(Err(status)) => return End { reason: Termination::Error, why: explain(&status) },
                Event::Late => return self.late(),
                Event::Ask(ask) => self.state.ask(ask),
            };
            if request.is_some_and(|request| requests.try_send(request).is_err()) {
                return closed(&mut responses, self.config.answer_timeout).await;
            }
        }
    }

    async fn next(&mut self, responses: &mut Streaming<DeltaDiscoveryResponse>, deadline: Option<Instant>) -> Event {
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            response = responses.message() => Event::Response(response),
            // Ends at once where nobody can ask, and that branch with it.
            Some(ask) = self.asks.recv() => Event::Ask(ask),
            () = late => Event::Late,
        }
    }

    fn late(&self) -> End {
        let why = format!("the server did not answer within {:?}", self.config.answer_timeout);
        End { reason: Termination::ConnectionError, why }
    }

    /// Decodes and applies a response; the reply is an acknowledgement, or a rejection that names what was not applied.
    async fn receive(&mut self, response: DeltaDiscoveryResponse, sink: &mut impl Sink) -> DeltaDiscoveryRequest {
        self.stats.message(&response.type_url, response.encoded_len());
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, .. } = response;
        let mut receiving = match self.state.begin(&type_url, &removed_resources) {
            Some(receiving) => receiving,
            None => return state::reject_type(type_url, nonce),
        };
        for (i, resource) in resources.into_iter().enumerate() {
            receiving.resource(&mut self.decoder, resource);
            // One thread does all control work: a whole mesh must not hold it for long.
            if i % DECODE_AT_ONCE == DECODE_AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
        }
        let received = receiving.end(nonce);
        if !received.changes.is_empty() {
            sink.apply(received.changes);
        }
        for (waiting, answer) in received.answers {
            // Whoever asked may have gone.
            let _ = waiting.send(Ok(answer));
        }
        if self.state.newly_synced() {
            sink.synced();
        }
        received.reply
    }
}

/// The server reads no more requests; why, it may say in the responses.
async fn closed(responses: &mut Streaming<DeltaDiscoveryResponse>, patience: Duration) -> End {
    let status = async {
        loop {
            // What it says besides is not taken in any more: the next stream brings it.
            if let Err(status) = responses.message().await.transpose()? {
                return Some(status);
            }
        }
    };
    match timeout(patience, status).await {
        Ok(Some(status)) => End { reason: Termination::Error, why: explain(&status) },
        _ => End { reason: Termination::Complete, why: "the server reads no more requests".into() },
    }
}

/// Everything a failed call has to say: its message, then its causes, each once.
fn explain(status: &GrpcStatus) -> String {
    let mut text = match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    };
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    if let Some(hint) = hint(status.code()) {
        text.push_str("; ");
        text.push_str(hint);
    }
    text
}

/// What an operator can look at.
fn hint(code: tonic::Code) -> Option<&'static str> {
    use tonic::Code;
    match code {
        Code::Unauthenticated | Code::PermissionDenied => {
            Some("check the token (AUTH_TOKEN) or the node's certificate, and that the server trusts its issuer")
        }
        Code::Unimplemented => Some("check that the address (XDS_ADDRESS) is that of a discovery server"),
        Code::Unavailable => Some("check the address (XDS_ADDRESS), and that the server runs"),
        Code::ResourceExhausted => Some("the server or a limit of messages is too small for this mesh"),
        _ => None,
    }
}
