//! What the tests share: a thread to run on, a server that hands its requests to the test, and relays between sockets.

use std::cell::RefCell;
use std::future::{Future, pending};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use zspire_hbone::headers::Headers;
use zspire_hbone::{
    Config, Counters, End, Ended, Handler, Incoming, Malformed, Request, ResponseHead, Stream, Tunnel, serve,
};

/// Runs a test in real time; one that hangs fails.
pub(crate) fn run<F: Future>(test: F) -> F::Output {
    on_one_thread(false, Duration::from_secs(60), test)
}

/// Runs the long form of a test, which `make soak` asks for.
pub(crate) fn run_long<F: Future>(test: F) -> F::Output {
    on_one_thread(false, Duration::from_secs(15 * 60), test)
}

/// How much of something a long test does: what the environment says, or what is enough for every day.
pub(crate) fn soak(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |value| value.parse().expect("a number"))
}

/// Runs a test in paused time: whenever nothing else can happen, the clock goes to the next timer.
pub(crate) fn run_paused<F: Future>(test: F) -> F::Output {
    on_one_thread(true, Duration::from_secs(24 * 3600), test)
}

fn on_one_thread<F: Future>(paused: bool, limit: Duration, test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(paused).build().unwrap();
    let test = async { tokio::time::timeout(limit, test).await.expect("the test hangs") };
    LocalSet::new().block_on(&runtime, test)
}

/// Lets every task that can run do so.
pub(crate) async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Waits for a state that other tasks bring about.
pub(crate) async fn until(what: &str, mut state: impl FnMut() -> bool) {
    for _ in 0..3_000_000 {
        if state() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("never came true: {what}");
}

/// A request to an address.
pub(crate) fn request(target: &str) -> Request {
    Request { target: target.parse().unwrap(), headers: Headers::default() }
}

/// A server whose requests are answered by the test.
pub(crate) struct Server {
    pub(crate) asked: mpsc::UnboundedReceiver<Incoming>,
    pub(crate) malformed: Rc<RefCell<Vec<Malformed>>>,
    pub(crate) drain: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<Ended>,
}

struct Desk {
    asked: mpsc::UnboundedSender<Incoming>,
    malformed: Rc<RefCell<Vec<Malformed>>>,
}

impl Handler for Desk {
    fn stream(&self, incoming: Incoming) {
        // A test that no longer looks refuses.
        let _ = self.asked.send(incoming);
    }

    fn malformed(&self, what: Malformed) {
        self.malformed.borrow_mut().push(what);
    }
}

impl Server {
    pub(crate) fn new<IO: AsyncRead + AsyncWrite + Unpin + 'static>(io: IO, config: &Config) -> Self {
        let (asked, requests) = mpsc::unbounded_channel();
        let malformed = Rc::<RefCell<Vec<Malformed>>>::default();
        let (drain, drained) = oneshot::channel();
        let (config, desk) = (config.clone(), Desk { asked, malformed: malformed.clone() });
        let task = spawn_local(async move {
            let drained = async {
                if drained.await.is_err() {
                    pending::<()>().await;
                }
            };
            serve(io, &config, &desk, drained).await
        });
        Self { asked: requests, malformed, drain: Some(drain), task }
    }

    pub(crate) fn drain(&mut self) {
        self.drain.take().unwrap().send(()).unwrap();
    }

    pub(crate) async fn next(&mut self) -> Incoming {
        self.asked.recv().await.expect("the server ended before a request came")
    }

    pub(crate) async fn accept(&mut self) -> Stream {
        self.next().await.accept(&ResponseHead::default()).unwrap()
    }
}

/// Answers every request of a tunnel and keeps the streams, in a task.
pub(crate) fn accept_all(mut server: Server) -> Rc<RefCell<Vec<Stream>>> {
    let streams = Rc::<RefCell<Vec<Stream>>>::default();
    let kept = streams.clone();
    spawn_local(async move {
        while let Some(incoming) = server.asked.recv().await {
            // One that was given up meanwhile is nothing to keep.
            if let Ok(stream) = incoming.accept(&ResponseHead::default()) {
                kept.borrow_mut().push(stream);
            }
        }
    });
    streams
}

/// The client's end of a tunnel and its driver.
pub(crate) struct Client {
    pub(crate) tunnel: Tunnel,
    pub(crate) task: JoinHandle<Ended>,
}

pub(crate) async fn client<IO: AsyncRead + AsyncWrite + Unpin + 'static>(io: IO, config: &Config) -> Client {
    let (tunnel, driver) = Tunnel::connect(io, config).await.unwrap();
    Client { tunnel, task: spawn_local(driver) }
}

/// Both ends, over memory.
pub(crate) async fn pair(ours: &Config, theirs: &Config) -> (Client, Server) {
    let (near, far) = wire();
    let server = Server::new(far, theirs);
    (client(near, ours).await, server)
}

pub(crate) fn wire() -> (DuplexStream, DuplexStream) {
    tokio::io::duplex(64 << 10)
}

/// A stream of a tunnel, seen from both ends.
pub(crate) async fn open(client: &Client, server: &mut Server) -> (Stream, Stream) {
    let request = request("10.0.0.1:80");
    let (ours, theirs) = tokio::join!(client.tunnel.open(&request), server.accept());
    (ours.unwrap().0, theirs)
}

/// A connected pair of sockets.
pub(crate) async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// An application and a server with everything between them: `app ↔ relay ↔ tunnel ↔ relay ↔ server`.
pub(crate) struct Path {
    pub(crate) app: TcpStream,
    pub(crate) server: TcpStream,
    pub(crate) app_end: Relay,
    pub(crate) server_end: Relay,
}

/// A relay that runs.
pub(crate) struct Relay {
    pub(crate) counters: Rc<Counters>,
    pub(crate) cut: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<End>,
}

pub(crate) fn relay(stream: Stream, socket: TcpStream) -> Relay {
    let counters = Rc::<Counters>::default();
    let (cut, was_cut) = oneshot::channel::<()>();
    let of_task = counters.clone();
    let task = spawn_local(async move {
        let cut = async {
            if was_cut.await.is_err() {
                pending::<()>().await;
            }
        };
        stream.relay(socket, &of_task, cut).await
    });
    Relay { counters, cut: Some(cut), task }
}

pub(crate) async fn path(client: &Client, server: &mut Server) -> Path {
    let (ours, theirs) = open(client, server).await;
    let ((app, of_relay), (other, of_server)) = tokio::join!(sockets(), sockets());
    Path { app, server: of_server, app_end: relay(ours, of_relay), server_end: relay(theirs, other) }
}

/// A frame of HTTP/2.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// What a client says first: the preface and empty SETTINGS.
pub(crate) fn hello() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes
}

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A header block without compression.
pub(crate) fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        block.push(u8::try_from(name.len()).unwrap());
        block.extend(name.as_bytes());
        block.push(u8::try_from(value.len()).unwrap());
        block.extend(value.as_bytes());
    }
    block
}

/// The header block of `CONNECT 10.0.0.1:80`.
pub(crate) fn connect_block() -> Vec<u8> {
    block(&[(":method", "CONNECT"), (":authority", "10.0.0.1:80")])
}

/// A peer that writes whatever the test likes and reads what comes.
pub(crate) struct Peer {
    write: WriteHalf<DuplexStream>,
    heard: mpsc::UnboundedReceiver<Heard>,
}

/// A frame that came.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) kind: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Heard {
    /// The error code of RST_STREAM.
    pub(crate) fn code(&self) -> u32 {
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }
}

impl Peer {
    /// In the place of a client.
    pub(crate) fn new(io: DuplexStream) -> Self {
        Self::after(0, io)
    }

    /// In the place of a server, which hears the preface first.
    pub(crate) fn server(io: DuplexStream) -> Self {
        Self::after(24, io)
    }

    fn after(preface: usize, io: DuplexStream) -> Self {
        let (mut read, write) = tokio::io::split(io);
        let (sender, heard) = mpsc::unbounded_channel();
        spawn_local(async move {
            if read.read_exact(&mut vec![0; preface]).await.is_err() {
                return;
            }
            while let Some(frame) = read_frame(&mut read).await {
                if sender.send(frame).is_err() {
                    break;
                }
            }
        });
        Self { write, heard }
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.write.write_all(bytes).await.unwrap();
    }

    /// Sends as long as the other end takes it.
    pub(crate) async fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.write.write_all(bytes).await.is_ok()
    }

    /// The next frame of interest; none if the other end has closed.
    pub(crate) async fn next(&mut self, wanted: impl Fn(&Heard) -> bool) -> Option<Heard> {
        loop {
            let frame = self.heard.recv().await?;
            if wanted(&frame) {
                return Some(frame);
            }
        }
    }
}

async fn read_frame(read: &mut ReadHalf<DuplexStream>) -> Option<Heard> {
    let mut header = [0; 9];
    read.read_exact(&mut header).await.ok()?;
    let [a, b, c, kind, _, stream @ ..] = header;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    read.read_exact(&mut payload).await.ok()?;
    Some(Heard { kind, stream: u32::from_be_bytes(stream), payload })
}
