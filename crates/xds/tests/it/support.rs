//! What the tests of client and server share: a served gRPC service, a client that runs, and a world that records what it hears.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::{Channel, Endpoint};
use zspire_model::{Change, Membership, NamespacedHostname, NetworkAddress, Policy, Service, Workload};
use zspire_wire::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use zspire_xds::Resource;
use zspire_xds::client::{Client, Config, Demand, Sink, Stats, Status};

const PATIENCE: Duration = Duration::from_secs(20);

/// What a client has told its sink.
#[derive(Debug, Clone, Default)]
pub(crate) struct World {
    pub(crate) resources: BTreeMap<String, Resource>,
    pub(crate) batches: Vec<Vec<String>>,
    pub(crate) synced: usize,
    pub(crate) states: Vec<Status>,
}

impl World {
    pub(crate) fn names(&self) -> Vec<&str> {
        self.resources.keys().map(String::as_str).collect()
    }

    pub(crate) fn connected(&self) -> bool {
        self.states.last() == Some(&Status::Connected)
    }
}

struct Recorder(watch::Sender<World>);

impl Sink for Recorder {
    fn apply(&mut self, changes: Vec<Change>) {
        self.0.send_modify(|world| {
            let mut batch = Vec::new();
            for change in changes {
                batch.push(describe(&change));
                let put = match change {
                    Change::PutWorkload(it) => Resource::Workload(it),
                    Change::PutService(it) => Resource::Service(it),
                    Change::PutPolicy(it) => Resource::Policy(it),
                    Change::RemoveWorkload(_) | Change::RemoveService(_) | Change::RemovePolicy(_) => {
                        world.resources.remove(&batch.last().unwrap()[1..]);
                        continue;
                    }
                };
                world.resources.insert(batch.last().unwrap()[1..].to_owned(), put);
            }
            world.batches.push(batch);
        });
    }

    fn synced(&mut self) {
        self.0.send_modify(|world| world.synced += 1);
    }

    fn state(&mut self, state: Status) {
        self.0.send_modify(|world| world.states.push(state));
    }
}

/// `+` or `-`, a letter for the kind, and the name.
pub(crate) fn describe(change: &Change) -> String {
    match change {
        Change::PutWorkload(it) => format!("+w {}", it.uid),
        Change::PutService(it) => format!("+s {}", it.key()),
        Change::PutPolicy(it) => format!("+p {}", it.key()),
        Change::RemoveWorkload(uid) => format!("-w {uid}"),
        Change::RemoveService(key) => format!("-s {key}"),
        Change::RemovePolicy(key) => format!("-p {key}"),
    }
}

/// A client that runs until it is dropped.
pub(crate) struct Running {
    pub(crate) world: watch::Receiver<World>,
    pub(crate) stats: Stats,
    pub(crate) demand: Option<Demand>,
    pub(crate) task: JoinHandle<()>,
    pub(crate) shutdown: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    pub(crate) fn new<S>(config: Config, service: S) -> Self
    where
        S: tonic::client::GrpcService<tonic::body::Body> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
        S::ResponseBody: tonic::codegen::Body<Data = tonic::codegen::Bytes> + Send + 'static,
        <S::ResponseBody as tonic::codegen::Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let (sender, world) = watch::channel(World::default());
        let client = Client::new(config, service);
        let (stats, demand, shutdown) = (client.stats(), client.demand(), CancellationToken::new());
        let task = tokio::spawn(client.run(Recorder(sender), shutdown.clone()));
        Self { world, stats, demand, task, shutdown }
    }

    pub(crate) fn of(address: SocketAddr) -> Self {
        Self::new(config(), channel(address))
    }

    /// The world, once it is as wanted.
    pub(crate) async fn until(&mut self, what: &str, wanted: impl FnMut(&World) -> bool) -> World {
        let waiting = self.world.wait_for(wanted);
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(world) => world.unwrap().clone(),
            Err(_) => panic!("waited in vain until {what}"),
        }
    }
}

pub(crate) fn config() -> Config {
    let mut config =
        Config::new(Config::node_id("10.0.0.1".parse().unwrap(), "proxy", "istio-system", "cluster.local"));
    config.node_metadata.insert("NODE_NAME".into(), "node-a".into());
    config.backoff_max = Duration::from_millis(50);
    config
}

pub(crate) fn channel(address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy()
}

/// A served gRPC service; when this is dropped it takes no more connections, and ends those that it has with their streams.
pub(crate) struct Served {
    pub(crate) address: SocketAddr,
    _stop: DropGuard,
}

impl Served {
    pub(crate) async fn new<T: AggregatedDiscoveryService>(service: AggregatedDiscoveryServiceServer<T>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::over(listener, service)
    }

    pub(crate) fn over<T: AggregatedDiscoveryService>(
        listener: TcpListener,
        service: AggregatedDiscoveryServiceServer<T>,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
        tokio::spawn(serving);
        Self { address, _stop: stop.drop_guard() }
    }
}

/// Whatever is waited for comes, or the test fails.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

pub(crate) fn workload(uid: &str, address: &str) -> Workload {
    Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "a".into(),
        service_account: "sa".into(),
        addresses: [address.parse().unwrap()].into_iter().collect(),
        ..Workload::default()
    }
}

pub(crate) fn put_workload(uid: &str, address: &str) -> Resource {
    Resource::Workload(Arc::new(workload(uid, address)))
}

pub(crate) fn endpoint(uid: &str, address: &str, service: &str) -> Resource {
    let service = NamespacedHostname { namespace: "a".into(), hostname: service.into() };
    let services = [Membership { service, ports: [].into() }].into();
    Resource::Workload(Arc::new(Workload { services, ..workload(uid, address) }))
}

pub(crate) fn service(hostname: &str, address: &str) -> Resource {
    Resource::Service(Arc::new(Service {
        name: hostname.into(),
        namespace: "a".into(),
        hostname: hostname.into(),
        vips: vec![NetworkAddress { network: "".into(), address: address.parse().unwrap() }],
        ..Service::default()
    }))
}

pub(crate) fn policy(name: &str) -> Resource {
    Resource::Policy(Arc::new(Policy { namespace: "a".into(), name: name.into(), ..Policy::default() }))
}
