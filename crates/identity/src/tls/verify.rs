//! Verification of a peer: the profile of its leaf, the chain against the bundle of its own trust domain, and
//! whether it is the one expected. All of it happens inside the handshake.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use webpki::{ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage, RequiredEkuNotFoundContext};

use super::{ExpectedPeers, Policy, Rejection};
use crate::bundle::Bundles;
use crate::revocation::{self, Revocation};
use crate::x509::Leaf;

/// What the owner of a certificate does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
    /// The one and the other, with one look at the signatures.
    Both,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Both => "client and server",
        }
    }
}

impl ExtendedKeyUsageValidator for Role {
    /// "Required if present": an SVID may leave the extension out.
    fn validate(&self, usages: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let present = usages.map(|usage| Ok(usage?.to_decoded_oid())).collect::<Result<Vec<_>, webpki::Error>>()?;
        let has = |oid: &[usize]| present.is_empty() || present.iter().any(|usage| usage == oid);
        let (client, server) = (KeyUsage::CLIENT_AUTH_REPR, KeyUsage::SERVER_AUTH_REPR);
        let required = match self {
            Self::Client | Self::Both if !has(client) => KeyUsage::client_auth(),
            Self::Server | Self::Both if !has(server) => KeyUsage::server_auth(),
            _ => return Ok(()),
        };
        Err(webpki::Error::RequiredEkuNotFoundContext(RequiredEkuNotFoundContext { required, present }))
    }
}

/// Verifies SVIDs against the bundle of each one's own trust domain.
#[derive(Debug, Clone)]
pub(crate) struct Verifier {
    bundles: Arc<Bundles>,
    algorithms: WebPkiSupportedAlgorithms,
    revocation: Revocation,
}

impl Verifier {
    pub(crate) fn new(bundles: Arc<Bundles>, policy: &Policy) -> Self {
        let algorithms = policy.provider.signature_verification_algorithms;
        Self { bundles, algorithms, revocation: policy.revocation.clone() }
    }

    /// The same without revocation lists.
    pub(crate) fn without_revocation(&self) -> Self {
        Self { revocation: Revocation::default(), ..self.clone() }
    }

    /// Everything that makes a chain an SVID we trust, for use in `role` at `now`.
    pub(crate) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        role: Role,
    ) -> Result<Leaf, Rejection> {
        let svid = Leaf::parse(leaf)?;
        let Some(bundle) = self.bundles.get(svid.id.trust_domain()) else {
            return Err(Rejection::UnknownTrustDomain { id: svid.id });
        };
        let certificate = webpki::EndEntityCert::try_from(leaf).map_err(|e| rejection(&svid, role, e))?;
        let path = certificate
            .verify_for_usage(self.algorithms.all, bundle.anchors(), intermediates, now, role, None, None)
            .map_err(|e| rejection(&svid, role, e))?;
        self.revocation.check(&svid.id, &path, revocation::moment(now))?;
        Ok(svid)
    }
}

fn rejection(svid: &Leaf, role: Role, error: webpki::Error) -> Rejection {
    use webpki::Error as Pki;
    let id = svid.id.clone();
    let moment = |time: UnixTime| UNIX_EPOCH + Duration::from_secs(time.as_secs());
    match error {
        Pki::CertExpired { not_after, .. } => Rejection::Expired { id, not_after: moment(not_after) },
        Pki::CertNotValidYet { not_before, .. } => Rejection::NotYetValid { id, not_before: moment(not_before) },
        Pki::RequiredEkuNotFoundContext(_) => Rejection::WrongUsage { id, role: role.name() },
        other => Rejection::Untrusted { id, why: format!("{other:?}").into() },
    }
}

fn refuse(rejection: Rejection) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(rejection))).into()
}

/// A client's view of the server it connects to.
#[derive(Debug)]
pub(crate) struct VerifyServer {
    pub(crate) verifier: Verifier,
    pub(crate) expected: ExpectedPeers,
}

impl ServerCertVerifier for VerifyServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let svid = self.verifier.check(leaf, intermediates, now, Role::Server).map_err(refuse)?;
        if !self.expected.contains(&svid.id) {
            return Err(refuse(Rejection::UnexpectedPeer { id: svid.id, expected: self.expected.to_string() }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.verifier.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.verifier.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.algorithms.supported_schemes()
    }
}

/// A server's view of its clients.
#[derive(Debug)]
pub(crate) struct VerifyClient {
    pub(crate) verifier: Verifier,
    /// Whether a client without a certificate is turned away.
    pub(crate) mandatory: bool,
}

impl ClientCertVerifier for VerifyClient {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: who we trust is not a stranger's business, and peers have one certificate anyway.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verifier.check(leaf, intermediates, now, Role::Client).map_err(refuse)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.verifier.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.verifier.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.algorithms.supported_schemes()
    }
}
