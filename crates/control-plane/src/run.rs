//! Assembly: loads everything, binds both ports, runs until told to stop, drains.
//!
//! What is wrong at the start ends the program; what goes wrong later is logged and the last good state stays.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use zspire_sys::supervisor::Supervisor;
use zspire_wire::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use zspire_xds::server::{Limits, Server as Discovery};

use crate::auth::{Authenticator, Keys, KeysError, Tokens};
use crate::ca::pool::Pool;
use crate::ca::service::{Certificates, MAX_REQUEST};
use crate::ca::{Ca, Issuing, publish_root};
use crate::config::Config;
use crate::mesh::{self, Follower, Mesh};
use crate::metrics::Metrics;
use crate::monitoring::{self, View};
use crate::placement::Rules;
use crate::serving::{self, Serving};
use crate::state::{self, Folder, Writer};
use crate::{config, discovery, listener};

/// Requests for certificates that may wait for a signer: at 400 µs each, under two seconds of one CPU.
const SIGN_QUEUE: usize = 4096;
/// Streams that one client may have open: a node renews many certificates at once over one connection.
const STREAMS: u32 = 256;
const HEADER_LIST: u32 = 32 * 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long calls under way may take when the control plane stops; discovery streams never end by themselves.
const DRAIN: Duration = Duration::from_secs(5);
/// Connections that have made their handshake and wait for gRPC to take them.
const HANDED_OVER: usize = 64;

/// A control plane that is loaded and listens, and does not serve yet.
#[derive(Debug)]
pub struct ControlPlane {
    config: Arc<Config>,
    ca: Ca,
    serving: Arc<Serving>,
    mesh: Arc<Mesh>,
    follower: Follower,
    discovery: Discovery,
    authenticator: Arc<Authenticator>,
    writer: Arc<Writer>,
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
    listener: TcpListener,
    admin: TcpListener,
    // Last, so that the folder is free only when everything has been written.
    folder: Folder,
}

impl ControlPlane {
    /// Loads the CA, the mesh and the keys of the token issuer, and binds both ports.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let config = Arc::new(config);
        let folder = Folder::hold(&config.state)?;
        let issuing = Issuing::load(&config, SystemTime::now())?;
        publish_root(&config, &issuing)?;
        let (mesh, follower) = Mesh::load(&config.mesh, &config.trust_domain)?;
        let tokens = match &config.jwt {
            Some(jwt) => Some(Tokens::new(jwt, Arc::new(Keys::load(&jwt.keys).await.map_err(Error::Keys)?))),
            None => None,
        };
        let bind = |what, address| listener::bind(address).map_err(|source| Error::Bind { what, address, source });
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        Ok(Self {
            serving: Arc::new(Serving::new(config.clone(), &issuing)?),
            ca: Ca::new(issuing, config.ttl),
            discovery: Discovery::new(mesh.resources(), discovery::authorize(), Limits::default()),
            mesh,
            follower,
            authenticator: Arc::new(Authenticator { domain: config.trust_domain.clone(), tokens }),
            writer: Arc::new(Writer::start(folder.path())?),
            pool: Arc::new(Pool::start(threads, SIGN_QUEUE).map_err(Error::Threads)?),
            metrics: Arc::default(),
            listener: bind("certificates and discovery", config.address)?,
            admin: bind("metrics and status", config.admin)?,
            config,
            folder,
        })
    }

    /// Where certificates and discovery are served.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Where metrics and status are served.
    pub fn admin_address(&self) -> std::io::Result<SocketAddr> {
        self.admin.local_addr()
    }

    /// Serves until `stop`, then lets calls under way finish and returns when every record is written.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
        let services = server(self.certificates(), &self);
        self.spawn(&tasks, &stop);
        let view = self.view(&stop);
        let Self { listener, admin, serving, metrics, writer, folder, follower, .. } = self;
        tasks.spawn(follower.run(metrics.clone(), stop.clone()));
        // The monitoring port lives longer, to tell that the rest is draining.
        tasks.spawn(monitoring::serve(admin, view, end.clone()));
        let (to, accepted) = mpsc::channel(HANDED_OVER);
        tasks.spawn(listener::accept(listener, serving, metrics, to, stop.clone()));
        let server =
            services.serve_with_incoming_shutdown(ReceiverStream::new(accepted), stop.clone().cancelled_owned());
        let drained = async {
            stop.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        };
        let result = tokio::select! {
            result = server => result.map_err(Error::Serve),
            () = drained => Ok(()),
        };
        stop.cancel();
        end.cancel();
        tasks.close();
        tasks.wait().await;
        // Before the folder is free for another.
        writer.finish();
        drop(folder);
        result
    }

    fn certificates(&self) -> Certificates {
        Certificates {
            ca: self.ca.clone(),
            pool: self.pool.clone(),
            authenticator: self.authenticator.clone(),
            rules: Arc::new(Rules {
                domain: self.config.trust_domain.clone(),
                node_accounts: self.config.node_accounts.clone(),
            }),
            placement: self.mesh.placement(),
            writer: self.writer.clone(),
            metrics: self.metrics.clone(),
        }
    }

    /// What follows files and clocks until `stop`.
    fn spawn(&self, tasks: &TaskTracker, stop: &CancellationToken) {
        tasks.spawn(self.ca.clone().follow(self.config.clone(), self.metrics.clone(), stop.clone()));
        tasks.spawn(self.serving.clone().follow(self.ca.changes(), stop.clone()));
        if let (Some(tokens), Some(jwt)) = (&self.authenticator.tokens, &self.config.jwt) {
            tasks.spawn(tokens.keys().clone().follow(jwt.keys.clone(), stop.clone()));
        }
    }

    fn view(&self, stop: &CancellationToken) -> View {
        View {
            config: self.config.clone(),
            ca: self.ca.clone(),
            serving: self.serving.clone(),
            mesh: self.mesh.clone(),
            discovery: self.discovery.clone(),
            metrics: self.metrics.clone(),
            writer: self.writer.stats(),
            authenticator: self.authenticator.clone(),
            stop: stop.clone(),
        }
    }
}

fn server(certificates: Certificates, of: &ControlPlane) -> tonic::transport::server::Router {
    let certificates = IstioCertificateServiceServer::new(certificates).max_decoding_message_size(MAX_REQUEST);
    let gate = discovery::gate(of.authenticator.clone());
    Server::builder()
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_LIST)
        .add_service(certificates)
        .add_service(InterceptedService::new(of.discovery.clone().into_service(), gate))
}

/// Runs a control plane until SIGTERM or SIGINT, on a runtime of its own. Logs to standard error.
pub fn run(config: Config) -> Result<(), Error> {
    log(&config.log);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(1, usize::from).min(4))
        .thread_name("control-plane")
        .enable_all()
        .build()
        .map_err(Error::Threads)?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Threads)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Threads)?;
        let supervisor = config.supervisor.clone();
        let control_plane = ControlPlane::start(config).await?;
        control_plane.announce();
        supervisor.ready();
        tokio::spawn(live(supervisor.clone()));
        let told = stop.clone();
        let signals = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to stop, draining");
            supervisor.stopping();
            told.cancel();
            // A second signal ends the wait for calls under way.
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let mut running = Box::pin(control_plane.run(stop));
        tokio::select! {
            result = &mut running => result,
            () = signals => Ok(()),
        }
    })
}

/// Gives the service manager its signs of life.
async fn live(supervisor: Supervisor) {
    let Some(pulse) = supervisor.pulse() else { return };
    let mut pulse = tokio::time::interval(pulse);
    loop {
        pulse.tick().await;
        supervisor.alive();
    }
}

impl ControlPlane {
    fn announce(&self) {
        let address = self.address().map(|address| address.to_string()).unwrap_or_default();
        let admin = self.admin_address().map(|address| address.to_string()).unwrap_or_default();
        let root = crate::ca::to_hex(&self.ca.current().root());
        tracing::info!(address, admin, trust_domain = %self.config.trust_domain, root, "control plane is ready");
    }
}

fn log(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::builder().parse_lossy(filter);
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    // A second start in one process keeps the first one's subscriber.
    drop(lines.try_init());
}

/// Why there is no control plane.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The state folder, or the CA in it.
    #[error(transparent)]
    State(#[from] state::Error),
    /// The mesh files.
    #[error("the mesh files cannot be used")]
    Mesh(#[from] mesh::Error),
    /// The keys of the token issuer.
    #[error(transparent)]
    Keys(KeysError),
    /// The serving certificate.
    #[error("cannot make the serving certificate")]
    Serving(#[from] serving::Error),
    /// A port.
    #[error("cannot listen on {address} for {what}: stop what uses it, or choose another with --address or --admin")]
    Bind {
        /// What the port is for.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Threads or signals.
    #[error("cannot start the threads of the control plane")]
    Threads(#[source] std::io::Error),
    /// gRPC.
    #[error("serving ended")]
    Serve(#[source] tonic::transport::Error),
}

impl Error {
    /// Whether the operator has to change configuration or files, rather than the machine.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Config(_) | Self::Mesh(_) | Self::Keys(_))
            || matches!(
                self,
                Self::State(
                    state::Error::Missing { .. }
                        | state::Error::Authority { .. }
                        | state::Error::RootLost { .. }
                        | state::Error::Exposed { .. }
                )
            )
    }
}
