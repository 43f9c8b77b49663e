//! Whether a connection may reach the pod, and its way into the application.
//!
//! ```text
//!  Question ── authorize ──▶ Authorized ── connect ──▶ Connected ── relay_* ──▶ (ended)
//! ```
//! Only this file makes an [`Authorized`], and only from a verdict of the policies: the bytes of a connection that was not
//! authorized cannot be relayed.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use zspire_hbone::{Stream, copy};
use zspire_model::authorize::Decision;
use zspire_model::policy::Action;
use zspire_model::workload::{ApplicationProtocol, ApplicationTunnel};
use zspire_model::{Service, Snapshot, SpiffeId, Workload};

use crate::connect::{self, Reach};
use crate::flow::{Failure, Flow};
use crate::live::{Place, Proof, Question};
use crate::metrics::Flag;
use crate::outbound::outcome;
use crate::pod::{Local, Pod};
use crate::preamble;

/// A connection that policies allow.
pub(crate) struct Authorized {
    /// From now on a change of policy cuts it.
    place: Place,
    destination: SocketAddr,
    /// The pod's own address, to which the connection came; it may ask for something behind the pod.
    here: IpAddr,
    peer: Option<SpiffeId>,
    source: SocketAddr,
}

/// A connection whose application is connected.
pub(crate) struct Connected {
    place: Place,
    socket: TcpStream,
}

/// Asks the policies of the newest snapshot about a connection that came to the pod's address `here`.
pub(crate) fn authorize(
    pod: &Pod,
    local: &Local,
    question: Question,
    source: SocketAddr,
    here: IpAddr,
) -> Result<Authorized, Failure> {
    let ask = |snapshot: &Snapshot| (pod.verdicts().ask(snapshot, &local.workload, &question), snapshot.version());
    let (verdict, version) = pod.mesh(ask);
    let info = pod.shared().config.policy_info_logging;
    macro_rules! say {
        ($($what:tt)*) => {
            if info { tracing::info!($($what)*) } else { tracing::debug!($($what)*) }
        };
    }
    let peer = question.peer.as_ref().map(SpiffeId::as_str);
    for (policy, action) in &verdict.dry_run {
        let would = match action {
            Action::Allow => "allow",
            Action::Deny => "deny",
        };
        say!(%policy, would, source = %source, destination = %question.destination, peer, "dry run of a policy matches");
    }
    say!(verdict = %verdict.decision, source = %source, destination = %question.destination, peer, "policies were asked");
    match verdict.decision {
        Decision::Allowed { by } => {
            let (destination, peer) = (question.destination, question.peer.clone());
            let own = peer.as_ref().and(local.workload.identity());
            Ok(Authorized {
                place: pod.live().enter_allowed(question, by, version, &local.workload, own),
                destination,
                here,
                peer,
                source,
            })
        }
        Decision::Denied(denied) => {
            Err(Failure::new(Flag::Deny, format_args!("connection closed due to policy rejection: {denied}")))
        }
    }
}

impl Authorized {
    /// It came in this tunnel.
    pub(crate) fn rests_on(&self, proof: &Rc<Proof>) {
        self.place.rests_on(proof);
    }

    /// Where the application is.
    pub(crate) fn application(&self, pod: &Pod, tunnel: Option<ApplicationTunnel>) -> SocketAddr {
        let Some(tunnel) = tunnel else { return self.destination };
        let port = tunnel.port.unwrap_or(self.destination.port());
        let ip = match (pod.shared().config.localhost_app_tunnel, self.here.to_canonical()) {
            (true, IpAddr::V4(_)) => IpAddr::from(std::net::Ipv4Addr::LOCALHOST),
            (true, IpAddr::V6(_)) => IpAddr::from(std::net::Ipv6Addr::LOCALHOST),
            (false, ip) => ip,
        };
        SocketAddr::new(ip, port)
    }

    /// Connects to the application.
    pub(crate) async fn connect(self, pod: &Pod, tunnel: Option<ApplicationTunnel>) -> Result<Connected, Failure> {
        let to = self.application(pod, tunnel);
        let here = to.ip().is_loopback() || to.ip() == self.here.to_canonical();
        let connecting = async {
            let reach = if here { Reach::Pod } else { Reach::Network };
            let mut socket = pod.sockets().connect(to, self.source.ip(), reach).await?;
            if tunnel.is_some_and(|tunnel| tunnel.protocol == ApplicationProtocol::Proxy) {
                let header = preamble::proxy_v2(self.source, self.destination, self.peer.as_ref());
                // A few hundred bytes into an empty socket buffer: it does not wait.
                socket.write_all(&header).await.map_err(|cause| connect::Error::Failed { to, cause })?;
            }
            Ok(socket)
        };
        let socket = self.place.unless_cut(connecting).await?;
        Ok(Connected { place: self.place, socket })
    }
}

impl Connected {
    /// Carries a tunnel's stream to its end.
    pub(crate) fn relay_stream(self, stream: Stream, mut flow: Flow) -> impl Future<Output = ()> + 'static {
        let Self { place, socket } = self;
        flow.opened();
        async move {
            let end = stream.relay(socket, &flow.live().bytes, place.cut()).await;
            flow.finish(true, outcome(end, &place));
        }
    }

    /// Carries a plain connection to its end.
    pub(crate) fn relay_plain(self, client: TcpStream, mut flow: Flow) -> impl Future<Output = ()> + 'static {
        let Self { place, socket } = self;
        flow.opened();
        async move {
            let end = copy(socket, client, &flow.live().bytes, place.cut()).await;
            flow.finish(true, outcome(end, &place));
        }
    }
}

/// The workload that a connection comes from: the one at its address, if it has the identity that was proved.
pub(crate) fn source_workload(
    snapshot: &Snapshot,
    local: &Workload,
    address: IpAddr,
    peer: Option<&SpiffeId>,
) -> Option<Arc<Workload>> {
    let found = snapshot.workload_at(&local.network, address)?;
    let same = peer.is_none_or(|peer| found.is(peer));
    same.then(|| found.clone())
}

/// The service that a connection to a port of the workload probably asked for: the first that leads there.
pub(crate) fn likely_service(snapshot: &Snapshot, local: &Workload, port: u16) -> Option<Arc<Service>> {
    local.services.iter().find_map(|membership| {
        let service = snapshot.service(&membership.service)?;
        let own = membership.ports.iter().any(|own| own.target == Some(port));
        let leads = own || service.ports.iter().any(|of_service| of_service.target == Some(port));
        leads.then(|| service.clone())
    })
}
