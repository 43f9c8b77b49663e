//! What is shown of the mesh: a request that is answered, one that is refused, and what proxies and the wire tell of them.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde_json::Value;

use super::mesh::{CLIENT, INTRUDER, NAMESPACE, POLICY, SERVER};
use super::report::{self, Verdict};
use super::{Demo, LOOK, PATIENCE, capture, children};

impl Demo {
    pub(super) fn request(&mut self) -> anyhow::Result<String> {
        let answer = self.until("the server to answer", |demo| demo.call(CLIENT))?;
        anyhow::ensure!(answer.contains(&self.canary), "the server did not send back what it was sent: {answer:?}");
        let seen_from = answer.lines().next().unwrap_or_default().trim_start_matches("from ").to_owned();
        let outbound = self.logged(CLIENT, "outbound", None)?;
        let inbound = self.logged(SERVER, "inbound", None)?;
        let text = |line: &Value, field: &str| line[field].as_str().unwrap_or("?").to_owned();
        let steps = vec![
            format!("{} asks for {} and is taken by its own proxy", text(&outbound, "src.addr"), self.stage.service()),
            format!("{} is service {}", self.stage.service(), text(&outbound, "dst.service")),
            format!(
                "a tunnel to {}: TLS 1.3, HTTP/2 CONNECT {}",
                text(&outbound, "dst.addr"),
                text(&outbound, "dst.hbone_addr")
            ),
            format!("there {} has proved to be {}", text(&inbound, "src.addr"), text(&inbound, "src.identity")),
            format!("and the proxy has proved to be {}", text(&outbound, "dst.identity")),
            format!("policies allow it; the application sees a connection from {seen_from}"),
        ];
        let told = format!("{CLIENT} → {SERVER}, answered with what was sent\n{}", steps.join("\n"));
        self.report.verdicts.push(Verdict {
            from: CLIENT,
            to: text(&outbound, "dst.service"),
            allowed: true,
            policy: None,
            why: "no policy denies it, and none demands to be asked".into(),
        });
        self.report.paths.push(report::Path {
            from: CLIENT,
            to: text(&outbound, "dst.service"),
            steps,
            outbound,
            inbound,
        });
        Ok(told)
    }

    pub(super) fn capture(&mut self) -> anyhow::Result<String> {
        let Some(recorder) = self.recorder.take() else {
            return Ok("not done: there is no link between nodes to watch on loopback".into());
        };
        let seen = capture::look(&recorder.stop()?, 15008, self.canary.as_bytes());
        self.report.capture = Some(seen.clone());
        anyhow::ensure!(seen.tls13_handshakes > 0, "no TLS 1.3 handshake was seen: {seen:?}");
        anyhow::ensure!(seen.tls_records > 0, "no TLS records were seen: {seen:?}");
        anyhow::ensure!(seen.not_tls == 0, "bytes between the proxies that are not TLS: {seen:?}");
        anyhow::ensure!(seen.canary_found == 0, "the canary was on the wire in plain text: {seen:?}");
        Ok(format!(
            "between the nodes: {} packets, {} TLS 1.3 handshakes, {} encrypted records, nothing else between the proxies; \
             the canary {} that was sent in the body is in none of them",
            seen.packets, seen.tls13_handshakes, seen.tls_records, self.canary
        ))
    }

    pub(super) fn denied(&mut self) -> anyhow::Result<String> {
        let Err(error) = self.call(INTRUDER) else { anyhow::bail!("the request of {INTRUDER} was answered") };
        let identity = self.stage.pod(INTRUDER).plan.spiffe_id();
        let line = self.logged(SERVER, "inbound", Some(&identity))?;
        let why = line["error"].as_str().unwrap_or_default().to_owned();
        anyhow::ensure!(
            why.contains(POLICY),
            "it failed, but not by policy {POLICY}: {why:?}; the client said {error:#}"
        );
        self.report.verdicts.push(Verdict {
            from: INTRUDER,
            to: format!("{SERVER}.{NAMESPACE}.svc.cluster.local"),
            allowed: false,
            policy: Some(POLICY),
            why: why.clone(),
        });
        Ok(format!(
            "{INTRUDER} → {SERVER}: refused by policy {POLICY}\nthe proxy of {SERVER}: {why}\nthe client: {error:#}"
        ))
    }

    /// Sends a request to the service from a pod.
    fn call(&self, from: &str) -> anyhow::Result<String> {
        let pod = self.stage.pod(from);
        let mut command = self.zspire(&["demo", "request", &self.stage.service().to_string(), "--body", &self.canary]);
        if let Some(proxy) = pod.socks5() {
            command.args(["--socks5", &proxy.to_string()]);
        }
        let output = pod.inside(command).output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        anyhow::ensure!(output.status.success(), "{said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The line that a pod's proxy logged about a connection: the last one in this direction, from this identity.
    fn logged(&self, pod: &str, direction: &str, from: Option<&str>) -> anyhow::Result<Value> {
        let path = self.children.log(&format!("proxy-{}", self.stage.host(self.stage.pod(pod)).name));
        // A node's proxy tells of all its pods.
        let own = if direction == "inbound" { "dst.workload" } else { "src.workload" };
        let until = Instant::now() + PATIENCE;
        loop {
            let text = std::fs::read_to_string(&path)?;
            let found = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(|line| {
                line["scope"] == "access"
                    && line["direction"] == direction
                    && line[own] == pod
                    && from.is_none_or(|from| line["src.identity"] == from)
            });
            match found {
                Some(line) => return Ok(line),
                None if Instant::now() > until => {
                    anyhow::bail!(
                        "the proxy of {pod} logged no {direction} connection; its last lines:\n{}",
                        children::tail(&path)
                    )
                }
                None if self.interrupted.load(Relaxed) => anyhow::bail!("interrupted"),
                None => std::thread::sleep(LOOK),
            }
        }
    }
}
