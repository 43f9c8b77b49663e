//! The connection to the CNI node agent: made, kept, made again.
//!
//! ```text
//!            ┌────────────── pause, growing, with jitter ◀─────────────┐
//!  connect ──┴─▶ hello ─▶ snapshot: add, add, keep, snapshot_sent ─▶ add, del … ─▶ it ends
//!                                                        ready from here
//! ```
//! While there is no connection, the pods that there are go on being served; readiness says what is missing. One task, which
//! owns the pods; it ends when it is told to, and then every pod drains.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use zspire_sys::process;
use zspire_sys::scm::{Received, SeqPacket};

use super::zds::{self, Packet};
use super::{Launcher, PodView, Pods, launcher};
use crate::descriptor::watched;
use crate::readiness::{Blocker, Readiness};

/// First pause after a connection that was not made or has ended; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// How long an answer may take to be written; the agent reads each before it sends more.
const WRITE: Duration = Duration::from_secs(1);

/// The pods as they are, for views. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Board(watch::Sender<Vec<PodView>>);

impl Board {
    /// All pods.
    pub fn pods(&self) -> Vec<PodView> {
        self.0.borrow().clone()
    }

    /// Shows these pods from now on.
    pub fn show(&self, pods: Vec<PodView>) {
        self.0.send_replace(pods);
    }

    /// Completes when there is no pod. Safe to cancel.
    pub async fn emptied(&self) {
        // It cannot fail: this is a sender of it.
        let _ = self.0.subscribe().wait_for(Vec::is_empty).await;
    }
}

/// The client of a node agent, before it runs.
#[derive(Debug)]
pub struct Client<L: Launcher> {
    path: PathBuf,
    pods: Pods<L>,
    readiness: Readiness,
    board: Board,
    blocked: Option<Blocker>,
    pause: Duration,
}

impl<L: Launcher> Client<L> {
    /// Of the agent that listens at a path.
    pub fn new(path: PathBuf, launcher: L, readiness: &Readiness, board: Board) -> Self {
        let why = format!("no connection to the node agent at {} yet", path.display());
        let blocked = Some(readiness.block("pods", why));
        let (pods, readiness) = (Pods::new(launcher), readiness.clone());
        Self { path, pods, readiness, board, blocked, pause: PAUSE_MIN }
    }

    /// Serves pods until told to stop; then they drain.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let why = tokio::select! {
                () = stop.cancelled() => break,
                why = self.connection() => why,
            };
            let why = format!("no connection to the node agent at {}: {why}", self.path.display());
            tracing::warn!(error = why, retry_in = ?self.pause, "pods that are served already go on being served");
            self.wait_for(why);
            let again = Instant::now() + jitter(self.pause);
            self.pause = (self.pause * 2).min(PAUSE_MAX);
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.retry_until(again) => {}
            }
        }
        self.pods.drain_all();
        self.show();
    }

    /// One connection, to its end; why it has ended.
    async fn connection(&mut self) -> String {
        match self.converse().await {
            Ok(()) => "the agent has closed the connection".into(),
            Err(error) => error.to_string(),
        }
    }

    async fn converse(&mut self) -> io::Result<()> {
        let socket = watched(self.connect()?)?;
        send(&socket, &zds::hello()).await?;
        tracing::info!(agent = %self.path.display(), "connected to the node agent");
        self.pods.begin_snapshot();
        let (mut whole, mut next) = (false, None);
        loop {
            let packet = match next.take() {
                Some(packet) => Some(packet),
                None => tokio::select! {
                    packet = receive(&socket) => packet?,
                    () = due(self.pods.next_retry()) => {
                        self.pods.retry(Instant::now());
                        self.changed(whole);
                        continue;
                    }
                },
            };
            let Some(packet) = packet else { return Ok(()) };
            let handled = zds::handle(&mut self.pods, packet, launcher::inode, Instant::now());
            if handled.snapshot_ended {
                whole = true;
                self.pause = PAUSE_MIN;
            }
            // Before the answer: whoever hears of it sees it done.
            self.changed(whole);
            // The agent asks when it has its answer, or has given up waiting for it. In that case it would take this answer for
            // that of its next question.
            next = waiting(&socket)?;
            match next {
                None => send(&socket, &handled.answer).await?,
                Some(_) => tracing::warn!("the node agent has asked again before it was answered"),
            }
        }
    }

    fn connect(&self) -> io::Result<SeqPacket> {
        let socket = SeqPacket::connect_now(&self.path)?;
        let user = socket.peer_user()?;
        if user != 0 && user != process::user() {
            let message = format!("it is served by user {user}, not by root: pods are taken from nobody else");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        Ok(socket)
    }

    /// Tries pending pods again for a time without a connection.
    async fn retry_until(&mut self, end: Instant) {
        loop {
            tokio::select! {
                () = sleep_until(end) => return,
                () = due(self.pods.next_retry()) => {
                    self.pods.retry(Instant::now());
                    self.show();
                }
            }
        }
    }

    /// Shows what there is; ready is who has the whole snapshot and no pod of it is pending.
    fn changed(&mut self, whole: bool) {
        self.show();
        let Some(blocked) = self.blocked.take_if(|_| whole) else { return };
        match self.pods.view().into_iter().find_map(|pod| Some((pod.uid, pod.info, pod.pending?))) {
            None => blocked.ready(),
            Some((uid, info, why)) => {
                blocked.because(format!("pod {info} ({uid}) is not served yet: {why}"));
                self.blocked = Some(blocked);
            }
        }
    }

    fn wait_for(&mut self, why: String) {
        match &self.blocked {
            Some(blocked) => blocked.because(why),
            None => self.blocked = Some(self.readiness.block("pods", why)),
        }
    }

    fn show(&self) {
        self.board.show(self.pods.view());
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The next message; none at the end. One that is too long, or has too many descriptors, is a message as well: it is answered.
async fn receive(socket: &AsyncFd<SeqPacket>) -> io::Result<Option<Packet>> {
    packet(socket.async_io(Interest::READABLE, |socket| socket.recv(zds::MAX_MESSAGE)).await)
}

/// A message that is there already.
fn waiting(socket: &AsyncFd<SeqPacket>) -> io::Result<Option<Packet>> {
    match socket.get_ref().recv(zds::MAX_MESSAGE) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        received => packet(received),
    }
}

fn packet(received: io::Result<Received>) -> io::Result<Option<Packet>> {
    match received {
        Ok(Received { bytes, fds }) if bytes.is_empty() && fds.is_empty() => Ok(None),
        Ok(Received { bytes, fds }) => Ok(Some(Packet { message: bytes, descriptors: fds, truncated: false })),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Ok(Some(Packet { message: Vec::new(), descriptors: Vec::<OwnedFd>::new(), truncated: true }))
        }
        Err(error) => Err(error),
    }
}

async fn send(socket: &AsyncFd<SeqPacket>, message: &[u8]) -> io::Result<()> {
    let sent = socket.async_io(Interest::WRITABLE, |socket| socket.send(message, &[]));
    timeout(WRITE, sent).await.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "it does not read")))
}

/// Between the half and the whole, so that proxies that lost their agents together do not come back together.
fn jitter(pause: Duration) -> Duration {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    pause / 2 + (pause / 2).mul_f64(f64::from(nanos % 1000) / 1000.0)
}
