//! Socket options, as the kernel gives them back and as packets show them.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::SockRef;
use zspire_sys::netns::Netns;
use zspire_sys::socket::{self, Connect, Listen};

fn any_port(address: impl Into<IpAddr>) -> Listen {
    let address = SocketAddr::new(address.into(), 0);
    Listen { address, mark: None, reuse_port: false, transparent: false, v6_only: false, backlog: 16 }
}

#[test]
fn a_listener_is_what_was_asked_for() {
    let options = Listen { mark: Some(0x539), reuse_port: true, transparent: true, ..any_port(Ipv6Addr::UNSPECIFIED) };
    let listener = socket::listen(&options).unwrap();
    let view = SockRef::from(&listener);
    assert_eq!(view.mark().unwrap(), 0x539);
    assert!(view.reuse_port().unwrap() && view.reuse_address().unwrap() && view.ip_transparent_v6().unwrap());
    assert!(view.nonblocking().unwrap() && !view.only_v6().unwrap());
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);

    let again = Listen { address: listener.local_addr().unwrap(), ..options };
    socket::listen(&again).unwrap();
    let alone = Listen { reuse_port: false, ..again };
    assert_eq!(socket::listen(&alone).unwrap_err().kind(), ErrorKind::AddrInUse);
}

#[test]
fn a_dual_stack_listener_takes_both_families_and_an_ipv6_one_does_not() {
    let both = socket::listen(&any_port(Ipv6Addr::UNSPECIFIED)).unwrap();
    let port = both.local_addr().unwrap().port();
    std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    let v6 = socket::listen(&Listen { v6_only: true, ..any_port(Ipv6Addr::UNSPECIFIED) }).unwrap();
    let port = v6.local_addr().unwrap().port();
    std::net::TcpStream::connect((Ipv6Addr::LOCALHOST, port)).unwrap();
    let refused = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_stream_is_marked_and_bound_without_a_port() {
    let source = Ipv4Addr::new(127, 0, 0, 9);
    let options = Connect { source: Some(source.into()), mark: Some(0x539), ..Connect::default() };
    let stream = socket::stream((Ipv4Addr::LOCALHOST, 1).into(), &options).unwrap();
    assert_eq!(stream.mark().unwrap(), 0x539);
    assert!(stream.nonblocking().unwrap());
    let bound = stream.local_addr().unwrap().as_socket().unwrap();
    assert_eq!(bound, SocketAddr::new(source.into(), 0), "the port is chosen when it connects");
}

#[test]
fn a_foreign_source_address_needs_a_transparent_socket() {
    for (to, source) in [
        (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from([192, 0, 2, 7])),
        (Ipv6Addr::LOCALHOST.into(), "2001:db8::7".parse().unwrap()),
    ] {
        let options = Connect { source: Some(source), ..Connect::default() };
        let plain = socket::stream((to, 1).into(), &options).unwrap_err();
        assert_eq!(plain.kind(), ErrorKind::AddrNotAvailable);
        let stream = socket::stream((to, 1).into(), &Connect { transparent: true, ..options }).unwrap();
        assert_eq!(stream.local_addr().unwrap().as_socket().unwrap().ip(), source);
    }
}

#[test]
fn port_is_known_before_it_connects_where_that_is_asked_for() {
    for to in ["127.0.0.1:1", "[::1]:1"].map(|to| to.parse::<SocketAddr>().unwrap()) {
        for source in [None, Some(to.ip())] {
            for early_port in [true, false] {
                let options = Connect { source, early_port, ..Connect::default() };
                let local = socket::stream(to, &options).unwrap().local_addr().unwrap().as_socket().unwrap();
                assert_eq!(local.port() != 0, early_port, "{options:?}");
                assert_eq!(local.ip().is_unspecified(), source.is_none(), "{options:?}");
            }
        }
    }
}

#[test]
fn a_source_of_the_other_family_is_refused() {
    let options = Connect { source: Some(Ipv6Addr::LOCALHOST.into()), ..Connect::default() };
    let error = socket::stream((Ipv4Addr::LOCALHOST, 1).into(), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_connection_that_nobody_redirected_has_no_original_destination() {
    // A namespace of its own has no rules, so it does not even track connections.
    let netns = Netns::new().unwrap();
    let listener = crate::listen(&netns, (Ipv4Addr::LOCALHOST, 0));
    let _client = crate::connect(&netns, listener.local_addr().unwrap());
    let (accepted, _) = listener.accept().unwrap();
    assert!(socket::original_destination(&accepted, accepted.local_addr().unwrap()).is_err());
}

#[test]
fn pace_is_taken_from_a_connection_and_from_what_a_listener_accepts() {
    let control =
        |socket: SockRef<'_>| socket.tcp_congestion().unwrap().split(|byte| *byte == 0).next().unwrap().to_vec();
    let netns = Netns::new().unwrap();
    let pacing = netns.run(socket::pacing_control).unwrap().unwrap();
    let listener = crate::listen(&netns, (Ipv4Addr::LOCALHOST, 0));
    let usual = control(SockRef::from(&listener));
    assert_eq!(pacing.as_deref(), usual.starts_with(b"bbr").then_some(&usual[..]));
    socket::set_congestion_control(&listener, socket::UNPACED).unwrap();
    let client = crate::connect(&netns, listener.local_addr().unwrap());
    let (accepted, _) = listener.accept().unwrap();
    assert_eq!(control(SockRef::from(&accepted)), b"reno");
    // And it can be given back.
    socket::set_congestion_control(&accepted, &usual).unwrap();
    assert_eq!(control(SockRef::from(&accepted)), usual);
    assert_eq!(control(SockRef::from(&client)), usual);
}

#[test]
fn root_can_do_it_all() {
    assert!(socket::can_mark() && socket::can_be_transparent() && socket::ipv6_available());
    let v6_off = Netns::new().unwrap();
    let off = v6_off.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")).unwrap();
    off.unwrap();
    assert!(!v6_off.run(socket::ipv6_available).unwrap());
}

#[test]
fn later_listeners_of_a_shared_port_are_preferred_while_there_are_some() {
    let netns = zspire_sys::netns::Netns::new().unwrap();
    let listen = |port| {
        let options = Listen {
            address: (std::net::Ipv4Addr::LOCALHOST, port).into(),
            mark: None,
            reuse_port: true,
            transparent: false,
            v6_only: false,
            backlog: 128,
        };
        netns.run(|| socket::listen(&options)).unwrap().unwrap()
    };
    let old = listen(0);
    let address = old.local_addr().unwrap();
    let (old, new) = ([old, listen(address.port())], [listen(address.port()), listen(address.port())]);
    let arrive = || drop((0..40).map(|_| crate::connect(&netns, address)).collect::<Vec<_>>());
    let waiting = |of: &[std::net::TcpListener]| {
        of.iter().map(|it| std::iter::from_fn(|| it.accept().ok()).count()).sum::<usize>()
    };
    arrive();
    assert!(waiting(&old) > 0 && waiting(&new) > 0, "all of them share the port");
    socket::prefer_later_listeners(&old[0], 2).unwrap();
    arrive();
    assert_eq!((waiting(&old), waiting(&new)), (0, 40));
    drop(new);
    arrive();
    assert_eq!(waiting(&old), 40);
}
