//! Which worker serves a tunnel that comes in.
//!
//! The kernel gives connections to the workers' listeners by a hash. That is even for many, but the tunnels of one peer are as few as
//! its workers and each carries a share of everything: half of the time two of them would meet on one worker, and the other have
//! nothing to do. So each goes to the worker that has the fewest of that peer, and it is handed over before anything is read.
//!
//! A tunnel between two pods of this process goes to the worker that opened it, if that is known in time and has room: a message that
//! stays on its thread wakes nobody.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use smallvec::SmallVec;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::accept::{Accepted, Complaint};
use crate::inbound;
use crate::pod::Pod;

/// Connections that wait to be taken over by one worker; what is more stays where it was accepted.
const WAITING: usize = 64;

/// A pod's tunnels on all workers, as one worker sees them.
pub(crate) struct Spread {
    own: usize,
    all: Arc<All>,
    handed: mpsc::Receiver<Handed>,
}

struct All {
    load: Mutex<Load>,
    workers: Vec<mpsc::Sender<Handed>>,
    complaint: Complaint,
}

impl All {
    /// The kernel could not be told to watch a connection for the other worker, for want of memory or by its limit of what is watched:
    /// it is closed.
    fn lost(&self, source: SocketAddr, error: &std::io::Error) {
        if self.complaint.is_due() {
            tracing::warn!(%source, %error, "a tunnel was lost on its way to another worker: its peer has to connect again");
        }
    }
}

/// How many tunnels of each peer each worker has. Peers do not count for each other: what one does is no reason to put others together.
#[derive(Default)]
struct Load(HashMap<IpAddr, SmallVec<[u32; 8]>>);

/// Tunnels that workers of this process have begun to open to pods of the same machine, until their handshakes are over: the other
/// end may be served here as well.
#[derive(Debug, Default)]
pub struct Begun(Mutex<HashMap<Ends, usize>>);

/// The port that a tunnel comes from, and where it goes. Two pods may be at the same port at the same moment: then the later is told of,
/// and the other is placed as if nobody knew.
type Ends = (u16, SocketAddr);

/// A tunnel of which its other end may ask; forgotten when this is dropped.
pub(crate) struct Beginning<'a> {
    begun: &'a Begun,
    ends: Ends,
    worker: usize,
}

impl Begun {
    /// Notes which worker opens a tunnel.
    pub(crate) fn note(&self, ends: Ends, worker: usize) -> Beginning<'_> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(ends, worker);
        Beginning { begun: self, ends, worker }
    }

    /// The worker that opens the tunnel between these ends, if it is one of this process.
    fn worker(&self, ends: &Ends) -> Option<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(ends).copied()
    }
}

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        let mut begun = self.begun.0.lock().unwrap_or_else(PoisonError::into_inner);
        if begun.get(&self.ends) == Some(&self.worker) {
            begun.remove(&self.ends);
        }
    }
}

/// A connection on its way to another worker.
struct Handed {
    socket: std::net::TcpStream,
    source: SocketAddr,
    seat: Seat,
}

/// A tunnel's place on a worker, as long as it lives.
struct Seat {
    all: Arc<All>,
    worker: usize,
    of: IpAddr,
}

impl Spread {
    /// For each of the workers.
    pub(crate) fn over(workers: usize) -> Vec<Self> {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(WAITING)).unzip();
        let all = Arc::new(All { load: Mutex::default(), workers: senders, complaint: Complaint::default() });
        receivers.into_iter().enumerate().map(|(own, handed)| Self { own, all: all.clone(), handed }).collect()
    }

    /// Serves connections that others have accepted, until the pod drains; then those that are on their way.
    pub(crate) async fn take_over(mut self, pod: &Pod) {
        let mut draining = false;
        loop {
            let handed = tokio::select! {
                handed = self.handed.recv() => handed,
                () = pod.drain().cancelled(), if !draining => {
                    draining = true;
                    self.handed.close();
                    continue;
                }
            };
            let Some(Handed { socket, source, seat }) = handed else { return };
            match TcpStream::from_std(socket) {
                Ok(socket) => pod.connections().spawn(serve(pod.clone(), Accepted { socket, source }, seat)),
                Err(error) => self.all.lost(source, &error),
            }
        }
    }

    /// What becomes of a connection that this worker accepts.
    pub(crate) fn placing(&self) -> impl Fn(Pod, Accepted) -> Placed + use<> {
        let (all, own) = (self.all.clone(), self.own);
        move |pod, accepted| Placed { pod, accepted, all: all.clone(), own }
    }
}

/// A connection that was accepted by a worker.
pub(crate) struct Placed {
    pod: Pod,
    accepted: Accepted,
    all: Arc<All>,
    own: usize,
}

impl Placed {
    /// Serves it here, or has another worker serve it.
    pub(crate) async fn serve(self) {
        let Self { pod, accepted, all, own } = self;
        let begun = accepted.local().ok().and_then(|local| pod.shared().begun.worker(&(accepted.source.port(), local)));
        let seat = Seat::take(&all, own, accepted.source.ip(), begun);
        let place = all.workers.get(seat.worker).filter(|_| seat.worker != own).map(mpsc::Sender::try_reserve);
        let place = match place {
            None => return serve(pod, accepted, seat).await,
            // It has too much to do, or takes no more.
            Some(Err(_)) => return serve(pod, accepted, seat.at(own)).await,
            Some(Ok(place)) => place,
        };
        let Accepted { socket, source } = accepted;
        match socket.into_std() {
            Ok(socket) => place.send(Handed { socket, source, seat }),
            Err(error) => all.lost(source, &error),
        }
    }
}

async fn serve(pod: Pod, accepted: Accepted, seat: Seat) {
    inbound::serve(pod, accepted).await;
    drop(seat);
}

impl Seat {
    fn take(all: &Arc<All>, own: usize, of: IpAddr, begun: Option<usize>) -> Self {
        let worker = all.load.lock().unwrap_or_else(PoisonError::into_inner).enter(all.workers.len(), own, of, begun);
        Self { all: all.clone(), worker, of }
    }

    /// The same on another worker.
    fn at(mut self, worker: usize) -> Self {
        let mut load = self.all.load.lock().unwrap_or_else(PoisonError::into_inner);
        load.enter_at(worker, self.of);
        load.leave(self.worker, self.of);
        drop(load);
        self.worker = worker;
        self
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.all.load.lock().unwrap_or_else(PoisonError::into_inner).leave(self.worker, self.of);
    }
}

impl Load {
    /// Enters a tunnel where it was begun, or where the fewest of its peer are, rather here than elsewhere.
    fn enter(&mut self, workers: usize, own: usize, of: IpAddr, begun: Option<usize>) -> usize {
        let each = self.0.entry(of).or_default();
        each.resize(workers, 0);
        let fewest = || (0..workers).min_by_key(|worker| (each[*worker], *worker != own));
        let worker = begun.filter(|begun| *begun < workers).or_else(fewest).unwrap_or(own);
        self.enter_at(worker, of);
        worker
    }

    fn enter_at(&mut self, worker: usize, of: IpAddr) {
        if let Some(each) = self.0.get_mut(&of) {
            each[worker] += 1;
        }
    }

    fn leave(&mut self, worker: usize, of: IpAddr) {
        if let Some(each) = self.0.get_mut(&of) {
            each[worker] -= 1;
            if each.iter().all(|count| *count == 0) {
                self.0.remove(&of);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_of_each_peer_are_spread() {
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut load = Load::default();
        assert_eq!(load.enter(2, 1, one, None), 1, "here, if all are equal");
        assert_eq!(load.enter(2, 1, other, None), 1, "whoever else is here");
        assert_eq!(load.enter(2, 1, one, None), 0, "where the fewest are");
        assert_eq!(load.enter(2, 1, other, None), 0);
        load.leave(0, one);
        assert_eq!(load.enter(2, 1, one, None), 0, "where one has ended");
        assert_eq!(load.enter(2, 1, one, Some(0)), 0, "where it was begun, however many there are");
        for (worker, of) in [(0, one), (0, one), (1, one), (0, other), (1, other)] {
            load.leave(worker, of);
        }
        assert!(load.0.is_empty(), "nothing is kept of who is gone");
    }

    #[test]
    fn a_tunnel_is_known_by_both_ends_until_its_handshake_is_over() {
        let (from, to) = (40000, SocketAddr::from(([10, 0, 0, 2], 15008)));
        let begun = Begun::default();
        let beginning = begun.note((from, to), 1);
        assert_eq!(begun.worker(&(from, to)), Some(1));
        assert_eq!(begun.worker(&(from, SocketAddr::from(([10, 0, 0, 3], 15008)))), None, "to somebody else");
        let another = begun.note((from, to), 0);
        drop(beginning);
        assert_eq!(begun.worker(&(from, to)), Some(0), "another pod's, at the same port");
        drop(another);
        assert_eq!(begun.worker(&(from, to)), None);
    }
}
