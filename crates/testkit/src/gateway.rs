//! A gateway that takes tunnels itself, as those between networks do: whatever it is asked for, it leads to one place.

use std::future::pending;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_local};
use zspire_hbone::{Config, Counters, Handler, Incoming, Malformed, ResponseHead, StatusCode};
use zspire_identity::Credentials;
use zspire_sys::netns::Netns;

use crate::mesh::{Mesh, lock};
use crate::peer;
use crate::pod::Pod;
use crate::wait::DEADLINE;

/// Where it takes tunnels.
const PORT: u16 = 15008;

/// Who asked for what.
type Seen = Arc<Mutex<Vec<(String, String)>>>;

/// The gateway; it ends with its value.
#[derive(Debug)]
pub struct Gateway {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    seen: Seen,
}

/// What serves the tunnels of one peer.
struct Serving {
    peer: String,
    leads_to: SocketAddr,
    netns: Netns,
    seen: Seen,
}

impl Gateway {
    /// Starts one in a pod that has no proxy, with the pod's identity.
    #[track_caller]
    pub fn start(mesh: &Mesh, pod: &Pod, leads_to: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let credentials = peer::credentials(mesh, &runtime, &pod.spiffe_id(), peer::LIFETIME);
        let listener = pod.run(|| std::net::TcpListener::bind(pod.at(PORT))).expect("the port is free");
        listener.set_nonblocking(true).expect("a socket option");
        let (stop, stopped) = oneshot::channel();
        let (seen, netns) = (Seen::default(), pod.netns().clone());
        let serving = seen.clone();
        let thread = std::thread::spawn(move || {
            LocalSet::new().block_on(&runtime, async {
                let accepting = accept(listener, credentials, leads_to, netns, serving);
                tokio::select! {
                    () = accepting => {}
                    _ = stopped => {}
                }
            });
        });
        Self { stop: Some(stop), thread: Some(thread), seen }
    }

    /// Who has asked it for what.
    pub fn seen(&self) -> Vec<(String, String)> {
        lock(&self.seen).clone()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.stop.take());
        drop(self.thread.take().map(JoinHandle::join));
    }
}

async fn accept(
    listener: std::net::TcpListener,
    credentials: Credentials,
    leads_to: SocketAddr,
    netns: Netns,
    seen: Seen,
) {
    let listener = TcpListener::from_std(listener).expect("a listening socket");
    let credentials = Rc::new(credentials);
    while let Ok((socket, _)) = listener.accept().await {
        let (credentials, netns, seen) = (credentials.clone(), netns.clone(), seen.clone());
        spawn_local(async move {
            // Whoever is refused here is no concern of the gateway's.
            let Ok((stream, peer)) = credentials.accept(socket).await else { return };
            let serving = Serving { peer: peer.id.to_string(), leads_to, netns, seen };
            zspire_hbone::serve(stream, &Config::default(), &serving, pending()).await;
        });
    }
}

impl Handler for Serving {
    fn stream(&self, incoming: Incoming) {
        lock(&self.seen).push((self.peer.clone(), incoming.head.target.to_string()));
        let (netns, leads_to) = (self.netns.clone(), self.leads_to);
        spawn_local(async move {
            let connected = netns.run(|| std::net::TcpStream::connect_timeout(&leads_to, DEADLINE));
            let socket = connected.and_then(|socket| socket).and_then(|socket| {
                socket.set_nonblocking(true)?;
                TcpStream::from_std(socket)
            });
            match socket {
                Err(_) => incoming.reject(StatusCode::SERVICE_UNAVAILABLE),
                Ok(socket) => {
                    if let Ok(stream) = incoming.accept(&ResponseHead::default()) {
                        stream.relay(socket, &Counters::default(), pending()).await;
                    }
                }
            }
        });
    }

    fn malformed(&self, what: Malformed) {
        lock(&self.seen).push((self.peer.clone(), what.to_string()));
    }
}
