//! A discovery server without any logic: the test takes each stream by the hand.

use std::pin::Pin;

use futures::Stream;
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use zspire_wire::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use zspire_wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource};
use zspire_xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};

use crate::support::{Served, soon};

pub(crate) struct Fake {
    pub(crate) served: Served,
    streams: mpsc::Receiver<FakeStream>,
}

pub(crate) struct FakeStream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

struct Service(mpsc::Sender<FakeStream>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outgoing) = mpsc::channel(8);
        let stream = FakeStream { requests: request.into_inner(), responses };
        self.0.send(stream).await.map_err(|_| Status::unavailable("the test has ended"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

impl Fake {
    pub(crate) async fn new() -> Self {
        let (sender, streams) = mpsc::channel(8);
        Self { served: Served::new(AggregatedDiscoveryServiceServer::new(Service(sender))).await, streams }
    }

    /// The next stream that a client opens.
    pub(crate) async fn stream(&mut self) -> FakeStream {
        soon("a stream", self.streams.recv()).await.unwrap()
    }
}

impl FakeStream {
    pub(crate) async fn request(&mut self) -> DeltaDiscoveryRequest {
        soon("a request", self.requests.message()).await.unwrap().expect("the client is there")
    }

    /// The requests that a stream begins with, one for each type.
    pub(crate) async fn opening(&mut self) -> (DeltaDiscoveryRequest, DeltaDiscoveryRequest) {
        let requests = (self.request().await, self.request().await);
        assert_eq!(requests.0.type_url, ADDRESS_TYPE);
        assert_eq!(requests.1.type_url, AUTHORIZATION_TYPE);
        requests
    }

    pub(crate) async fn send(&self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).await.unwrap();
    }

    /// Sends a response; the reply that it leads to.
    pub(crate) async fn exchange(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let nonce = response.nonce.clone();
        self.send(response).await;
        let reply = self.request().await;
        assert_eq!(reply.response_nonce, nonce);
        reply
    }

    pub(crate) async fn fail(self, status: Status) {
        self.responses.send(Err(status)).await.unwrap();
    }
}

pub(crate) fn response(
    type_url: &str,
    nonce: &str,
    resources: Vec<WireResource>,
    removed: &[&str],
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: nonce.into(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

pub(crate) fn wire(resource: &Resource, version: &str) -> WireResource {
    WireResource {
        name: resource.name().to_string(),
        version: version.into(),
        aliases: Vec::new(),
        resource: Some(Any { type_url: resource.type_url().into(), value: zspire_xds::codec::encode(resource) }),
    }
}

/// A resource whose value is no message.
pub(crate) fn malformed(type_url: &str, name: &str) -> WireResource {
    WireResource {
        name: name.into(),
        version: "9".into(),
        aliases: Vec::new(),
        resource: Some(Any { type_url: type_url.into(), value: vec![0xff; 5] }),
    }
}
