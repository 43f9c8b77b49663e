//! Names that a pod asks for, over the ways that a resolver takes: UDP and TCP, to whatever server it was told.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use zspire_testkit::plan::{captured, hostname};
use zspire_testkit::{Pod, mesh, uncaptured};

use crate::scenario;

const PATIENCE: Duration = Duration::from_secs(8);
pub(crate) const A: u16 = 1;
const AAAA: u16 = 28;

/// A query as a stub resolver writes it.
pub(crate) fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend([kind.to_be_bytes(), 1_u16.to_be_bytes()].concat());
    bytes
}

/// What an answer says: its code, how many records answer and how many are beside it, and its last four bytes as an address.
#[derive(Debug, PartialEq)]
pub(crate) struct Said {
    code: u8,
    answers: u16,
    authorities: u16,
    pub(crate) last: Ipv4Addr,
}

fn said(answer: &[u8]) -> Said {
    let number = |at: usize| u16::from_be_bytes([answer[at], answer[at + 1]]);
    assert_eq!(number(0), 0x1234, "the answer is to the question");
    let last: [u8; 4] = answer[answer.len() - 4..].try_into().unwrap();
    Said { code: answer[3] & 0xf, answers: number(6), authorities: number(8), last: last.into() }
}

pub(crate) fn over_udp(pod: &Pod, server: SocketAddr, query: &[u8]) -> Said {
    pod.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        // From then on only what comes from the server that was asked is heard.
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send(query).unwrap();
        let mut answer = [0; 1500];
        let length = socket.recv(&mut answer).unwrap();
        said(&answer[..length])
    })
}

fn over_tcp(pod: &Pod, server: SocketAddr, query: &[u8]) -> Said {
    pod.run(|| {
        let mut stream = TcpStream::connect(server).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = u16::try_from(query.len()).unwrap();
        stream.write_all(&[&length.to_be_bytes(), query].concat()).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).unwrap();
        said(&answer)
    })
}

#[test]
fn services_are_resolved_by_the_proxy_whatever_server_is_asked() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").node("b").pod("server").service("api", &["server"]).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        client.redirect_dns();
        // Nobody takes queries there.
        let resolver = server.at(53);
        let SocketAddr::V4(vip) = mesh.service("api") else { panic!("a service has an IPv4 address") };
        let address = Said { code: 0, answers: 1, authorities: 0, last: *vip.ip() };
        let name = hostname("api");
        assert_eq!(over_udp(&client, resolver, &query(&name, A)), address);
        assert_eq!(over_tcp(&client, resolver, &query(&name, A)), address);
        assert_eq!(over_udp(&client, resolver, &query(&name.to_uppercase(), A)), address);
        let none = over_udp(&client, resolver, &query(&name, AAAA));
        assert_eq!((none.code, none.answers, none.authorities), (0, 0, 1));
        client.metric(&["istio_dns_requests_total", "request_query_type=\"A\"", "request_protocol=\"tcp\"", " 1"]);
        // The name leads where it says.
        let _app = server.greet();
        client.reaches(vip.into());
    });
}

#[test]
fn names_that_nobody_knows_are_answered_in_time() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        client.redirect_dns();
        let began = Instant::now();
        // The proxy's own server cannot be reached from here.
        let answer = over_udp(&client, server.at(53), &query("nobody.invalid", A));
        assert_eq!((answer.code, answer.answers), (2, 0), "SERVFAIL");
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    });
}

#[test]
fn names_of_an_enrolled_pod_are_captured_where_that_is_wanted() {
    scenario(|| {
        let mesh = mesh()
            .shared()
            .node("a")
            .pod(captured("client").with("AMBIENT_DNS_CAPTURE", "true"))
            .node("b")
            .pod("server")
            .pod(uncaptured("resolver"))
            .service("api", &["server"])
            .start();
        let (client, resolver) = (mesh.pod("client"), mesh.pod("resolver"));
        let SocketAddr::V4(vip) = mesh.service("api") else { panic!("a service has an IPv4 address") };
        let ask = |pod: &Pod| over_udp(pod, resolver.at(53), &query(&hostname("api"), A));
        assert_eq!(ask(&client), Said { code: 0, answers: 1, authorities: 0, last: *vip.ip() });
        assert_eq!(over_tcp(&client, resolver.at(53), &query(&hostname("api"), A)).last, *vip.ip());
        // From then on it asks whom it wants to ask.
        let output = mesh.agent_command("a", &["unenroll", "test/client"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let own = resolver.run(|| UdpSocket::bind((resolver.address(), 53))).unwrap();
        own.set_read_timeout(Some(PATIENCE)).unwrap();
        client.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(&query(&hostname("api"), A), resolver.at(53)).unwrap();
        });
        assert_eq!(own.recv_from(&mut [0; 512]).unwrap().1.ip(), client.address());
    });
}
