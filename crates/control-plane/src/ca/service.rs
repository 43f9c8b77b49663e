//! `IstioCertificateService`: who asks, for whom, and the certificate.
//!
//! Codes and messages are istiod's, which tells strangers nothing about why they were refused; the reason is in the log.
//! A refused join token is the exception: whoever holds the secret is told what is wrong with it.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use prost_types::value::Kind;
use tonic::{Request, Response, Status};
use zspire_identity::authority::BACKDATE;
use zspire_model::SpiffeId;
use zspire_wire::ca::istio_certificate_service_server::IstioCertificateService;
use zspire_wire::ca::{IstioCertificateRequest, IstioCertificateResponse};

use super::pool::Pool;
use super::{Ca, Error};
use crate::auth::{Authenticator, Caller, Connection, Join};
use crate::metrics::Metrics;
use crate::placement::{Placement, Rules};
use crate::state::{Record, Writer};

/// Longest request read: a CSR is at most 16 KiB.
pub(crate) const MAX_REQUEST: usize = 64 * 1024;

/// The service. Clones share everything.
#[derive(Clone)]
pub(crate) struct Certificates {
    pub(crate) ca: Ca,
    pub(crate) pool: Arc<Pool>,
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) placement: Arc<ArcSwap<Placement>>,
    pub(crate) writer: Arc<Writer>,
    pub(crate) metrics: Arc<Metrics>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificates")
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.metrics.csrs.inc();
        let caller = self.caller(&request).await?;
        let request = request.into_inner();
        let id = self.subject(&caller, impersonated(&request))?;
        if let Caller::Joining(join) = &caller {
            self.spend(join, &request).await?;
        }
        self.sign(request, id, &caller).await
    }
}

impl Certificates {
    async fn caller(&self, request: &Request<IstioCertificateRequest>) -> Result<Caller, Status> {
        let found = match self.authenticator.caller(request.metadata(), request.extensions()) {
            Ok(Caller::Joining(join)) => self.known(join).await,
            other => other.map_err(|error| {
                let remote = request.extensions().get::<Connection>().map(|connection| connection.remote);
                tracing::info!(?remote, reason = %error, "refused a request for a certificate");
                Status::unauthenticated("request authenticate failure")
            }),
        };
        found.inspect_err(|_| {
            self.metrics.authentication_failures.inc();
        })
    }

    /// A join token is looked at first, so that a stranger's request is not even parsed.
    async fn known(&self, join: Join) -> Result<Caller, Status> {
        match self.writer.check(join.hash, &join.node).await {
            Ok(Ok(())) => Ok(Caller::Joining(join)),
            Ok(Err(refusal)) => Err(self.refuse_join(&join, &refusal)),
            Err(error) => Err(unavailable(&error)),
        }
    }

    /// Spends the token, once the request is known to be one that will be signed.
    async fn spend(&self, join: &Join, request: &IstioCertificateRequest) -> Result<(), Status> {
        let checked = self.ca.check(&request.csr, request.validity_duration, SystemTime::now());
        checked.map_err(|error| self.not_signed(&error))?;
        match self.writer.spend(join.hash, &join.node).await {
            Ok(Ok(())) => {
                self.metrics.join("accepted");
                tracing::info!(node = %join.node, "a node has joined");
                Ok(())
            }
            Ok(Err(refusal)) => {
                self.metrics.authentication_failures.inc();
                Err(self.refuse_join(join, &refusal))
            }
            Err(error) => Err(unavailable(&error)),
        }
    }

    fn refuse_join(&self, join: &Join, refusal: &crate::state::Refusal) -> Status {
        self.metrics.join(refusal.label());
        tracing::warn!(node = %join.node, reason = %refusal, "refused a join token");
        Status::unauthenticated(format!("request authenticate failure: {refusal}"))
    }

    fn subject(&self, caller: &Caller, asked: Option<&str>) -> Result<SpiffeId, Status> {
        let placement = self.placement.load();
        self.rules.subject(caller, asked, &placement).map_err(|denied| {
            self.metrics.authentication_failures.inc();
            if denied.is_malformed() {
                self.metrics.id_extraction_errors.inc();
            }
            tracing::warn!(caller = %caller, asked, reason = %denied, "refused an identity");
            Status::unauthenticated("request impersonation authentication failure")
        })
    }

    async fn sign(
        &self,
        request: IstioCertificateRequest,
        id: SpiffeId,
        caller: &Caller,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let now = SystemTime::now();
        let (ca, identity) = (self.ca.clone(), id.clone());
        let job = move || ca.issue(&request.csr, &identity, request.validity_duration, now);
        let answer = self.pool.run(job).await.map_err(|refused| {
            self.metrics.overloaded.inc();
            Status::resource_exhausted(refused.to_string())
        })?;
        let answer = answer.map_err(|error| self.not_signed(&error))?;
        self.writer.record(Record {
            serial: answer.leaf.serial,
            identity: id,
            caller: caller.name(),
            not_before: now - BACKDATE,
            not_after: answer.leaf.not_after,
            issued_at: now,
        });
        self.metrics.issued.inc();
        Ok(Response::new(IstioCertificateResponse { cert_chain: answer.chain }))
    }

    fn not_signed(&self, error: &Error) -> Status {
        if matches!(error, Error::Csr(_)) {
            self.metrics.csr_parsing_errors.inc();
        }
        self.metrics.not_signed(error.label());
        error.status()
    }
}

fn unavailable(error: &crate::state::Unavailable) -> Status {
    match error {
        crate::state::Unavailable::Busy => Status::resource_exhausted(error.to_string()),
        _ => {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::error!(%error, cause, "a node cannot join");
            Status::unavailable("the control plane cannot record the use of the join token, try again later")
        }
    }
}

/// The identity that is asked for, if one is named.
fn impersonated(request: &IstioCertificateRequest) -> Option<&str> {
    match request.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text).filter(|text| !text.is_empty()).map(String::as_str),
        // Not a text: present, and no identity.
        _ => Some("?"),
    }
}
