//! The commands of zspire that the demo runs, each with its environment and where it has to run. What they are for is the steps'.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde_json::Value;

use super::Demo;
use super::mesh::NAMESPACE;
use super::stage::{Host, Pod};

impl Demo {
    pub(super) fn zspire(&self, arguments: &[&str]) -> Command {
        self.zspire_as(&self.program, arguments)
    }

    pub(super) fn zspire_as(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir(&self.folder);
        command
    }

    pub(super) fn control_plane_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.zspire(&[&["control-plane"], arguments].concat());
        let address = self.stage.control_plane;
        command
            .env("ZSPIRE_CP_ADDRESS", address.to_string())
            .env("ZSPIRE_CP_HOSTNAMES", address.ip().to_string())
            .env("ZSPIRE_CP_ADMIN", "127.0.0.1:0")
            .env("ZSPIRE_CP_MESH", self.folder.join("mesh.yaml"))
            .env("ZSPIRE_CP_STATE", self.folder.join("control-plane"));
        self.stage.outside(command)
    }

    pub(super) fn proxy(&self, host: &Host) -> Command {
        let (name, control_plane) = (&host.name, format!("https://{}", self.stage.control_plane));
        let mut command = self.zspire(&["proxy"]);
        match &self.spire {
            Some(spire) => command.envs(spire.proxy_environment(name)),
            None => command
                .env("CA_ADDRESS", &control_plane)
                .env("XDS_ADDRESS", &control_plane)
                .env("ZSPIRE_JOIN_TOKEN", self.folder.join(format!("{name}.token")))
                .env("ZSPIRE_STATE_DIR", self.folder.join(format!("{name}.state"))),
        };
        command
            .env("NODE_NAME", &host.node)
            .env("LOG_FORMAT", "json")
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .envs(host.proxy_environment(&self.folder));
        host.inside(command)
    }

    /// A command of a node's agent, or one that asks it.
    pub(super) fn agent(&self, host: &Host, arguments: &[&str]) -> Command {
        let mut command = self.zspire(arguments);
        command.envs(host.agent_environment(&self.folder));
        host.inside(command)
    }

    /// What a command of ours, run where the pod's proxy is, prints as JSON.
    pub(super) fn ask(&self, pod: &Pod, command: &str) -> anyhow::Result<Value> {
        let host = self.stage.host(pod);
        let output = host.inside(self.zspire(&[command, "--admin", &host.admin(), "-o", "json"])).output()?;
        anyhow::ensure!(
            output.status.success(),
            "zspire {command}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        serde_json::from_slice(&output.stdout).with_context(|| format!("zspire {command} -o json"))
    }

    /// The program that a pod runs, by whose path an agent knows it.
    pub(super) fn application(&self, pod: &Pod) -> PathBuf {
        self.folder.join("apps").join(pod.plan.name)
    }
}

/// The command that enrols a pod.
pub(super) fn enroll_arguments(pod: &Pod, place: &[&str]) -> Vec<String> {
    let name = pod.plan.name;
    let who = ["--name", name, "--namespace", NAMESPACE, "--service-account", name];
    ["enroll"].iter().chain(place).chain(&who).map(|&argument| argument.to_owned()).collect()
}
