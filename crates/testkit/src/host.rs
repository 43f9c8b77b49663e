//! Where a proxy runs: in a pod, for that pod alone, or on a node, for the pods that are enrolled there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use zspire_sys::netns::Netns;
use zspire_sys::nft::Redirection;
use zspire_sys::process::in_netns;

use crate::istio;
use crate::mesh::{World, lock};
use crate::plan::{NAMESPACE, Source};
use crate::process::Process;
use crate::spire::{self, Settings};
use crate::wait::until;

/// Where a proxy shows itself on loopback.
pub(crate) const ADMIN: u16 = 15000;
pub(crate) const STATS: u16 = 15020;
pub(crate) const READINESS: u16 = 15021;

/// Whom a proxy serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Serves {
    /// One pod, which it is in.
    Pod,
    /// The pods of its node.
    Node,
}

/// Where a proxy runs, and what it is started with.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) serves: Serves,
    pub(crate) netns: Netns,
    /// Variables of the proxy, and of the node's agent.
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) descriptors: Option<u32>,
    pub(crate) hosts: bool,
    pub(crate) world: Arc<World>,
    /// Whether its proxy asks SPIRE, where others ask a control plane.
    pub(crate) moved: AtomicBool,
    /// How often its proxy was succeeded by another: they have different ports.
    pub(crate) generation: AtomicU16,
    pub(crate) proxy: Mutex<Option<Process>>,
    pub(crate) agent: Mutex<Option<Process>>,
}

impl Host {
    /// Starts the proxy, also again.
    pub(crate) fn start(&self) {
        // The one before ends first: both want the same ports.
        drop(lock(&self.proxy).take());
        let process = Process::start(&format!("proxy-{}", self.name), self.folder(), self.proxy_command());
        *lock(&self.proxy) = Some(process);
    }

    /// The command that starts the proxy.
    pub(crate) fn proxy_command(&self) -> Command {
        let world = &self.world;
        let mut command = match (self.descriptors, self.hosts) {
            (None, false) => world.zspire(&["proxy"]),
            (Some(limit), _) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit -n {limit} && exec \"$0\" proxy")]).arg(&world.program);
                world.surroundings(&mut shell);
                shell
            }
            (None, true) => {
                let mut shell = Command::new("unshare");
                shell
                    .args(["-m", "sh", "-c", "mount --bind hosts /etc/hosts && exec \"$0\" proxy"])
                    .arg(&world.program);
                world.surroundings(&mut shell);
                shell
            }
        };
        self.configure(&mut command);
        in_netns(&self.netns, command)
    }

    /// Another command than the proxy, with the proxy's settings.
    pub(crate) fn with_settings(&self, arguments: &[&str]) -> Command {
        let mut command = self.world.zspire(arguments);
        self.configure(&mut command);
        in_netns(&self.netns, command)
    }

    fn configure(&self, command: &mut Command) {
        let world = &self.world;
        match self.serves {
            Serves::Pod => {
                command
                    .env("PROXY_MODE", "dedicated")
                    .env("PROXY_WORKLOAD_INFO", format!("{NAMESPACE}/{0}/{0}", self.name))
                    .env("PACKET_MARK", Redirection::default().mark.to_string());
            }
            // Shared is the default.
            Serves::Node => {
                command.env("INPOD_UDS", self.zds());
            }
        }
        command.env("NODE_NAME", &self.node).env("LOG_FORMAT", "json").env("ZTUNNEL_WORKER_THREADS", "2");
        let source = match world.source {
            Source::Spire(Settings { from_control_plane: true, .. }) if !self.moved.load(Relaxed) => {
                Source::ControlPlane
            }
            source => source,
        };
        match source {
            Source::Files => {
                command.env("FAKE_CA", "true").env("LOCAL_XDS_PATH", self.folder().join("mesh.json"));
            }
            Source::ControlPlane => {
                let address = format!("https://{}", world.control_plane);
                command
                    .env("CA_ADDRESS", &address)
                    .env("XDS_ADDRESS", &address)
                    .env("ZSPIRE_JOIN_TOKEN", self.folder().join(format!("{}.token", self.name)))
                    .env("ZSPIRE_STATE_DIR", self.folder().join(format!("{}.state", self.name)));
            }
            Source::Istio => {
                command.envs(istio::environment(self.folder(), world.control_plane, &self.node));
            }
            Source::Spire(Settings { way, .. }) => {
                command.env("LOCAL_XDS_PATH", self.folder().join("mesh.json")).envs(spire::environment(
                    way,
                    self.folder(),
                    &self.node,
                ));
            }
        }
        for (name, port) in [("ADMIN", ADMIN), ("STATS", STATS), ("READINESS", READINESS)] {
            command.env(format!("ZSPIRE_{name}_PORT"), self.port(port).to_string());
        }
        command.envs(&self.environment);
    }

    /// A port of the proxy where its host is.
    pub(crate) fn port(&self, port: u16) -> u16 {
        port + self.generation.load(Relaxed) % 2 * 1000
    }

    /// Starts another proxy beside the one that runs, which is returned.
    #[track_caller]
    pub(crate) fn start_successor(&self) -> Process {
        let generation = self.generation.fetch_add(1, Relaxed) + 1;
        let name = format!("proxy-{}-{generation}", self.name);
        let new = Process::start(&name, self.folder(), self.proxy_command());
        lock(&self.proxy).replace(new).expect("there is a proxy to succeed")
    }

    /// The socket of the node's agent.
    pub(crate) fn zds(&self) -> PathBuf {
        self.folder().join(format!("{}.zds", self.name))
    }

    /// A command that speaks to the node's agent, or is it.
    pub(crate) fn agent_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.world.zspire(arguments);
        command
            .env("INPOD_UDS", self.zds())
            .env("ZSPIRE_AGENT_SOCKET", self.folder().join(format!("{}.agent", self.name)))
            .env("ZSPIRE_AGENT_STATE_DIR", self.folder().join(format!("{}.enrolled", self.name)))
            .env("LOG_FORMAT", "json")
            .envs(&self.environment);
        in_netns(&self.netns, command)
    }

    /// Starts the node's agent, also again; returns when it answers.
    #[track_caller]
    pub(crate) fn start_agent(&self) {
        let process =
            Process::start(&format!("agent-{}", self.name), self.folder(), self.agent_command(&["node-agent"]));
        *lock(&self.agent) = Some(process);
        until("the node agent to answer", || {
            let output = self.agent_command(&["enrolled"]).output().map_err(|error| error.to_string())?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let runs = lock(&self.agent).as_mut().is_some_and(Process::runs);
            assert!(
                runs,
                "the node agent has ended:\n{}",
                lock(&self.agent).as_ref().map(Process::log).unwrap_or_default()
            );
            if output.status.success() { Ok(()) } else { Err(said) }
        });
    }

    fn folder(&self) -> &Path {
        self.world.folder.path()
    }
}
