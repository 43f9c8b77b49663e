//! How the mesh of the demo comes up: the steps until an application listens behind a proxy that has its identity.

use anyhow::Context as _;

use super::commands::enroll_arguments;
use super::mesh::{self, APPLICATION_PORT, SERVER};
use super::stage::Host;
use super::{Demo, capture, report, spire};

impl Demo {
    pub(super) fn network(&mut self) -> anyhow::Result<String> {
        let pods =
            self.stage.pods.iter().map(|pod| format!("{} {} on {}", pod.plan.name, pod.address, pod.plan.node_name()));
        let pods = pods.collect::<Vec<_>>().join(", ");
        Ok(format!("2 nodes and 3 pods ({}): {pods}; service {}", self.stage.mode(), self.stage.service()))
    }

    pub(super) fn control_plane(&mut self) -> anyhow::Result<String> {
        self.write_mesh()?;
        let command = self.control_plane_command(&[]);
        self.children.start("control-plane", command)?;
        // A token for each proxy: whoever has it may join once, as that node.
        let names: Vec<_> = self.stage.hosts.iter().map(|host| (host.name.clone(), host.node.clone())).collect();
        for (name, node) in names {
            let token = self.until("a join token", |demo| {
                let output = demo.control_plane_command(&["token", "--node", &node]).output()?;
                anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
                Ok(output.stdout)
            })?;
            std::fs::write(self.folder.join(format!("{name}.token")), token)?;
        }
        Ok(format!(
            "certificates and discovery on {}, one single-use join token for each proxy",
            self.stage.control_plane
        ))
    }

    /// A server, an agent on each node, and an entry for each pod's application.
    pub(super) fn start_spire(&mut self) -> anyhow::Result<String> {
        self.write_mesh()?;
        let spire = self.spire.clone().context("SPIRE was not asked for")?;
        self.children.start("spire-server", self.stage.outside(spire.server()?))?;
        self.until("SPIRE's server to answer", |_| spire.ask(&["bundle", "show"]).map(drop))?;
        std::fs::create_dir(self.folder.join("apps"))?;
        for pod in &self.stage.pods {
            let application = self.application(pod);
            spire::copy(&self.program, &application)?;
            spire.register(&self.stage.host(pod).name, &application, &pod.plan.spiffe_id())?;
        }
        for n in 0..self.stage.hosts.len() {
            let name = self.stage.hosts[n].name.clone();
            let command = self.stage.hosts[n].inside(spire.agent(&name, &self.program)?);
            self.children.start(&format!("spire-agent-{name}"), command)?;
            self.until(&format!("the SPIRE agent of {name} to serve"), |_| spire.serves(&name))?;
        }
        Ok("a server, an agent on each node, which the proxy asks by the Broker API; an entry for the program of each pod".into())
    }

    fn write_mesh(&self) -> anyhow::Result<()> {
        let addresses: Vec<_> = self.stage.pods.iter().map(|pod| pod.address).collect();
        Ok(std::fs::write(self.folder.join("mesh.yaml"), mesh::file(&addresses, self.stage.vip))?)
    }

    pub(super) fn proxies(&mut self) -> anyhow::Result<String> {
        let mut commands = Vec::new();
        for host in &self.stage.hosts {
            commands.push((format!("proxy-{}", host.name), self.proxy(host)));
            if host.is_node() {
                commands.push((format!("agent-{}", host.name), self.agent(host, &["node-agent"])));
            }
        }
        for (name, command) in commands {
            self.children.start(&name, command)?;
        }
        for n in 0..self.stage.hosts.len() {
            let name = self.stage.hosts[n].name.clone();
            self.until(&format!("the proxy of {name} to be ready"), |demo| {
                demo.stage.hosts[n].readiness().map_err(|why| anyhow::anyhow!("{why}"))
            })?;
        }
        let which = match self.stage.hosts.iter().all(Host::is_node) {
            true => "one on each node, and a node agent beside it",
            false => "one in each pod, dedicated",
        };
        let how =
            if self.spire.is_some() { "following the mesh file" } else { "joined, and following the control plane" };
        Ok(format!("{which}; {how}"))
    }

    pub(super) fn enrol(&mut self) -> anyhow::Result<String> {
        if !self.stage.hosts.iter().all(Host::is_node) {
            return Ok("not done: on loopback each proxy serves one pod, which asks it by SOCKS5".into());
        }
        let mut told = String::from("connections redirected by rules in the pod, then served by the node's proxy");
        for n in 0..self.stage.pods.len() {
            let pod = &self.stage.pods[n];
            let netns = pod.netns_file().context("a pod among namespaces has one")?;
            let arguments = match self.spire {
                None => enroll_arguments(pod, &["--netns", &netns]),
                Some(_) => {
                    // It is the process that is attested, so it has to be there.
                    let command = self.zspire_as(&self.application(pod), &["demo", "pause"]);
                    let (name, command) = (format!("pod-{}", pod.plan.name), pod.inside(command));
                    let process = self.children.start(&name, command)?.to_string();
                    enroll_arguments(&self.stage.pods[n], &["--pid", &process])
                }
            };
            let pod = &self.stage.pods[n];
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let output = self.agent(self.stage.host(pod), &arguments).output()?;
            anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
            told += &format!("\n{}: {}", self.stage.host(pod).name, String::from_utf8_lossy(&output.stdout).trim());
        }
        Ok(told)
    }

    pub(super) fn identities(&mut self) -> anyhow::Result<String> {
        let mut told = String::from(match self.spire {
            None => "X.509-SVIDs, issued by the control plane to the node of each pod",
            Some(_) => "X.509-SVIDs from SPIRE, each attested by its node's agent for a process of the pod",
        });
        for n in 0..self.stage.pods.len() {
            let expected = self.stage.pods[n].plan.spiffe_id();
            let entry = self.until(&format!("the certificate {expected}"), |demo| {
                let all = demo.ask(&demo.stage.pods[n], "certificates")?;
                let entry = all.as_array().into_iter().flatten().find(|entry| entry["identity"] == *expected);
                let entry = entry.with_context(|| format!("the proxy holds {all}"))?;
                anyhow::ensure!(entry["state"] == "Available", "its state is {}", entry["state"]);
                Ok(entry.clone())
            })?;
            let pod = &self.stage.pods[n];
            let leaf = &entry["certChain"][0];
            told += &format!(
                "\n{:<9} {expected}  {} to {}",
                pod.plan.name,
                leaf["validFrom"].as_str().unwrap_or("?"),
                leaf["expirationTime"].as_str().unwrap_or("?")
            );
            self.report.pods.push(report::Pod {
                name: pod.plan.name,
                node: pod.plan.node_name(),
                address: pod.address.to_string(),
                spiffe_id: expected,
                certificate: serde_json::json!({
                    "serial_number": leaf["serialNumber"],
                    "not_before": leaf["validFrom"],
                    "not_after": leaf["expirationTime"],
                }),
            });
        }
        Ok(told)
    }

    pub(super) fn applications(&mut self) -> anyhow::Result<String> {
        let server = self.stage.pod(SERVER);
        let address = match server.socks5() {
            Some(_) => format!("{}:{APPLICATION_PORT}", server.address),
            None => format!("0.0.0.0:{APPLICATION_PORT}"),
        };
        let command = server.inside(self.zspire(&["demo", "serve", &address]));
        self.children.start("app-api", command)?;
        self.recorder = self.stage.link()?.map(capture::Recorder::start).transpose()?;
        let captured = if self.recorder.is_some() { "; packets between the nodes are being captured" } else { "" };
        Ok(format!("an HTTP server in {SERVER}{captured}"))
    }
}
