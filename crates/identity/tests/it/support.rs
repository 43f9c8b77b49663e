//! A clock that follows tokio's paused time, a CA that can make any certificate, and a scripted CA server.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderName, HeaderValue};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationList, CertificateRevocationListParams, DistinguishedName,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::pki_types::CertificateDer;
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use zspire_identity::authority::{Csr, PublicKey};
use zspire_identity::grpc::{Channel, TokenSource};
use zspire_identity::tls::Policy;
use zspire_identity::{Bundle, Bundles, Clock, Credentials, PrivateKey, Svid, pem};
use zspire_model::{SpiffeId, TrustDomain};
use zspire_wire::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use zspire_wire::ca::{IstioCertificateRequest, IstioCertificateResponse};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub(crate) fn domain(text: &str) -> TrustDomain {
    text.parse().unwrap()
}

/// Wall-clock time that moves with tokio's, from a fixed beginning, and can be shifted.
#[derive(Debug)]
pub(crate) struct TestClock {
    start: Instant,
    base: Mutex<SystemTime>,
}

impl TestClock {
    pub(crate) fn new() -> Arc<Self> {
        let base = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        Arc::new(Self { start: Instant::now(), base: Mutex::new(base) })
    }

    pub(crate) fn jump(&self, forward: Duration) {
        *self.base.lock().unwrap() += forward;
    }
}

impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        *self.base.lock().unwrap() + self.start.elapsed()
    }
}

/// A CA for tests, which makes good certificates unless told otherwise.
pub(crate) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl TestCa {
    pub(crate) fn new(now: SystemTime) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "test");
        params.not_before = (now - 24 * HOUR).into();
        params.not_after = (now + 24 * 365 * HOUR).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), root }
    }

    /// A CA below this one, with its certificate.
    pub(crate) fn intermediate(&self, name: &str, usages: &[KeyUsagePurpose], now: SystemTime) -> TestCa {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, name);
        params.not_before = (now - 24 * HOUR).into();
        params.not_after = (now + 24 * 365 * HOUR).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.serial_number = Some(rcgen::SerialNumber::from(77_u64));
        params.key_usages = usages.to_vec();
        let key = KeyPair::generate().unwrap();
        let root = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        // It can sign lists also where its certificate does not allow it.
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self { issuer: Issuer::new(params, key), root }
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    /// A revocation list of these serial numbers, good until then.
    pub(crate) fn crl(&self, serials: &[u64], now: SystemTime, next_update: SystemTime) -> CertificateRevocationList {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: (now - HOUR).into(),
            next_update: next_update.into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap()
    }

    pub(crate) fn bundle(&self) -> Bundle {
        Bundle::new(vec![self.root.clone()]).unwrap()
    }

    pub(crate) fn root_pem(&self) -> String {
        pem::certificate(&self.root)
    }

    /// A leaf for `uris`, valid for an hour; `change` may spoil it.
    pub(crate) fn leaf(
        &self,
        key: &PublicKey,
        uris: &[&str],
        now: SystemTime,
        change: impl FnOnce(&mut CertificateParams),
    ) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = (now - Duration::from_secs(120)).into();
        params.not_after = (now + HOUR).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.is_ca = IsCa::ExplicitNoCa;
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        change(&mut params);
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }

    pub(crate) fn svid(&self, name: &str, trusted: &[(&str, &TestCa)], now: SystemTime) -> Svid {
        let key = PrivateKey::generate();
        let public = public_key(&key);
        let chain = vec![self.leaf(&public, &[name], now, |_| ())];
        let bundles: Bundles = trusted.iter().map(|(td, ca)| (domain(td), ca.bundle())).collect();
        Svid { id: id(name), chain, key, bundles: Arc::new(bundles) }
    }

    pub(crate) fn credentials(&self, name: &str, trusted: &[(&str, &TestCa)], clock: &Arc<dyn Clock>) -> Credentials {
        Credentials::new(self.svid(name, trusted, clock.now()), &Policy::default(), clock).unwrap()
    }
}

pub(crate) fn public_key(key: &PrivateKey) -> PublicKey {
    Csr::from_pem(&key.request(None).unwrap()).unwrap().key
}

/// One call that the fake CA got.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// 0 for the first of all.
    pub(crate) number: usize,
    pub(crate) identity: Option<String>,
    pub(crate) csr: String,
    pub(crate) ttl: i64,
    pub(crate) headers: BTreeMap<String, String>,
}

type Answer = Pin<Box<dyn Future<Output = Result<Vec<String>, Status>> + Send>>;

/// A CA server that answers as a script says.
#[derive(Clone)]
pub(crate) struct FakeCa {
    script: Arc<dyn Fn(Call) -> Answer + Send + Sync>,
    calls: Arc<Mutex<Vec<Call>>>,
    running: Arc<AtomicUsize>,
    pub(crate) most: Arc<AtomicUsize>,
}

impl fmt::Debug for FakeCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeCa")
    }
}

impl FakeCa {
    pub(crate) fn new<F>(script: impl Fn(Call) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Vec<String>, Status>> + Send + 'static,
    {
        let script = Arc::new(move |call| -> Answer { Box::pin(script(call)) });
        Self { script, calls: Arc::default(), running: Arc::default(), most: Arc::default() }
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    pub(crate) fn service(&self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self.clone())
    }

    /// A channel to it that exists in memory only, so that paused time stays exact.
    pub(crate) fn channel(&self) -> Channel {
        self.channel_with(None, Vec::new())
    }

    /// The same with what is sent beside every call.
    pub(crate) fn channel_with(&self, token: Option<TokenSource>, headers: Vec<(HeaderName, HeaderValue)>) -> Channel {
        let fake = self.clone();
        let connect = move || {
            let service = fake.service();
            async move {
                let (client, server) = tokio::io::duplex(1 << 16);
                let incoming = tokio_stream::once(Ok::<_, std::io::Error>(server));
                tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
                Ok(client)
            }
        };
        Channel::over(connect, token, headers)
    }
}

#[tonic::async_trait]
impl IstioCertificateService for FakeCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let headers = request.metadata().clone().into_headers();
        let headers = headers.iter().map(|(k, v)| (k.to_string(), v.to_str().unwrap_or("").to_owned())).collect();
        let request = request.into_inner();
        let identity = request.metadata.and_then(|fields| match &fields.fields.get("ImpersonatedIdentity")?.kind {
            Some(prost_types::value::Kind::StringValue(text)) => Some(text.clone()),
            _ => None,
        });
        let call = {
            let mut calls = self.calls.lock().unwrap();
            let call =
                Call { number: calls.len(), identity, csr: request.csr, ttl: request.validity_duration, headers };
            calls.push(call.clone());
            call
        };
        let running = Running::enter(&self.running);
        self.most.fetch_max(running.0.load(Ordering::Relaxed), Ordering::Relaxed);
        let cert_chain = (self.script)(call).await?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

struct Running(Arc<AtomicUsize>);

impl Running {
    fn enter(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
