//! The discovery server: whoever is let in gets the mesh, and then what changes in it.
//!
//! The mesh comes as immutable [`ResourceSet`]s by a watch channel. Each stream compares the set that it sent last with the
//! newest one, when its client is ready for more (`stream`); streams that fall behind therefore skip what is in between. There
//! are no tasks: a stream is a future that tonic drives, and that ends with the connection.
//!
//! It does not know who may ask ([`Authorize`] decides) nor where the mesh comes from.

mod connections;
mod set;
mod stream;
mod subscription;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use prost_types::Struct;
use prost_types::value::Kind;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use zspire_wire::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use zspire_wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use connections::Connections;
pub use connections::{Connection, TypeStatus};
pub use set::{Entry, ResourceSet};

/// Who asks, as [`Authorize`] recognized it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Name for the status view and the log, for example a SPIFFE id.
    pub name: String,
}

/// What a client says of itself. Nothing of it is proven.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// Its id, for example `ztunnel~10.0.0.1~pod.namespace~namespace.svc.cluster.local`.
    pub id: String,
    metadata: Struct,
}

impl Node {
    /// A text of its metadata.
    pub fn metadata(&self, name: &str) -> Option<&str> {
        match self.metadata.fields.get(name)?.kind.as_ref()? {
            Kind::StringValue(text) => Some(text),
            _ => None,
        }
    }

    /// The node that it runs on, as it says.
    pub fn node_name(&self) -> Option<&str> {
        self.metadata("NODE_NAME").filter(|name| !name.is_empty())
    }
}

/// Decides who may ask: from what the transport knows of the peer (extensions), the headers, and what the client says of itself.
pub type Authorize = dyn Fn(&tonic::Extensions, &MetadataMap, &Node) -> Result<Caller, Status> + Send + Sync;

/// What clients may do.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Streams at once.
    pub max_connections: usize,
    /// Names that one stream subscribes to.
    pub max_subscriptions: usize,
    /// Longest request, in bytes. A node that knows 100,000 resources says so in some 10 MB.
    pub max_request: usize,
    /// How long a client may take to say who it is.
    pub first_request: Duration,
    /// How long a client may take to acknowledge a response.
    pub acknowledgement: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 10_000,
            max_subscriptions: 200_000,
            max_request: 64 << 20,
            first_request: Duration::from_secs(10),
            acknowledgement: Duration::from_secs(300),
        }
    }
}

/// The server. Clones are one server.
#[derive(Clone)]
pub struct Server {
    resources: watch::Receiver<Arc<ResourceSet>>,
    authorize: Arc<Authorize>,
    limits: Limits,
    connections: Connections,
    /// How it names itself to clients.
    identifier: Arc<str>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Server {
    /// A server of the newest set that comes by the channel. Streams end when the channel is closed.
    pub fn new(resources: watch::Receiver<Arc<ResourceSet>>, authorize: Arc<Authorize>, limits: Limits) -> Self {
        let identifier = concat!("zspire ", env!("CARGO_PKG_VERSION")).into();
        Self { resources, authorize, limits, connections: Connections::default(), identifier }
    }

    /// The gRPC service, with the limits on messages set.
    pub fn into_service(self) -> AggregatedDiscoveryServiceServer<Self> {
        let max_request = self.limits.max_request;
        AggregatedDiscoveryServiceServer::new(self).max_decoding_message_size(max_request)
    }

    /// The streams that are open, oldest first.
    pub fn connections(&self) -> Vec<Connection> {
        self.connections.list()
    }

    async fn first_request(
        &self,
        requests: &mut Streaming<DeltaDiscoveryRequest>,
    ) -> Result<(DeltaDiscoveryRequest, Node), Status> {
        let first = timeout(self.limits.first_request, requests.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no request came"))??
            .ok_or_else(|| Status::invalid_argument("no request came"))?;
        let node = first.node.clone().unwrap_or_default();
        if node.id.is_empty() {
            return Err(Status::invalid_argument("missing node information"));
        }
        let node = Node { id: node.id, metadata: node.metadata.unwrap_or_default() };
        Ok((first, node))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Server {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (metadata, extensions, mut requests) = request.into_parts();
        let (first, node) = self.first_request(&mut requests).await?;
        let caller = (self.authorize)(&extensions, &metadata, &node)?;
        let tracked = self
            .connections
            .add(&node, &caller, self.limits.max_connections)
            .ok_or_else(|| Status::resource_exhausted("too many streams"))?;
        tracing::info!(node = %node.id, caller = %caller.name, "discovery stream opened");
        let stream = stream::State::new(self, requests, node, tracked);
        Ok(Response::new(Box::pin(stream.responses(first))))
    }
}
