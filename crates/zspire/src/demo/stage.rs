//! Where the demo runs: namespaces joined by veth links, or, where those are forbidden, loopback addresses and SOCKS5.
//!
//! Knows how a command gets into a pod and how a proxy there is configured; not what is started, nor what for.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use zspire_sys::netns::Netns;
use zspire_sys::nft::Redirection;
use zspire_sys::packets::Packets;
use zspire_sys::process::in_netns;
use zspire_sys::topology::{self, Topology};

use super::mesh::{PODS, PodPlan, SERVICE_PORT};

/// The service's virtual address among namespaces.
const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
/// And on loopback.
const LOOPBACK_VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 2, 80));

/// A place to run in.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) pods: Vec<Pod>,
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
    netns: Option<Netns>,
    ports: Ports,
}

/// Where a pod's proxy shows itself.
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
            pod.netns.run(|| Redirection::default().apply())?.context("cannot redirect a pod's connections")?;
            let ports = Ports { admin: 15000, stats: 15020, readiness: 15021 };
            pods.push(Pod { plan, address: address.into(), netns: Some(pod.netns), ports });
        }
        let control_plane = (topology.uplink_address(), 15012).into();
        Ok(Self { pods, vip: VIP, control_plane, network: Some(Network { topology, nodes }) })
    }

    /// Three loopback addresses.
    pub(super) fn loopback() -> anyhow::Result<Self> {
        let mut pods = Vec::new();
        for (n, plan) in PODS.into_iter().enumerate() {
            let ports = Ports { admin: free_port()?, stats: free_port()?, readiness: free_port()? };
            pods.push(Pod { plan, address: Ipv4Addr::new(127, 0, 1, n as u8 + 1).into(), netns: None, ports });
        }
        let control_plane = SocketAddr::from(([127, 0, 1, 254], free_port()?));
        Ok(Self { pods, vip: LOOPBACK_VIP, control_plane, network: None })
    }

    /// What it is, in a word.
    pub(super) fn mode(&self) -> &'static str {
        if self.network.is_some() { "namespaces" } else { "loopback" }
    }

    /// The pod with a name.
    pub(super) fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.plan.name == name).expect("the demo asks for its own pods")
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

    /// What a command in the pod needs in its environment to find the pod's proxy.
    pub(super) fn admin(&self) -> String {
        format!("127.0.0.1:{}", self.ports.admin)
    }

    /// Where applications ask for connections when they are not redirected.
    pub(super) fn socks5(&self) -> Option<SocketAddr> {
        self.netns.is_none().then_some(SocketAddr::new(self.address, 15080))
    }

    /// The variables by which the pod's proxy differs from one stage to the other.
    pub(super) fn proxy_environment(&self) -> Vec<(&'static str, String)> {
        if self.netns.is_some() {
            return vec![("PACKET_MARK", Redirection::default().mark.to_string())];
        }
        vec![
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
