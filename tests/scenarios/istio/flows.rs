//! The rules that Istio's node agent puts into a pod, and those of `zspire enroll`: who gets what, flow by flow, is the same, except
//! where the table says otherwise and why. Connections that are older than the rules end under ours in any case; under Istio's
//! those go on, past the proxy, that connection tracking knows.
//!
//! Sockets of the test are in the proxy's place, at its ports and with its mark. A pod under Istio's rules has been enrolled by
//! Istio's agent, which is gone by then, as the proxy is; likewise the other.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use zspire_testkit::flows::{Answering, Call, Protocol, answer};
use zspire_testkit::plan::captured;
use zspire_testkit::{Mesh, Pod, hear, mesh, say, uncaptured};

use Protocol::{Tcp, Udp};

use crate::scenario;

/// The mark of a proxy's packets.
const OURS: u32 = 0x539;

/// Where a flow begins.
#[derive(Debug, Clone, Copy)]
enum From {
    Pod,
    /// A socket of the pod with the proxy's mark.
    Proxy,
    /// Another pod, without a proxy.
    Peer,
    /// A process of the node, such as the kubelet with a probe.
    Node,
}

/// Where to.
#[derive(Debug, Clone, Copy)]
enum To {
    Peer,
    Pod,
    Node,
    /// `127.0.0.1` and `::1`.
    Loopback,
    /// `127.0.0.53`, as of a resolver in the pod. There is no such IPv6 address.
    Resolver,
    /// What the kubelet's probes come from under Istio: 169.254.7.127 and its IPv6 counterpart.
    Prober,
}

/// Whose rules are in the pod.
#[derive(Debug, Clone, Copy)]
enum Rules {
    Istios,
    Ours,
}

/// Who gets a flow.
#[derive(Debug, Clone, Copy)]
enum Gets {
    /// Under both.
    Both(&'static str),
    Differs {
        istios: &'static str,
        ours: &'static str,
    },
}

use Gets::{Both, Differs};

impl Gets {
    fn under(self, rules: Rules) -> &'static str {
        match (self, rules) {
            (Both(who), _)
            | (Differs { istios: who, .. }, Rules::Istios)
            | (Differs { ours: who, .. }, Rules::Ours) => who,
        }
    }
}

/// The flows.
const FLOWS: &[(From, Protocol, To, u16, Gets)] = &[
    // Outbound.
    (From::Pod, Tcp, To::Peer, 8080, Both("proxy 15001")),
    (From::Pod, Tcp, To::Peer, 15008, Both("proxy 15001")),
    (From::Pod, Tcp, To::Node, 8080, Both("proxy 15001")),
    (From::Pod, Udp, To::Peer, 8080, Both("peer")),
    (From::Proxy, Tcp, To::Peer, 8080, Both("peer")),
    (From::Proxy, Tcp, To::Peer, 15008, Both("peer")),
    (From::Proxy, Udp, To::Peer, 8080, Both("peer")),
    // Istio's agent has the probes of the node's kubelet come from an address of its own, and leaves that alone both ways. Where
    // `zspire enroll` is, there is no kubelet: nothing has to be left alone, and policies apply to whoever calls.
    (From::Pod, Tcp, To::Prober, 8080, Differs { istios: "node", ours: "proxy 15001" }),
    (From::Node, Tcp, To::Pod, 8080, Differs { istios: "pod", ours: "proxy 15006" }),
    // To itself.
    (From::Pod, Tcp, To::Pod, 8080, Both("pod")),
    (From::Pod, Tcp, To::Loopback, 8080, Both("pod")),
    (From::Pod, Tcp, To::Resolver, 8080, Both("pod")),
    (From::Pod, Udp, To::Loopback, 8080, Both("pod")),
    (From::Pod, Tcp, To::Loopback, 15001, Both("proxy 15001")),
    (From::Proxy, Tcp, To::Pod, 8080, Both("pod")),
    (From::Proxy, Tcp, To::Loopback, 8080, Both("pod")),
    // DNS.
    (From::Pod, Udp, To::Peer, 53, Both("proxy 15053")),
    (From::Pod, Tcp, To::Peer, 53, Both("proxy 15053")),
    (From::Pod, Udp, To::Loopback, 53, Both("pod")),
    (From::Pod, Tcp, To::Loopback, 53, Both("pod")),
    (From::Pod, Udp, To::Resolver, 53, Both("pod")),
    // A resolver of the pod's own is its own matter by TCP as well.
    (From::Pod, Tcp, To::Resolver, 53, Differs { istios: "proxy 15053", ours: "pod" }),
    (From::Pod, Udp, To::Pod, 53, Both("pod")),
    (From::Pod, Tcp, To::Pod, 53, Both("proxy 15053")),
    (From::Proxy, Udp, To::Peer, 53, Both("peer")),
    (From::Proxy, Tcp, To::Peer, 53, Both("peer")),
    // Inbound.
    (From::Peer, Tcp, To::Pod, 8080, Both("proxy 15006")),
    (From::Peer, Tcp, To::Pod, 53, Both("proxy 15006")),
    (From::Peer, Udp, To::Pod, 8080, Both("pod")),
    (From::Node, Udp, To::Pod, 8080, Both("pod")),
    // The proxy's own ports.
    (From::Peer, Tcp, To::Pod, 15008, Both("proxy 15008")),
    (From::Node, Tcp, To::Pod, 15008, Both("proxy 15008")),
    (From::Peer, Tcp, To::Pod, 15006, Both("proxy 15006")),
    (From::Peer, Tcp, To::Pod, 15001, Both("proxy 15006")),
    (From::Peer, Tcp, To::Pod, 15053, Both("proxy 15006")),
    (From::Peer, Udp, To::Pod, 15053, Both("refused")),
];

#[test]
fn flows_under_istios_rules() {
    under_istios_rules("false");
}

/// The same rules once more, programmed without `iptables`.
#[test]
fn flows_under_istios_native_rules() {
    under_istios_rules("true");
}

fn under_istios_rules(native: &str) {
    scenario(|| {
        let mesh = mesh()
            .istio_cni()
            .node("a")
            .pod(captured("pod").dual_stack().not_started().with("NATIVE_NFTABLES", native))
            .pod(captured("tracked").not_started())
            .node("b")
            .pod(uncaptured("peer").dual_stack())
            .start();
        let (pod, older, tracked) = (mesh.pod("pod"), Older::open(&mesh), Older::open_tracked(&mesh));
        let (istio, cni) = (mesh.istio(), mesh.cni("a"));
        for pod in [&pod, &mesh.pod("tracked")] {
            cni.run_pod(&istio.uid(pod), pod);
            istio.set_ready(pod, true);
            istio.wait_for_redirection(pod, Some("enabled"));
        }
        let rules = pod.command("nft", &["list", "tables"]).output().unwrap();
        let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
        assert_eq!(rules.contains("inet istio-ambient-nat").to_string(), native, "{rules}");
        cni.kill();
        // Those who wait are not told; those who speak are not heard, or go on as they are.
        assert_eq!((older.told(), older.heard()), ([[false; 2]; 2], [false; 2]));
        assert_eq!((tracked.told(), tracked.heard()), ([[false; 2]; 2], [true; 2]));
        compare(&mesh, Rules::Istios);
    });
}

#[test]
fn flows_under_our_rules() {
    scenario(|| {
        let mesh = mesh()
            .shared()
            .node("a")
            .pod(captured("pod").dual_stack().not_started().with("AMBIENT_DNS_CAPTURE", "true"))
            .pod(captured("tracked").not_started())
            .node("b")
            .pod(uncaptured("peer").dual_stack())
            .start();
        let older = [Older::open(&mesh), Older::open_tracked(&mesh)];
        for name in ["pod", "tracked"] {
            mesh.enroll(&mesh.pod(name));
        }
        mesh.agent("a", |agent| agent.kill());
        // Those who wait are told at once.
        for older in older {
            assert_eq!((older.told(), older.heard()), ([[true; 2]; 2], [false; 2]));
        }
        compare(&mesh, Rules::Ours);
    });
}

/// Sends every flow in both address families.
#[track_caller]
fn compare(mesh: &Mesh, rules: Rules) {
    let (pod, peer) = (mesh.pod("pod"), mesh.pod("peer"));
    pod.proxy(|proxy| proxy.kill());
    let _answering = everybody(mesh);
    let mut wrong = Vec::new();
    for v4 in [true, false] {
        for &(from, protocol, to, port, gets) in FLOWS {
            let Some(ip) = address(mesh, to, v4) else { continue };
            let (netns, mark) = match from {
                From::Pod => (pod.netns(), None),
                From::Proxy => (pod.netns(), Some(OURS)),
                From::Peer => (peer.netns(), None),
                From::Node => (mesh.node("a"), None),
            };
            let who = answer(netns, Call { protocol, mark, to: SocketAddr::new(ip, port) }).to_string();
            let expected = gets.under(rules);
            if who != expected {
                wrong.push(format!("{from:?} -> {protocol:?} {to:?} {ip}:{port}: {who}, not {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn address(mesh: &Mesh, to: To, v4: bool) -> Option<IpAddr> {
    let of = |pod: &Pod| if v4 { pod.address() } else { pod.v6() };
    Some(match (to, v4) {
        (To::Peer, _) => of(&mesh.pod("peer")),
        (To::Pod, _) => of(&mesh.pod("pod")),
        (To::Node, true) => mesh.node_at("a", 0).ip(),
        (To::Loopback, true) => Ipv4Addr::LOCALHOST.into(),
        (To::Loopback, false) => Ipv6Addr::LOCALHOST.into(),
        (To::Resolver, true) => Ipv4Addr::new(127, 0, 0, 53).into(),
        (To::Prober, true) => Ipv4Addr::new(169, 254, 7, 127).into(),
        (To::Prober, false) => Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff).into(),
        (To::Node | To::Resolver, false) => return None,
    })
}

/// Sockets that say who they are, in the pod, at the peer and on the node.
fn everybody(mesh: &Mesh) -> Answering {
    let mut all = Answering::default();
    let (pod, peer, node) = (mesh.pod("pod"), mesh.pod("peer"), mesh.node("a"));
    let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let own: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for (any, own) in any.into_iter().zip(own) {
        for port in [15001, 15006, 15008, 15053] {
            all.at(pod.netns(), &format!("proxy {port}"), (Tcp, (any, port).into()), Some(OURS));
        }
        all.at(pod.netns(), "proxy 15053", (Udp, (own, 15053).into()), None);
        for (netns, name) in [(pod.netns(), "pod"), (peer.netns(), "peer"), (node, "node")] {
            for port in [53, 8080] {
                all.at(netns, name, (Tcp, (any, port).into()), None);
                all.at(netns, name, (Udp, (any, port).into()), None);
            }
        }
        all.at(peer.netns(), "peer", (Tcp, (any, 15008).into()), None);
    }
    let resolver = address(mesh, To::Resolver, true).expect("there is one");
    all.at(pod.netns(), "pod", (Udp, (resolver, 53).into()), None);
    // Where Istio has the node's probes come from, which nobody has as an address of his own.
    for prober in [true, false].map(|v4| address(mesh, To::Prober, v4).expect("there is one in each family")) {
        let added =
            mesh.node_command("a", "ip", &["address", "add", &prober.to_string(), "dev", "lo"]).output().unwrap();
        assert!(added.status.success(), "{added:?}");
    }
    all
}

/// Connections that are older than the rules: one that the pod has opened and one that it has accepted.
struct Older([[TcpStream; 2]; 2]);

impl Older {
    fn open(mesh: &Mesh) -> Self {
        Self::of(&mesh.pod("pod"), &mesh.pod("peer"))
    }

    /// The same in a pod in which something has asked for the state of connections, so that the kernel keeps it.
    fn open_tracked(mesh: &Mesh) -> Self {
        let pod = mesh.pod("tracked");
        let rules = "add table inet other; add chain inet other c { type filter hook output priority 0; }; \
                     add rule inet other c ct state established accept";
        assert!(pod.command("nft", &[rules]).status().unwrap().success());
        Self::of(&pod, &mesh.pod("peer"))
    }

    fn of(pod: &Pod, peer: &Pod) -> Self {
        Self([(pod, peer), (peer, pod)].map(|(client, server)| {
            let listener = server.listen();
            let asking = client.open(server.app());
            let served = listener.accept();
            say(&asking, "before");
            hear(&served, "before");
            [asking, served]
        }))
    }

    /// Each end: whether it is told that it is over, without saying anything.
    fn told(&self) -> [[bool; 2]; 2] {
        let is_told = |end: &TcpStream| match hears(end) {
            Ok(length) => length == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        };
        self.0.each_ref().map(|ends| ends.each_ref().map(is_told))
    }

    /// Whether what a client says arrives.
    fn heard(&self) -> [bool; 2] {
        self.0.each_ref().map(|[asking, served]| {
            // It may know already that nobody listens.
            let _ = (&*asking).write_all(b"after");
            matches!(hears(served), Ok(1..))
        })
    }
}

fn hears(mut end: &TcpStream) -> io::Result<usize> {
    // On a link of this machine, nothing is on its way for longer.
    end.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    end.read(&mut [0; 8])
}
