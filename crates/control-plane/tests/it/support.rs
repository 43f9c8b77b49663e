//! A running control plane, and clients for it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use serde_json::Value as Json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use zeroize::Zeroizing;
use zspire_control_plane::config::Options;
use zspire_control_plane::{Config, ControlPlane, Error, create_token};
use zspire_identity::authority::Parts;
use zspire_identity::grpc::{self, Channel, ClientIdentity, Roots, TokenSource};
use zspire_identity::{PrivateKey, join, pem};
use zspire_wire::ca::IstioCertificateRequest;
use zspire_wire::ca::istio_certificate_service_client::IstioCertificateServiceClient;

pub(crate) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
pub(crate) const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";
const PATIENCE: Duration = Duration::from_secs(20);

/// `web` on node a, `db` on node b.
pub(crate) const MESH: &str = "
workloads:
- {uid: c/web, name: web-1, namespace: shop, serviceAccount: web, workloadIps: [10.0.0.1], protocol: HBONE, node: a}
- {uid: c/db, name: db-1, namespace: shop, serviceAccount: db, workloadIps: [10.0.0.2], protocol: HBONE, node: b}
- {uid: c/far, name: far-1, namespace: shop, serviceAccount: far, workloadIps: [10.0.0.3], protocol: HBONE, node: a, trustDomain: elsewhere}
services:
- {name: web, namespace: shop, hostname: web.shop.svc.cluster.local, vips: [/10.1.0.1], ports: {80: 8080}}
";

/// A folder with a mesh, and the settings for it.
pub(crate) struct Setup {
    pub(crate) folder: TempDir,
    pub(crate) options: Options,
}

impl Setup {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("mesh.d")).unwrap();
        std::fs::write(folder.path().join("mesh.d/mesh.yaml"), MESH).unwrap();
        let path = |name: &str| Some(folder.path().join(name).display().to_string());
        let options = Options {
            address: Some("127.0.0.1:0".into()),
            admin: Some("127.0.0.1:0".into()),
            mesh: path("mesh.d"),
            state: path("state"),
            ..Options::default()
        };
        Self { folder, options }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn config(&self) -> Config {
        Config::build(self.options.clone(), |_| None).unwrap()
    }

    pub(crate) async fn start(self) -> Running {
        let control_plane = ControlPlane::start(self.config()).await.unwrap();
        let (address, admin) = (control_plane.address().unwrap(), control_plane.admin_address().unwrap());
        let stop = CancellationToken::new();
        let task = tokio::spawn(control_plane.run(stop.clone()));
        Running { setup: self, address, admin, stop, task }
    }
}

/// A control plane that serves.
pub(crate) struct Running {
    pub(crate) setup: Setup,
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
}

impl Running {
    pub(crate) async fn start() -> Self {
        Setup::new().start().await
    }

    pub(crate) async fn stop(self) -> Setup {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
        self.setup
    }

    pub(crate) fn roots(&self) -> PathBuf {
        self.setup.path("state/root-cert.pem")
    }

    pub(crate) fn channel_config(&self) -> grpc::Config {
        grpc::Config::new(format!("https://{}", self.address), Roots::File(self.roots()))
    }

    pub(crate) fn stranger(&self) -> Channel {
        Channel::new(self.channel_config()).unwrap()
    }

    pub(crate) fn with_token(&self, token: &str) -> Channel {
        let token = Some(TokenSource::Literal(Zeroizing::new(token.to_owned())));
        Channel::new(grpc::Config { token, ..self.channel_config() }).unwrap()
    }

    pub(crate) fn with_certificate(&self, identity: ClientIdentity) -> Channel {
        // The sender may go: the certificate stays.
        let client = Some(watch::Sender::new(Some(Arc::new(identity))).subscribe());
        Channel::new(grpc::Config { client, ..self.channel_config() }).unwrap()
    }

    pub(crate) fn token(&self, node: &str) -> join::JoinToken {
        create_token(&self.setup.config(), node, Duration::from_secs(60)).unwrap().parse().unwrap()
    }

    pub(crate) fn join_config(&self, node: &str) -> join::Config {
        let state_dir = self.setup.path(&format!("node-{node}"));
        join::Config { ca: self.channel_config(), node: node.into(), state_dir }
    }

    pub(crate) async fn node(&self, name: &str) -> join::Node {
        join::Node::join(self.join_config(name), &self.token(name)).await.unwrap()
    }

    /// A channel of a node that has joined.
    pub(crate) async fn node_channel(&self, name: &str) -> Channel {
        let node = self.node(name).await;
        Channel::new(grpc::Config { client: Some(node.identity()), ..self.channel_config() }).unwrap()
    }

    pub(crate) async fn metrics(&self) -> String {
        http(self.admin, "/metrics").await.1
    }

    /// The value of a metric, labels included in its name.
    pub(crate) async fn metric(&self, name: &str) -> i64 {
        let page = self.metrics().await;
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in\n{page}")).parse().unwrap()
    }

    pub(crate) async fn status(&self) -> Json {
        serde_json::from_str(&http(self.admin, "/status").await.1).unwrap()
    }

    /// Waits until the status is as it should be.
    pub(crate) async fn until(&self, what: &str, fine: impl Fn(&Json) -> bool) -> Json {
        let begin = Instant::now();
        loop {
            let status = self.status().await;
            if fine(&status) {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "not {what}: {status:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// One GET; status code and body.
pub(crate) async fn http(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

pub(crate) fn csr() -> String {
    PrivateKey::generate().request(None).unwrap()
}

/// One call of `CreateCertificate`.
pub(crate) async fn create(
    channel: &Channel,
    csr: String,
    seconds: i64,
    identity: Option<&str>,
) -> Result<Vec<String>, Status> {
    let metadata = identity.map(|id| Struct { fields: BTreeMap::from([("ImpersonatedIdentity".into(), text(id))]) });
    let request = IstioCertificateRequest { csr, validity_duration: seconds, metadata };
    let mut client = IstioCertificateServiceClient::new(channel.clone());
    client.create_certificate(request).await.map(|response| response.into_inner().cert_chain)
}

pub(crate) fn text(text: &str) -> Value {
    Value { kind: Some(Kind::StringValue(text.into())) }
}

/// A certificate for `identity`, bought by a node, to be used by the workload itself.
pub(crate) async fn workload(node: &Channel, identity: &str) -> ClientIdentity {
    let key = PrivateKey::generate();
    let chain = create(node, key.request(None).unwrap(), 600, Some(identity)).await.unwrap();
    ClientIdentity::new(pem::certificates(chain[0].as_bytes()).unwrap(), &key).unwrap()
}

/// What OpenSSL prints.
pub(crate) fn openssl(arguments: &[&str], folder: &Path) -> (bool, String) {
    let output = std::process::Command::new("openssl").args(arguments).current_dir(folder).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

/// Writes a CA as istiod's secret `cacerts` has it.
pub(crate) fn write_cacerts(folder: &Path, parts: &Parts) {
    std::fs::create_dir_all(folder).unwrap();
    for (name, content) in [
        ("ca-cert.pem", &parts.certificate),
        ("ca-key.pem", &*parts.key),
        ("cert-chain.pem", &parts.chain),
        ("root-cert.pem", &parts.roots),
    ] {
        // Replaced whole, as every good tool does it.
        let temporary = folder.join(format!(".{name}"));
        zspire_identity::files::write_private(&temporary, content.as_bytes()).unwrap();
        std::fs::rename(temporary, folder.join(name)).unwrap();
    }
}
