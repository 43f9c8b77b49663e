//! Where the demo runs: namespaces joined by veth links, or, where those are forbidden, loopback addresses and SOCKS5.
//!
//! Among namespaces each node has a proxy for its pods, on loopback each pod has one. Knows how a command gets to a pod or to a
//! proxy and how a proxy is configured; not what is started, nor what for.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use zspire_sys::netns::Netns;
use zspire_sys::packets::Packets;
use zspire_sys::process::in_netns;
use zspire_sys::topology::{self, Topology};

use super::mesh::{NAMESPACE, PODS, PodPlan, SERVICE_PORT};

/// The service's virtual address among namespaces.
const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
/// And on loopback.
const LOOPBACK_VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 2, 80));

/// A place to run in.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) pods: Vec<Pod>,
    pub(super) hosts: Vec<Host>,
    pub(super) vip: IpAddr,
    /// Where the control plane listens.
    pub(super) control_plane: SocketAddr,
    network: Option<Network>,
}

/// The namespaces; they are gone when nobody holds them.
#[derive(Debug)]
struct Network {
    topology: Topology,
    nodes: [topology::Node; 2],
}

/// A pod on the stage.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) plan: PodPlan,
    pub(super) address: IpAddr,
    /// Where its proxy is, among the stage's hosts.
    pub(super) host: usize,
    netns: Option<Netns>,
}

/// What a proxy runs in: a node, or, on loopback, a pod.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) name: String,
    pub(super) node: String,
    /// A node's; none on loopback.
    netns: Option<Netns>,
    /// Of the pod on loopback.
    address: IpAddr,
    ports: Ports,
}

/// Where a proxy shows itself.
#[derive(Debug, Clone, Copy)]
struct Ports {
    admin: u16,
    stats: u16,
    readiness: u16,
}

impl Stage {
    /// Two nodes and three pods as namespaces. The process must be in a user namespace of its own, or root.
    pub(super) fn namespaces() -> anyhow::Result<Self> {
        let mut topology = Topology::new()?;
        let mut nodes = [topology.node("node-1")?, topology.node("node-2")?];
        let mut pods = Vec::new();
        let mut numbers = [0; 2];
        for plan in PODS {
            let n = usize::from(plan.node - 1);
            numbers[n] += 1;
            let address = nodes[n].pod_address(numbers[n]);
            let pod = nodes[n].pod(plan.name, address)?;
            pods.push(Pod { plan, address: address.into(), host: n, netns: Some(pod.netns) });
        }
        let host = |node: &topology::Node| Host {
            name: node.name.clone(),
            node: node.name.clone(),
            netns: Some(node.netns.clone()),
            address: node.address.into(),
            ports: Ports { admin: 15000, stats: 15020, readiness: 15021 },
        };
        let hosts = nodes.iter().map(host).collect();
        let control_plane = (topology.uplink_address(), 15012).into();
        Ok(Self { pods, hosts, vip: VIP, control_plane, network: Some(Network { topology, nodes }) })
    }

    /// Three loopback addresses.
    pub(super) fn loopback() -> anyhow::Result<Self> {
        let (mut pods, mut hosts) = (Vec::new(), Vec::new());
        for (n, plan) in PODS.into_iter().enumerate() {
            let ports = Ports { admin: free_port()?, stats: free_port()?, readiness: free_port()? };
            let address = Ipv4Addr::new(127, 0, 1, n as u8 + 1).into();
            hosts.push(Host { name: plan.name.into(), node: plan.node_name(), netns: None, address, ports });
            pods.push(Pod { plan, address, host: n, netns: None });
        }
        let control_plane = SocketAddr::from(([127, 0, 1, 254], free_port()?));
        Ok(Self { pods, hosts, vip: LOOPBACK_VIP, control_plane, network: None })
    }

    /// What it is, in a word.
    pub(super) fn mode(&self) -> &'static str {
        if self.network.is_some() { "namespaces" } else { "loopback" }
    }

    /// The pod with a name.
    pub(super) fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.plan.name == name).expect("the demo asks for its own pods")
    }

    /// Where a pod's proxy is.
    pub(super) fn host(&self, pod: &Pod) -> &Host {
        &self.hosts[pod.host]
    }

    /// A command on the machine that the control plane runs on.
    pub(super) fn outside(&self, command: Command) -> Command {
        match &self.network {
            Some(network) => in_netns(network.topology.uplink(), command),
            None => command,
        }
    }

    /// The packets between the nodes, seen on node 1; none without namespaces.
    pub(super) fn link(&self) -> anyhow::Result<Option<Packets>> {
        let Some(network) = &self.network else { return Ok(None) };
        let packets = network.nodes[0].netns.run(|| Packets::of(Topology::link()));
        Ok(Some(packets.and_then(|packets| packets).context("cannot watch the link between the nodes")?))
    }

    /// The address of the service.
    pub(super) fn service(&self) -> SocketAddr {
        SocketAddr::new(self.vip, SERVICE_PORT)
    }
}

impl Pod {
    /// A command in the pod.
    pub(super) fn inside(&self, command: Command) -> Command {
        match &self.netns {
            Some(netns) => in_netns(netns, command),
            None => command,
        }
    }

    /// A file that stands for the pod's network namespace while this process runs; none on loopback.
    pub(super) fn netns_file(&self) -> Option<String> {
        let netns = self.netns.as_ref()?;
        Some(format!("/proc/{}/fd/{}", std::process::id(), netns.as_fd().as_raw_fd()))
    }

    /// Where applications ask for connections when they are not redirected.
    pub(super) fn socks5(&self) -> Option<SocketAddr> {
        self.netns.is_none().then_some(SocketAddr::new(self.address, 15080))
    }
}

impl Host {
    /// A command where the proxy is.
    pub(super) fn inside(&self, command: Command) -> Command {
        match &self.netns {
            Some(netns) => in_netns(netns, command),
            None => command,
        }
    }

    /// Whether it is a node, for pods that are enrolled there.
    pub(super) fn is_node(&self) -> bool {
        self.netns.is_some()
    }

    /// What a command here needs to find the proxy.
    pub(super) fn admin(&self) -> String {
        format!("127.0.0.1:{}", self.ports.admin)
    }

    /// The variables of a node's agent, of which a command needs some to find it.
    pub(super) fn agent_environment(&self, folder: &Path) -> [(&'static str, String); 3] {
        let file = |what: &str| folder.join(format!("{}.{what}", self.name)).display().to_string();
        [
            ("INPOD_UDS", file("zds")),
            ("ZSPIRE_AGENT_SOCKET", file("agent")),
            ("ZSPIRE_AGENT_STATE_DIR", file("enrolled")),
        ]
    }

    /// The variables by which the proxy differs from one stage to the other.
    pub(super) fn proxy_environment(&self, folder: &Path) -> Vec<(&'static str, String)> {
        if self.is_node() {
            // Shared is the default.
            return self.agent_environment(folder)[..1].to_vec();
        }
        vec![
            ("PROXY_MODE", "dedicated".into()),
            ("PROXY_WORKLOAD_INFO", format!("{NAMESPACE}/{0}/{0}", self.name)),
            ("ZSPIRE_BIND_ADDRESS", self.address.to_string()),
            ("ZSPIRE_ADMIN_PORT", self.ports.admin.to_string()),
            ("ZSPIRE_STATS_PORT", self.ports.stats.to_string()),
            ("ZSPIRE_READINESS_PORT", self.ports.readiness.to_string()),
            ("UNSTABLE_ENABLE_SOCKS5", "true".into()),
        ]
    }

    /// Whether the proxy is ready, and if not, why.
    pub(super) fn readiness(&self) -> Result<(), String> {
        let port = self.ports.readiness;
        let answer = match &self.netns {
            Some(netns) => netns.run(|| get(port)).map_err(|error| error.to_string())?,
            None => get(port),
        };
        answer.map_err(|error| format!("no answer on port {port}: {error}")).and_then(|answer| {
            let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).trim().to_owned();
            if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(body) }
        })
    }
}

fn get(port: u16) -> std::io::Result<String> {
    let time = Duration::from_secs(2);
    let mut socket = TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), time)?;
    socket.set_read_timeout(Some(time))?;
    socket.write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    socket.take(64 * 1024).read_to_string(&mut answer)?;
    Ok(answer)
}

/// A port that nobody has at this moment.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0)).context("no free port on loopback")?.local_addr()?.port())
}
