//! A fake kubelet: the list of pods that the agent's `k8s` attestor asks for, on the loopback of a node.
//!
//! A fake, since a real one does not run without a cluster. It has the pods that a test says, and knows no other question.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use socket2::SockRef;
use zspire_sys::netns::Netns;

use crate::mesh::lock;
use crate::plan::NAMESPACE;
use crate::pod::Pod;

const PORT: u16 = 10255;

/// What an agent is told of it. `permissive`: there is no Kubernetes to ask whether the broker may.
pub(super) fn attestor(node: &str, broker: &str) -> String {
    format!(
        r#"  WorkloadAttestor "k8s" {{ plugin_data {{
    node_name = "{node}"
    kubelet_read_only_port = {PORT}
    max_poll_attempts = 4
    poll_retry_interval = "250ms"
    experimental {{ broker {{
      access_policy = "permissive"
      brokers = [ {{ id = "{broker}" pod_reference_scope = "agent_node" }} ] }} }} }} }}
"#
    )
}

/// The kubelet of one node. Ends with its value.
#[derive(Debug)]
pub struct Kubelet {
    node: String,
    pods: Arc<Mutex<Vec<Value>>>,
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Kubelet {
    #[track_caller]
    pub(super) fn start(netns: &Netns, node: &str) -> Self {
        let bound = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)));
        let listener = Arc::new(bound.expect("the namespace can be entered").expect("the port is free"));
        let pods: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (accepting, told) = (listener.clone(), pods.clone());
        let thread = std::thread::spawn(move || {
            while let Ok((socket, _)) = accepting.accept() {
                let list = json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": *lock(&told) });
                // An agent that goes away asks again.
                let _ = answer(socket, &list.to_string());
            }
        });
        Self { node: node.into(), pods, listener, thread: Some(thread) }
    }

    /// A pod is there from now on.
    pub fn add(&self, pod: &Pod) {
        lock(&self.pods).push(json!({
            "metadata": { "name": pod.name(), "namespace": NAMESPACE, "uid": pod.uid() },
            "spec": {
                "serviceAccountName": pod.name(),
                "nodeName": self.node,
                "containers": [{ "name": "app", "image": "app:1" }],
            },
            "status": { "phase": "Running", "containerStatuses": [] },
        }));
    }

    /// It is gone.
    pub fn remove(&self, pod: &Pod) {
        lock(&self.pods).retain(|entry| entry["metadata"]["uid"] != pod.uid());
    }
}

fn answer(socket: TcpStream, body: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(&socket).lines();
    let asked = lines.next().transpose()?.unwrap_or_default();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let (status, body) = if asked.starts_with("GET /pods") { ("200 OK", body) } else { ("404 Not Found", "") };
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    (&socket).write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes())
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        // On Linux this wakes `accept` with an error.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        drop(self.thread.take().map(JoinHandle::join));
    }
}
