//! The server, with the client of this crate and with requests made by hand.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use zspire_model::Change;
use zspire_wire::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use zspire_wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use zspire_wire::rpc;
use zspire_xds::client::Answer;
use zspire_xds::server::{Authorize, Caller, Limits, ResourceSet, Server};
use zspire_xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Kind, Resource};

use crate::support::{Running, Served, channel, config, endpoint, policy, put_workload, service, soon, workload};

struct Mesh {
    set: watch::Sender<Arc<ResourceSet>>,
    server: Server,
    served: Served,
}

fn everybody() -> Arc<Authorize> {
    Arc::new(|_, _, node| Ok(Caller { name: node.metadata("NODE_NAME").unwrap_or("?").to_owned() }))
}

impl Mesh {
    async fn new(resources: Vec<Resource>) -> Self {
        Self::with(resources, everybody(), Limits::default()).await
    }

    async fn with(resources: Vec<Resource>, authorize: Arc<Authorize>, limits: Limits) -> Self {
        let (set, receiver) = watch::channel(Arc::new(ResourceSet::new(resources)));
        let server = Server::new(receiver, authorize, limits);
        let served = Served::new(server.clone().into_service()).await;
        Self { set, server, served }
    }

    fn change(&self, changes: impl IntoIterator<Item = Change>) {
        let next = self.set.borrow().with(changes);
        self.set.send_replace(Arc::new(next));
    }
}

fn small_mesh() -> Vec<Resource> {
    vec![
        put_workload("w1", "10.0.0.1"),
        endpoint("w2", "10.0.0.2", "h"),
        endpoint("w3", "10.0.0.3", "h"),
        service("h", "10.9.0.1"),
        policy("p"),
    ]
}

#[tokio::test]
async fn a_client_gets_the_mesh_and_then_what_changes() {
    let mesh = Mesh::new(small_mesh()).await;
    let mut client = Running::of(mesh.served.address);
    let world = client.until("it is synced", |world| world.synced == 1).await;
    assert_eq!(world.names(), ["p a/p", "s a/h", "w w1", "w w2", "w w3"]);
    assert!(world.resources.values().all(|it| small_mesh().contains(it)));
    mesh.change([Change::RemoveWorkload("w1".into()), service("h", "10.9.0.9").put()]);
    let world = client.until("it is changed", |world| world.batches.len() == 3).await;
    let mut batch = world.batches[2].clone();
    batch.sort();
    assert_eq!(batch, ["+s a/h", "-w w1"]);
    // The same again is no change; the next one shows that nothing came in between.
    mesh.change([service("h", "10.9.0.9").put()]);
    mesh.change([policy("q").put()]);
    let world = client.until("it is changed again", |world| world.batches.len() == 4).await;
    assert_eq!(world.batches[3], ["+p a/q"]);
    let status = mesh.server.connections();
    assert_eq!(status.len(), 1);
    assert!(status[0].node_id.starts_with("ztunnel~10.0.0.1~"));
    assert_eq!(status[0].caller, "node-a");
    assert_eq!(status[0].types[ADDRESS_TYPE].last_rejection, None);
}

#[tokio::test]
async fn what_vanished_while_a_client_was_away_is_removed() {
    let mesh = Mesh::new(small_mesh()).await;
    let mut client = Running::of(mesh.served.address);
    client.until("it is synced", |world| world.synced == 1).await;
    // Another server with another history takes the place of this one.
    let address = mesh.served.address;
    let Mesh { served, set, server } = mesh;
    drop((served, set, server));
    client.until("it is lost", |world| !world.connected()).await;
    let resources = vec![put_workload("w1", "10.0.0.1"), put_workload("w4", "10.0.0.4")];
    let (_set, receiver) = watch::channel(Arc::new(ResourceSet::new(resources)));
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let _served = Served::over(listener, Server::new(receiver, everybody(), Limits::default()).into_service());
    let world = client.until("it is as the server has it", |world| world.names() == ["w w1", "w w4"]).await;
    // What it had is not sent again.
    assert!(!world.batches[2..].iter().flatten().any(|change| change == "+w w1"), "{:?}", world.batches);
}

#[tokio::test]
async fn a_client_on_demand_gets_what_it_asks_for() {
    let mut resources = small_mesh();
    resources.push(Resource::Workload(Arc::new(zspire_model::Workload {
        node: "node-a".into(),
        ..workload("mine", "10.0.0.7")
    })));
    let mesh = Mesh::new(resources).await;
    let mut config = config();
    config.on_demand = true;
    let mut client = Running::new(config, channel(mesh.served.address));
    let world = client.until("it is synced", |world| world.synced == 1).await;
    assert_eq!(world.names(), ["p a/p", "w mine"]);
    let demand = client.demand.clone().unwrap();
    assert_eq!(soon("an answer", demand.get("/10.9.0.1")).await, Ok(Answer::Found));
    assert_eq!(client.world.borrow().names(), ["p a/p", "s a/h", "w mine", "w w2", "w w3"]);
    // Known already, by another name.
    assert_eq!(soon("an answer", demand.get("/10.0.0.2")).await, Ok(Answer::Found));
    assert_eq!(soon("an answer", demand.get("a/h")).await, Ok(Answer::Found));
    assert_eq!(soon("an answer", demand.get("/10.0.0.99")).await, Ok(Answer::Unknown));
    assert_eq!(client.world.borrow().resources.len(), 5);
    // An unknown name that becomes known, a known one that goes, and one that nobody asked for.
    mesh.change([
        put_workload("w99", "10.0.0.99").put(),
        Change::RemoveWorkload("w2".into()),
        put_workload("w5", "10.0.0.5").put(),
    ]);
    let world = client.until("it is changed", |world| world.resources.contains_key("w w99")).await;
    assert_eq!(world.names(), ["p a/p", "s a/h", "w mine", "w w3", "w w99"]);
    assert_eq!(soon("an answer", demand.get("/10.0.0.99")).await, Ok(Answer::Found));
}

/// gRPC libraries stop at 4 MiB unless they are told otherwise.
#[tokio::test]
async fn a_mesh_may_be_larger_than_the_usual_message() {
    let uid = |i: u32| format!("cluster//Pod/a/{}-{i}", "x".repeat(200));
    let address = |i: u32| std::net::Ipv4Addr::from_bits(0x0a00_0000 + i).to_string();
    let resources: Vec<Resource> = (0..12_000).map(|i| put_workload(&uid(i), &address(i))).collect();
    let bytes: usize = resources.iter().map(|it| zspire_xds::codec::encode(it).len()).sum();
    assert!(bytes > 4 << 20, "{bytes}");
    let mesh = Mesh::new(resources).await;
    let mut client = Running::of(mesh.served.address);
    let world = client.until("it is synced", |world| world.synced == 1).await;
    assert_eq!(world.resources.len(), 12_000);
}

/// A stream whose requests are made by hand.
struct ByHand {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl ByHand {
    async fn open(mesh: &Mesh, first: DeltaDiscoveryRequest) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(16);
        requests.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel(mesh.served.address));
        let response = soon("headers", client.delta_aggregated_resources(ReceiverStream::new(outgoing))).await?;
        Ok(Self { requests, responses: response.into_inner() })
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn response(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        Ok(soon("a response", self.responses.message()).await?.expect("the stream has not ended"))
    }
}

fn request(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: Some(Node { id: "ztunnel~1.1.1.1~a.b~b.svc.cluster.local".into(), ..Default::default() }),
        type_url: type_url.into(),
        ..Default::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    }
}

#[tokio::test]
async fn one_response_of_a_type_is_under_way_at_a_time() {
    let mesh = Mesh::new(vec![put_workload("w1", "10.0.0.1")]).await;
    let mut stream = ByHand::open(&mesh, request(ADDRESS_TYPE)).await.unwrap();
    let first = stream.response().await.unwrap();
    assert_eq!(first.resources.len(), 1);
    assert_eq!(first.control_plane.as_ref().unwrap().identifier, concat!("zspire ", env!("CARGO_PKG_VERSION")));
    mesh.change([put_workload("w2", "10.0.0.2").put()]);
    mesh.change([put_workload("w3", "10.0.0.3").put()]);
    // The other type is not held up.
    stream.send(request(AUTHORIZATION_TYPE)).await;
    let other = stream.response().await.unwrap();
    assert_eq!((other.type_url.as_str(), other.resources.len()), (AUTHORIZATION_TYPE, 0));
    // A late acknowledgement of something else does not count.
    stream.send(DeltaDiscoveryRequest { response_nonce: "other".into(), ..ack(&first) }).await;
    stream.send(ack(&first)).await;
    let second = stream.response().await.unwrap();
    let names: Vec<_> = second.resources.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["w2", "w3"]);
    assert_ne!(first.nonce, second.nonce);
    assert_ne!(first.system_version_info, second.system_version_info);
    assert_eq!(second.system_version_info, mesh.set.borrow().version());
}

#[tokio::test]
async fn a_rejection_is_remembered_and_nothing_is_sent_again() {
    let mesh = Mesh::new(vec![put_workload("w1", "10.0.0.1")]).await;
    let mut stream = ByHand::open(&mesh, request(ADDRESS_TYPE)).await.unwrap();
    let first = stream.response().await.unwrap();
    let detail = rpc::Status { code: 3, message: "w1 is no good".into(), details: vec![] };
    stream.send(DeltaDiscoveryRequest { error_detail: Some(detail), ..ack(&first) }).await;
    mesh.change([put_workload("w2", "10.0.0.2").put()]);
    let second = stream.response().await.unwrap();
    assert_eq!(second.resources.len(), 1);
    let status = &mesh.server.connections()[0].types[ADDRESS_TYPE];
    assert_eq!(status.last_rejection.as_deref(), Some("w1 is no good"));
    assert_eq!(status.acknowledged, first.system_version_info);
    assert_eq!(status.sent, second.system_version_info);
}

#[tokio::test]
async fn an_unknown_type_is_answered_with_nothing() {
    let mesh = Mesh::new(vec![]).await;
    let mut stream = ByHand::open(&mesh, request("type.example/other")).await.unwrap();
    let response = stream.response().await.unwrap();
    assert_eq!((response.type_url.as_str(), response.resources.len()), ("type.example/other", 0));
    // Acknowledging it leads to nothing; asking for ever more types leads to the end.
    stream.send(ack(&response)).await;
    for i in 0..20 {
        stream.send(DeltaDiscoveryRequest { type_url: format!("type.example/{i}"), ..Default::default() }).await;
    }
    let end = loop {
        match stream.response().await {
            Ok(response) => assert!(response.resources.is_empty()),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn who_is_not_authorized_gets_nothing() {
    let authorize: Arc<Authorize> = Arc::new(|_, metadata, _| match metadata.get("authorization") {
        Some(_) => Ok(Caller { name: "somebody".into() }),
        None => Err(Status::unauthenticated("authentication failure")),
    });
    let mesh = Mesh::with(small_mesh(), authorize, Limits::default()).await;
    let refused = ByHand::open(&mesh, request(ADDRESS_TYPE)).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(mesh.server.connections().is_empty());
}

#[tokio::test]
async fn who_does_not_say_its_name_gets_nothing() {
    let mesh = Mesh::new(small_mesh()).await;
    let refused =
        ByHand::open(&mesh, DeltaDiscoveryRequest { node: None, ..request(ADDRESS_TYPE) }).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn limits_hold() {
    let limits = Limits {
        max_connections: 1,
        max_subscriptions: 2,
        max_request: 10_000,
        acknowledgement: Duration::from_millis(200),
        ..Limits::default()
    };
    let mesh = Mesh::with(small_mesh(), everybody(), limits).await;
    let mut names = request(ADDRESS_TYPE);
    names.resource_names_subscribe = vec!["a".into(), "b".into(), "c".into()];
    let mut stream = ByHand::open(&mesh, names).await.unwrap();
    assert_eq!(stream.response().await.unwrap_err().code(), Code::ResourceExhausted);
    drop(stream);
    wait_until_free(&mesh).await;

    let mut stream = ByHand::open(&mesh, request(ADDRESS_TYPE)).await.unwrap();
    stream.response().await.unwrap();
    let second = ByHand::open(&mesh, request(ADDRESS_TYPE)).await.err().unwrap();
    assert_eq!(second.code(), Code::ResourceExhausted);
    // The response is not acknowledged.
    assert_eq!(stream.response().await.unwrap_err().code(), Code::DeadlineExceeded);
    drop(stream);
    wait_until_free(&mesh).await;

    let mut long = request(ADDRESS_TYPE);
    long.resource_names_subscribe = vec!["x".repeat(20_000)];
    let refused = ByHand::open(&mesh, long).await.err().unwrap();
    assert_eq!(refused.code(), Code::OutOfRange);
}

async fn wait_until_free(mesh: &Mesh) {
    soon("the stream to be forgotten", async {
        while !mesh.server.connections().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[test]
fn versions_depend_on_content_alone() {
    let one = ResourceSet::new(small_mesh());
    let mut backwards = small_mesh();
    backwards.reverse();
    assert_eq!(one.version(), ResourceSet::new(backwards).version());
    let more = one.with([put_workload("w9", "10.0.0.9").put()]);
    assert_ne!(more.version(), one.version());
    assert_eq!(more.with([Change::RemoveWorkload("w9".into())]).version(), one.version());
    assert_eq!((one.len(), more.len()), (5, 6));
    assert_eq!(one.iter(AUTHORIZATION_TYPE).count(), 1);
    assert!(one.get(Kind::Workload, "w1").is_some());
    assert!(one.get(Kind::Service, "w1").is_none());
}
