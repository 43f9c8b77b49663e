//! A real SPIRE as the demo's source of identities: a server for all, an agent on each node, an entry for each application.
//!
//! Agents tell applications apart by the path of their program: in a user namespace of one user there is nothing else. Knows
//! SPIRE's commands and configuration; what is started when is the plot's.

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

/// The version that the demo was tried with, which `make demo` builds.
const VERSION: &str = "1.15.3";
pub(super) const TRUST_DOMAIN: &str = "cluster.local";
/// The proxies' own.
const PROXY: &str = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";
const PORT: u16 = 8081;

/// SPIRE's programs, and where its files are.
#[derive(Debug, Clone)]
pub(super) struct Spire {
    spire_server: PathBuf,
    spire_agent: PathBuf,
    folder: PathBuf,
    address: SocketAddr,
}

impl Spire {
    /// Finds the programs on the PATH.
    pub(super) fn find(folder: &Path, address: IpAddr) -> anyhow::Result<Self> {
        let (Some(spire_server), Some(spire_agent)) = (located("spire-server")?, located("spire-agent")?) else {
            anyhow::bail!(
                "spire-server and spire-agent {VERSION} are not on the PATH; \
                 `make demo ARGS=\"--identity spire\"` builds them first, once"
            )
        };
        Ok(Self { spire_server, spire_agent, folder: folder.into(), address: SocketAddr::new(address, PORT) })
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir(&self.folder);
        command
    }

    /// Writes the server's configuration; the command runs it.
    pub(super) fn server(&self) -> anyhow::Result<Command> {
        let own = self.own("server")?;
        let (ip, data) = (self.address.ip(), own.display());
        let text = format!(
            r#"server {{
  bind_address = "{ip}"
  bind_port    = "{PORT}"
  trust_domain = "{TRUST_DOMAIN}"
  data_dir     = "{data}"
  socket_path  = "{data}/api.sock"
  log_level    = "WARN"
  experimental {{ cache_reload_interval = "500ms" }}
}}
plugins {{
  DataStore "sql"           {{ plugin_data {{ database_type = "sqlite3" connection_string = "{data}/datastore.sqlite3" }} }}
  KeyManager "memory"       {{ plugin_data {{}} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
}}
"#
        );
        fs::write(own.join("server.conf"), text)?;
        let mut command = self.command(&self.spire_server);
        command.arg("run").arg("-config").arg(own.join("server.conf"));
        Ok(command)
    }

    /// What the server answers to a command of its own.
    pub(super) fn ask(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = self.command(&self.spire_server);
        command.args(arguments).arg("-socketPath").arg(self.folder.join("spire-server/api.sock"));
        let output = command.output().context("cannot run spire-server")?;
        let said = String::from_utf8_lossy(&[output.stderr, output.stdout.clone()].concat()).trim().to_owned();
        anyhow::ensure!(output.status.success(), "spire-server {}: {said}", arguments.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Registers what runs this program on a node as that identity.
    pub(super) fn register(&self, node: &str, program: &Path, id: &str) -> anyhow::Result<()> {
        let (parent, selector) = (alias(node), format!("unix:path:{}", program.display()));
        self.ask(&["entry", "create", "-parentID", &parent, "-spiffeID", id, "-selector", &selector]).map(drop)
    }

    /// Registers the proxy of a node, and writes the configuration of its agent; the command runs the agent.
    pub(super) fn agent(&self, node: &str, proxy: &Path) -> anyhow::Result<Command> {
        self.register(node, proxy, PROXY)?;
        let own = self.own(node)?;
        fs::write(own.join("bootstrap.pem"), self.ask(&["bundle", "show"])?)?;
        let token = self.ask(&["token", "generate", "-spiffeID", &alias(node)])?;
        let token =
            token.lines().find_map(|line| line.strip_prefix("Token: ")).context("spire-server gave no token")?;
        let (ip, data) = (self.address.ip(), own.display());
        let text = format!(
            r#"agent {{
  trust_domain      = "{TRUST_DOMAIN}"
  data_dir          = "{data}"
  server_address    = "{ip}"
  server_port       = "{PORT}"
  trust_bundle_path = "{data}/bootstrap.pem"
  socket_path       = "{data}/public/api.sock"
  log_level         = "WARN"
  experimental {{
    sync_interval = "500ms"
    broker {{
      socket_path = "{data}/broker/broker.sock"
      brokers = [
        {{ id = "{PROXY}"
          allowed_reference_types = [
            {{ type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" }} ] }} ]
    }}
  }}
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory"       {{ plugin_data {{}} }}
  WorkloadAttestor "unix"   {{ plugin_data {{ discover_workload_path = true workload_size_limit = -1 }} }}
}}
"#
        );
        fs::write(own.join("agent.conf"), text)?;
        let mut command = self.command(&self.spire_agent);
        command.arg("run").arg("-config").arg(own.join("agent.conf")).args(["-joinToken", token.trim()]);
        Ok(command)
    }

    /// Whether the agent of a node serves.
    pub(super) fn serves(&self, node: &str) -> anyhow::Result<()> {
        let socket = self.own(node)?.join("broker/broker.sock");
        std::os::unix::net::UnixStream::connect(&socket).map(drop).with_context(|| format!("{}", socket.display()))
    }

    /// What the proxy of a node is told.
    pub(super) fn proxy_environment(&self, node: &str) -> [(&'static str, String); 6] {
        let socket = |what: &str| format!("unix://{}", self.folder.join(format!("spire-{node}")).join(what).display());
        [
            ("IDENTITY_SOURCE", "spire-broker".into()),
            ("SPIFFE_REFERENCE", "pid".into()),
            ("TRUST_DOMAIN", TRUST_DOMAIN.into()),
            ("SPIFFE_ENDPOINT_SOCKET", socket("public/api.sock")),
            ("SPIFFE_BROKER_SOCKET", socket("broker/broker.sock")),
            ("LOCAL_XDS_PATH", self.folder.join("mesh.yaml").display().to_string()),
        ]
    }

    fn own(&self, name: &str) -> anyhow::Result<PathBuf> {
        let own = self.folder.join(format!("spire-{name}"));
        fs::create_dir_all(&own).with_context(|| format!("cannot make {}", own.display()))?;
        Ok(own)
    }
}

/// Where a program is that a shell finds by its name. The name alone would not do: SPIRE runs without the PATH of who runs the demo,
/// and without whatever else of the environment would change what it does.
fn located(name: &str) -> anyhow::Result<Option<PathBuf>> {
    let found =
        Command::new("/bin/sh").args(["-c", "command -v \"$0\"", name]).output().context("cannot run /bin/sh")?;
    Ok(found.status.success().then(|| OsString::from_vec(found.stdout.trim_ascii_end().to_vec()).into()))
}

/// The ID that entries of a node hang off.
fn alias(node: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/node/{node}")
}

/// This program under another name, so that an agent tells who runs it from who runs another.
pub(super) fn copy(program: &Path, to: &Path) -> anyhow::Result<()> {
    // A link is enough where it can be made: the path is what is looked at.
    fs::hard_link(program, to)
        .or_else(|_| fs::copy(program, to).map(drop))
        .with_context(|| format!("cannot make {}", to.display()))
}
