//! The small HTTP/1 server under admin, metrics and readiness: bounded, and always with room for one more question.
//!
//! A connection that waits for a request can be closed at any time without harm, so that is what makes room: when its source has
//! its share, or when all places are taken, the one that has waited longest goes. Nobody keeps a probe out by connecting and
//! saying nothing. Without a free descriptor questions are answered one at a time by one that is held back.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at the same time.
const CONNECTIONS: usize = 64;
/// Connections of one source among them.
const OF_ONE_SOURCE: usize = 16;
/// How long a client may take to send a request head, and how long a connection may wait for the next one.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// How long one connection may live.
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// How long a question may take that is answered without a free descriptor.
const SHORT_TIME: Duration = Duration::from_millis(500);
/// Pause after an accept failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// At most one line about failed accepts in this time.
const COMPLAINT: Duration = Duration::from_secs(10);

/// A port that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {what}")]
pub struct BindError {
    what: &'static str,
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// Binds `address` for `what` (a word for messages). IPv6 sockets take IPv6 only.
pub fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    let listen = || -> std::io::Result<TcpListener> {
        let socket = if address.is_ipv6() {
            let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
            socket.set_only_v6(false)?;
            socket
        } else {
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?
        };
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(128)?;
        TcpListener::from_std(socket.into())
    };
    listen().map_err(|source| BindError { what, address, source })
}

/// Serves `app` on `listener` until `stop`, then closes.
pub async fn serve(listener: TcpListener, app: Router, stop: CancellationToken) {
    let (places, connections) = (Places::default(), TaskTracker::new());
    let mut shortage = Shortage::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, from)) => {
                let place = places.take(from.ip());
                let (app, stop) = (app.clone(), stop.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = place.0.told_to_go.cancelled() => {}
                        () = serve_connection(stream, place.0.watched(app), CONNECTION_TIME) => {}
                    }
                });
            }
            Err(error) => tokio::select! {
                () = stop.cancelled() => break,
                () = shortage.answer_one(&listener, &app, &error) => {}
            },
        }
    }
    connections.close();
    connections.wait().await;
}

async fn serve_connection(stream: TcpStream, app: Router, limit: Duration) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME.min(limit))
        .keep_alive(limit > SHORT_TIME)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    // A client that goes away or stalls concerns nobody else.
    let _ = tokio::time::timeout(limit, connection).await;
}

/// The places of one listener. Clones are the same.
#[derive(Debug, Clone, Default)]
struct Places(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    /// By order of arrival.
    connections: BTreeMap<u64, Arc<Connection>>,
}

#[derive(Debug)]
struct Connection {
    number: u64,
    from: IpAddr,
    /// Whether a request is being answered.
    busy: AtomicBool,
    told_to_go: CancellationToken,
}

/// The place of one connection; it is free again when this is dropped.
#[derive(Debug)]
struct Place(Arc<Connection>, Places);

impl Places {
    /// A place for one more connection. If there is none left, whoever has waited longest in silence loses theirs: of the same
    /// source when that has its share, else of all.
    fn take(&self, from: IpAddr) -> Place {
        let mut taken = self.lock();
        let own = taken.connections.values().filter(|connection| connection.from == from).count();
        if own >= OF_ONE_SOURCE {
            taken.make_room(|connection| connection.from == from);
        } else if taken.connections.len() >= CONNECTIONS {
            taken.make_room(|_| true);
        }
        let number = taken.next;
        taken.next += 1;
        let (busy, told_to_go) = (AtomicBool::new(false), CancellationToken::new());
        let connection = Arc::new(Connection { number, from, busy, told_to_go });
        taken.connections.insert(number, connection.clone());
        Place(connection, self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn make_room(&mut self, among: impl Fn(&Connection) -> bool) {
        let candidates = self.connections.values().filter(|connection| among(connection));
        let oldest = candidates.min_by_key(|connection| (connection.busy.load(Relaxed), connection.number));
        if let Some(number) = oldest.map(|connection| connection.number)
            && let Some(connection) = self.connections.remove(&number)
        {
            connection.told_to_go.cancel();
        }
    }
}

impl Connection {
    /// The application, with a note of when it is at work for this connection.
    fn watched(self: &Arc<Self>, app: Router) -> Router {
        let connection = self.clone();
        app.layer(middleware::from_fn(move |request: Request, next: Next| {
            let connection = connection.clone();
            async move {
                connection.busy.store(true, Relaxed);
                let response: Response = next.run(request).await;
                connection.busy.store(false, Relaxed);
                response
            }
        }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.1.lock().connections.remove(&self.0.number);
    }
}

/// What is done when a connection cannot be accepted, mostly for want of descriptors.
struct Shortage {
    /// Given up to accept a connection, and taken again.
    held: Option<File>,
    complained: Option<Instant>,
}

impl Shortage {
    fn new() -> Self {
        Self { held: hold(), complained: None }
    }

    /// Answers one question by the descriptor that is held back, and rests.
    async fn answer_one(&mut self, listener: &TcpListener, app: &Router, error: &std::io::Error) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAINT) {
            self.complained = Some(Instant::now());
            tracing::warn!(%error, "cannot accept connections as usual, questions are answered one at a time");
        }
        let had = self.held.take().is_some();
        if had && let Ok(Ok((stream, _))) = tokio::time::timeout(ACCEPT_PAUSE, listener.accept()).await {
            serve_connection(stream, app.clone(), SHORT_TIME).await;
        } else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
        self.held = hold();
    }
}

fn hold() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn app() -> Router {
        Router::new().route("/", axum::routing::get(|| async { "here\n" }))
    }

    async fn started() -> (SocketAddr, CancellationToken) {
        let listener = bind("the test", "127.0.0.1:0".parse().unwrap()).unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        tokio::spawn(serve(listener, app(), stop.clone()));
        (address, stop)
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn silent_connections_make_room_for_a_question() {
        let (address, stop) = started().await;
        let mut silent = Vec::new();
        for _ in 0..3 * CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut asking = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut asking).await.ends_with("here\n"));
        // The first of them is gone, the last still has its place.
        assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0);
        assert!(ask(silent.last_mut().unwrap()).await.ends_with("here\n"));
        stop.cancel();
    }

    #[test]
    fn each_source_has_its_share_and_the_oldest_silent_one_goes() {
        let places = Places::default();
        let (one, other): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let others = places.take(other);
        let first = places.take(one);
        first.0.busy.store(true, Relaxed);
        let rest: Vec<_> = (1..OF_ONE_SOURCE).map(|_| places.take(one)).collect();
        let _more = places.take(one);
        assert!(rest[0].0.told_to_go.is_cancelled(), "the oldest that is not at work");
        assert!(!first.0.told_to_go.is_cancelled() && !others.0.told_to_go.is_cancelled());
        drop(rest);
        assert_eq!(places.lock().connections.len(), 3);
        let sources = (0..u8::MAX).map(|n| IpAddr::from([10, 1, 0, n]));
        let many: Vec<_> = sources.map(|source| places.take(source)).collect();
        assert_eq!(places.lock().connections.len(), CONNECTIONS);
        assert!(others.0.told_to_go.is_cancelled() && many[0].0.told_to_go.is_cancelled());
        assert!(!first.0.told_to_go.is_cancelled() && !many.last().unwrap().0.told_to_go.is_cancelled());
    }
}
