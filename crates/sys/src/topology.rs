//! Small networks of namespaces, for the tests and the demo: nodes that are linked to each other, with pods on them.
//!
//! ```text
//!                 uplink 10.10.0.254
//!                /                  \
//!      node 1 10.10.0.1 ════════ node 2 10.10.0.2        each pair of nodes has a link of its own
//!        │          │                  │
//!  10.244.1.1  10.244.1.2         10.244.2.1              pods, one link each to their node
//! ```
//!
//! Nothing is bridged: nodes forward, and every address is a /32 (or /128) with routes, as many network plugins do
//! it. Namespaces have no names and are held by descriptor, so nothing is left behind when the process ends, however
//! it ends. Needs root, on the machine or in a user namespace ([`crate::userns`]). It knows nothing of the proxy.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;

use crate::netns::Netns;
use crate::process::in_netns;
use crate::program::{self, IP};

/// What pods have for a gateway, whatever their node.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The last part of the uplink's addresses, where nodes have their number.
const UPLINK: u8 = 254;

/// Why the network could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No namespace.
    #[error("cannot make a network namespace for {name}: this needs root or a user namespace")]
    Namespace {
        /// Whose it would have been.
        name: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A kernel setting was refused.
    #[error("cannot set {file} in a network namespace")]
    Setting {
        /// The setting's file.
        file: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The `ip` program failed.
    #[error("cannot configure the network of {name}")]
    Program {
        /// Whose network it is.
        name: String,
        /// What happened.
        #[source]
        source: program::Error,
    },
    /// The address does not belong to the node, or is taken.
    #[error(
        "pod {pod} cannot have the address {address}: it must be free, and one of 10.244.{node}.1 to 10.244.{node}.254"
    )]
    Address {
        /// The pod.
        pod: String,
        /// Its node's number.
        node: u8,
        /// The address.
        address: Ipv4Addr,
    },
    /// There is no number left for another node.
    #[error("a topology has at most 253 nodes")]
    Full,
}

/// A network under construction.
#[derive(Debug)]
pub struct Topology {
    uplink: Netns,
    nodes: Vec<(u8, Netns)>,
}

/// A machine of the network.
#[derive(Debug)]
pub struct Node {
    /// Its name, for messages.
    pub name: String,
    /// Its number, from 1: part of its addresses and of its pods'.
    pub number: u8,
    /// Its namespace.
    pub netns: Netns,
    /// Its address, `10.10.0.<number>`.
    pub address: Ipv4Addr,
    /// Its other address, `fd00:10::<number>`.
    pub v6: Ipv6Addr,
    taken: Vec<Ipv4Addr>,
}

/// A pod of a node.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its name, for messages.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its address, `10.244.<node>.<n>`.
    pub address: Ipv4Addr,
    /// Its other address, `fd00:244:<node>::<n>`, if it was asked for.
    pub v6: Option<Ipv6Addr>,
}

impl Topology {
    /// A network of the uplink alone: a place for what is outside the nodes, which all nodes and pods can reach.
    pub fn new() -> Result<Self, Error> {
        let uplink = namespace("the uplink", true)?;
        let mut script = String::new();
        own_addresses(&mut script, UPLINK);
        configure("the uplink", &uplink, &script)?;
        Ok(Self { uplink, nodes: Vec::new() })
    }

    /// The uplink's namespace.
    pub fn uplink(&self) -> &Netns {
        &self.uplink
    }

    /// The uplink's address.
    pub fn uplink_address(&self) -> Ipv4Addr {
        node_address(UPLINK)
    }

    /// The name, on node 1, of its link to node 2: where traffic between the two can be watched.
    pub fn link() -> &'static str {
        "node-2"
    }

    /// Adds a node, linked to the uplink and to every node there is.
    pub fn node(&mut self, name: &str) -> Result<Node, Error> {
        let number = u8::try_from(self.nodes.len() + 1).ok().filter(|number| *number < UPLINK).ok_or(Error::Full)?;
        let netns = namespace(name, true)?;
        let mut script = String::new();
        own_addresses(&mut script, number);
        configure(name, &netns, &script)?;
        join(name, (number, &netns), (UPLINK, &self.uplink))?;
        for (other, peer) in &self.nodes {
            join(name, (number, &netns), (*other, peer))?;
        }
        self.nodes.push((number, netns.clone()));
        let (address, v6) = (node_address(number), node_v6(number));
        Ok(Node { name: name.into(), number, netns, address, v6, taken: Vec::new() })
    }

    /// A command whose process starts in a namespace.
    pub fn command(netns: &Netns, program: impl AsRef<std::ffi::OsStr>) -> Command {
        in_netns(netns, Command::new(program))
    }
}

impl Node {
    /// Adds a pod with an address of this node's network: see [`pod_address`](Self::pod_address).
    pub fn pod(&mut self, name: &str, address: Ipv4Addr) -> Result<Pod, Error> {
        self.add(name, address, None)
    }

    /// Adds a pod that also has an IPv6 address, with the same last part.
    pub fn dual_stack_pod(&mut self, name: &str, address: Ipv4Addr) -> Result<Pod, Error> {
        let v6 = pod_v6(self.number, address.octets()[3]);
        self.add(name, address, Some(v6))
    }

    /// The address of this node's pod number `n`, from 1 to 254.
    pub fn pod_address(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number, n)
    }

    fn add(&mut self, name: &str, address: Ipv4Addr, v6: Option<Ipv6Addr>) -> Result<Pod, Error> {
        let n = address.octets()[3];
        if address != self.pod_address(n) || n == 0 || n == 255 || self.taken.contains(&address) {
            return Err(Error::Address { pod: name.into(), node: self.number, address });
        }
        let netns = namespace(name, false)?;
        let link = format!("pod-{n}");
        configure(name, &self.netns, &self.pod_link(&link, &netns, address, v6))?;
        configure(name, &netns, &pod_side(address, v6))?;
        self.taken.push(address);
        Ok(Pod { name: name.into(), netns, address, v6 })
    }

    fn pod_link(&self, link: &str, pod: &Netns, address: Ipv4Addr, v6: Option<Ipv6Addr>) -> String {
        let mut script = String::new();
        line(&mut script, format_args!("link add {link} type veth peer name eth0 netns {}", handle(pod)));
        line(&mut script, format_args!("address add {GATEWAY}/32 dev {link}"));
        line(&mut script, format_args!("link set {link} up"));
        // The gateway's address is the same on all links: the node speaks to its pods with its own.
        line(&mut script, format_args!("route add {address}/32 dev {link} src {}", self.address));
        if let Some(v6) = v6 {
            line(&mut script, format_args!("address add {GATEWAY_V6}/64 dev {link} nodad"));
            line(&mut script, format_args!("route add {v6}/128 dev {link} src {}", self.v6));
        }
        script
    }
}

fn pod_side(address: Ipv4Addr, v6: Option<Ipv6Addr>) -> String {
    let mut script = String::new();
    line(&mut script, format_args!("address add {address}/32 dev eth0"));
    line(&mut script, format_args!("link set eth0 up"));
    line(&mut script, format_args!("route add {GATEWAY}/32 dev eth0 scope link"));
    line(&mut script, format_args!("route add default via {GATEWAY} dev eth0 src {address}"));
    if let Some(v6) = v6 {
        line(&mut script, format_args!("address add {v6}/128 dev eth0 nodad"));
        line(&mut script, format_args!("route add default via {GATEWAY_V6} dev eth0 src {v6}"));
    }
    script
}

fn node_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 10, 0, number)
}

fn node_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, decimal(number))
}

fn pod_v6(node: u8, n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, decimal(node), 0, 0, 0, 0, decimal(n))
}

/// The number whose hexadecimal form reads like the decimal form of `number`, so that both addresses look alike.
fn decimal(number: u8) -> u16 {
    let number = u16::from(number);
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}

/// A node's addresses are on its loopback: they are the same on all of its links.
fn own_addresses(script: &mut String, number: u8) {
    line(script, format_args!("address add {}/32 dev lo", node_address(number)));
    if has_v6() {
        line(script, format_args!("address add {}/128 dev lo nodad", node_v6(number)));
    }
}

/// Links two nodes and gives each the routes to the other and to the other's pods.
fn join(name: &str, a: (u8, &Netns), b: (u8, &Netns)) -> Result<(), Error> {
    let mut script = String::new();
    let (near, far) = (link_to(b.0), link_to(a.0));
    line(&mut script, format_args!("link add {near} type veth peer name {far} netns {}", handle(b.1)));
    configure(name, a.1, &script)?;
    configure(name, a.1, &link_side(a.0, b.0))?;
    configure(name, b.1, &link_side(b.0, a.0))
}

fn link_side(own: u8, peer: u8) -> String {
    let link = link_to(peer);
    let (source, gateway) = (node_address(own), node_address(peer));
    let mut script = String::new();
    line(&mut script, format_args!("link set {link} up"));
    line(&mut script, format_args!("route add {gateway}/32 dev {link} src {source}"));
    line(&mut script, format_args!("route add 10.244.{peer}.0/24 via {gateway} dev {link} src {source} onlink"));
    if has_v6() {
        // Neighbours are found by link-local addresses; those of a node are the same on all of its links.
        let (source, gateway) = (node_v6(own), node_v6(peer));
        let (near, far) = (link_local(own), link_local(peer));
        line(&mut script, format_args!("address add {near}/64 dev {link} nodad"));
        line(&mut script, format_args!("route add {gateway}/128 via {far} dev {link} src {source}"));
        let pods = Ipv6Addr::new(0xfd00, 0x244, decimal(peer), 0, 0, 0, 0, 0);
        line(&mut script, format_args!("route add {pods}/64 via {far} dev {link} src {source}"));
    }
    script
}

fn link_to(peer: u8) -> String {
    if peer == UPLINK { "uplink".into() } else { format!("node-{peer}") }
}

fn link_local(number: u8) -> IpAddr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 1, decimal(number)).into()
}

/// A namespace as the `ip` program can be told of it, which inherits none of our descriptors.
fn handle(netns: &Netns) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), netns.as_fd().as_raw_fd())
}

fn line(script: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(script, "{arguments}").expect("a string takes everything");
}

fn configure(name: &str, netns: &Netns, script: &str) -> Result<(), Error> {
    let program = |source| Error::Program { name: name.into(), source };
    IP.run(Some(netns), &["-batch", "-"], script).map(drop).map_err(program)
}

/// Settings of every namespace, made before it has links, which take theirs from the defaults.
const SETTINGS: [(&str, &str); 4] = [
    // Packets with a kept source address arrive where their source is not routed to.
    ("/proc/sys/net/ipv4/conf/all/rp_filter", "0"),
    ("/proc/sys/net/ipv4/conf/default/rp_filter", "0"),
    // Addresses are known to be unique: looking for duplicates would make them unusable for a second.
    ("/proc/sys/net/ipv6/conf/all/accept_dad", "0"),
    ("/proc/sys/net/ipv6/conf/default/accept_dad", "0"),
];

const FORWARDING: [(&str, &str); 2] =
    [("/proc/sys/net/ipv4/ip_forward", "1"), ("/proc/sys/net/ipv6/conf/all/forwarding", "1")];

fn namespace(name: &str, forwards: bool) -> Result<Netns, Error> {
    let failed = |source| Error::Namespace { name: name.into(), source };
    let netns = Netns::new().map_err(failed)?;
    let settings = SETTINGS.iter().chain(if forwards { &FORWARDING[..] } else { &[] });
    // A thread sees in /proc/sys/net the settings of the namespace it is in.
    netns.run(|| settings.into_iter().try_for_each(|(file, value)| set(file, value))).map_err(failed)??;
    Ok(netns)
}

fn set(file: &'static str, value: &str) -> Result<(), Error> {
    if file.starts_with("/proc/sys/net/ipv6") && !has_v6() {
        return Ok(());
    }
    fs::write(file, value).map_err(|source| Error::Setting { file, source })
}

/// Whether the kernel has IPv6 at all.
fn has_v6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}
