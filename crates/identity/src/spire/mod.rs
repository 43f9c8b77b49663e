//! Identities from a SPIRE agent: every workload's own SVID, attested by the agent for *that* workload.
//!
//! Three ways to ask an agent, each an [`Agent`]: the SPIFFE Broker API ([`broker`]), SPIRE's Delegated Identity API
//! ([`delegated`]), and the SPIFFE Workload API for the process itself ([`workload_api`]). When to ask, what to do with the
//! answers, and when to give a key up is the same for all of them and lives in [`subscriptions`]; [`held`] is its state machine
//! for one workload, without tasks and sockets.
//!
//! The module does not find processes or pods: whoever serves them says what an agent is to be asked about ([`Locate`]).
//! Key material is never shared between workloads, also when their SPIFFE IDs are the same (Broker API §4.2).

pub mod broker;
mod decode;
pub mod delegated;
mod endpoint;
mod held;
mod select;
pub mod subscriptions;
pub mod workload_api;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use futures::Stream;
use rustls::pki_types::CertificateDer;
use tonic::{Code, Status};
use zeroize::Zeroizing;
use zspire_model::{SpiffeId, Str};

pub use endpoint::{Endpoint, EndpointError};
pub use subscriptions::{Driver, Subscriptions};

use crate::bundle::Bundles;
use crate::clock::{Clock, SystemClock};
use crate::grpc;
use crate::source::{Watch, WorkloadKey};
use crate::tls::Policy;

/// How the source is run.
#[derive(Debug, Clone)]
pub struct Config {
    /// What TLS may use.
    pub policy: Policy,
    /// The clock that SVIDs are checked by.
    pub clock: Arc<dyn Clock>,
    /// Tells SVIDs with the same SPIFFE ID apart.
    pub hint: Option<Str>,
    /// Takes an SVID with another ID than expected, if the agent offers only that one.
    pub accept_other_id: bool,
    /// The proxy's own credentials: an SVID with their ID is not taken for another one.
    pub own: Option<Watch>,
}

impl Default for Config {
    fn default() -> Self {
        Self { policy: Policy::default(), clock: Arc::new(SystemClock), hint: None, accept_other_id: false, own: None }
    }
}

/// A way to ask an agent.
#[async_trait]
pub trait Agent: fmt::Debug + Send + Sync + 'static {
    /// What the source is called in views and metrics, for example `spire-broker`.
    fn name(&self) -> &'static str;

    /// Opens the stream of a workload's SVIDs. It is dropped when its time is up.
    async fn subscribe(&self, reference: &Reference) -> Result<Updates, Refusal>;

    /// Who the agent has proved to be, where the connection tells that.
    fn id(&self) -> Option<SpiffeId> {
        None
    }
}

/// What an agent says of one workload, newest last.
pub type Updates = Pin<Box<dyn Stream<Item = Result<Update, Refusal>> + Send>>;

/// Says what an agent is to be asked about for a workload of this node.
pub trait Locate: fmt::Debug + Send + Sync + 'static {
    /// Asked anew for every stream, since processes come and go. Where several could be meant, `useless` answers in a row lead to
    /// another one. The error says what is missing.
    fn locate(&self, key: &WorkloadKey, useless: usize) -> Result<Reference, Str>;
}

/// What an agent is asked about.
#[derive(Debug, Clone)]
pub enum Reference {
    /// A Kubernetes pod, by its UID.
    Pod {
        /// The pod's UID.
        uid: Str,
    },
    /// A process of the workload; never the sandbox's.
    Process(Arc<dyn Process>),
    /// Selectors that the caller has made up and nobody has attested.
    Selectors(Arc<[(Str, Str)]>),
    /// The process that asks.
    Own,
}

/// A process that is held so that its number cannot come to mean another one unnoticed.
pub trait Process: fmt::Debug + Send + Sync + 'static {
    /// Its number, in the namespace of the agent's host.
    fn pid(&self) -> i32;

    /// Completes when it has ended, also as a zombie.
    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;

    /// Whether it is the same process as in the beginning, and has not ended.
    fn is_alive(&self) -> bool;

    /// Whether it runs as the user that the proxy runs as. To an agent that attests users alone it is then the proxy.
    fn is_of_own_user(&self) -> bool;

    /// Selectors that an agent finds for it, as far as they are known here: for whoever wants to register it.
    fn selectors(&self) -> Vec<Str> {
        Vec::new()
    }
}

impl Reference {
    /// What kind of reference it is.
    fn kind(&self) -> &'static str {
        match self {
            Self::Pod { .. } => "pod",
            Self::Process(_) => "process",
            Self::Selectors(_) => "selectors",
            Self::Own => "own",
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { uid } => write!(f, "pod {uid}"),
            Self::Process(process) => write!(f, "process {}", process.pid()),
            Self::Selectors(selectors) => {
                f.write_str("selectors")?;
                selectors.iter().try_for_each(|(kind, value)| write!(f, " {kind}:{value}"))
            }
            Self::Own => f.write_str("this process"),
        }
    }
}

/// All that an agent has for a workload at one time. What is not in it has been taken away, or is being replaced.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// SVIDs, in the agent's order, which means nothing.
    pub offers: Vec<Offer>,
    /// The workload's own trust domain and those it federates with.
    pub bundles: Arc<Bundles>,
}

/// One SVID that an agent offers.
#[derive(Clone)]
pub struct Offer {
    /// Whose it is said to be; the certificate is looked at later.
    pub id: SpiffeId,
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS#8.
    pub key: Arc<Zeroizing<Vec<u8>>>,
    /// What the registration says it is for.
    pub hint: Str,
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer").field("id", &self.id).field("hint", &self.hint).finish_non_exhaustive()
    }
}

/// Why there is no stream, or no stream any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Refusal {
    /// What it means for the workload.
    pub meaning: Meaning,
    /// The gRPC code as `CamelCase`, or a name of ours, for metrics.
    pub code: &'static str,
    /// The whole story.
    pub why: Str,
}

/// What a refusal means for the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// The workload is not there, or nobody may have its identity: what is held of it must be dropped.
    Gone,
    /// It is about the one who asks, or the agent is away: what is held works until it expires.
    Outage,
    /// Nothing is registered for whoever asks, as far as the agent knows: it also says so for a moment after it has started.
    Unregistered,
    /// The question itself is wrong: asking it again does not help.
    Mistake,
}

impl Refusal {
    fn outage(code: &'static str, why: impl Into<Str>) -> Self {
        Self { meaning: Meaning::Outage, code, why: why.into() }
    }

    /// A status, where refusals are about the workload if `about_workload` says so of their code.
    fn from_status(status: &Status, about_workload: impl Fn(Code) -> bool) -> Self {
        let meaning = match status.code() {
            Code::InvalidArgument | Code::Unimplemented => Meaning::Mistake,
            code if about_workload(code) => Meaning::Gone,
            _ => Meaning::Outage,
        };
        Self { meaning, code: grpc::code_name(status.code()), why: grpc::explain(status).into() }
    }
}
