//! A discovery server that tells the mesh file's workloads and policies, each not before the test says so.

use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;

use prost_types::Any;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use zspire_wire::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use zspire_wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource};
use zspire_xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};

use crate::mesh::Mesh;

/// The server; it ends with its value.
#[derive(Debug)]
pub struct Discovery {
    _runtime: Runtime,
    told: watch::Sender<Told>,
}

/// What may be told so far.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    addresses: bool,
    policies: bool,
}

struct Service {
    resources: Arc<Vec<Resource>>,
    told: watch::Receiver<Told>,
}

impl Discovery {
    /// Where it listens: on the uplink, which has the same address in every test.
    pub const URL: &str = "http://10.10.0.254:15010";

    /// Starts it with what the mesh file says now. It tells nothing yet.
    #[track_caller]
    pub fn start(mesh: &Mesh) -> Self {
        let resources = zspire_xds::file::parse(&mesh.file(), "mesh.json").expect("the mesh file can be read");
        let resources = Arc::new(resources);
        let address = Self::URL.strip_prefix("http://").expect("a URL");
        let listener = mesh.uplink().run(|| TcpListener::bind(address));
        let listener = listener.expect("the namespace can be entered").expect("a free port");
        listener.set_nonblocking(true).expect("a socket option");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (told, receiver) = watch::channel(Told::default());
        let service = AggregatedDiscoveryServiceServer::new(Service { resources, told: receiver });
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listening socket");
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
        });
        Self { _runtime: runtime, told }
    }

    /// Tells workloads and services.
    pub fn tell_addresses(&self) {
        self.told.send_modify(|told| told.addresses = true);
    }

    /// Tells policies.
    pub fn tell_policies(&self) {
        self.told.send_modify(|told| told.policies = true);
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outgoing) = mpsc::channel(8);
        for type_url in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
            let (responses, resources, mut told) = (responses.clone(), self.resources.clone(), self.told.clone());
            tokio::spawn(async move {
                let may = |told: &Told| if type_url == ADDRESS_TYPE { told.addresses } else { told.policies };
                if told.wait_for(may).await.is_ok() {
                    // Whoever asked may have gone.
                    let _ = responses.send(Ok(all(type_url, &resources))).await;
                }
            });
        }
        let mut requests = request.into_inner();
        // Held open as long as the client does; what it says is nothing new.
        tokio::spawn(async move {
            while let Ok(Some(_)) = requests.message().await {}
            drop(responses);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

fn all(type_url: &str, resources: &[Resource]) -> DeltaDiscoveryResponse {
    let of_type = resources.iter().filter(|resource| resource.type_url() == type_url);
    let wire = |resource: &Resource| WireResource {
        name: resource.name().to_string(),
        version: "1".into(),
        aliases: Vec::new(),
        resource: Some(Any { type_url: type_url.into(), value: zspire_xds::codec::encode(resource) }),
    };
    DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: "1".into(),
        resources: of_type.map(wire).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}
