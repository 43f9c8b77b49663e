//! Questions to other servers: in bounded time and number, and answered only by whom they were put to.
//!
//! A query goes out as it came, but under a random id from a port of its own to which only the server asked can send. What comes
//! back counts if it is an answer to that id and to that very question; anything else is ignored, as if it had not come.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, Query};
use hickory_proto::serialize::binary::BinDecoder;
use rand::Rng as _;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::{Instant, timeout_at};

use super::Upstreams;
use super::metrics::Transport;

/// How long one server may take.
const ONE: Duration = Duration::from_millis(1500);
/// How long all of them may take together: a client waits five seconds.
const ALL: Duration = Duration::from_millis(4500);
/// Forwarded queries under way at once, on each worker for each pod.
const AT_ONCE: usize = 256;
/// Servers that are asked at most.
const SERVERS: usize = 4;
/// Longest answer over UDP.
const DATAGRAM: usize = 4096;
/// Bytes of a header.
const HEADER: usize = 12;

/// Asks other servers, for one pod on one worker.
pub(crate) struct Forwarder {
    servers: Vec<SocketAddr>,
    mark: Option<u32>,
    under_way: Rc<RefCell<usize>>,
    own: Own,
}

/// The queries that this process has sent and waits for: local port and id. One that arrives here has gone in a circle.
#[derive(Debug, Clone, Default)]
pub(crate) struct Own(Arc<Mutex<HashSet<(u16, u16)>>>);

pub(super) struct Sent {
    own: Own,
    key: (u16, u16),
}

/// Why nobody has answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("too many queries are under way")]
    TooMany,
    #[error("no DNS server is known for other names: name one in /etc/resolv.conf of the proxy")]
    NoServer,
    #[error("no answer from {server}")]
    TimedOut { server: SocketAddr },
    #[error("cannot ask {server}: {cause}")]
    Failed { server: SocketAddr, cause: io::Error },
}

impl Own {
    pub(super) fn sent(&self, port: u16, id: u16) -> Sent {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((port, id));
        Sent { own: self.clone(), key: (port, id) }
    }

    /// Whether a query from this port with this id is one that this process has sent.
    pub(crate) fn is(&self, port: u16, id: u16) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&(port, id))
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.own.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// A place among the queries under way.
struct Place(Rc<RefCell<usize>>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.borrow_mut() -= 1;
    }
}

impl Forwarder {
    /// `listening` is where this proxy itself takes queries: nobody is asked there.
    pub(crate) fn new(upstreams: &Upstreams, listening: &[SocketAddr], mark: Option<u32>, own: Own) -> Self {
        let mut servers = match upstreams {
            Upstreams::These(servers) => servers.clone(),
            Upstreams::ResolvConf(path) => read(path),
        };
        servers.retain(|server| {
            let itself = is_itself(*server, listening);
            if itself {
                tracing::error!(%server, "a DNS server is this proxy itself: it is not asked");
            }
            !itself
        });
        servers.truncate(SERVERS);
        Self { servers, mark, under_way: Rc::default(), own }
    }

    /// The answer to a query, as bytes with the client's id. Dropping the future gives up.
    pub(crate) async fn ask(&self, query: &[u8], question: &Query, transport: Transport) -> Result<Vec<u8>, Error> {
        let _place = self.place()?;
        let deadline = Instant::now() + ALL;
        let mut last = Error::NoServer;
        // Twice around: a datagram may get lost.
        for server in self.servers.iter().chain(&self.servers).copied() {
            let until = deadline.min(Instant::now() + ONE);
            let asked = timeout_at(until, self.ask_one(server, query, question, transport)).await;
            last = match asked {
                Ok(Ok(mut answer)) => {
                    answer[..2].copy_from_slice(&query[..2]);
                    return Ok(answer);
                }
                Ok(Err(cause)) => Error::Failed { server, cause },
                Err(_) => Error::TimedOut { server },
            };
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(last)
    }

    fn place(&self) -> Result<Place, Error> {
        let mut under_way = self.under_way.borrow_mut();
        if *under_way >= AT_ONCE {
            return Err(Error::TooMany);
        }
        *under_way += 1;
        Ok(Place(self.under_way.clone()))
    }

    async fn ask_one(
        &self,
        server: SocketAddr,
        query: &[u8],
        question: &Query,
        transport: Transport,
    ) -> io::Result<Vec<u8>> {
        let id: u16 = rand::rng().random();
        let mut query = query.to_vec();
        query[..2].copy_from_slice(&id.to_be_bytes());
        let is_answer = |answer: &[u8]| answers(answer, id, question);
        match transport {
            Transport::Udp => self.by_datagram(server, &query, id, is_answer).await,
            Transport::Tcp => self.by_stream(server, &query, id, is_answer).await,
        }
    }

    async fn by_datagram(
        &self,
        server: SocketAddr,
        query: &[u8],
        id: u16,
        is_answer: impl Fn(&[u8]) -> bool,
    ) -> io::Result<Vec<u8>> {
        let socket = self.socket(server, Type::DGRAM, Protocol::UDP)?;
        socket.bind(&any(server).into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        // From now on nobody else can answer.
        socket.connect(server).await?;
        let _sent = self.own.sent(socket.local_addr()?.port(), id);
        socket.send(query).await?;
        let mut answer = vec![0; DATAGRAM];
        loop {
            let length = socket.recv(&mut answer).await?;
            if is_answer(&answer[..length]) {
                answer.truncate(length);
                return Ok(answer);
            }
        }
    }

    async fn by_stream(
        &self,
        server: SocketAddr,
        query: &[u8],
        id: u16,
        is_answer: impl Fn(&[u8]) -> bool,
    ) -> io::Result<Vec<u8>> {
        let socket = self.socket(server, Type::STREAM, Protocol::TCP)?;
        let mut stream = TcpSocket::from_std_stream(socket.into()).connect(server).await?;
        let _sent = self.own.sent(stream.local_addr()?.port(), id);
        let length = u16::try_from(query.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        stream.write_all(&[&length.to_be_bytes(), query].concat()).await?;
        loop {
            let length = stream.read_u16().await?;
            let mut answer = vec![0; usize::from(length)];
            stream.read_exact(&mut answer).await?;
            if is_answer(&answer) {
                return Ok(answer);
            }
        }
    }

    fn socket(&self, server: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(server), kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        if let Some(mark) = self.mark {
            zspire_sys::socket::set_mark(&socket, mark)?;
        }
        Ok(socket)
    }
}

/// Whether bytes are an answer to this id and question.
fn answers(bytes: &[u8], id: u16, question: &Query) -> bool {
    const QR: u8 = 0x80;
    if bytes.len() < HEADER || bytes[..2] != id.to_be_bytes() || bytes[2] & QR == 0 || bytes[4..6] != [0, 1] {
        return false;
    }
    // Names may be compressed only backwards, so the question needs nothing but what is before it.
    let mut decoder = BinDecoder::new(bytes).clone(HEADER as u16);
    let Ok(questions) = Message::read_queries(&mut decoder, 1) else { return false };
    let [echoed] = &questions[..] else { return false };
    echoed.query_type() == question.query_type()
        && echoed.query_class() == question.query_class()
        && echoed.name() == question.name()
}

fn any(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        SocketAddr::V6(_) => SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
    }
}

fn is_itself(server: SocketAddr, listening: &[SocketAddr]) -> bool {
    let ip = server.ip().to_canonical();
    let loopback = ip.is_loopback() || ip.is_unspecified();
    listening.iter().any(|own| own.port() == server.port() && (own.ip().to_canonical() == ip || loopback))
        || (loopback && server.port() == crate::DNS_PORT)
}

/// The servers of a `resolv.conf`.
fn read(path: &Path) -> Vec<SocketAddr> {
    match fs::read_to_string(path) {
        Ok(text) => parse(&text),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "no DNS servers are known: names outside the mesh cannot be resolved");
            Vec::new()
        }
    }
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        // A link-local address needs its zone, which a scope of another namespace would not have.
        let address = words.next().filter(|word| *word == "nameserver").and_then(|_| words.next())?;
        address.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 53))
    };
    text.lines().filter_map(server).collect()
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{MessageType, OpCode};
    use hickory_proto::rr::{Name, RecordType};

    use super::*;

    #[test]
    fn servers_of_resolv_conf() {
        let text = "search x\n# nameserver 1.1.1.1\nnameserver 10.0.0.2 # ours\nnameserver fd00::2\nnameserver fe80::1%eth0\nnameserver\n";
        assert_eq!(parse(text), ["10.0.0.2:53".parse().unwrap(), "[fd00::2]:53".parse::<SocketAddr>().unwrap()]);
        assert!(read(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn nobody_asks_himself() {
        let listening = ["127.0.0.1:15053".parse().unwrap(), "10.0.0.1:53".parse().unwrap()];
        for own in
            ["127.0.0.1:15053", "[::1]:15053", "0.0.0.0:15053", "127.0.0.53:15053", "10.0.0.1:53", "127.0.0.1:53"]
        {
            assert!(is_itself(own.parse().unwrap(), &listening), "{own}");
        }
        for other in ["10.0.0.2:53", "10.0.0.1:5353"] {
            assert!(!is_itself(other.parse().unwrap(), &listening), "{other}");
        }
        assert!(!is_itself("127.0.0.53:53".parse().unwrap(), &listening[..1]), "a resolver of the machine");
    }

    #[test]
    fn only_an_answer_to_the_question_counts() {
        let question = Query::query(Name::from_ascii("a.example.").unwrap(), RecordType::A);
        let bytes = |change: &dyn Fn(&mut Message)| {
            let mut message = Message::new(7, MessageType::Response, OpCode::Query);
            message.add_query(question.clone());
            change(&mut message);
            message.to_vec().unwrap()
        };
        assert!(answers(&bytes(&|_| ()), 7, &question));
        for (what, bad) in [
            ("another id", bytes(&|it| it.metadata.id = 8)),
            ("a query", bytes(&|it| it.metadata.message_type = MessageType::Query)),
            ("no question", bytes(&|it| it.queries.clear())),
            (
                "two questions",
                bytes(&|it| {
                    it.add_query(question.clone());
                }),
            ),
            (
                "another type",
                bytes(&|it| {
                    it.queries[0].set_query_type(RecordType::AAAA);
                }),
            ),
            (
                "another name",
                bytes(&|it| {
                    it.queries[0].set_name(Name::from_ascii("b.example.").unwrap());
                }),
            ),
            ("cut off", bytes(&|_| ())[..20].to_vec()),
            ("nothing", Vec::new()),
        ] {
            assert!(!answers(&bad, 7, &question), "{what}");
        }
    }
}
