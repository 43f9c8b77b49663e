//! The gRPC channel to the CA and to the discovery server.
//!
//! A [`Channel`] is a tonic `GrpcService`: it connects when first used and again after a failure, reads the token for
//! every call and the roots for every connection, and opens a new connection for the next call once the roots or
//! the client certificate have changed. It spawns nothing; connections are driven by tonic.

mod client_identity;
mod connect;
mod roots;
mod token;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tower::{BoxError, Service, ServiceExt as _};

pub use client_identity::ClientIdentity;
pub use connect::{ConnectHook, Error as ConnectError};
pub(crate) use roots::Remembered;
pub use roots::{Error as RootsError, Roots};
pub use token::{Error as TokenError, TokenSource};

use crate::clock::{Clock, SystemClock};
use crate::files::Watched;
use crate::tls::{ALPN, Policy};
pub(crate) use connect::{CONNECT_TIMEOUT, Tls, tcp};

const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How to reach a control server.
#[derive(Clone)]
pub struct Config {
    /// `https://host:port`, or `http://host:port` without TLS.
    pub address: String,
    /// The roots that the server's certificate must lead to.
    pub roots: Roots,
    /// The name that the server's certificate must carry, if it is not the host of the address.
    pub alt_hostname: Option<String>,
    /// The bearer token to send.
    pub token: Option<TokenSource>,
    /// Further headers of every call, `clusterid` among them. Values never show in `Debug`.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The client certificate to show, while there is one.
    pub client: Option<watch::Receiver<Option<Arc<ClientIdentity>>>>,
    /// Called with each socket before it connects.
    pub connect_hook: Option<ConnectHook>,
    /// What TLS may use.
    pub policy: Policy,
    /// The clock that certificates are checked by.
    pub clock: Arc<dyn Clock>,
}

impl Config {
    /// The address, its roots, and nothing else.
    pub fn new(address: impl Into<String>, roots: Roots) -> Self {
        Self {
            address: address.into(),
            roots,
            alt_hostname: None,
            token: None,
            headers: Vec::new(),
            client: None,
            connect_hook: None,
            policy: Policy::default(),
            clock: Arc::new(SystemClock),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers: Vec<_> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Config")
            .field("address", &self.address)
            .field("roots", &self.roots)
            .field("alt_hostname", &self.alt_hostname)
            .field("token", &self.token)
            .field("headers", &headers)
            .finish_non_exhaustive()
    }
}

/// A channel to a control server. Clones share one connection.
#[derive(Clone)]
pub struct Channel(Arc<Inner>);

struct Inner {
    token: Option<TokenSource>,
    headers: Vec<(HeaderName, HeaderValue)>,
    dial: Box<dyn Fn() -> tonic::transport::Channel + Send + Sync>,
    roots_file: Option<Watched>,
    current: Mutex<Current>,
}

struct Current {
    channel: Option<tonic::transport::Channel>,
    client: Option<watch::Receiver<Option<Arc<ClientIdentity>>>>,
}

impl Channel {
    /// Checks the configuration; nothing is connected or read yet.
    pub fn new(config: Config) -> Result<Self, AddressError> {
        let Config { address, roots, alt_hostname, token, headers, client, connect_hook, policy, clock } = config;
        let target = Target::parse(&address, alt_hostname.as_deref())?;
        let roots_file = roots.path().filter(|_| target.tls.is_some()).map(|path| Watched::new([path.clone()]));
        let endpoint = endpoint(&address)?;
        let (identities, roots) = (client.clone(), Arc::new(Remembered::new(roots)));
        let dial = Box::new(move || {
            let (target, hook, roots) = (target.clone(), connect_hook.clone(), roots.clone());
            let (policy, clock, identities) = (policy.clone(), clock.clone(), identities.clone());
            endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let tls = target.tls.clone().map(|name| Tls {
                    policy: policy.clone(),
                    clock: clock.clone(),
                    roots: roots.clone(),
                    name,
                    client: identities.as_ref().and_then(|c| c.borrow().clone()),
                    alpn: ALPN,
                });
                open(target.clone(), hook.clone(), tls)
            }))
        });
        Ok(Self(Arc::new(Inner {
            token,
            headers,
            dial,
            roots_file,
            current: Mutex::new(Current { channel: None, client }),
        })))
    }

    /// A channel over connections that `connector` makes, for other transports (in memory, Unix sockets).
    pub fn over<C, F, IO>(connector: C, token: Option<TokenSource>, headers: Vec<(HeaderName, HeaderValue)>) -> Self
    where
        C: Fn() -> F + Clone + Send + Sync + 'static,
        F: Future<Output = std::io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let endpoint = Endpoint::from_static("http://in.process");
        let dial = Box::new(move || {
            let connector = connector.clone();
            endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let connecting = connector();
                async move { connecting.await.map(TokioIo::new) }
            }))
        });
        let current = Mutex::new(Current { channel: None, client: None });
        Self(Arc::new(Inner { token, headers, dial, roots_file: None, current }))
    }
}

impl Inner {
    /// The connection to use now: a new one if the roots or the client certificate have changed.
    ///
    /// Calls and streams on the old connection are not disturbed; it closes with the last of them.
    fn channel(&self) -> tonic::transport::Channel {
        let mut current = self.current.lock().expect("nothing panics while holding it");
        let rotated = self.roots_file.as_ref().is_some_and(Watched::has_changed);
        let renewed = current.client.as_mut().is_some_and(|client| {
            let changed = client.has_changed().unwrap_or(false);
            client.mark_unchanged();
            changed
        });
        if rotated || renewed {
            tracing::info!(rotated, renewed, "roots or client certificate changed, next call reconnects");
            current.channel = None;
        }
        current.channel.get_or_insert_with(|| (self.dial)()).clone()
    }

    async fn send(&self, mut request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        for (name, value) in &self.headers {
            request.headers_mut().append(name.clone(), value.clone());
        }
        if let Some(token) = &self.token {
            let mut metadata = tonic::metadata::MetadataMap::new();
            metadata.insert("authorization", token.header().await.map_err(no_token)?);
            request.headers_mut().extend(metadata.into_headers());
        }
        let mut channel = self.channel();
        let channel = channel.ready().await.map_err(|e| Status::from_error(Box::new(e)))?;
        channel.call(request).await.map_err(|e| Status::from_error(Box::new(e)))
    }
}

fn no_token(error: TokenError) -> Status {
    let mut status = Status::unauthenticated("no token to send");
    status.set_source(Arc::new(error));
    status
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move { inner.send(request).await })
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("token", &self.0.token).finish_non_exhaustive()
    }
}

fn endpoint(address: &str) -> Result<Endpoint, AddressError> {
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|e| AddressError::new(address, e.to_string()))?;
    Ok(endpoint
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

async fn open(target: Target, hook: Option<ConnectHook>, tls: Option<Tls>) -> Result<TokioIo<Io>, BoxError> {
    let connecting = async {
        let stream = tcp(&target.host, target.port, hook.as_ref()).await?;
        let io: Io = match tls {
            Some(tls) => Box::new(tls.handshake(stream).await?),
            None => Box::new(stream),
        };
        Ok::<_, ConnectError>(TokioIo::new(io))
    };
    let late = |_| ConnectError::Timeout { target: format!("{}:{}", target.host, target.port) };
    Ok(tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(late)??)
}

trait Both: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Both for T {}
type Io = Box<dyn Both>;

/// An address, taken apart.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The name to check; `None` without TLS.
    pub(crate) tls: Option<ServerName<'static>>,
}

impl Target {
    pub(crate) fn parse(address: &str, alt_hostname: Option<&str>) -> Result<Self, AddressError> {
        let wrong = |why: &str| AddressError::new(address, why.to_owned());
        let uri: Uri = address.parse().map_err(|e: http::uri::InvalidUri| wrong(&e.to_string()))?;
        let host = uri.host().ok_or_else(|| wrong("it has no host"))?.trim_matches(['[', ']']).to_owned();
        let (tls, default_port) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") => (false, 80),
            _ => return Err(wrong("it must begin with https:// or http://")),
        };
        let name = alt_hostname.unwrap_or(&host).to_owned();
        let name = tls.then(|| ServerName::try_from(name)).transpose().map_err(|_| wrong("not a host name"))?;
        Ok(Self { host, port: uri.port_u16().unwrap_or(default_port), tls: name })
    }
}

/// An address that cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the address {address:?} cannot be used: {why}; it has the form https://host:port")]
pub struct AddressError {
    address: String,
    why: String,
}

impl AddressError {
    fn new(address: &str, why: String) -> Self {
        Self { address: address.to_owned(), why }
    }
}

/// Everything a failed call has to say: gRPC's own message, then its causes, each once.
pub fn explain(status: &Status) -> String {
    let mut text = match status.message() {
        "" => format!("{}", status.code()),
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
    text
}

/// gRPC's own name of a code, as its documentation and other tools print it.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "Ok",
        Code::Cancelled => "Cancelled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}
