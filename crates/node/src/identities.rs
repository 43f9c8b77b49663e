//! Which source certificates come from, and the channels to the CA and the discovery server.
//!
//! A node that joins a zspire control plane gets a certificate of its own first, and shows it on both channels;
//! everywhere else a bearer token is sent. Knows settings, not certificates: those are `identity`'s.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use http::{HeaderName, HeaderValue};
use tokio_util::sync::CancellationToken;
use zspire_identity::files::Watched;
use zspire_identity::grpc::{self, Channel, Roots, TokenSource};
use zspire_identity::join::{self, JoinToken, Node};
use zspire_identity::tls::{KeyExchange, Policy};
use zspire_identity::{Revocation, SystemClock, istio_ca, local, per_identity, revocation};

use crate::config::{Compliance, Config, IdentitySource, RootCert, Server, Token, UnknownStatus};
use crate::pods::references::References;
use crate::readiness::{Problem, Readiness};
use crate::spire;
use crate::tasks::Tasks;

/// First pause after a failed join; doubles up to [`JOIN_PAUSE_MAX`].
const JOIN_PAUSE_MIN: Duration = Duration::from_secs(1);
const JOIN_PAUSE_MAX: Duration = Duration::from_secs(15);

/// The source of certificates and the way to the discovery server.
#[derive(Debug)]
pub struct Control {
    pub source: Arc<dyn zspire_identity::Source>,
    /// The lists of certificates that were revoked.
    pub revocation: Revocation,
    /// To the discovery server, if there is one.
    pub xds: Option<Channel>,
    /// What the source knows of the pods that it is asked about, where every pod has credentials of its own.
    pub references: Option<Arc<References>>,
    /// The proxy's own SVID, where it has to show one to whoever issues the others.
    pub own: Option<Arc<dyn zspire_identity::Source>>,
}

/// Builds source and channels; joins first where that is configured.
pub async fn start(config: &Config, readiness: &Readiness, tasks: &Tasks) -> anyhow::Result<Control> {
    let mut ca = config.ca.as_ref().map(|server| channel_config(config, server)).transpose()?;
    let mut xds = config.xds.as_ref().map(|server| channel_config(config, server)).transpose()?;

    if let Some(ca) = &mut ca
        && let Some(node) = join(config, ca, readiness, &tasks.stop).await?
    {
        for channel in [Some(ca), xds.as_mut()].into_iter().flatten() {
            channel.client = Some(node.identity());
            channel.roots = node.roots();
            channel.token = None;
        }
        tasks.spawn("node certificate", node.run(tasks.stop.clone()));
    }

    let revocation = revocation(config, readiness, tasks);
    let policy = policy(config).with_revocation(revocation.clone());
    let schedule = per_identity::Config { policy, ..per_identity::Config::default() };
    let (mut references, mut own) = (None, None);
    let source: Arc<dyn zspire_identity::Source> = match (config.identity, ca) {
        (IdentitySource::SpireBroker | IdentitySource::SpireDelegated | IdentitySource::WorkloadApi, _) => {
            let spire = spire::start(config, &schedule.policy, tasks)?;
            (references, own) = (spire.references, spire.own);
            spire.source
        }
        (IdentitySource::Local, _) | (IdentitySource::IstioCa, None) => {
            let directory = local::directory(config.runtime_dir.as_deref(), &std::env::temp_dir())
                .context("cannot use the development CA")?;
            let settings = local::Config {
                in_kubernetes: config.in_kubernetes,
                directory,
                ttl: config.secret_ttl,
                clock: Arc::new(SystemClock),
            };
            let (source, driver) = local::source(settings, schedule).context("cannot use the development CA")?;
            tasks.spawn("certificates", driver.run(tasks.stop.clone()));
            Arc::new(source)
        }
        (IdentitySource::IstioCa, Some(ca)) => {
            let channel = Channel::new(ca).context("CA_ADDRESS")?;
            let settings = istio_ca::Config { ttl: config.secret_ttl, impersonate: true };
            let (source, driver) = istio_ca::source(channel, settings, schedule);
            tasks.spawn("certificates", driver.run(tasks.stop.clone()));
            Arc::new(source)
        }
    };
    let xds = xds.map(Channel::new).transpose().context("XDS_ADDRESS")?;
    Ok(Control { source, revocation, xds, references, own })
}

/// Follows the file of revocation lists, if there is one. For proxies only: CA and discovery server are known by their roots.
fn revocation(config: &Config, readiness: &Readiness, tasks: &Tasks) -> Revocation {
    let Some(path) = &config.crl_path else { return Revocation::default() };
    let unknown = match config.crl_unknown {
        UnknownStatus::Deny => revocation::Unknown::Deny,
        UnknownStatus::Allow => revocation::Unknown::Allow,
    };
    let (revocation, follower) = revocation::follow(path, unknown, Arc::new(SystemClock));
    tasks.spawn("revocation lists", follower.run(tasks.stop.clone()));
    let observed = revocation.clone();
    readiness.observe("revocation lists (CRL_PATH)", move || {
        let why = observed.problem()?;
        Some(if observed.refuses_everybody() { Problem::blocks(why) } else { Problem::note(why) })
    });
    revocation
}

fn channel_config(config: &Config, server: &Server) -> anyhow::Result<grpc::Config> {
    let roots = match &server.root {
        RootCert::File(path) => Roots::File(path.clone()),
        RootCert::System => Roots::System,
        RootCert::Pem(text) => Roots::Inline(text.as_str().into()),
    };
    let mut channel = grpc::Config::new(server.address.clone(), roots);
    channel.alt_hostname = server.alt_hostname.clone();
    channel.token = config.token.as_ref().map(|token| match token {
        Token::File(path) => TokenSource::File(path.clone()),
        Token::Literal(text) => TokenSource::Literal(text.clone().into()),
    });
    let cluster = HeaderValue::from_str(&config.cluster_id).context("CLUSTER_ID is not a header value")?;
    channel.headers.push((HeaderName::from_static("clusterid"), cluster));
    for (name, value) in &server.headers.0 {
        let header = HeaderName::try_from(name.as_str()).context("header name")?;
        let mut value = HeaderValue::from_str(value).with_context(|| format!("the value of header {name}"))?;
        value.set_sensitive(true);
        channel.headers.push((header, value));
    }
    channel.policy = policy(config);
    if let Some(mark) = config.packet_mark {
        // The proxy's own calls must not be captured by the rules that capture the pod's.
        channel.connect_hook = Some(Arc::new(move |socket: BorrowedFd<'_>| zspire_sys::socket::set_mark(socket, mark)));
    }
    Ok(channel)
}

pub fn policy(config: &Config) -> Policy {
    let exchange = match config.compliance {
        Compliance::None => KeyExchange::PreferPostQuantum,
        Compliance::Pqc => KeyExchange::PostQuantumOnly,
    };
    Policy::new(exchange, config.tls12)
}

/// The node's own certificate: of an earlier join, or bought with the token. Tried again until there is one; but a token that
/// the control plane has refused is not shown again: that would only fill its log. The process stays up and unready, so that
/// nothing starts it over and over, and a token in a file is taken up when the file changes.
async fn join(
    config: &Config,
    ca: &grpc::Config,
    readiness: &Readiness,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Node>> {
    let settings =
        || join::Config { ca: ca.clone(), node: config.node_name.clone(), state_dir: config.state_dir.clone() };
    let Some(token) = &config.join_token else {
        // The token was used and taken out of the configuration since.
        return match config.token {
            None if !config.node_name.is_empty() => Node::load(settings()).context("cannot use ZSPIRE_STATE_DIR"),
            _ => Ok(None),
        };
    };
    anyhow::ensure!(!config.node_name.is_empty(), "ZSPIRE_JOIN_TOKEN needs NODE_NAME: the token is for one node");
    if let Some(node) = Node::load(settings()).context("cannot use ZSPIRE_STATE_DIR")? {
        return Ok(Some(node));
    }
    let blocked = readiness.block("join", "asking the control plane for this node's certificate");
    let file = match token {
        Token::File(path) => Some(Watched::new([path.clone()])),
        Token::Literal(_) => None,
    };
    let mut pause = JOIN_PAUSE_MIN;
    loop {
        let (error, retry) = match attempt(token, settings()).await {
            Ok(node) => {
                blocked.ready();
                return Ok(Some(node));
            }
            Err(error) => (format!("{:#}", error.why), !error.is_final),
        };
        let again = async {
            match (&file, retry) {
                (_, true) => tokio::time::sleep(jitter(pause)).await,
                (Some(file), false) => file.changed().await,
                (None, false) => std::future::pending().await,
            }
        };
        if retry {
            tracing::warn!(%error, retry_in = ?pause, "cannot join the control plane");
            blocked.because(format!("cannot join the control plane: {error}"));
        } else {
            let next = match token {
                Token::File(path) => format!(
                    "make a new one (`zspire control-plane token --node {}`) and write it to {}: it is taken up from there",
                    config.node_name,
                    path.display()
                ),
                Token::Literal(_) => format!(
                    "make a new one (`zspire control-plane token --node {}`), set ZSPIRE_JOIN_TOKEN to it and restart",
                    config.node_name
                ),
            };
            tracing::error!(%error, next, "cannot join the control plane, and the token is not tried again");
            blocked.because(format!("the join token is of no use: {error}; {next}"));
        }
        tokio::select! {
            () = stop.cancelled() => anyhow::bail!("stopped before the node had joined: {error}"),
            () = again => {}
        }
        pause = if retry { (pause * 2).min(JOIN_PAUSE_MAX) } else { JOIN_PAUSE_MIN };
    }
}

/// Why an attempt to join has failed.
struct NotJoined {
    why: anyhow::Error,
    /// Whether the same token will not do better another time.
    is_final: bool,
}

async fn attempt(token: &Token, settings: join::Config) -> Result<Node, NotJoined> {
    let text = match token {
        Token::Literal(text) => text.clone(),
        Token::File(path) => {
            let read = tokio::fs::read_to_string(path).await.with_context(|| format!("cannot read {}", path.display()));
            read.map_err(|why| NotJoined { why, is_final: false })?
        }
    };
    let token: JoinToken =
        text.parse().context("ZSPIRE_JOIN_TOKEN").map_err(|why| NotJoined { why, is_final: true })?;
    let joined = Node::join(settings, &token).await;
    joined.map_err(|error| NotJoined { is_final: error.is_final(), why: error.into() })
}

/// Up to a quarter more, so that nodes started together do not ask together.
fn jitter(pause: Duration) -> Duration {
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    pause + pause.mul_f64(f64::from(nanos % 1000) / 4000.0)
}
