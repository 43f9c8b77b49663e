//! A SPIRE server: its configuration, its process, and its command line.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Mutex;

use serde_json::Value;
use zspire_sys::netns::Netns;
use zspire_sys::process::in_netns;

use super::{Settings, pki, wait_until_ready};
use crate::mesh::lock;
use crate::peers::program;
use crate::process::Process;

/// Where the first server listens for agents; each further one a port higher, as with the others.
const PORT: u16 = 8081;
const BUNDLE_PORT: u16 = 8443;
const HEALTH_PORT: u16 = 8090;

/// The CAs of a server while there are two.
#[derive(Debug)]
pub struct Authorities {
    /// The ID of the one that signs.
    pub active: String,
    /// The ID of the one that is to come.
    pub prepared: String,
    /// The key that has signed the first, if there is a root above.
    pub root: String,
}

/// A server of one trust domain.
#[derive(Debug)]
pub struct Server {
    trust_domain: String,
    number: u16,
    address: Ipv4Addr,
    netns: Netns,
    folder: PathBuf,
    settings: Settings,
    programs: PathBuf,
    process: Mutex<Option<Process>>,
}

impl Server {
    #[track_caller]
    pub(super) fn start(
        trust_domain: &str,
        number: u16,
        folder: &Path,
        (netns, address): (&Netns, Ipv4Addr),
        settings: Settings,
        programs: &Path,
    ) -> Self {
        let server = Self {
            trust_domain: trust_domain.into(),
            number,
            address,
            netns: netns.clone(),
            folder: folder.into(),
            settings,
            programs: programs.into(),
            process: Mutex::default(),
        };
        fs::create_dir(server.own()).expect("the test's own folder");
        fs::write(server.own().join("server.conf"), server.configuration()).expect("the test's own folder");
        server.start_again();
        server
    }

    /// The trust domain that it is of.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Starts it, also again; returns when it is ready.
    #[track_caller]
    pub fn start_again(&self) {
        let mut command = program(&self.programs, "spire-server");
        command.args(["run", "-config"]).arg(self.own().join("server.conf"));
        let name = format!("spire-server-{}", self.trust_domain);
        let mut process = Process::start(&name, &self.folder, in_netns(&self.netns, command));
        wait_until_ready(&mut process, &self.netns, HEALTH_PORT + self.number);
        *lock(&self.process) = Some(process);
    }

    /// Ends it as a crash would.
    pub fn stop(&self) {
        drop(lock(&self.process).take());
    }

    /// What a command prints.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.try_run(arguments);
        let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "spire-server {arguments:?}: {said}{errors}");
        said.into_owned()
    }

    /// The same, which may fail.
    pub fn try_run(&self, arguments: &[&str]) -> Output {
        // The socket is named after the command and before what the command is given.
        let command = arguments.iter().take_while(|argument| !argument.starts_with('-')).count();
        let mut spire = program(&self.programs, "spire-server");
        spire.args(&arguments[..command]).arg("-socketPath").arg(self.socket()).args(&arguments[command..]);
        spire.output().expect("SPIRE's programs can be started")
    }

    /// Creates an entry; returns its ID.
    #[track_caller]
    pub fn entry(&self, arguments: &[&str]) -> String {
        let said = self.run(&[&["entry", "create"], arguments].concat());
        value(&said, "Entry ID").unwrap_or_else(|| panic!("no entry was created: {said}"))
    }

    /// Has this trust domain trust another one, whose bundle it follows from now on.
    #[track_caller]
    pub fn federate_with(&self, other: &Self) {
        let file = self.own().join(format!("{}.bundle", other.trust_domain));
        fs::write(&file, other.run(&["bundle", "show", "-format", "spiffe"])).expect("the test's own folder");
        let url = format!("https://{}:{}", other.address, BUNDLE_PORT + other.number);
        let peer = format!("spiffe://{}/spire/server", other.trust_domain);
        let of = ["federation", "create", "-trustDomain", &other.trust_domain, "-bundleEndpointURL", &url];
        let profile = ["-bundleEndpointProfile", "https_spiffe", "-endpointSpiffeID", &peer];
        let first = ["-trustDomainBundlePath", &file.display().to_string(), "-trustDomainBundleFormat", "spiffe"];
        self.run(&[&of[..], &profile, &first].concat());
    }

    /// Ends that, also for the entries that have it.
    #[track_caller]
    pub fn end_federation_with(&self, other: &Self) {
        self.run(&["federation", "delete", "-id", &other.trust_domain]);
        let id = format!("spiffe://{}", other.trust_domain);
        self.run(&["bundle", "delete", "-id", &id, "-mode", "dissociate"]);
    }

    /// Prepares another CA.
    #[track_caller]
    pub fn prepare_authority(&self) -> Authorities {
        self.run(&["localauthority", "x509", "prepare", "-output", "json"]);
        let shown = self.run(&["localauthority", "x509", "show", "-output", "json"]);
        let all: Value = serde_json::from_str(&shown).expect("JSON");
        let id = |which: &str| {
            all[which]["authority_id"].as_str().unwrap_or_else(|| panic!("no {which}: {shown}")).to_owned()
        };
        let root = all["active"]["upstream_authority_subject_key_id"].as_str().unwrap_or_default().to_owned();
        Authorities { active: id("active"), prepared: id("prepared"), root }
    }

    /// Does something with a CA: `activate`, `taint`, `revoke`.
    #[track_caller]
    pub fn authority(&self, action: &str, id: &str) {
        self.run(&["localauthority", "x509", action, "-authorityID", id]);
    }

    /// Does something with the root above a CA that signs no longer: `taint`, `revoke`.
    #[track_caller]
    pub fn root(&self, action: &str, id: &str) {
        self.run(&["upstreamauthority", action, "-subjectKeyID", id]);
    }

    /// Its CA's certificates, PEM.
    #[track_caller]
    pub(super) fn bundle(&self) -> String {
        self.run(&["bundle", "show"])
    }

    /// Where its agents reach it.
    pub(super) fn agents_port(&self) -> (Ipv4Addr, u16) {
        (self.address, PORT + self.number)
    }

    fn own(&self) -> PathBuf {
        self.folder.join(format!("{}.spire", self.trust_domain))
    }

    fn socket(&self) -> PathBuf {
        self.own().join("api.sock")
    }

    /// Entries are looked at more often than a server in use does it, so that a test need not wait for seconds.
    fn configuration(&self) -> String {
        let own = self.own();
        let (own, ca) = (own.display(), self.folder.join(pki::CA));
        let Self { trust_domain, address, number, settings: Settings { agent_lifetime, .. }, .. } = self;
        let (root, key) = (self.folder.join(pki::UPSTREAM), self.folder.join(pki::UPSTREAM_KEY));
        let files = format!("cert_file_path = \"{}\" key_file_path = \"{}\"", root.display(), key.display());
        let root_above = match self.settings.from_control_plane {
            true => format!("  UpstreamAuthority \"disk\" {{ plugin_data {{ {files} }} }}\n"),
            false => String::new(),
        };
        let (port, bundle_port, health_port) = (PORT + number, BUNDLE_PORT + number, HEALTH_PORT + number);
        format!(
            r#"server {{
  bind_address = "{address}"
  bind_port = "{port}"
  trust_domain = "{trust_domain}"
  data_dir = "{own}"
  socket_path = "{own}/api.sock"
  ca_ttl = "1h"
  default_x509_svid_ttl = "5m"
  agent_ttl = "{agent_lifetime}s"
  log_level = "INFO"
  federation {{
    bundle_endpoint {{ address = "{address}" port = {bundle_port} refresh_hint = "5s" profile "https_spiffe" {{}} }}
  }}
  experimental {{ cache_reload_interval = "200ms" }}
}}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "sqlite3" connection_string = "{own}/data.sqlite3" }} }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{own}/keys.json" }} }}
  NodeAttestor "x509pop" {{ plugin_data {{ ca_bundle_path = "{ca}" }} }}
{root_above}}}
health_checks {{ listener_enabled = true bind_address = "127.0.0.1" bind_port = "{health_port}" live_path = "/live" ready_path = "/ready" }}
"#,
            ca = ca.display(),
        )
    }
}

/// The value of a line `Name : value`.
fn value(said: &str, name: &str) -> Option<String> {
    said.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}
