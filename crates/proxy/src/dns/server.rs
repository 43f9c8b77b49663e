//! The sockets that a pod's queries arrive on.
//!
//! A query from the mesh is answered at once, in the loop that has read it; one that has to be forwarded, or whose client is not
//! known yet, goes on in a task of the pod.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::{Instant, timeout};
use zspire_model::{Snapshot, Workload};

use super::Config;
use super::answer::{Answer, Decision, Zone};
use super::forward::{Forwarder, Own};
use super::metrics::{Labels, Transport};
use crate::pod::{Known, Local, Pod};

/// Longest query.
const QUERY: usize = 4096;
/// What every client takes over UDP.
const PLAIN: u16 = 512;
/// Most that is sent over UDP, whatever the client would take: more would be cut into pieces on the way.
const DATAGRAM: u16 = 1232;
/// A TCP connection that says nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(10);
/// TCP connections at once, on each worker for each pod.
const CONNECTIONS: usize = 64;
/// Queries at once that wait for something, on each worker for each pod.
const WAITING: usize = 512;
/// Pause after an accept failed.
const REST: Duration = Duration::from_millis(20);

/// One address, on one worker.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) udp: std::net::UdpSocket,
    pub(crate) tcp: std::net::TcpListener,
}

/// A socket for queries over UDP.
pub(crate) fn datagrams(address: SocketAddr, mark: Option<u32>, reuse_port: bool) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_port(reuse_port)?;
    if let Some(mark) = mark {
        zspire_sys::socket::set_mark(&socket, mark)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// What the queries of a pod on one worker have in common. Clones are the same.
#[derive(Clone)]
struct Resolver(Rc<Inner>);

struct Inner {
    pod: Pod,
    zone: Zone,
    forwarder: Forwarder,
    queries: Own,
    waiting: RefCell<usize>,
    connections: RefCell<usize>,
}

/// One of a bounded number.
struct Counted(Rc<Inner>, fn(&Inner) -> &RefCell<usize>);

impl Counted {
    fn new(of: &Rc<Inner>, which: fn(&Inner) -> &RefCell<usize>, most: usize) -> Option<Self> {
        let mut count = which(of).borrow_mut();
        (*count < most).then(|| {
            *count += 1;
            Self(of.clone(), which)
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *(self.1)(&self.0).borrow_mut() -= 1;
    }
}

/// Answers a pod's queries until it drains.
pub(crate) async fn serve(pod: &Pod, config: &Config, sockets: Vec<Sockets>) {
    let Some(zone) = Zone::new(&config.domain, config.preferred_namespace.clone()) else {
        return tracing::error!(
            domain = config.domain,
            "CLUSTER_DOMAIN is not the name of a domain: no name is resolved"
        );
    };
    let listening: Vec<SocketAddr> = sockets.iter().filter_map(|socket| socket.udp.local_addr().ok()).collect();
    let forwarder = Forwarder::new(&config.upstreams, &listening, pod.sockets().mark(), config.queries.clone());
    let (waiting, connections) = (RefCell::default(), RefCell::default());
    let queries = config.queries.clone();
    let resolver = Resolver(Rc::new(Inner { pod: pod.clone(), zone, forwarder, queries, waiting, connections }));
    let mut loops = tokio::task::JoinSet::new();
    for Sockets { udp, tcp } in sockets {
        let (datagrams, streams) = (resolver.clone(), resolver.clone());
        loops.spawn_local(async move { datagrams.datagrams(udp).await });
        loops.spawn_local(async move { streams.streams(tcp).await });
    }
    let ended = async {
        while let Some(ended) = loops.join_next().await {
            if let Ok(Err(error)) = ended {
                // The pod's other listeners go on.
                tracing::error!(%error, "a DNS socket of a pod cannot be used any more");
            }
        }
    };
    tokio::select! {
        () = async { ended.await; std::future::pending().await } => {}
        () = pod.drain().cancelled() => {}
    }
}

impl Resolver {
    async fn datagrams(&self, socket: std::net::UdpSocket) -> io::Result<()> {
        let socket = Rc::new(UdpSocket::from_std(socket)?);
        let mut buffer = vec![0; QUERY];
        loop {
            // An error is about something that was sent to somebody who has gone.
            let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
                tokio::task::yield_now().await;
                continue;
            };
            match self.begin(&buffer[..length], from, Transport::Udp) {
                Begun::Done(answer) => drop(answer.map(|answer| socket.try_send_to(&answer, from))),
                Begun::Waits(waiting) => {
                    let socket = socket.clone();
                    self.0.pod.connections().spawn(async move {
                        let answer = waiting.finish().await;
                        drop(socket.send_to(&answer, from).await);
                    });
                }
            }
        }
    }

    async fn streams(&self, listener: std::net::TcpListener) -> io::Result<()> {
        let listener = TcpListener::from_std(listener)?;
        loop {
            match listener.accept().await {
                Ok((stream, from)) => {
                    // Whoever is refused tries again; what is open ends by itself.
                    let Some(place) = Counted::new(&self.0, |inner| &inner.connections, CONNECTIONS) else { continue };
                    let resolver = self.clone();
                    self.0.pod.connections().spawn(async move {
                        drop(resolver.stream(stream, from).await);
                        drop(place);
                    });
                }
                Err(_) => tokio::time::sleep(REST).await,
            }
        }
    }

    /// One query after the other, each with its length before it.
    async fn stream(&self, mut stream: TcpStream, from: SocketAddr) -> io::Result<()> {
        loop {
            let read = async {
                let length = usize::from(stream.read_u16().await?);
                if length > QUERY {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let mut query = vec![0; length];
                stream.read_exact(&mut query).await?;
                io::Result::Ok(query)
            };
            let query = tokio::select! {
                query = timeout(IDLE, read) => query.map_err(|_| io::ErrorKind::TimedOut)??,
                () = self.0.pod.drain().cancelled() => return Ok(()),
            };
            let answer = match self.begin(&query, from, Transport::Tcp) {
                Begun::Done(Some(answer)) => answer,
                Begun::Done(None) => return Ok(()),
                Begun::Waits(waiting) => waiting.finish().await,
            };
            let length = u16::try_from(answer.len()).map_err(|_| io::ErrorKind::InvalidData)?;
            let framed = [&length.to_be_bytes(), &answer[..]].concat();
            match timeout(IDLE, stream.write_all(&framed)).await {
                Ok(written) => written?,
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    /// Reads a query, and answers it if that can be done at once.
    fn begin(&self, bytes: &[u8], from: SocketAddr, transport: Transport) -> Begun {
        let asked = match read(bytes, transport) {
            Ok(asked) => asked,
            Err(done) => return Begun::Done(done),
        };
        let refuse = |code| Begun::Done(Some(asked.refusal(code)));
        if self.0.queries.is(from.port(), asked.query.metadata.id) {
            tracing::error!(
                name = %asked.question.name(),
                "a forwarded DNS query came back: redirection does not exempt this proxy (PACKET_MARK), or a DNS server in \
                 its /etc/resolv.conf is itself"
            );
            return refuse(ResponseCode::Refused);
        }
        if let Some(local) = self.client()
            && let Some(answer) = self.mesh_answer(&asked, &local.workload)
        {
            return Begun::Done(Some(answer));
        }
        match Counted::new(&self.0, |inner| &inner.waiting, WAITING) {
            Some(place) => Begun::Waits(Box::new(Waiting { resolver: self.clone(), asked, _place: place })),
            None => refuse(ResponseCode::ServFail),
        }
    }

    /// Who asks, if that and the whole mesh are known.
    fn client(&self) -> Option<Arc<Local>> {
        let whole = *self.0.pod.shared().discovered.borrow();
        match self.0.pod.known() {
            Known::Here(local) if whole => Some(local),
            _ => None,
        }
    }

    /// The answer of the mesh; none if somebody else has to be asked.
    fn mesh_answer(&self, asked: &Asked, client: &Arc<Workload>) -> Option<Vec<u8>> {
        let zone = &self.0.zone;
        let answer = self.0.pod.mesh(|snapshot| asked.answer_of(zone, snapshot, client))?;
        self.count(&asked.labels(Some(client)));
        Some(answer)
    }

    fn count(&self, labels: &Labels) {
        self.0.pod.shared().metrics.dns().asked(labels);
    }
}

/// What became of a query.
enum Begun {
    /// It is answered, or not worth an answer.
    Done(Option<Vec<u8>>),
    Waits(Box<Waiting>),
}

/// A query that waits for discovery or for another server.
struct Waiting {
    resolver: Resolver,
    asked: Asked,
    _place: Counted,
}

impl Waiting {
    async fn finish(self) -> Vec<u8> {
        let Self { resolver, asked, .. } = &self;
        let question = &asked.question;
        let client = match resolver.client() {
            Some(local) => local.workload.clone(),
            // A pod may be faster than the news of it.
            None => match resolver.0.pod.local().await {
                Ok(local) => {
                    if let Some(answer) = resolver.mesh_answer(asked, &local.workload) {
                        return answer;
                    }
                    local.workload.clone()
                }
                Err(error) => {
                    tracing::debug!(%error, name = %question.name(), "a DNS query is not answered");
                    resolver.count(&asked.labels(None));
                    return asked.refusal(ResponseCode::ServFail);
                }
            },
        };
        let labels = asked.labels(Some(&client));
        resolver.count(&labels);
        let started = Instant::now();
        let answer = resolver.0.forwarder.ask(&asked.bytes, question, asked.transport).await;
        resolver.0.pod.shared().metrics.dns().forwarded(&labels, started.elapsed(), answer.is_err());
        match answer {
            Ok(answer) => asked.fitting(answer),
            Err(error) => {
                tracing::debug!(%error, name = %question.name(), "a DNS query was not answered");
                asked.refusal(ResponseCode::ServFail)
            }
        }
    }
}

/// A query as it came.
struct Asked {
    bytes: Vec<u8>,
    query: Message,
    /// The only question in it.
    question: Query,
    transport: Transport,
}

/// Reads a query; if it is none that can be answered, what is said to that.
fn read(bytes: &[u8], transport: Transport) -> Result<Asked, Option<Vec<u8>>> {
    let query = Message::from_vec(bytes).map_err(|_| malformed(bytes))?;
    // An answer to an answer could go on for ever.
    if query.metadata.message_type != MessageType::Query {
        return Err(None);
    }
    let question = query.queries.first().cloned().unwrap_or_default();
    let asked = Asked { bytes: bytes.to_vec(), query, question, transport };
    match &asked.query.queries[..] {
        _ if asked.query.metadata.op_code != OpCode::Query => Err(Some(asked.refusal(ResponseCode::NotImp))),
        [_] => Ok(asked),
        _ => Err(Some(asked.refusal(ResponseCode::FormErr))),
    }
}

/// What is said over UDP to whatever bytes a client sends, by the mesh alone: nothing to what would be forwarded.
pub(super) fn reply(zone: &Zone, snapshot: &Snapshot, client: &Workload, bytes: &[u8]) -> Option<Vec<u8>> {
    match read(bytes, Transport::Udp) {
        Ok(asked) => asked.answer_of(zone, snapshot, client),
        Err(done) => done,
    }
}

impl Asked {
    fn labels(&self, client: Option<&Workload>) -> Labels {
        Labels::new(self.question.query_type(), self.transport, client)
    }

    /// The answer of a mesh; none if somebody else has to be asked.
    fn answer_of(&self, zone: &Zone, snapshot: &Snapshot, client: &Workload) -> Option<Vec<u8>> {
        match zone.answer(snapshot, client, &self.question, &mut rand::rng()) {
            Decision::Forward => None,
            Decision::Answer(answer) => Some(self.answer(*answer)),
            Decision::Refuse(code) => Some(self.refusal(code)),
        }
    }

    /// The beginning of an answer: what is asked, and what the client says of itself.
    fn response(&self, code: ResponseCode) -> Message {
        let mut response = Message::response(self.query.metadata.id, self.query.metadata.op_code);
        response.metadata.response_code = code;
        response.metadata.recursion_desired = self.query.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.add_queries(self.query.queries.iter().cloned());
        if self.query.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(DATAGRAM);
            response.set_edns(edns);
        }
        response
    }

    fn refusal(&self, code: ResponseCode) -> Vec<u8> {
        self.written(&self.response(code))
    }

    fn answer(&self, answer: Answer) -> Vec<u8> {
        let mut response = self.response(ResponseCode::NoError);
        response.metadata.authoritative = true;
        response.add_answers(answer.records);
        response.add_authorities(answer.soa);
        response.add_additionals(answer.additionals);
        let whole = self.written(&response);
        if whole.len() <= self.limit() {
            return whole;
        }
        // What is in addition may be left out without a word.
        response.additionals.clear();
        self.fitting(self.written(&response))
    }

    fn written(&self, response: &Message) -> Vec<u8> {
        // Only what was read before is written; if that fails, the header alone says so.
        response.to_vec().unwrap_or_else(|_| malformed(&self.bytes).unwrap_or_default())
    }

    /// How long an answer may be.
    fn limit(&self) -> usize {
        match (self.transport, &self.query.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, Some(edns)) => usize::from(edns.max_payload().clamp(PLAIN, DATAGRAM)),
            (Transport::Udp, None) => usize::from(PLAIN),
        }
    }

    /// An answer that the client takes; if it is too long, one that says so, upon which the client asks over TCP.
    fn fitting(&self, answer: Vec<u8>) -> Vec<u8> {
        if answer.len() <= self.limit() {
            return answer;
        }
        let mut short = self.response(ResponseCode::NoError);
        // The code of the long one, in the low bits of its fourth byte.
        short.metadata.response_code = ResponseCode::from(0, answer[3] & 0x0f);
        short.metadata.truncation = true;
        self.written(&short)
    }
}

/// What is answered to bytes that are no query: their id and that they are not understood. Nothing to what may be an answer.
fn malformed(bytes: &[u8]) -> Option<Vec<u8>> {
    const QR: u8 = 0x80;
    const FORMAT_ERROR: u8 = 1;
    let [first, second, flags, ..] = bytes else { return None };
    let is_query = bytes.len() >= 12 && flags & QR == 0;
    is_query.then(|| [&[*first, *second, QR, FORMAT_ERROR][..], &[0; 8]].concat())
}

#[cfg(test)]
mod tests;
