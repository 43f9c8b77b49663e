//! The tunnels of a pod on one worker: what they may be shared for, and how one is made.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::{Instant, timeout};
use zspire_hbone::{Connected, Ended, OpenError, Pool, PoolConfig, Request, ResponseHead, StatusCode, Stream, Tunnel};
use zspire_identity::{Credentials, ExpectedPeers, tls};
use zspire_model::SpiffeId;

use crate::connect::Sockets;
use crate::flow::Failure;
use crate::metrics::{Flag, Reporter};
use crate::proxy::Shared;

/// How often a request is given to another tunnel when the peer certainly has not looked at it.
const RETRIES: usize = 2;

/// What a tunnel may be shared for: everything that the peer, the policies there and the path there depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Whose certificate is shown.
    pub(crate) source: SpiffeId,
    /// Where the connection comes from.
    pub(crate) source_address: IpAddr,
    /// Where it goes.
    pub(crate) destination: SocketAddr,
    /// Who may stand there.
    pub(crate) expected: ExpectedPeers,
}

/// The tunnels.
pub(crate) struct Tunnels {
    pool: Pool<Key, Failure>,
    shared: Arc<Shared>,
    sockets: Sockets,
}

impl Tunnels {
    pub(crate) fn new(shared: &Arc<Shared>, sockets: Sockets) -> Self {
        let metrics = shared.metrics.clone();
        let config = PoolConfig { unused_release: shared.config.unused_release };
        Self { pool: Pool::new(config, move |change| metrics.tunnels(change)), shared: shared.clone(), sockets }
    }

    /// Opens a stream to a peer, on a tunnel that is there or on a new one.
    pub(crate) async fn open(
        &self,
        key: &Key,
        credentials: &Arc<Credentials>,
        request: &Request,
    ) -> Result<(Stream, ResponseHead), Failure> {
        let mut tries = 0;
        loop {
            let make = || make(self.shared.clone(), self.sockets.clone(), key.clone(), credentials.clone());
            let lease = self.pool.lease(key, make, || self.shared.metrics.tunnel_wait()).await?;
            match lease.open(request).await {
                Ok(opened) => return Ok(opened),
                Err(error) if error.unprocessed() && tries < RETRIES => tries += 1,
                Err(error) => return Err(open_failure(error, &key.expected)),
            }
        }
    }

    /// Opens no more streams on the tunnels there are.
    pub(crate) fn retire_all(&self) {
        self.pool.retire(|_| true);
    }
}

/// Makes a tunnel to a peer that proves to be the right one.
async fn make(
    shared: Arc<Shared>,
    sockets: Sockets,
    key: Key,
    credentials: Arc<Credentials>,
) -> Result<Connected, Failure> {
    let socket = sockets.connect(key.destination, key.source_address).await?;
    let (tunnel, driver, until) = over(&shared, socket, &credentials, &key.expected).await?;
    let driver = Box::pin(async move {
        let ended = driver.await;
        match ended {
            Ended::Closed => tracing::debug!(peer = %key.destination, "tunnel closed"),
            ended => tracing::debug!(peer = %key.destination, error = %Chain(&ended), "tunnel ended"),
        }
    });
    Ok(Connected { tunnel, driver, until: Some(until) })
}

/// Begins a tunnel on a connection: TLS, then HTTP/2. It may be used until one of its certificates expires.
pub(crate) async fn over<IO>(
    shared: &Shared,
    io: IO,
    credentials: &Credentials,
    expected: &ExpectedPeers,
) -> Result<(Tunnel, impl Future<Output = Ended> + use<IO>, Instant), Failure>
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let started = Instant::now();
    let handshake = credentials.connect(io, expected);
    let (stream, peer) = match timeout(shared.config.handshake_timeout, handshake).await {
        Ok(Ok(connected)) => connected,
        Ok(Err(error)) => {
            shared.metrics.handshake_failed(Reporter::Source, error.label());
            return Err(tls_failure(&error, expected));
        }
        Err(_) => {
            shared.metrics.handshake_failed(Reporter::Source, "timeout");
            let why =
                format!("the TLS handshake with {expected} was not finished in {:?}", shared.config.handshake_timeout);
            return Err(Failure::new(Flag::TlsFailure, why));
        }
    };
    shared.metrics.handshake(Reporter::Source, started.elapsed().as_secs_f64());
    let until = instant(credentials.not_after().min(peer.not_after));
    let (tunnel, driver) = Tunnel::connect(stream, &shared.config.tunnel)
        .await
        .map_err(|ended| Failure::new(Flag::H2HandshakeFailure, Chain(&ended)))?;
    Ok((tunnel, driver, until))
}

fn tls_failure(error: &tls::Error, expected: &ExpectedPeers) -> Failure {
    Failure::new(Flag::TlsFailure, format_args!("TLS handshake with {expected}: {}", Chain(error)))
}

/// What an answer that is no means; a refusal of our certificate is heard only here (TLS 1.3).
pub(crate) fn open_failure(error: OpenError, expected: &ExpectedPeers) -> Failure {
    let flag = match &error {
        OpenError::Refused(StatusCode::UNAUTHORIZED) => Flag::Deny,
        OpenError::Ended(Ended::Io(io)) => {
            let copy = std::io::Error::new(io.kind(), io.clone());
            match tls::Error::from_io(copy) {
                tls::Error::Io(_) => Flag::Connect,
                tls => return tls_failure(&tls, expected),
            }
        }
        OpenError::Ended(Ended::Handshake) => Flag::H2HandshakeFailure,
        _ => Flag::Connect,
    };
    let hint = match &error {
        OpenError::Refused(StatusCode::UNAUTHORIZED) => {
            ": a policy at the destination denies it; the proxy there logs which"
        }
        OpenError::Refused(StatusCode::SERVICE_UNAVAILABLE) => ": the proxy there cannot reach the application",
        OpenError::Refused(StatusCode::BAD_REQUEST) => ": the workload there is not the one that was asked for",
        _ => "",
    };
    let mut failure = Failure::new(flag, format_args!("{}{hint}", Chain(&error)));
    if let OpenError::Refused(StatusCode::SERVICE_UNAVAILABLE) = error {
        failure.kind = std::io::ErrorKind::HostUnreachable;
    }
    failure
}

/// The monotonic time that a point of the calendar is now.
pub(crate) fn instant(at: SystemTime) -> Instant {
    Instant::now() + at.duration_since(SystemTime::now()).unwrap_or_default()
}

/// An error with its causes, in one line.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut last = self.0.to_string();
        f.write_str(&last)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            // Some errors say what their cause says.
            let text = error.to_string();
            if !last.contains(&text) {
                write!(f, ": {text}")?;
            }
            last = text;
            cause = error.source();
        }
        Ok(())
    }
}
