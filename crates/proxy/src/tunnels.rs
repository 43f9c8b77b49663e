//! The tunnels of a pod on one worker: what they may be shared for, and how one is made.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout};
use zspire_hbone::{Connected, Ended, OpenError, Pool, PoolConfig, Request, StatusCode, Stream, Tunnel, TunnelId};
use zspire_identity::{Credentials, ExpectedPeers, Peer, tls};
use zspire_model::SpiffeId;

use crate::connect::{Reach, Sockets, canonical};
use crate::flow::Failure;
use crate::live::{Proof, Proved, Registry};
use crate::metrics::{Flag, Metrics, Reporter};
use crate::proxy::Shared;
use crate::watch::Newest;

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
    /// How far that is.
    pub(crate) reach: Reach,
}

/// The tunnels.
#[derive(Clone)]
pub(crate) struct Tunnels(Rc<Inner>);

struct Inner {
    pool: Pool<Key, Failure>,
    shared: Arc<Shared>,
    worker: usize,
    sockets: Sockets,
    live: Rc<Registry>,
    newest: Newest,
    made: RefCell<HashMap<TunnelId, Made>>,
}

/// A tunnel that was made and has not ended.
struct Made {
    key: Key,
    proof: Rc<Proof>,
    /// When a tunnel should be made that shows the peer's newer certificate and ours, if connections still rest on this one.
    renew_at: Cell<Option<SystemTime>>,
}

/// A stream and what was proved for its tunnel.
pub(crate) struct Opened {
    pub(crate) stream: Stream,
    pub(crate) proof: Rc<Proof>,
}

impl Tunnels {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        worker: usize,
        sockets: Sockets,
        live: Rc<Registry>,
        newest: Newest,
    ) -> Self {
        let metrics = shared.metrics.clone();
        let config = PoolConfig { unused_release: shared.config.unused_release };
        let pool = Pool::new(config, move |change| metrics.tunnels(change));
        Self(Rc::new(Inner { pool, shared: shared.clone(), worker, sockets, live, newest, made: RefCell::default() }))
    }

    /// Opens a stream to a peer, on a tunnel that is there or on a new one.
    pub(crate) async fn open(
        &self,
        key: &Key,
        credentials: &Arc<Credentials>,
        request: &Request,
    ) -> Result<Opened, Failure> {
        let metrics = &self.0.shared.metrics;
        let mut tries = 0;
        loop {
            let make = || self.clone().make(key.clone(), credentials.clone());
            let mut wait = None;
            let lease = self.0.pool.lease(key, make, || wait = Some(metrics.tunnel_wait())).await?;
            drop(wait);
            let opened = match lease.open(request).await {
                Ok((stream, _)) => {
                    let proof = self.0.made.borrow().get(&stream.tunnel()).map(|made| made.proof.clone());
                    proof.map(|proof| Opened { stream, proof }).ok_or(OpenError::Ended(Ended::Closed))
                }
                Err(error) => Err(error),
            };
            match opened {
                Ok(opened) => return Ok(opened),
                Err(error) if error.unprocessed() && !is_tls(&error) && tries < RETRIES => tries += 1,
                Err(error) => return Err(open_failure(error, &key.expected)),
            }
        }
    }

    /// Opens no more streams on the tunnels there are, nor on those that are being made.
    pub(crate) fn retire_all(&self) {
        self.0.pool.retire_all();
    }

    /// The same, and whatever is made from now on is for those alone who wait for it.
    pub(crate) fn close(&self) {
        self.0.pool.close();
    }

    /// Opens no more streams on tunnels whose ends are no longer trusted.
    pub(crate) fn retire_withdrawn(&self) {
        let made = self.0.made.borrow();
        let withdrawn: HashSet<TunnelId> =
            made.iter().filter(|(_, made)| made.proof.withdrawn().is_some()).map(|(id, _)| *id).collect();
        drop(made);
        self.0.pool.retire(|_, id| withdrawn.contains(&id));
    }

    /// When the next tunnel should be renewed.
    pub(crate) fn next_renewal(&self) -> Option<SystemTime> {
        self.0.made.borrow().values().filter_map(|made| made.renew_at.get()).min()
    }

    /// Replaces the tunnels whose certificates end soon. Where live connections rest on one, the new one is made at once: in it
    /// the two ends show each other their newer certificates, and the connections may go on.
    pub(crate) fn renew(&self, credentials: &Arc<Credentials>) {
        let now = SystemTime::now();
        let (mut ids, mut keys) = (HashSet::new(), Vec::<Key>::new());
        for (id, made) in self.0.made.borrow().iter() {
            if made.renew_at.get().is_none_or(|at| at > now) {
                continue;
            }
            made.renew_at.set(None);
            ids.insert(*id);
            if made.proof.is_used() && made.key.source == *credentials.id() && !keys.contains(&made.key) {
                keys.push(made.key.clone());
            }
        }
        if ids.is_empty() {
            return;
        }
        self.0.pool.retire(|_, id| ids.contains(&id));
        for key in keys {
            self.0.pool.renew(&key, || self.clone().make(key.clone(), credentials.clone()));
        }
    }

    /// The next [`renew`](Self::renew) is to replace the tunnels of these proofs, however much time is left.
    pub(crate) fn hasten(&self, which: impl Fn(&Rc<Proof>) -> bool) {
        for made in self.0.made.borrow().values().filter(|made| which(&made.proof)) {
            made.renew_at.set(Some(SystemTime::UNIX_EPOCH));
        }
    }

    /// The connections of a tunnel go on with newer certificates: those are to be renewed in time as well.
    pub(crate) fn renewed(&self, proof: &Rc<Proof>, credentials: &Credentials) {
        let at = renewal(SystemTime::now(), credentials.not_after().min(proof.not_after()));
        for made in self.0.made.borrow().values().filter(|made| Rc::ptr_eq(&made.proof, proof)) {
            made.renew_at.set(Some(at));
        }
    }

    /// Makes a tunnel to a peer that proves to be the right one.
    async fn make(self, key: Key, credentials: Arc<Credentials>) -> Result<Connected, Failure> {
        let shared = &self.0.shared;
        let (sockets, to, from) = (&self.0.sockets, key.destination, key.source_address);
        let (socket, beginning) = if key.reach == Reach::Host {
            // Before it connects: the other end may accept it before this one hears of that.
            let note = |port| shared.begun.note((port, canonical(to)), self.0.worker);
            sockets.connect_noted(to, from, key.reach, note).await?
        } else {
            (sockets.connect(to, from, key.reach).await?, None)
        };
        let Begun { tunnel, driver, until, peer } = over(shared, socket, &credentials, &key.expected).await?;
        drop(beginning);
        let proved = self.prove(&key, &credentials, &peer);
        let renew_at = renewal(SystemTime::now(), credentials.not_after().min(peer.not_after));
        let made = Made { key: key.clone(), proof: proved.proof().clone(), renew_at: Cell::new(Some(renew_at)) };
        let id = tunnel.id();
        self.0.made.borrow_mut().insert(id, made);
        // It watches for the renewal of the soonest.
        self.0.live.look_again();
        let tunnels = Rc::downgrade(&self.0);
        let driver = Box::pin(async move {
            let ended = driver.await;
            let Some(tunnels) = tunnels.upgrade() else { return };
            tunnels.made.borrow_mut().remove(&id);
            tell_end(&tunnels.shared.metrics, proved.proof(), key.destination, &ended);
        });
        Ok(Connected { tunnel, driver, until: Some(until) })
    }

    /// Notes what a handshake has proved.
    pub(crate) fn prove(&self, key: &Key, credentials: &Credentials, peer: &Peer) -> Proved {
        let address = key.destination.ip();
        self.0.newest.put(Reporter::Source, address, peer);
        self.0.live.prove(Reporter::Source, credentials.id().clone(), peer.clone(), address)
    }
}

/// When a tunnel that begins `now` is to be renewed: when a quarter of its time is left, and at most a minute. Certificates are
/// renewed at half their life, so that newer ones are there by then.
fn renewal(now: SystemTime, not_after: SystemTime) -> SystemTime {
    const AHEAD: Duration = Duration::from_secs(60);
    not_after - (not_after.duration_since(now).unwrap_or_default() / 4).min(AHEAD)
}

/// A tunnel that has begun.
pub(crate) struct Begun<D> {
    pub(crate) tunnel: Tunnel,
    pub(crate) driver: D,
    /// It may be used until one of its certificates expires.
    pub(crate) until: Instant,
    pub(crate) peer: Peer,
}

/// Begins a tunnel on a connection: TLS, then HTTP/2.
pub(crate) async fn over<IO>(
    shared: &Shared,
    io: IO,
    credentials: &Credentials,
    expected: &ExpectedPeers,
) -> Result<Begun<impl Future<Output = Ended> + use<IO>>, Failure>
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let started = Instant::now();
    let handshake = credentials.connect(io, expected);
    let (stream, peer) = match timeout(shared.config.handshake_timeout, handshake).await {
        Ok(Ok(connected)) => connected,
        Ok(Err(error)) => {
            shared.metrics.handshake_failed(Reporter::Source, error.label());
            if error.label() == REVOKED {
                shared.metrics.revoked(Reporter::Source);
            }
            return Err(tls_failure(&error, expected));
        }
        Err(_) => {
            shared.metrics.handshake_failed(Reporter::Source, "timeout");
            let why =
                format!("the TLS handshake with {expected} was not finished in {:?}", shared.config.handshake_timeout);
            return Err(Failure::new(Flag::TlsFailure, why).on_this_way());
        }
    };
    shared.metrics.handshake(Reporter::Source, started.elapsed().as_secs_f64());
    let until = instant(credentials.not_after().min(peer.not_after));
    let (tunnel, driver) = Tunnel::connect(stream, &shared.config.tunnel)
        .await
        .map_err(|ended| Failure::new(Flag::H2HandshakeFailure, Chain(&ended)).on_this_way())?;
    Ok(Begun { tunnel, driver, until, peer })
}

/// Tells how a tunnel ended whose other end was at `address`.
pub(crate) fn tell_end(metrics: &Metrics, proof: &Proof, address: SocketAddr, ended: &Ended) {
    let (peer, error) = (&proof.peer.borrow().id, Chain(ended));
    match (ended, metrics.tunnel_ended(proof.reporter, ended)) {
        (_, Some(reason)) => tracing::warn!(%peer, %address, reason, %error, "tunnel ended by an offence of the peer"),
        (Ended::Closed, None) => tracing::debug!(%peer, %address, "tunnel closed"),
        (_, None) => tracing::debug!(%peer, %address, %error, "tunnel ended"),
    }
}

/// What the check is called that a revoked certificate fails.
pub(crate) const REVOKED: &str = "revoked";

fn tls_failure(error: &tls::Error, expected: &ExpectedPeers) -> Failure {
    let flag = if error.label() == REVOKED { Flag::CertRevoked } else { Flag::TlsFailure };
    Failure::new(flag, format_args!("TLS handshake with {expected}: {}", Chain(error))).on_this_way()
}

/// Whether the peer has refused our certificate: it would do so again.
fn is_tls(error: &OpenError) -> bool {
    let OpenError::Ended(Ended::Io(io)) = error else { return false };
    !matches!(tls::Error::from_io(std::io::Error::new(io.kind(), io.clone())), tls::Error::Io(_))
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
    match error {
        // A policy says the same everywhere, and what was malformed once stays so.
        OpenError::Refused(status) if status != StatusCode::SERVICE_UNAVAILABLE => failure,
        OpenError::Invalid => failure,
        _ => failure.on_this_way(),
    }
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
