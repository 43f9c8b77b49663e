//! Credentials: one workload's SVID with the trust bundles that go with it, ready for TLS.
//!
//! Immutable. A new generation is built whole, and only from material that has passed every check that a peer
//! would make, so whoever holds [`Credentials`] holds something that works.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use zspire_model::SpiffeId;

use crate::bundle::Bundles;
use crate::clock::{Clock, TlsTime, unix};
use crate::key::{self, PrivateKey};
use crate::tls::verify::{Role, Verifier, VerifyClient, VerifyServer};
use crate::tls::{self, ALPN, ClientTls, ExpectedPeers, Peer, Policy, Rejection, ServerTls, Stream};
use crate::x509::{self, CertificateView, Fingerprint};

/// What a source obtains for a workload.
#[derive(Debug)]
pub struct Svid {
    /// Who the workload is.
    pub id: SpiffeId,
    /// Leaf first, then intermediates; without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of the leaf.
    pub key: PrivateKey,
    /// Whom the workload trusts, by trust domain.
    pub bundles: Arc<Bundles>,
}

/// An SVID in use. See the module.
pub struct Credentials {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    bundles: Arc<Bundles>,
    not_before: SystemTime,
    not_after: SystemTime,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    verifier: Verifier,
    clock: Arc<dyn Clock>,
}

impl Credentials {
    /// Checks an SVID as a peer of the same trust domain would, and builds its TLS configurations.
    pub fn new(svid: Svid, policy: &Policy, clock: &Arc<dyn Clock>) -> Result<Self, Invalid> {
        let Svid { id, chain, key, bundles } = svid;
        let [leaf, intermediates @ ..] = &chain[..] else { return Err(Invalid::Empty) };
        let verifier = Verifier::new(bundles.clone(), policy);
        let now = unix(clock.now());
        // Without revocation lists: they are about others, and what is new cannot be on one.
        let alone = verifier.without_revocation();
        let seen = alone.check(leaf, intermediates, now, Role::Both)?;
        if seen.id != id {
            return Err(Invalid::OtherIdentity { asked: id, given: seen.id });
        }
        let key = key.certify(chain.clone())?;
        let time = Arc::new(TlsTime(clock.clone()));

        let builder = ServerConfig::builder_with_details(policy.provider.clone(), time.clone());
        let mut server = builder
            .with_protocol_versions(policy.versions)
            .map_err(|_| Invalid::Policy)?
            .with_client_cert_verifier(Arc::new(VerifyClient { verifier: verifier.clone(), mandatory: true }))
            .with_cert_resolver(key.clone());
        server.alpn_protocols = vec![ALPN.to_vec()];
        forbid_resumption(&mut server);

        let builder = ClientConfig::builder_with_details(policy.provider.clone(), time);
        let nobody = VerifyServer { verifier: verifier.clone(), expected: ExpectedPeers::from_iter([]) };
        let mut client = builder
            .with_protocol_versions(policy.versions)
            .map_err(|_| Invalid::Policy)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(nobody))
            .with_client_cert_resolver(key);
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = rustls::client::Resumption::disabled();
        client.enable_sni = false;

        let (not_before, not_after) = (seen.not_before, seen.not_after);
        Ok(Self {
            id,
            chain,
            bundles,
            not_before,
            not_after,
            server: Arc::new(server),
            client,
            verifier,
            clock: clock.clone(),
        })
    }

    /// Who this is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// First moment of the leaf's validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Last moment of the leaf's validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Who is trusted, by trust domain.
    pub fn bundles(&self) -> &Arc<Bundles> {
        &self.bundles
    }

    /// SHA-256 of the leaf: differs between generations.
    pub fn fingerprint(&self) -> Fingerprint {
        x509::fingerprint(&self.chain[0])
    }

    /// Whether the same CA has signed both: not when SVIDs come from a new one.
    pub fn has_issuer_of(&self, other: &Self) -> bool {
        x509::issuer(&self.chain[0]) == x509::issuer(&other.chain[0])
    }

    /// Whether a peer that was verified in a handshake would be accepted now: its certificates are still valid, they lead to a
    /// root that these credentials trust, and no revocation list is against them.
    ///
    /// For live connections, asked of the newest credentials of the workload; [`crate::revocation`] says when. It verifies the
    /// chain anew (some 100 µs). Whether the peer is one that is expected does not change and is not asked again.
    pub fn still_valid(&self, peer: &Peer) -> Result<(), tls::Error> {
        let [leaf, intermediates @ ..] = &peer.evidence.chain[..] else { return Err(tls::Error::NoCertificate) };
        let now = unix(self.clock.now());
        self.verifier.check(leaf, intermediates, now, peer.evidence.role).map(drop).map_err(tls::Error::Rejected)
    }

    /// The chain for admin views, leaf first.
    pub fn chain_view(&self) -> Vec<CertificateView> {
        self.chain.iter().filter_map(|der| CertificateView::parse(der)).collect()
    }

    /// The roots of the own trust domain for admin views.
    pub fn roots_view(&self) -> Vec<CertificateView> {
        let own = self.bundles.get(self.id.trust_domain());
        own.iter().flat_map(|bundle| bundle.roots()).filter_map(|der| CertificateView::parse(der)).collect()
    }

    /// Makes a TLS connection to a server that must be one of `expected`, over a connection that is there already.
    ///
    /// It has no time limit of its own: wrap it in a timeout. Dropping it midway closes the connection.
    pub async fn connect<IO>(&self, io: IO, expected: &ExpectedPeers) -> Result<(ClientTls<IO>, Peer), tls::Error>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let mut config = self.client.clone();
        let verifier = VerifyServer { verifier: self.verifier.clone(), expected: expected.clone() };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        // Neither sent (no SNI) nor compared: identities are SPIFFE IDs.
        let unused = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let stream = Stream::connect(io, Arc::new(config), unused).await.map_err(tls::Error::from_io)?;
        stream.require_alpn()?;
        let peer = stream.peer()?.ok_or(tls::Error::NoCertificate)?;
        Ok((stream, peer))
    }

    /// Accepts a TLS connection from a client with an SVID of a trusted domain.
    ///
    /// It has no time limit of its own: wrap it in a timeout. Dropping it midway closes the connection.
    pub async fn accept<IO>(&self, io: IO) -> Result<(ServerTls<IO>, Peer), tls::Error>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = Stream::accept(io, self.server.clone()).await.map_err(tls::Error::from_io)?;
        stream.require_alpn()?;
        let peer = stream.peer()?.ok_or(tls::Error::NoCertificate)?;
        Ok((stream, peer))
    }
}

/// A resumed session takes over the client's chain from before without checking it again, so there are none.
pub(crate) fn forbid_resumption(server: &mut ServerConfig) {
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Why material does not make credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No certificate at all.
    #[error("there is no certificate")]
    Empty,
    /// A peer would refuse it.
    #[error("a peer would refuse it: {0}")]
    Refused(#[from] Rejection),
    /// Somebody else's certificate.
    #[error("the certificate is for {given}, asked for {asked}")]
    OtherIdentity {
        /// The identity wanted.
        asked: SpiffeId,
        /// The identity in the certificate.
        given: SpiffeId,
    },
    /// Wrong or unusable key.
    #[error(transparent)]
    Key(#[from] key::Unusable),
    /// The TLS policy leaves no version.
    #[error("the TLS policy allows no protocol version")]
    Policy,
}

impl Invalid {
    /// A short name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Refused(rejection) => rejection.label(),
            Self::OtherIdentity { .. } => "wrong_identity",
            Self::Key(_) => "wrong_key",
            Self::Policy => "policy",
        }
    }
}
