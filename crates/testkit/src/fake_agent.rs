//! A fake SPIRE agent: the Delegated Identity API on a Unix socket, for thousands of workloads at once.
//!
//! For what a real one cannot be made to show on a small machine: ten thousand streams, all answered in the same moment. It
//! attests nobody and registers nothing: whoever asks by the selector `fake:id:<SPIFFE ID>` is that. Every answer says in its hint
//! when it was made, in nanoseconds since 1970.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};
use zspire_identity::PrivateKey;
use zspire_identity::authority::{Authority, Csr, Parts, Subject};
use zspire_model::{SpiffeId, TrustDomain};
use zspire_wire::delegated_identity::delegated_identity_server::{DelegatedIdentity, DelegatedIdentityServer};
use zspire_wire::delegated_identity::{
    SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509sviDsRequest,
    SubscribeToX509sviDsResponse, X509svidWithKey,
};
use zspire_wire::spire_types::{Spiffeid, X509svid};

const LIFETIME: Duration = Duration::from_secs(3600);

/// The fake. It keeps what it has issued over its restarts, and serves only between [`listen`](Self::listen) and
/// [`die`](Self::die).
#[derive(Debug)]
pub struct FakeAgent {
    socket: PathBuf,
    issuer: Arc<Issuer>,
    /// Its connections and streams live in it, and end with it.
    serving: Option<Runtime>,
}

impl FakeAgent {
    /// At a socket that is not there yet.
    pub fn new(socket: &Path, trust_domain: &TrustDomain) -> Self {
        let issuer = Arc::new(Issuer::new(trust_domain.clone()));
        Self { socket: socket.into(), issuer, serving: None }
    }

    /// Makes an SVID beforehand, so that the answer costs nothing.
    pub fn prepare(&self, id: &SpiffeId) {
        self.issuer.certificate(id);
    }

    /// Begins to serve. Not to be called from within a runtime.
    pub fn listen(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = runtime.block_on(async { UnixListener::bind(&self.socket) }).expect("a free socket");
        let service = DelegatedIdentityServer::new(Service(self.issuer.clone()));
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        self.serving = Some(runtime);
    }

    /// Ends as a crash would: its connections are closed, its socket stays.
    pub fn die(&mut self) {
        if let Some(runtime) = self.serving.take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
        }
    }

    /// Streams of SVIDs that are open.
    pub fn streams(&self) -> usize {
        self.issuer.streams.load(Relaxed)
    }
}

#[derive(Debug)]
struct Issuer {
    trust_domain: TrustDomain,
    authority: Authority,
    request: Csr,
    /// One for all: whoever checks it does not compare.
    key: Bytes,
    issued: Mutex<BTreeMap<String, Bytes>>,
    streams: AtomicUsize,
}

impl Issuer {
    fn new(trust_domain: TrustDomain) -> Self {
        let now = SystemTime::now();
        let parts = Parts::generate(trust_domain.as_str(), 2 * LIFETIME, now).expect("a root can be made");
        let authority = Authority::new(&parts, now).expect("a root that was just made can issue");
        let key = PrivateKey::generate();
        let request = Csr::from_pem(&key.request(None).expect("a key can sign")).expect("a request of our own");
        let pem = key.to_pem();
        let base64: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let key = STANDARD.decode(base64).expect("PEM of our own").into();
        Self { trust_domain, authority, request, key, issued: Mutex::default(), streams: AtomicUsize::new(0) }
    }

    fn certificate(&self, id: &SpiffeId) -> Bytes {
        let mut issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let (now, subject) = (SystemTime::now(), Subject::Workload { id, common_name: false });
            let made = self.authority.sign(&self.request.key, &subject, now, now + LIFETIME);
            Bytes::copy_from_slice(&made.expect("the authority signs what it is asked for").der)
        };
        issued.entry(id.to_string()).or_insert_with(make).clone()
    }

    fn svid(&self, id: &SpiffeId) -> X509svidWithKey {
        let sent = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = Spiffeid { trust_domain: id.trust_domain().to_string(), path: id.path().to_owned() };
        let (cert_chain, hint) = (vec![self.certificate(id)], sent.to_string());
        let svid = X509svid { cert_chain, id: Some(name), hint, ..X509svid::default() };
        X509svidWithKey { x509_svid: Some(svid), x509_svid_key: self.key.clone() }
    }
}

struct Service(Arc<Issuer>);

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One message, and then silence.
fn once<T: Send + 'static>(message: T) -> Messages<T> {
    Box::pin(tokio_stream::once(Ok(message)).chain(tokio_stream::pending()))
}

#[tonic::async_trait]
impl DelegatedIdentity for Service {
    type SubscribeToX509SVIDsStream = Counted;
    type SubscribeToX509BundlesStream = Messages<SubscribeToX509BundlesResponse>;

    async fn subscribe_to_x509svi_ds(
        &self,
        request: Request<SubscribeToX509sviDsRequest>,
    ) -> Result<Response<Counted>, Status> {
        let mut selectors = request.get_ref().selectors.iter().filter(|selector| selector.r#type == "fake");
        let id = selectors.find_map(|selector| selector.value.strip_prefix("id:")?.parse().ok());
        let id: SpiffeId =
            id.ok_or_else(|| Status::invalid_argument("the fake takes one selector, fake:id:SPIFFE_ID"))?;
        let answer = SubscribeToX509sviDsResponse { x509_svids: vec![self.0.svid(&id)], ..Default::default() };
        self.0.streams.fetch_add(1, Relaxed);
        Ok(Response::new(Counted { issuer: self.0.clone(), messages: once(answer) }))
    }

    async fn subscribe_to_x509_bundles(
        &self,
        _: Request<SubscribeToX509BundlesRequest>,
    ) -> Result<Response<Self::SubscribeToX509BundlesStream>, Status> {
        let roots: Vec<u8> = self.0.authority.roots().roots().iter().flat_map(|der| der.to_vec()).collect();
        let ca_certificates = BTreeMap::from([(self.0.trust_domain.to_string(), roots.into())]);
        Ok(Response::new(once(SubscribeToX509BundlesResponse { ca_certificates })))
    }
}

/// A stream that counts as open until it is dropped.
struct Counted {
    issuer: Arc<Issuer>,
    messages: Messages<SubscribeToX509sviDsResponse>,
}

impl Stream for Counted {
    type Item = Result<SubscribeToX509sviDsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.messages.as_mut().poll_next(cx)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.issuer.streams.fetch_sub(1, Relaxed);
    }
}
