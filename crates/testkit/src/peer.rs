//! A foreign peer: holds a valid certificate of the mesh's CA, and asks a proxy's HBONE port for what it likes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use zspire_identity::local::{self, LocalCa};
use zspire_identity::per_identity::Issuer as _;
use zspire_identity::tls::{KeyExchange, Policy, Stream};
use zspire_identity::{Bundles, Clock, Credentials, ExpectedPeers, SystemClock};
use zspire_model::SpiffeId;
use zspire_sys::netns::Netns;

use crate::app::Ending;
use crate::mesh::Mesh;
use crate::pod::Pod;
use crate::wait::DEADLINE;

pub(crate) const LIFETIME: Duration = Duration::from_secs(3600);

/// A foreign peer.
#[derive(Debug)]
pub struct Peer {
    runtime: Runtime,
    credentials: Credentials,
    netns: Netns,
}

/// A tunnel that it has opened.
#[derive(Debug)]
pub struct Tunnel<'a> {
    peer: &'a Peer,
    requests: SendRequest<bytes::Bytes>,
}

impl Peer {
    /// Somewhere, with a certificate of the development CA for this identity. It trusts the proxies of the mesh, also if it is
    /// of another trust domain itself.
    #[track_caller]
    pub fn new(mesh: &Mesh, at: &Pod, id: &str) -> Self {
        Self::for_a_while(mesh, at, id, LIFETIME)
    }

    /// The same with a certificate that expires after this time and is not renewed.
    #[track_caller]
    pub fn for_a_while(mesh: &Mesh, at: &Pod, id: &str, lifetime: Duration) -> Self {
        // It may hold more tunnels than a process has descriptors by default.
        zspire_sys::privileges::raise_descriptor_limit().expect("the limit may be raised");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let credentials = credentials(mesh, &runtime, id, lifetime);
        Self { runtime, credentials, netns: at.netns().clone() }
    }

    /// Opens a tunnel to the proxy of a pod. In TLS 1.3 a server looks at the client's certificate last: that it was taken is
    /// known only when a request is answered.
    pub fn tunnel(&self, to: &Pod) -> Result<Tunnel<'_>, String> {
        let made = async {
            let stream = self.handshake(to).await?;
            let (requests, connection) = h2::client::handshake(stream).await.map_err(|error| chain(&error))?;
            tokio::spawn(connection);
            Ok(requests)
        };
        let requests = in_time(&self.runtime, made)?;
        Ok(Tunnel { peer: self, requests })
    }

    /// Says whatever it likes to the proxy of a pod, in TLS, and listens until that closes the connection; what it has heard.
    pub fn say(&self, to: &Pod, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let said = async {
            let (mut read, mut write) = tokio::io::split(self.handshake(to).await?);
            let mut heard = Vec::new();
            let (_, ended) = tokio::join!(write.write_all(bytes), read.read_to_end(&mut heard));
            ended.map(|_| heard).map_err(|error| chain(&error))
        };
        in_time(&self.runtime, said)
    }

    async fn handshake(&self, to: &Pod) -> Result<Stream<TcpStream>, String> {
        let expected: ExpectedPeers = [to.spiffe_id().parse::<SpiffeId>().expect("a SPIFFE id")].into_iter().collect();
        let address: SocketAddr = to.at(15008);
        let socket = self.netns.run(|| std::net::TcpStream::connect_timeout(&address, DEADLINE));
        let socket = socket.expect("the namespace can be entered").map_err(|error| error.to_string())?;
        socket.set_nonblocking(true).map_err(|error| error.to_string())?;
        let socket = TcpStream::from_std(socket).map_err(|error| error.to_string())?;
        let (stream, _) = self.credentials.connect(socket, &expected).await.map_err(|error| chain(&error))?;
        Ok(stream)
    }
}

/// A certificate of the development CA for an identity, with trust in the mesh as well as in its own trust domain.
#[track_caller]
pub(crate) fn credentials(mesh: &Mesh, runtime: &Runtime, id: &str, lifetime: Duration) -> Credentials {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let directory = mesh.path("run").join("zspire");
    let settings = local::Config { in_kubernetes: false, directory, ttl: lifetime, clock: clock.clone() };
    let ca = LocalCa::open(settings).expect("the development CA of the mesh");
    let id: SpiffeId = id.parse().expect("a SPIFFE id");
    let mut svid = runtime.block_on(ca.issue(&id)).expect("the development CA issues what it is asked for");
    let bundle = svid.bundles.get(id.trust_domain()).expect("its own").clone();
    let domains = [id.trust_domain().clone(), "cluster.local".parse().expect("a trust domain")];
    svid.bundles = Arc::new(domains.into_iter().map(|domain| (domain, bundle.clone())).collect::<Bundles>());
    let policy = Policy::new(KeyExchange::PreferPostQuantum, false);
    Credentials::new(svid, &policy, &clock).expect("a certificate that can be used")
}

/// A connection through a tunnel.
#[derive(Debug)]
pub struct Held<'a> {
    peer: &'a Peer,
    body: h2::RecvStream,
    _send: h2::SendStream<bytes::Bytes>,
}

impl Held<'_> {
    /// Waits until it ends, and says how: by a reset, or in good order.
    pub fn ending(&mut self) -> Result<Ending, String> {
        let body = &mut self.body;
        let ended = async {
            loop {
                match body.data().await {
                    Some(Ok(bytes)) => drop(body.flow_control().release_capacity(bytes.len())),
                    Some(Err(error)) if error.is_reset() => return Ok(Ending::Reset),
                    Some(Err(error)) => return Err(chain(&error)),
                    None => return Ok(Ending::Orderly),
                }
            }
        };
        in_time(&self.peer.runtime, ended)
    }
}

impl<'a> Tunnel<'a> {
    /// Asks for a target with headers of its own making; the status of the answer.
    pub fn connect_with(&mut self, target: &str, headers: &[(&'static str, &str)]) -> Result<StatusCode, String> {
        let mut request = Request::builder().method(Method::CONNECT).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("a request");
        let requests = &mut self.requests;
        let answered = async {
            let (response, _body) = requests.send_request(request, false).map_err(|error| chain(&error))?;
            response.await.map(|response| response.status()).map_err(|error| chain(&error))
        };
        in_time(&self.peer.runtime, answered)
    }

    /// Opens a connection to a target and keeps it.
    pub fn open(&mut self, target: &str) -> Result<Held<'a>, String> {
        let request = Request::builder().method(Method::CONNECT).uri(target).body(()).expect("a request");
        let requests = &mut self.requests;
        let opened = async {
            let (response, send) = requests.send_request(request, false).map_err(|error| chain(&error))?;
            let response = response.await.map_err(|error| chain(&error))?;
            match response.status() {
                StatusCode::OK => Ok((response.into_body(), send)),
                other => Err(other.to_string()),
            }
        };
        let (body, send) = in_time(&self.peer.runtime, opened)?;
        Ok(Held { peer: self.peer, body, _send: send })
    }

    /// Asks for a target by CONNECT; the status of the answer.
    pub fn connect(&mut self, target: &str) -> Result<StatusCode, String> {
        self.connect_with(target, &[])
    }
}

fn in_time<T>(runtime: &Runtime, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    runtime.block_on(async { timeout(DEADLINE, work).await.unwrap_or_else(|_| Err("no answer in time".into())) })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
