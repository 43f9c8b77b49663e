//! A SPIRE agent: its configuration, its sockets, its process.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use zspire_sys::netns::Netns;
use zspire_sys::process::in_netns;

use super::{Node, Server, Way, kubelet, pki, proxy_id, wait_until_ready};
use crate::mesh::lock;
use crate::peers::program;
use crate::process::Process;

const HEALTH_PORT: u16 = 8090;
/// Where the Broker API is over TCP.
pub(super) const BROKER: &str = "127.0.0.1:8444";

/// Where an agent listens. The Workload API's folder is the one that workloads may see; the others must not be in it.
pub(crate) struct Sockets {
    pub(crate) workload_api: PathBuf,
    pub(crate) admin: PathBuf,
    pub(crate) broker: PathBuf,
}

impl Sockets {
    pub(crate) fn of(folder: &Path, node: &str) -> Self {
        let own = own(folder, node);
        Self {
            workload_api: own.join("public/api.sock"),
            admin: own.join("admin/admin.sock"),
            broker: own.join("broker/broker.sock"),
        }
    }
}

fn own(folder: &Path, node: &str) -> PathBuf {
    folder.join(format!("{node}.agent-data"))
}

/// The agent of one node.
#[derive(Debug)]
pub struct Agent {
    node: String,
    trust_domain: String,
    server: (Ipv4Addr, u16),
    way: Way,
    netns: Netns,
    folder: PathBuf,
    programs: PathBuf,
    process: Mutex<Option<Process>>,
}

impl Agent {
    #[track_caller]
    pub(super) fn start(node: &Node, server: &Server, way: Way, folder: &Path, programs: &Path) -> Self {
        let agent = Self {
            node: node.name.clone(),
            trust_domain: node.trust_domain.clone(),
            server: server.agents_port(),
            way,
            netns: node.netns.clone(),
            folder: folder.into(),
            programs: programs.into(),
            process: Mutex::default(),
        };
        pki::node(folder, &node.name);
        fs::create_dir(agent.own()).expect("the test's own folder");
        fs::write(agent.own().join("bootstrap.pem"), server.bundle()).expect("the test's own folder");
        agent.configure(true);
        agent.start_again();
        agent
    }

    /// The node that it is on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The trust domain that it is of.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Says whether the proxy of the node may ask about pods; the agent starts anew with that.
    #[track_caller]
    pub fn trust_the_proxy(&self, trusted: bool) {
        self.kill();
        self.configure(trusted);
        self.start_again();
    }

    #[track_caller]
    fn configure(&self, trusted: bool) {
        let someone = || format!("spiffe://{}/someone", self.trust_domain);
        let proxy = if trusted { proxy_id(&self.trust_domain) } else { someone() };
        let text = self.configuration(&proxy);
        fs::write(self.own().join("agent.conf"), text).expect("the test's own folder");
    }

    /// Starts it, also again; returns when it is ready.
    #[track_caller]
    pub fn start_again(&self) {
        let mut command = program(&self.programs, "spire-agent");
        command.args(["run", "-config"]).arg(self.own().join("agent.conf"));
        let name = format!("spire-agent-{}", self.node);
        let mut process = Process::start(&name, &self.folder, in_netns(&self.netns, command));
        wait_until_ready(&mut process, &self.netns, HEALTH_PORT);
        *lock(&self.process) = Some(process);
    }

    /// Ends it with SIGKILL, as a crash would: its sockets stay where they are.
    pub fn kill(&self) {
        drop(lock(&self.process).take());
    }

    /// Ends it in good order: it takes its sockets away.
    #[track_caller]
    pub fn stop(&self) {
        let mut process = lock(&self.process).take().expect("the agent was started");
        process.terminate();
        process.ended();
    }

    /// What it has for this process, or what it says instead.
    pub fn fetch(&self) -> Result<String, String> {
        let mut command = program(&self.programs, "spire-agent");
        command.args(["api", "fetch", "x509", "-socketPath"]).arg(Sockets::of(&self.folder, &self.node).workload_api);
        let output = command.output().expect("SPIRE's programs can be started");
        let said = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
        if output.status.success() { Ok(said) } else { Err(said) }
    }

    /// What it has written.
    #[track_caller]
    pub fn log(&self) -> String {
        lock(&self.process).as_ref().expect("the agent was started").log()
    }

    fn own(&self) -> PathBuf {
        own(&self.folder, &self.node)
    }

    /// It asks its server more often than an agent in use does it, so that a test need not wait for seconds.
    fn configuration(&self, proxy: &str) -> String {
        let (own, node) = (self.own(), pki_file(&self.folder, &self.node));
        let (own, node) = (own.display(), node.display());
        let sockets = Sockets::of(&self.folder, &self.node);
        let (workload_api, admin) = (sockets.workload_api.display(), sockets.admin.display());
        let (broker, over_tcp) = match self.way {
            Way::BrokerOverTcp => (format!("bind_address = \"{BROKER}\""), "allow_over_tcp = true"),
            _ => (format!("socket_path = \"{}\"", sockets.broker.display()), ""),
        };
        let ((address, port), trust_domain) = (self.server, &self.trust_domain);
        let kubernetes = match self.way {
            Way::BrokerByPod => kubelet::attestor(&self.node, proxy),
            _ => String::new(),
        };
        format!(
            r#"agent {{
  data_dir = "{own}"
  server_address = "{address}"
  server_port = "{port}"
  trust_domain = "{trust_domain}"
  socket_path = "{workload_api}"
  admin_socket_path = "{admin}"
  trust_bundle_path = "{own}/bootstrap.pem"
  authorized_delegates = ["{proxy}"]
  log_level = "INFO"
  experimental {{
    sync_interval = "200ms"
    broker {{
      {broker}
      brokers = [
        {{ id = "{proxy}"
          allowed_reference_types = [
            {{ type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" {over_tcp} }},
            {{ type_url = "type.googleapis.com/spiffe.broker.KubernetesObjectReference" }} ] }} ]
    }}
  }}
}}
plugins {{
  NodeAttestor "x509pop" {{ plugin_data {{ private_key_path = "{node}.key" certificate_path = "{node}.pem" }} }}
  KeyManager "disk" {{ plugin_data {{ directory = "{own}" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
{kubernetes}}}
health_checks {{ listener_enabled = true bind_address = "127.0.0.1" bind_port = "{HEALTH_PORT}" live_path = "/live" ready_path = "/ready" }}
"#
        )
    }
}

fn pki_file(folder: &Path, node: &str) -> PathBuf {
    folder.join(format!("{node}-node"))
}
