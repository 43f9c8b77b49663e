//! Tunnels from other proxies to the pod (15008).
//!
//! `Accepted → Authenticated → Authorized → Connected`: a handshake proves who the peer is; then every stream of the tunnel is
//! asked where it wants to go and whether it may, and is answered with 200 only when the application is connected.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use zspire_hbone::{Handler, Incoming, Malformed, ResponseHead, StatusCode, Stream, Target};
use zspire_identity::tls;
use zspire_model::SpiffeId;
use zspire_model::inbound::{self, Inbound, InboundRequest};
use zspire_model::route::Authority;

use crate::accept::Accepted;
use crate::admission::{self, Connected, likely_service, source_workload};
use crate::connect::Reach;
use crate::flow::{self, About, Direction, Failure, Flow, Transport};
use crate::live::{Proof, Proved, Question};
use crate::metrics::{Flag, Reporter};
use crate::outbound::baggage;
use crate::pod::{Known, Local, Pod};
use crate::tunnels::{Chain, REVOKED, instant, tell_end};

/// Serves one connection to the HBONE port.
pub(crate) async fn serve(pod: Pod, accepted: Accepted) {
    let source = accepted.source;
    let Ok(local) = accepted.local() else { return accepted.refuse() };
    let refused = |reason: &'static str, why: &dyn std::fmt::Display| {
        flow::deny_early(&pod.shared().metrics, Direction::Inbound, source, Some(local), reason, why);
    };
    let handshake = match pod.handshake(source.ip()) {
        Ok(handshake) => handshake,
        Err(crowded) => {
            refused("handshakes", &crowded);
            return accepted.refuse();
        }
    };
    let _tunnel = match pod.tunnel(source.ip()) {
        Ok(tunnel) => tunnel,
        Err(crowded) => {
            refused("tunnels", &crowded);
            return accepted.refuse();
        }
    };
    match Authenticated::new(&pod, accepted, local).await {
        Ok(authenticated) => {
            drop(handshake);
            authenticated.serve(&pod).await;
        }
        Err(Unauthenticated { silent: true, why, .. }) => tracing::debug!(%source, error = %why, "no handshake"),
        Err(Unauthenticated { reason, why, .. }) => refused(reason, &why),
    }
}

/// A connection whose peer has proved its identity.
struct Authenticated {
    stream: tls::ServerTls<TcpStream>,
    tunnel: Tunnel,
    proved: Proved,
    /// When one of the two certificates expires.
    until: Instant,
}

/// What the streams of a tunnel have in common.
struct Tunnel {
    local_address: SocketAddr,
    source: SocketAddr,
    peer: SpiffeId,
    proof: Rc<Proof>,
}

/// Why a peer is not served.
struct Unauthenticated {
    reason: &'static str,
    why: String,
    /// Whether it went away without having said anything, as port scans and health checks do.
    silent: bool,
}

impl Unauthenticated {
    fn new(reason: &'static str, why: impl std::fmt::Display) -> Self {
        Self { reason, why: why.to_string(), silent: false }
    }
}

impl Authenticated {
    async fn new(pod: &Pod, accepted: Accepted, local_address: SocketAddr) -> Result<Self, Unauthenticated> {
        let metrics = &pod.shared().metrics;
        let local = pod.local().await.map_err(|error| Unauthenticated::new(error.label(), error))?;
        let credentials = pod.credentials(&local).await.map_err(|failure| Unauthenticated::new("identity", failure))?;
        let started = Instant::now();
        let limit = pod.shared().config.handshake_timeout;
        let handshake = credentials.accept(accepted.socket);
        let (stream, peer) = match timeout(limit, handshake).await {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(error)) => {
                metrics.handshake_failed(Reporter::Destination, error.label());
                if error.label() == REVOKED {
                    metrics.revoked(Reporter::Destination);
                }
                let silent = matches!(&error, tls::Error::Io(io) if io.kind() == std::io::ErrorKind::UnexpectedEof);
                let why = format!("TLS handshake: {}", Chain(&error));
                return Err(Unauthenticated { reason: error.label(), why, silent });
            }
            Err(_) => {
                metrics.handshake_failed(Reporter::Destination, "timeout");
                let why = format!("the TLS handshake was not finished in {limit:?}");
                return Err(Unauthenticated::new("timeout", why));
            }
        };
        metrics.handshake(Reporter::Destination, started.elapsed().as_secs_f64());
        let until = instant(credentials.not_after().min(peer.not_after));
        let (source, id) = (accepted.source, peer.id.clone());
        pod.newest().put(Reporter::Destination, source.ip(), &peer);
        let proved = pod.live().prove(Reporter::Destination, credentials.id().clone(), peer, source.ip());
        // What the listener's connections inherit is for peers of this machine.
        let from = pod.mesh(|snapshot| source_workload(snapshot, &local.workload, source.ip(), Some(&id)));
        if Reach::between(&local.workload, from.as_deref()) == Reach::Network {
            pod.sockets().pace(stream.get_ref());
        }
        let tunnel = Tunnel { local_address, source, peer: id, proof: proved.proof().clone() };
        Ok(Self { stream, tunnel, proved, until })
    }

    /// Serves the tunnel to its end; it takes no more streams when the pod drains, a certificate has expired or the peer is no
    /// longer trusted.
    async fn serve(self, pod: &Pod) {
        let Self { stream, tunnel, proved, until } = self;
        let source = tunnel.source;
        let handler = Streams { pod: pod.clone(), tunnel: Rc::new(tunnel) };
        let drain = async {
            tokio::select! {
                () = pod.drain().cancelled() => {}
                () = sleep_until(until) => {}
                () = proved.proof().is_withdrawn() => {}
            }
        };
        let ended = zspire_hbone::serve(stream, &pod.shared().config.tunnel, &handler, drain).await;
        tell_end(&pod.shared().metrics, proved.proof(), source, &ended);
    }
}

/// Answers the streams of one tunnel.
struct Streams {
    pod: Pod,
    tunnel: Rc<Tunnel>,
}

impl Handler for Streams {
    fn stream(&self, incoming: Incoming) {
        let (pod, tunnel) = (self.pod.clone(), self.tunnel.clone());
        self.pod.connections().spawn(async move {
            if let Some((connected, stream, flow)) = tunnel.answer(&pod, incoming).await {
                // A task of its own: while the connection lives, only the relay's state is held.
                pod.connections().spawn(connected.relay_stream(stream, flow));
            }
        });
    }

    fn malformed(&self, what: Malformed) {
        let source = self.tunnel.source;
        flow::deny_early(&self.pod.shared().metrics, Direction::Inbound, source, None, "malformed", &what);
    }
}

impl Tunnel {
    /// Answers one stream; what is returned is to be relayed. A refusal has been logged and counted.
    async fn answer(&self, pod: &Pod, mut incoming: Incoming) -> Option<(Connected, Stream, Flow)> {
        // What discovery says of the pod may have changed since the tunnel was opened, and what was proved then.
        let local = match self.still_served(pod) {
            Ok(local) => local,
            Err((reason, why)) => {
                let (metrics, asked) = (&pod.shared().metrics, incoming.head.address());
                flow::deny_early(metrics, Direction::Inbound, self.source, asked, reason, &why);
                incoming.reject(StatusCode::UNAUTHORIZED);
                return None;
            }
        };
        let target = incoming.head.target.clone();
        let resolved = match self.resolve(pod, &local, &target) {
            Ok(resolved) => resolved,
            Err(reject) => {
                let asked = incoming.head.address();
                let metrics = &pod.shared().metrics;
                flow::deny_early(metrics, Direction::Inbound, self.source, asked, "not_here", &reject);
                incoming.reject(StatusCode::BAD_REQUEST);
                return None;
            }
        };
        let question = Question {
            destination: resolved.destination,
            peer: Some(self.peer.clone()),
            peer_address: self.source.ip(),
        };
        let mut about = self.about(pod, &local, &target, &resolved);
        let authorized = match admission::authorize(pod, &local, question, self.source, self.local_address.ip()) {
            Ok(authorized) => authorized,
            Err(failure) => {
                pod.open(about).finish(false, Err(failure));
                incoming.reject(StatusCode::UNAUTHORIZED);
                return None;
            }
        };
        authorized.rests_on(&self.proof);
        about.next_hop = authorized.application(pod, resolved.tunnel);
        let flow = pod.open(about);
        let connected = tokio::select! {
            connected = authorized.connect(pod, resolved.tunnel) => connected,
            () = incoming.abandoned() => Err(Failure::new(Flag::None, "the peer no longer waits for an answer")),
        };
        let connected = match connected {
            Ok(connected) => connected,
            Err(failure) => {
                // A policy may have come that denies it: who asked must not take that for an endpoint that is down.
                let denied = failure.flag == Flag::Deny;
                flow.finish(false, Err(failure));
                incoming.reject(if denied { StatusCode::UNAUTHORIZED } else { StatusCode::SERVICE_UNAVAILABLE });
                return None;
            }
        };
        let baggage = pod.shared().config.response_baggage.then(|| baggage(&local.workload));
        match incoming.accept(&ResponseHead { baggage }) {
            Ok(stream) => Some((connected, stream, flow)),
            Err(ended) => {
                flow.finish(false, Err(Failure::new(Flag::None, Chain(&ended))));
                None
            }
        }
    }

    /// The pod as it is now, if it is still who the peer has verified, and the peer still trusted.
    fn still_served(&self, pod: &Pod) -> Result<Arc<Local>, (&'static str, String)> {
        let local = match pod.known() {
            Known::Here(local) => local,
            Known::Waiting => return Err(("unknown_workload", "discovery no longer knows the workload".into())),
            Known::Refused(why) => return Err(("wrong_namespace", why.to_string())),
        };
        if !local.workload.is(&self.proof.own) {
            return Err((
                "identity",
                format!("the tunnel was opened to {}, whom the workload is no longer", self.proof.own),
            ));
        }
        match self.proof.withdrawn() {
            None => Ok(local),
            Some(verdict) => Err((verdict.reason.as_str(), verdict.failure.why)),
        }
    }

    fn resolve(&self, pod: &Pod, local: &Local, target: &Target) -> Result<Inbound, inbound::Reject> {
        let authority = match target {
            Target::Address(address) => Authority::Address(*address),
            Target::Host { name, port } => Authority::Host((**name).into(), *port),
        };
        let request = InboundRequest {
            local: &local.workload,
            local_address: self.local_address.ip(),
            authority: &authority,
            only: pod.only(),
            settings: &pod.shared().config.routing,
        };
        pod.mesh(|snapshot| inbound::resolve(snapshot, &request))
    }

    fn about(&self, pod: &Pod, local: &Local, target: &Target, resolved: &Inbound) -> About {
        let workload = &local.workload;
        let (source, service) = pod.mesh(|snapshot| {
            let source = source_workload(snapshot, workload, self.source.ip(), Some(&self.peer));
            let port = resolved.destination.port();
            (source, resolved.service.clone().or_else(|| likely_service(snapshot, workload, port)))
        });
        About {
            direction: Direction::Inbound,
            transport: Transport::Hbone,
            source_address: self.source,
            source,
            source_identity: Some(self.peer.clone()),
            destination_address: self.local_address,
            next_hop: resolved.destination,
            hbone_address: Some(target.to_string().into()),
            original_destination: None,
            destination: Some(workload.clone()),
            destination_identity: workload.identity(),
            service,
        }
    }
}
