//! Commands to the node agent, over a Unix socket that only its own user and root may use.
//!
//! A request is one message: JSON, and for an enrolment the descriptor of the network namespace, followed by that of the
//! process if one was named. So a path is looked up where the command runs, in its mount namespace, and a process number where
//! it means the process that was meant. The answer is one message for each pod, and one that ends it.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use zspire_sys::netns::Netns;
use zspire_sys::pidfd::Pidfd;
use zspire_sys::process;
use zspire_sys::scm::{Listener, SeqPacket};

use super::book::{Book, Enrolled, Enrolment, Which};
use crate::descriptor::watched;

/// Longest request and longest part of an answer.
const MAX_MESSAGE: usize = 64 * 1024;
/// How long a command may take to ask, and to read.
const TIME: Duration = Duration::from_secs(5);
/// How long a command waits for the next part of an answer: leaving waits for connections to drain.
const ANSWER: Duration = Duration::from_secs(180);
/// Commands at once.
const MAX_COMMANDS: usize = 64;
const REST: Duration = Duration::from_millis(100);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Request {
    Enroll(Enrolment),
    Unenroll(Which),
    Enrolled,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Part {
    Pod(Box<Enrolled>),
    End,
    Error(String),
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent cannot be asked.
    #[error("cannot ask the node agent at {path}; is `zspire node-agent` running there, and may this user use it?")]
    Unreachable {
        /// Its socket.
        path: String,
        #[source]
        source: io::Error,
    },
    /// It refuses.
    #[error("{0}")]
    Refused(String),
}

/// The agent, as commands ask it. Blocks.
#[derive(Debug)]
pub struct Agent<'a>(pub &'a Path);

impl Agent<'_> {
    /// Enrols a pod.
    pub fn enroll(&self, enrolment: Enrolment, netns: &Netns, process: Option<&Pidfd>) -> Result<Enrolled, Error> {
        let descriptors: Vec<BorrowedFd<'_>> =
            std::iter::once(netns.as_fd()).chain(process.map(Pidfd::as_fd)).collect();
        self.one(&Request::Enroll(enrolment), &descriptors)
    }

    /// Unenrols a pod.
    pub fn unenroll(&self, which: Which) -> Result<Enrolled, Error> {
        self.one(&Request::Unenroll(which), &[])
    }

    /// The pods that are enrolled.
    pub fn enrolled(&self) -> Result<Vec<Enrolled>, Error> {
        self.ask(&Request::Enrolled, &[])
    }

    fn one(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Enrolled, Error> {
        let answered = self.ask(request, descriptors)?.pop();
        answered.ok_or_else(|| Error::Refused("the node agent answered without naming the pod".into()))
    }

    fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Vec<Enrolled>, Error> {
        let asked = || {
            let socket = SeqPacket::connect(self.0)?;
            socket.set_timeouts(ANSWER)?;
            socket.send(&serde_json::to_vec(request)?, descriptors)?;
            let mut pods = Vec::new();
            loop {
                let part = socket.recv(MAX_MESSAGE)?.bytes;
                if part.is_empty() {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended before it had answered"));
                }
                match serde_json::from_slice(&part)? {
                    Part::Pod(pod) => pods.push(*pod),
                    Part::End => return Ok(Ok(pods)),
                    Part::Error(error) => return Ok(Err(error)),
                }
            }
        };
        let answered = asked().map_err(|source| Error::Unreachable { path: self.0.display().to_string(), source })?;
        answered.map_err(Error::Refused)
    }
}

/// Carries out commands until told to stop.
pub(super) async fn accept(listener: Listener, book: Arc<Book>, stop: CancellationToken) {
    let listener = match watched(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot wait for commands"),
    };
    let mut commands = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = commands.join_next() => {}
            accepted = listener.async_io(Interest::READABLE, Listener::accept), if commands.len() < MAX_COMMANDS => {
                match accepted {
                    Ok(socket) => drop(commands.spawn(carry_out(socket, book.clone()))),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a command");
                        sleep(REST).await;
                    }
                }
            }
        }
    }
}

async fn carry_out(socket: SeqPacket, book: Arc<Book>) {
    if let Err(error) = converse(socket, &book).await {
        tracing::info!(%error, "a command has gone away");
    }
}

async fn converse(socket: SeqPacket, book: &Arc<Book>) -> io::Result<()> {
    let user = socket.peer_user()?;
    if user != 0 && user != process::user() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("it is of user {user}")));
    }
    socket.set_nonblocking(true)?;
    let socket = watched(socket)?;
    let received = socket.async_io(Interest::READABLE, |socket| socket.recv(MAX_MESSAGE));
    let received = timeout(TIME, received).await.map_err(|_| io::ErrorKind::TimedOut)??;
    // What was begun is brought to its end, also for a command that no longer waits.
    let (book, bytes, fds) = (book.clone(), received.bytes, received.fds);
    let done = tokio::spawn(async move { answer(&bytes, fds, &book).await }).await;
    let done = done.unwrap_or_else(|_| Err(anyhow::anyhow!("the node agent has failed; its log says how")));
    match done {
        Ok(pods) => {
            for pod in pods {
                send(&socket, &Part::Pod(Box::new(pod))).await?;
            }
            send(&socket, &Part::End).await
        }
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "a command is refused");
            send(&socket, &Part::Error(format!("{error:#}"))).await
        }
    }
}

async fn answer(bytes: &[u8], fds: Vec<OwnedFd>, book: &Arc<Book>) -> anyhow::Result<Vec<Enrolled>> {
    match serde_json::from_slice(bytes).context("the request cannot be understood")? {
        Request::Enroll(enrolment) => {
            let mut fds = fds.into_iter();
            let netns = fds.next().context("the request brings no network namespace")?;
            let netns = Netns::from_fd(netns).context("what the request brings is no network namespace")?;
            let process =
                fds.next().map(Pidfd::from_fd).transpose().context("what the request brings is no process")?;
            Ok(vec![book.enroll(enrolment, netns, process).await?])
        }
        Request::Unenroll(which) => {
            let record = book.unenroll(&which).await?;
            Ok(vec![Enrolled { record, pending: None }])
        }
        Request::Enrolled => Ok(book.enrolled()),
    }
}

async fn send(socket: &AsyncFd<SeqPacket>, part: &Part) -> io::Result<()> {
    let bytes = serde_json::to_vec(part)?;
    let sent = socket.async_io(Interest::WRITABLE, |socket| socket.send(&bytes, &[]));
    timeout(TIME, sent).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
