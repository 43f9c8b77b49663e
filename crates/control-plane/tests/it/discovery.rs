//! Discovery: who is let in, and what arrives.

use std::collections::BTreeMap;

use prost_types::Struct;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use zspire_identity::grpc::Channel;
use zspire_wire::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use zspire_wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use zspire_xds::ADDRESS_TYPE;

use crate::support::{MESH, Running, WEB, text, workload};

/// A stream that asks for all workloads and services.
struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

async fn open(channel: &Channel, metadata: &[(&str, &str)]) -> Result<Stream, Status> {
    let (requests, stream) = mpsc::channel(4);
    let fields: BTreeMap<_, _> = metadata.iter().map(|(name, value)| ((*name).to_owned(), text(value))).collect();
    let node = Node {
        id: "ztunnel~10.0.0.9~ztunnel-a.istio-system~istio-system.svc.cluster.local".into(),
        metadata: Some(Struct { fields }),
        ..Node::default()
    };
    let first =
        DeltaDiscoveryRequest { node: Some(node), type_url: ADDRESS_TYPE.into(), ..DeltaDiscoveryRequest::default() };
    requests.send(first).await.unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(channel.clone());
    let responses = client.delta_aggregated_resources(ReceiverStream::new(stream)).await?.into_inner();
    Ok(Stream { requests, responses })
}

impl Stream {
    /// The next response, acknowledged: what is new and what is gone.
    async fn next(&mut self) -> (Vec<String>, Vec<String>) {
        let response = self.responses.message().await.unwrap().unwrap();
        let acknowledged = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(acknowledged).await.unwrap();
        let mut names: Vec<_> = response.resources.into_iter().map(|resource| resource.name).collect();
        names.sort();
        (names, response.removed_resources)
    }
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test]
async fn a_node_follows_the_mesh_files() {
    let running = Running::start().await;
    let mut stream = open(&running.node_channel("a").await, &[("NODE_NAME", "a")]).await.unwrap();
    let all = names(&["c/db", "c/far", "c/web", "shop/web.shop.svc.cluster.local"]);
    assert_eq!(stream.next().await, (all, vec![]));
    let status = running.until("acknowledged", |status| {
        status["discovery"][0]["types"][ADDRESS_TYPE]["acknowledged"] == status["mesh"]["version"]
    });
    assert_eq!(status.await["discovery"][0]["caller"], "node a");

    let less: String = MESH.lines().filter(|line| !line.contains("c/far")).map(|line| format!("{line}\n")).collect();
    std::fs::write(running.setup.path("mesh.d/mesh.yaml"), less.replace("10.0.0.2", "10.0.0.7")).unwrap();
    assert_eq!(stream.next().await, (names(&["c/db"]), names(&["c/far"])), "what changed and nothing else");

    let setup = running.stop().await;
    let end = stream.responses.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable, "the stream ends with the control plane: {end}");
    drop(setup);
}

#[tokio::test]
async fn strangers_and_join_tokens_are_turned_away() {
    let running = Running::start().await;
    let token = running.token("a");
    for channel in [running.stranger(), running.with_token("anything"), running.with_token(&token.expose())] {
        let status = open(&channel, &[]).await.err().unwrap();
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "authentication failure"));
    }
}

#[tokio::test]
async fn what_a_client_says_of_itself_must_be_what_it_has_proved() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let status = open(&node, &[("NODE_NAME", "b")]).await.err().unwrap();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(open(&node, &[]).await.is_ok());

    let web = running.with_certificate(workload(&node, WEB).await);
    assert!(open(&web, &[("NAMESPACE", "shop"), ("SERVICE_ACCOUNT", "web")]).await.is_ok());
    for metadata in [[("NAMESPACE", "istio-system")], [("SERVICE_ACCOUNT", "db")]] {
        let status = open(&web, &metadata).await.err().unwrap();
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().starts_with("authorization failed: no identities ([spiffe://"), "{status}");
    }
}
