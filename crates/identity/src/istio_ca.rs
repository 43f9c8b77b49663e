//! Certificates from Istio's certificate service (`istio.v1.auth.IstioCertificateService`): istiod, or zspire's own
//! control plane.
//!
//! One call, one certificate: a new P-256 key each time, its request, and what comes back checked for form. Whether
//! the certificate is the right one is checked by [`crate::per_identity`], as for every issuer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::{Code, Request, Status};
use zspire_model::SpiffeId;
use zspire_wire::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use zspire_wire::ca::{IstioCertificateRequest, IstioCertificateResponse};

use crate::bundle::{Bundle, Bundles};
use crate::credentials::Svid;
use crate::grpc::{self, Channel};
use crate::key::PrivateKey;
use crate::pem;
use crate::per_identity::{self, Driver, Failure, Issuer, PerIdentity};

/// A chain of a leaf, intermediates and roots is a few kilobytes.
const MAX_ANSWER: usize = 256 * 1024;

/// What to ask for.
#[derive(Debug, Clone)]
pub struct Config {
    /// Lifetime to ask for (`SECRET_TTL`).
    pub ttl: Duration,
    /// Whether to name the identity asked for. A proxy shared by a node must: it asks for others than its own. One that
    /// runs with the token of the very workload it serves need not, and Istio's CA would refuse it if it did.
    pub impersonate: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(24 * 3600), impersonate: true }
    }
}

/// A source that asks the CA behind `channel`, and its task.
pub fn source(channel: Channel, config: Config, schedule: per_identity::Config) -> (PerIdentity, Driver<IstioCa>) {
    per_identity::new(IstioCa::new(channel, config), schedule)
}

/// Istio's CA as an issuer.
#[derive(Debug)]
pub struct IstioCa {
    client: IstioCertificateServiceClient<Channel>,
    config: Config,
}

impl IstioCa {
    /// Asks over `channel`.
    pub fn new(channel: Channel, config: Config) -> Self {
        let client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        Self { client, config }
    }
}

#[async_trait]
impl Issuer for IstioCa {
    fn name(&self) -> &'static str {
        "istio-ca"
    }

    async fn issue(&self, id: &SpiffeId) -> Result<Svid, Failure> {
        let key = PrivateKey::generate();
        let csr = key.request(Some(id)).map_err(|e| Failure::new("csr", e.to_string()))?;
        let identity = self.config.impersonate.then_some(id);
        let answer = create_certificate(&mut self.client.clone(), csr, self.config.ttl, identity).await?;
        let Answer { chain, roots } = answer;
        let bundles = Arc::new(Bundles::of(id.trust_domain().clone(), roots));
        Ok(Svid { id: id.clone(), chain, key, bundles })
    }
}

/// What the CA gives: a chain, leaf first and without its root, and the roots.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    pub(crate) roots: Bundle,
}

/// One call of `CreateCertificate`.
pub(crate) async fn create_certificate(
    client: &mut IstioCertificateServiceClient<Channel>,
    csr: String,
    ttl: Duration,
    identity: Option<&SpiffeId>,
) -> Result<Answer, Failure> {
    let metadata = identity.map(|id| Struct {
        fields: BTreeMap::from([(
            "ImpersonatedIdentity".to_owned(),
            Value { kind: Some(Kind::StringValue(id.to_string())) },
        )]),
    });
    let validity_duration = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
    let request = Request::new(IstioCertificateRequest { csr, validity_duration, metadata });
    let response = client.create_certificate(request).await.map_err(|status| refused(&status))?;
    parse(&response.into_inner())
        .map_err(|why| Failure::new("malformed", format!("the CA's answer is unusable: {why}")))
}

fn parse(response: &IstioCertificateResponse) -> Result<Answer, String> {
    let [chain @ .., roots] = &response.cert_chain[..] else {
        return Err("it holds no certificate".into());
    };
    if chain.is_empty() {
        return Err("it holds one certificate, expected at least a leaf and a root".into());
    }
    let chain = chain.iter().map(|text| pem::certificates(text.as_bytes())).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|e| e.to_string())?.concat();
    let roots = Bundle::from_pem(roots.as_bytes()).map_err(|e| e.to_string())?;
    Ok(Answer { chain, roots })
}

fn refused(status: &Status) -> Failure {
    let reason = match status.code() {
        _ if has_cause::<grpc::TokenError>(status) => "token",
        Code::Unauthenticated | Code::PermissionDenied => "denied",
        Code::Unavailable => "unavailable",
        Code::DeadlineExceeded | Code::Cancelled => "timeout",
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => "rejected",
        Code::ResourceExhausted => "overloaded",
        _ => "error",
    };
    let code = grpc::code_name(status.code());
    Failure::new(reason, format!("the CA did not issue the certificate: {} ({code})", grpc::explain(status)))
        .with_code(code)
}

fn has_cause<E: std::error::Error + 'static>(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<E>() {
            return true;
        }
        cause = error.source();
    }
    false
}
