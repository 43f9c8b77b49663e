//! TLS for a server that is known by its host name and whose callers may show an SVID: the control plane's own port.

use std::fmt;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::bundle::Bundles;
use crate::clock::{Clock, TlsTime};
use crate::credentials::{Invalid, forbid_resumption};
use crate::key::PrivateKey;
use crate::tls::verify::{Verifier, VerifyClient};
use crate::tls::{self, ALPN, Peer, Policy, ServerTls, Stream};

/// Accepts connections with one server certificate. Immutable: a rotation makes a new one.
#[derive(Clone)]
pub struct Acceptor(Arc<ServerConfig>);

impl Acceptor {
    /// `chain` is leaf first and should include the root, for clients that know it by its fingerprint only.
    /// A client certificate is optional, but one that is shown must verify against `clients`.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKey,
        clients: Arc<Bundles>,
        policy: &Policy,
        clock: &Arc<dyn Clock>,
    ) -> Result<Self, Invalid> {
        let key = key.certify(chain)?;
        let verifier = Verifier::new(clients, policy);
        let mut config = ServerConfig::builder_with_details(policy.provider.clone(), Arc::new(TlsTime(clock.clone())))
            .with_protocol_versions(policy.versions)
            .map_err(|_| Invalid::Policy)?
            .with_client_cert_verifier(Arc::new(VerifyClient { verifier, mandatory: false }))
            .with_cert_resolver(key);
        config.alpn_protocols = vec![ALPN.to_vec()];
        forbid_resumption(&mut config);
        Ok(Self(Arc::new(config)))
    }

    /// Makes the handshake. It has no time limit of its own: wrap it in a timeout.
    pub async fn accept<IO>(&self, io: IO) -> Result<(ServerTls<IO>, Option<Peer>), tls::Error>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = Stream::accept(io, self.0.clone()).await.map_err(tls::Error::from_io)?;
        let peer = stream.peer()?;
        Ok((stream, peer))
    }
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Acceptor")
    }
}
