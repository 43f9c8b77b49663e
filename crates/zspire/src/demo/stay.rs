//! The demo after its steps: it stays up, and offers a script for each pod and node to try things with.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use super::commands::enroll_arguments;
use super::mesh::NAMESPACE;
use super::stage::Host;
use super::{Demo, LOOK};

impl Demo {
    /// Stays up until Ctrl-C.
    pub(super) fn stay(&mut self) {
        if let Err(error) = self.offer() {
            self.voice.line(&format!("zspire: {error:#}"));
            return;
        }
        while !self.interrupted.load(Relaxed) {
            std::thread::sleep(LOOK);
        }
        self.voice.line("");
    }

    /// Puts a script for each pod into the folder that runs a command in it, and says what to try.
    fn offer(&mut self) -> anyhow::Result<()> {
        std::os::unix::fs::symlink(&self.program, self.folder.join("zspire"))?;
        let mut nodes = Vec::new();
        for n in (0..self.stage.hosts.len()).filter(|n| self.stage.hosts[*n].is_node()) {
            let host = &self.stage.hosts[n];
            let (name, command) = (host.name.clone(), host.inside(self.zspire(&["demo", "pause"])));
            let id = self.children.start(&format!("pause-{name}"), command)?;
            let host = &self.stage.hosts[n];
            nodes.push(script(&self.folder, &name, Some(id), &self.host_environment(host))?);
        }
        let (mut scripts, mut ids) = (Vec::new(), Vec::new());
        for n in 0..self.stage.pods.len() {
            let name = self.stage.pods[n].plan.name;
            let command = self.stage.pods[n].inside(self.zspire(&["demo", "pause"]));
            let id = self.children.start(&format!("pause-{name}"), command)?;
            let pod = &self.stage.pods[n];
            let (enter, host) = (pod.socks5().is_none().then_some(id), self.stage.host(pod));
            scripts.push(script(&self.folder, name, enter, &self.host_environment(host))?);
            ids.push(id);
        }
        let service = self.stage.service();
        let request = |n: usize| match self.stage.pods[n].socks5() {
            Some(proxy) => format!("zspire demo request {service} --socks5 {proxy}"),
            None => format!("zspire demo request {service}"),
        };
        self.voice.line("\nThe mesh stays up. Try, in another terminal:\n");
        let proxy = nodes.first().unwrap_or(&scripts[0]);
        self.voice.line(&format!("  {} zspire certificates", proxy.display()));
        self.voice.line(&format!("  {} zspire identity list", proxy.display()));
        self.voice.line(&format!("  {} {}", scripts[0].display(), request(0)));
        self.voice.line(&format!("  {} {}", scripts[1].display(), request(1)));
        if let Some(node) = nodes.first() {
            let pod = &self.stage.pods[0];
            let arguments = enroll_arguments(pod, &["--pid", &ids[0].to_string()]).join(" ");
            self.voice.line(&format!("  {} zspire enrolled", node.display()));
            self.voice.line(&format!("  {} zspire unenroll {NAMESPACE}/{}", node.display(), pod.plan.name));
            self.voice.line(&format!("  {} zspire {arguments}", node.display()));
        }
        self.voice.line("\nCtrl-C ends it and leaves nothing behind.");
        Ok(())
    }

    /// What commands need to find a proxy and its node agent.
    fn host_environment(&self, host: &Host) -> String {
        let [_, (socket, path), _] = host.agent_environment(&self.folder);
        format!("ZSPIRE_ADMIN={} {socket}={path}", host.admin())
    }
}

/// A script that runs its arguments in a pod or on a node, where a process is that keeps the place.
fn script(folder: &Path, name: &str, pause: Option<u32>, environment: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    let enter = pause
        .map(|pause| format!("nsenter --target {pause} --user --net --preserve-credentials -- "))
        .unwrap_or_default();
    let folder = folder.display();
    let text =
        format!("#!/bin/sh\n# Runs a command in {name}.\nPATH=\"{folder}:$PATH\" {environment} exec {enter}\"$@\"\n");
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    Ok(path)
}
