//! The redirection rules at work: who gets a connection, what it knows of where it was going, how replies come back.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use zspire_sys::netns::Netns;
use zspire_sys::nft::Redirection;
use zspire_sys::socket::{self, Connect, Listen};
use zspire_sys::topology::{Node, Pod, Topology};

use crate::{DEADLINE, connect, converse, listen};

const MARK: u32 = 0x539;

/// A pod with the rules, and another without.
struct Mesh {
    _node: Node,
    captured: Pod,
    plain: Pod,
}

impl Mesh {
    fn new(redirection: &Redirection) -> Self {
        let mut node = Topology::new().unwrap().node("node").unwrap();
        let captured = node.dual_stack_pod("captured", node.pod_address(1)).unwrap();
        let plain = node.dual_stack_pod("plain", node.pod_address(2)).unwrap();
        captured.netns.run(|| redirection.apply()).unwrap().unwrap();
        Self { _node: node, captured, plain }
    }
}

fn addresses(pod: &Pod) -> [IpAddr; 2] {
    [pod.address.into(), pod.v6.unwrap().into()]
}

/// A port of the proxy in the pod, marked and for both families as the proxy has it.
fn proxy(pod: &Pod, port: u16) -> TcpListener {
    let options = Listen {
        address: (Ipv6Addr::UNSPECIFIED, port).into(),
        mark: Some(MARK),
        reuse_port: false,
        transparent: false,
        v6_only: false,
        backlog: 16,
    };
    let listener = pod.netns.run(|| socket::listen(&options)).unwrap().unwrap();
    listener.set_nonblocking(false).unwrap();
    socket2::SockRef::from(&listener).set_read_timeout(Some(DEADLINE)).unwrap();
    listener
}

fn marked(netns: &Netns, to: SocketAddr, source: Option<IpAddr>) -> TcpStream {
    let options = Connect { source, mark: Some(MARK), transparent: source.is_some(), early_port: false };
    let socket = netns.run(|| socket::stream(to, &options)).unwrap().unwrap();
    socket.connect_timeout(&to.into(), DEADLINE).unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.into()
}

#[test]
fn outbound_connections_go_to_the_proxy_which_learns_where_to() {
    let mesh = Mesh::new(&Redirection::default());
    let outbound = proxy(&mesh.captured, 15001);
    for to in addresses(&mesh.plain) {
        let to = SocketAddr::new(to, 8080);
        let client = connect(&mesh.captured.netns, to);
        let (accepted, _) = outbound.accept().unwrap();
        assert_eq!(socket::original_destination(&accepted, accepted.local_addr().unwrap()).unwrap(), to);
        converse(&client, &accepted);
    }
}

#[test]
fn inbound_connections_go_to_the_proxy_which_learns_where_to() {
    let mesh = Mesh::new(&Redirection::default());
    let inbound = proxy(&mesh.captured, 15006);
    for to in addresses(&mesh.captured) {
        let to = SocketAddr::new(to, 8080);
        let client = connect(&mesh.plain.netns, to);
        let (accepted, _) = inbound.accept().unwrap();
        assert_eq!(socket::original_destination(&accepted, accepted.local_addr().unwrap()).unwrap(), to);
        converse(&client, &accepted);
    }
}

#[test]
fn the_proxys_own_connections_and_tunnels_are_left_alone() {
    let mesh = Mesh::new(&Redirection::default());
    let _outbound = proxy(&mesh.captured, 15001);
    let hbone = proxy(&mesh.captured, 15008);
    for to in addresses(&mesh.plain) {
        let server = listen(&mesh.plain.netns, (to, 0));
        let client = marked(&mesh.captured.netns, server.local_addr().unwrap(), None);
        converse(&client, &server.accept().unwrap().0);
    }
    for to in addresses(&mesh.captured) {
        let client = connect(&mesh.plain.netns, (to, 15008).into());
        converse(&client, &hbone.accept().unwrap().0);
    }
}

/// Redirection is about first packets; these are connections that it has never seen begin.
#[test]
fn connections_that_are_older_than_the_rules_are_reset() {
    let mut node = Topology::new().unwrap().node("node").unwrap();
    let captured = node.dual_stack_pod("captured", node.pod_address(1)).unwrap();
    let plain = node.dual_stack_pod("plain", node.pod_address(2)).unwrap();
    for (here, there) in addresses(&captured).into_iter().zip(addresses(&plain)) {
        let (out, back) = (listen(&plain.netns, (there, 0)), listen(&captured.netns, (here, 0)));
        let leaving = connect(&captured.netns, out.local_addr().unwrap());
        let (coming, own) = (connect(&plain.netns, back.local_addr().unwrap()), back.accept().unwrap().0);
        let far = out.accept().unwrap().0;
        converse(&leaving, &far);
        converse(&coming, &own);
        captured.netns.run(|| Redirection::default().apply()).unwrap().unwrap();
        for mut speaker in [&leaving, &coming] {
            speaker.set_read_timeout(Some(DEADLINE)).unwrap();
            let _ = std::io::Write::write_all(&mut speaker, b"more");
            let heard = std::io::Read::read(&mut speaker, &mut [0; 4]).unwrap_err();
            assert_eq!(heard.kind(), ErrorKind::ConnectionReset);
        }
        for mut silent in [&far, &own] {
            silent.set_nonblocking(true).unwrap();
            assert!(!matches!(std::io::Read::read(&mut silent, &mut [0; 4]), Ok(1..)), "it hears what was said");
        }
        captured.netns.run(Redirection::remove).unwrap().unwrap();
    }
}

#[test]
fn what_a_pod_says_to_itself_is_left_alone() {
    let mesh = Mesh::new(&Redirection::default());
    let _ports = [proxy(&mesh.captured, 15001), proxy(&mesh.captured, 15006)];
    let loopback: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    for to in addresses(&mesh.captured).into_iter().chain(loopback) {
        let server = listen(&mesh.captured.netns, (to, 0));
        let client = connect(&mesh.captured.netns, server.local_addr().unwrap());
        converse(&client, &server.accept().unwrap().0);
    }
}

#[test]
fn the_application_sees_the_peers_address_and_its_replies_come_back() {
    let mesh = Mesh::new(&Redirection::default());
    let _outbound = proxy(&mesh.captured, 15001);
    for (source, to) in addresses(&mesh.plain).into_iter().zip(addresses(&mesh.captured)) {
        let application = listen(&mesh.captured.netns, (to, 0));
        let client = marked(&mesh.captured.netns, application.local_addr().unwrap(), Some(source));
        let (accepted, peer) = application.accept().unwrap();
        assert_eq!(peer.ip(), source);
        converse(&client, &accepted);
    }
}

/// The kernel chooses the port of the proxy's connection among those that no socket here has; a client's is none of them.
#[test]
fn the_proxy_may_have_the_port_that_its_client_has() {
    let mesh = Mesh::new(&Redirection::default());
    let inbound = proxy(&mesh.captured, 15006);
    for (own, client) in addresses(&mesh.captured).into_iter().zip(addresses(&mesh.plain)) {
        let to = SocketAddr::new(own, 8080);
        let app = listen(&mesh.captured.netns, to);
        let coming = connect(&mesh.plain.netns, to);
        let (accepted, from) = inbound.accept().unwrap();
        let range = format!("{0} {0}", from.port());
        mesh.captured.netns.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range)).unwrap().unwrap();
        let ours = marked(&mesh.captured.netns, to, Some(client));
        let (served, seen) = app.accept().unwrap();
        assert_eq!(seen, SocketAddr::new(client, from.port()));
        converse(&ours, &served);
        converse(&coming, &accepted);
    }
}

#[test]
fn a_transparent_listener_is_marked_as_the_connections_it_accepts() {
    let mesh = Mesh::new(&Redirection::default());
    let options = Listen {
        address: (Ipv6Addr::UNSPECIFIED, 15008).into(),
        mark: Some(MARK),
        reuse_port: true,
        transparent: true,
        v6_only: false,
        backlog: 16,
    };
    let hbone = mesh.captured.netns.run(|| socket::listen(&options)).unwrap().unwrap();
    hbone.set_nonblocking(false).unwrap();
    socket2::SockRef::from(&hbone).set_read_timeout(Some(DEADLINE)).unwrap();
    let client = connect(&mesh.plain.netns, (mesh.captured.address, 15008).into());
    let (accepted, _) = hbone.accept().unwrap();
    assert_eq!(socket2::SockRef::from(&accepted).mark().unwrap(), MARK);
    converse(&client, &accepted);
}

#[test]
fn exempt_peers_and_pods_without_inbound_capture_are_left_alone() {
    let probe: Vec<IpAddr> = vec!["10.244.1.2".parse().unwrap(), "fd00:244:1::2".parse().unwrap()];
    let exempt = Redirection { exempt_sources: probe, ..Redirection::default() };
    let bypass = Redirection { inbound: None, ..Redirection::default() };
    for redirection in [exempt, bypass] {
        let mesh = Mesh::new(&redirection);
        for to in addresses(&mesh.captured) {
            let server = listen(&mesh.captured.netns, (to, 0));
            let client = connect(&mesh.plain.netns, server.local_addr().unwrap());
            converse(&client, &server.accept().unwrap().0);
        }
    }
}

#[test]
fn dns_goes_to_the_proxy_when_asked() {
    let mesh = Mesh::new(&Redirection { dns: Some(15053), ..Redirection::default() });
    let tcp = proxy(&mesh.captured, 15053);
    let bind = |netns: &Netns, address: SocketAddr| {
        let socket = netns.run(|| UdpSocket::bind(address)).unwrap().unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    };
    for (own, server) in addresses(&mesh.captured).into_iter().zip(addresses(&mesh.plain)) {
        let loopback: IpAddr = if own.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        let dns = bind(&mesh.captured.netns, (loopback, 15053).into());
        let client = bind(&mesh.captured.netns, (own, 0).into());
        client.connect((server, 53)).unwrap();
        client.send(b"query").unwrap();
        let (length, peer) = dns.recv_from(&mut [0; 16]).unwrap();
        assert_eq!(length, 5);
        dns.send_to(b"reply", peer).unwrap();
        // It is connected, so it takes an answer only from the server it asked.
        assert_eq!(client.recv(&mut [0; 16]).unwrap(), 5);
        drop(dns);

        let stream = connect(&mesh.captured.netns, (server, 53).into());
        let (accepted, _) = tcp.accept().unwrap();
        converse(&stream, &accepted);
        let upstream = listen(&mesh.plain.netns, (server, 53));
        converse(&marked(&mesh.captured.netns, (server, 53).into(), None), &upstream.accept().unwrap().0);
    }
}

#[test]
fn a_mark_beyond_upstreams_mask_is_compared_as_a_whole() {
    let mesh = Mesh::new(&Redirection { mark: 0x1_0539, ..Redirection::default() });
    let outbound = proxy(&mesh.captured, 15001);
    let _client = marked(&mesh.captured.netns, (mesh.plain.address, 8080).into(), None);
    outbound.accept().unwrap();
}

fn state(netns: &Netns) -> String {
    let show = |program: &str, arguments: &[&str]| {
        let output = Topology::command(netns, program).args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let rules = show("nft", &["list", "ruleset"]);
    let routing = ["-4", "-6"].map(|family| {
        let routes = show("ip", &[family, "route", "show", "table", "100"]);
        show("ip", &[family, "rule"]) + &routes
    });
    rules + &routing.concat()
}

#[test]
fn applying_twice_is_applying_once_and_removing_leaves_nothing() {
    let netns = Netns::new().unwrap();
    let before = state(&netns);
    let apply = || netns.run(|| Redirection::default().apply()).unwrap().unwrap();
    apply();
    let once = state(&netns);
    assert_eq!(once.matches("fwmark 0x111/0xfff lookup 100").count(), 2, "{once}");
    apply();
    assert_eq!(state(&netns), once);
    netns.run(Redirection::remove).unwrap().unwrap();
    assert_eq!(state(&netns), before);
    netns.run(Redirection::remove).unwrap().unwrap();
}

#[test]
fn a_namespace_without_ipv6_gets_the_rules_of_ipv4() {
    let netns = Netns::new().unwrap();
    netns.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")).unwrap().unwrap();
    netns.run(|| Redirection::default().apply()).unwrap().unwrap();
    assert_eq!(state(&netns).matches("lookup 100").count(), 1);
}

#[test]
fn without_the_proxy_a_captured_connection_is_refused_and_not_let_through() {
    let mesh = Mesh::new(&Redirection::default());
    let server = listen(&mesh.plain.netns, (mesh.plain.address, 0));
    let to = server.local_addr().unwrap();
    let error = mesh.captured.netns.run(|| TcpStream::connect(to)).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}
