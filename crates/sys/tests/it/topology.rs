//! Networks of namespaces: everything reaches everything, and nothing else is there.

use std::net::{IpAddr, SocketAddr};

use zspire_sys::netns::Netns;
use zspire_sys::topology::{Error, Topology};

use crate::{connect, converse, listen};

fn reach(from: (&Netns, IpAddr), to: (&Netns, IpAddr)) {
    let listener = listen(to.0, (to.1, 0));
    let client = connect(from.0, listener.local_addr().unwrap());
    let (server, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), from.1);
    converse(&client, &server);
}

#[test]
fn pods_nodes_and_the_uplink_reach_each_other_by_their_own_addresses() {
    let mut topology = Topology::new().unwrap();
    let (mut a, mut b) = (topology.node("a").unwrap(), topology.node("b").unwrap());
    let c = topology.node("c").unwrap();
    let pod_a = a.dual_stack_pod("client", a.pod_address(1)).unwrap();
    let pod_a2 = a.pod("neighbour", a.pod_address(254)).unwrap();
    let pod_b = b.dual_stack_pod("server", b.pod_address(12)).unwrap();
    assert_eq!(pod_b.v6.unwrap().to_string(), "fd00:244:2::12");

    let places: Vec<(&Netns, IpAddr)> = vec![
        (&pod_a.netns, pod_a.address.into()),
        (&pod_a2.netns, pod_a2.address.into()),
        (&pod_b.netns, pod_b.address.into()),
        (&a.netns, a.address.into()),
        (&c.netns, c.address.into()),
        (topology.uplink(), topology.uplink_address().into()),
    ];
    for from in &places {
        for to in places.iter().filter(|to| to.1 != from.1) {
            reach(*from, *to);
        }
    }
    let v6: [(&Netns, IpAddr); 4] = [
        (&pod_a.netns, pod_a.v6.unwrap().into()),
        (&pod_b.netns, pod_b.v6.unwrap().into()),
        (&a.netns, a.v6.into()),
        (&c.netns, c.v6.into()),
    ];
    for from in v6 {
        for to in v6.into_iter().filter(|to| to.1 != from.1) {
            reach(from, to);
        }
    }
}

#[test]
fn the_link_between_the_first_two_nodes_has_a_known_name() {
    let mut topology = Topology::new().unwrap();
    let (a, _b) = (topology.node("a").unwrap(), topology.node("b").unwrap());
    let status = Topology::command(&a.netns, "ip").args(["link", "show", Topology::link()]).output().unwrap().status;
    assert!(status.success());
}

#[test]
fn an_address_that_is_not_the_nodes_or_is_taken_is_refused() {
    let mut topology = Topology::new().unwrap();
    let mut a = topology.node("a").unwrap();
    a.pod("one", a.pod_address(1)).unwrap();
    for address in ["10.244.1.1", "10.244.2.1", "10.244.1.0", "10.244.1.255", "192.0.2.1"] {
        let refused = a.pod("other", address.parse().unwrap());
        assert!(matches!(refused, Err(Error::Address { .. })), "{address}");
    }
}

#[test]
fn a_network_is_apart_from_the_machines() {
    let mut topology = Topology::new().unwrap();
    let mut node = topology.node("a").unwrap();
    let pod = node.pod("pod", node.pod_address(1)).unwrap();
    let listener = listen(&pod.netns, SocketAddr::new(pod.address.into(), 0));
    let elsewhere = Netns::new().unwrap();
    let address = listener.local_addr().unwrap();
    assert!(elsewhere.run(|| std::net::TcpStream::connect(address)).unwrap().is_err());
}
