//! A pod's DNS on loopback, asked over real sockets, with other servers that tests play.

use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::sync::watch;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;
use zspire_identity::{State, Watch};
use zspire_model::{Change, NamespacedHostname, NetworkAddress, Service, Store};

use super::*;
use crate::connect::Sockets as Connecting;
use crate::dns::{Config as Dns, Upstreams};
use crate::metrics::Metrics;
use crate::{Config as Proxy, Known, Listeners, Local, PodSpec, Shared};

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A pod whose DNS is served in the background of a test.
struct Rig {
    address: SocketAddr,
    dns: Dns,
    metrics: Metrics,
    local: watch::Sender<Known>,
}

fn workload(name: &str, address: &str) -> Workload {
    Workload {
        uid: name.into(),
        name: name.into(),
        namespace: "ns".into(),
        canonical_name: "client".into(),
        canonical_revision: "v1".into(),
        addresses: [address.parse().unwrap()].into_iter().collect(),
        ..Workload::default()
    }
}

fn service(hostname: &str, vips: &[&str]) -> Service {
    let vip = |text: &&str| NetworkAddress { network: "".into(), address: text.parse().unwrap() };
    Service {
        namespace: "ns".into(),
        hostname: hostname.into(),
        vips: vips.iter().map(vip).collect(),
        ..Service::default()
    }
}

fn client() -> Arc<Local> {
    let (sender, states) = watch::channel(State::Pending { why: "a test".into() });
    drop(sender);
    Arc::new(Local { workload: Arc::new(workload("client", "10.0.0.9")), credentials: Watch::new(states, || ()) })
}

impl Rig {
    /// Must be called in a [`LocalSet`].
    fn new(upstreams: impl FnOnce(SocketAddr) -> Vec<SocketAddr>) -> Self {
        let (mut store, mesh) = Store::new();
        let many = NamespacedHostname { namespace: "ns".into(), hostname: "many.ns.svc.cluster.local".into() };
        let endpoint = |n: u8| {
            let membership = zspire_model::Membership { service: many.clone(), ports: Vec::new().into() };
            Workload { services: [membership].into(), ..workload(&format!("p{n}"), &format!("10.0.1.{n}")) }
        };
        store.apply(
            [service("web.ns.svc.cluster.local", &["10.1.0.1"]), service(&many.hostname, &[])]
                .map(|it| Change::PutService(Arc::new(it))),
        );
        store.apply((0..60).map(|n| Change::PutWorkload(Arc::new(endpoint(n)))));

        let tcp = std::net::TcpListener::bind(LOOPBACK).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let address = tcp.local_addr().unwrap();
        let udp = datagrams(address, None, false).unwrap();
        let dns = Dns::new("cluster.local", Upstreams::These(upstreams(address)));
        let config = Proxy { dns: dns.clone(), ..Proxy::default() };
        let metrics = Metrics::default();
        let shared = Shared {
            config,
            mesh,
            metrics: metrics.clone(),
            connections: Default::default(),
            begun: Default::default(),
            authorization: watch::channel(0).1,
            discovered: watch::channel(true).1,
            trust: watch::channel(0).1,
            resolver: crate::Resolver::system(),
            on_demand: None,
        };
        let (local, known) = watch::channel(Known::Here(client()));
        let listeners = Listeners::well_known(None, false, false);
        let spec =
            PodSpec { uid: "ns/client".into(), local: known, listeners, place: None, overlap: false, only: None };
        let connecting = Connecting::new(&shared.config, shared.config.original_source, None, 1).unwrap();
        let pod = Pod::new(Arc::new(shared), &spec, 0, connecting, Default::default(), CancellationToken::new());
        tokio::task::spawn_local(async move {
            let config = pod.shared().config.dns.clone();
            serve(&pod, &config, vec![Sockets { udp, tcp }]).await;
        });
        Self { address, dns, metrics, local }
    }

    async fn send(&self, query: &[u8]) -> Message {
        let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
        exchange(&socket, self.address, query).await
    }

    async fn ask(&self, name: &str) -> Message {
        self.send(&query(name, |_| ())).await
    }

    async fn ask_tcp(&self, name: &str) -> Message {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let query = query(name, |_| ());
        let length = u16::try_from(query.len()).unwrap();
        stream.write_all(&[&length.to_be_bytes(), &query[..]].concat()).await.unwrap();
        let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut answer).await.unwrap();
        Message::from_vec(&answer).unwrap()
    }

    fn page(&self) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        self.metrics.register_upstream(registry.sub_registry_with_prefix("istio"));
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
        page
    }
}

async fn exchange(socket: &UdpSocket, to: SocketAddr, query: &[u8]) -> Message {
    socket.send_to(query, to).await.unwrap();
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).await.unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

fn query(name: &str, change: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    change(&mut message);
    message.to_vec().unwrap()
}

fn addresses(message: &Message) -> Vec<String> {
    assert_eq!((message.metadata.id, message.metadata.message_type), (4711, MessageType::Response));
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

/// What another server answers to a query; what it says beside the answer comes first.
fn answered(query: &[u8]) -> Vec<Vec<u8>> {
    let query = Message::from_vec(query).unwrap();
    let question = query.queries[0].clone();
    let answer = |change: &dyn Fn(&mut Message), address: [u8; 4]| {
        let mut message = Message::response(query.metadata.id, OpCode::Query);
        message.add_query(question.clone());
        message.add_answer(Record::from_rdata(question.name().clone(), 60, RData::A(A(address.into()))));
        change(&mut message);
        message.to_vec().unwrap()
    };
    let bad = [6, 6, 6, 6];
    match question.name().to_ascii().split('.').next().unwrap() {
        "forged" => vec![
            b"?".to_vec(),
            answer(&|it| it.metadata.id ^= 1, bad),
            answer(
                &|it| {
                    it.queries[0].set_name(Name::from_ascii("other.example.").unwrap());
                },
                bad,
            ),
            answer(&|it| it.metadata.message_type = MessageType::Query, bad),
            answer(&|_| (), [1, 2, 3, 4]),
        ],
        "long" => vec![answer(
            &|it| {
                for n in 0..80 {
                    let data = RData::A(A([10, 9, 9, n].into()));
                    it.add_answer(Record::from_rdata(question.name().clone(), 60, data));
                }
            },
            [1, 2, 3, 4],
        )],
        "nobody" => vec![answer(
            &|it| {
                it.answers.clear();
                it.metadata.response_code = ResponseCode::NXDomain;
            },
            bad,
        )],
        _ => vec![answer(&|_| (), [1, 2, 3, 4])],
    }
}

/// Another server, over UDP and TCP on one port.
async fn server() -> SocketAddr {
    let listener = TcpListener::bind(LOOPBACK).await.unwrap();
    let address = listener.local_addr().unwrap();
    let socket = UdpSocket::bind(address).await.unwrap();
    tokio::task::spawn_local(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            for answer in answered(&buffer[..length]) {
                socket.send_to(&answer, from).await.unwrap();
            }
        }
    });
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut query).await.unwrap();
            for answer in answered(&query) {
                let length = u16::try_from(answer.len()).unwrap();
                stream.write_all(&[&length.to_be_bytes(), &answer[..]].concat()).await.unwrap();
            }
        }
    });
    address
}

/// One that takes queries and says nothing.
fn silent() -> (std::net::UdpSocket, SocketAddr) {
    let socket = std::net::UdpSocket::bind(LOOPBACK).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

#[tokio::test]
async fn names_of_the_mesh_are_answered_from_the_mesh() {
    let test = async {
        let rig = Rig::new(|_| Vec::new());
        for answer in [rig.ask("WEB.ns.svc.cluster.local.").await, rig.ask_tcp("WEB.ns.svc.cluster.local.").await] {
            assert_eq!(addresses(&answer), ["10.1.0.1"]);
            assert_eq!(answer.queries[0].name().to_ascii(), "WEB.ns.svc.cluster.local.", "as it was asked");
            let said = answer.metadata;
            assert!(said.authoritative && said.recursion_available && said.recursion_desired && !said.truncation);
            assert!(answer.edns.is_none());
        }
        let page = rig.page();
        for protocol in ["udp", "tcp"] {
            let line = format!(
                "istio_dns_requests_total{{request_query_type=\"A\",request_protocol=\"{protocol}\",\
                 source_canonical_service=\"client\",source_canonical_revision=\"v1\"}} 1"
            );
            assert!(page.contains(&line), "{page}");
        }
        assert!(!page.contains("istio_dns_upstream_requests_total{"), "{page}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn other_names_are_forwarded() {
    let test = async {
        let server = server().await;
        let rig = Rig::new(|_| vec![server]);
        assert_eq!(addresses(&rig.ask("plain.example.").await), ["1.2.3.4"]);
        assert_eq!(addresses(&rig.ask_tcp("plain.example.").await), ["1.2.3.4"]);
        assert_eq!(addresses(&rig.ask("forged.example.").await), ["1.2.3.4"], "only the answer counts");
        let nobody = rig.ask("nobody.ns.svc.cluster.local.").await;
        assert_eq!(nobody.metadata.response_code, ResponseCode::NXDomain);
        let page = rig.page();
        for line in [
            "istio_dns_upstream_requests_total{request_query_type=\"A\",request_protocol=\"udp\",source_canonical_service=\"client\",source_canonical_revision=\"v1\"} 3",
            "istio_dns_upstream_request_duration_seconds_count{request_query_type=\"A\",request_protocol=\"tcp\",source_canonical_service=\"client\",source_canonical_revision=\"v1\"} 1",
        ] {
            assert!(page.contains(line), "{page}");
        }
        assert!(!page.contains("istio_dns_upstream_failures_total{"), "{page}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn what_does_not_fit_is_cut_and_asked_for_over_tcp() {
    let test = async {
        let server = server().await;
        let rig = Rig::new(|_| vec![server]);
        for (name, count) in [("many.ns.svc.cluster.local.", 60), ("long.example.", 81)] {
            let short = rig.ask(name).await;
            assert!(short.metadata.truncation && short.answers.is_empty(), "{name}");
            let whole = rig.ask_tcp(name).await;
            assert_eq!((whole.answers.len(), whole.metadata.truncation), (count, false), "{name}");
        }
        let roomy = query("many.ns.svc.cluster.local.", |message| {
            let mut edns = Edns::new();
            edns.set_max_payload(4096);
            message.set_edns(edns);
        });
        let answer = rig.send(&roomy).await;
        assert_eq!((answer.answers.len(), answer.metadata.truncation), (60, false));
        assert_eq!(answer.edns.unwrap().max_payload(), DATAGRAM);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_is_silent() {
    let test = async {
        let (server, (_kept, mute)) = (server().await, silent());
        let rig = Rig::new(|_| vec![mute, server]);
        assert_eq!(addresses(&rig.ask("plain.example.").await), ["1.2.3.4"]);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_is_told_within_five_seconds_that_nobody_answers() {
    let test = async {
        let ((_kept, mute), (_too, also)) = (silent(), silent());
        let rig = Rig::new(|_| vec![mute, also]);
        let begin = Instant::now();
        let answer = rig.ask("plain.example.").await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert!(begin.elapsed() <= Duration::from_secs(5), "{:?}", begin.elapsed());
        assert!(rig.page().contains("istio_dns_upstream_failures_total{"), "{}", rig.page());
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn no_query_goes_in_circles() {
    let test = async {
        // The only server is itself.
        let rig = Rig::new(|own| vec![own]);
        assert_eq!(rig.ask("plain.example.").await.metadata.response_code, ResponseCode::ServFail);
        // One that this process has forwarded comes back.
        let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
        let forwarded = rig.dns.queries.sent(socket.local_addr().unwrap().port(), 4711);
        let answer = exchange(&socket, rig.address, &query("plain.example.", |_| ())).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
        drop(forwarded);
        let answer = exchange(&socket, rig.address, &query("plain.example.", |_| ())).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn what_is_no_query_is_answered_so_or_not_at_all() {
    let test = async {
        let rig = Rig::new(|_| Vec::new());
        let code = async |bytes: Vec<u8>| rig.send(&bytes).await.metadata.response_code;
        let two = |message: &mut Message| {
            let again = message.queries[0].clone();
            message.add_query(again);
        };
        assert_eq!(code(query("web.", two)).await, ResponseCode::FormErr);
        assert_eq!(code(query("web.", |it| it.queries.clear())).await, ResponseCode::FormErr);
        assert_eq!(code(query("web.", |it| it.metadata.op_code = OpCode::Status)).await, ResponseCode::NotImp);
        let mut broken = query("web.", |_| ());
        broken.truncate(14);
        assert_eq!(code(broken).await, ResponseCode::FormErr);
        // Nothing comes of these: the next answer is that of the next question.
        let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
        let response = query("web.", |it| it.metadata.message_type = MessageType::Response);
        for nothing in [&b""[..], b"x", &[0xff; 40], &response] {
            socket.send_to(nothing, rig.address).await.unwrap();
        }
        assert_eq!(addresses(&exchange(&socket, rig.address, &query("web.", |_| ())).await), ["10.1.0.1"]);
        // Longer than a query can be.
        let mut stream = TcpStream::connect(rig.address).await.unwrap();
        stream.write_all(&[0xff, 0xff, 0]).await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap_or(0), 0);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_pod_that_is_not_known_yet_waits() {
    let test = async {
        let rig = Rig::new(|_| Vec::new());
        rig.local.send_replace(Known::Waiting);
        let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
        socket.send_to(&query("web.", |_| ()), rig.address).await.unwrap();
        // The query is read before anything else happens on this thread.
        tokio::task::yield_now().await;
        rig.local.send_replace(Known::Here(client()));
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).await.unwrap();
        assert_eq!(addresses(&Message::from_vec(&buffer[..length]).unwrap()), ["10.1.0.1"]);
    };
    LocalSet::new().run_until(test).await;
}
