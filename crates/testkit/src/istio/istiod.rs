//! An istiod: its surroundings and its process.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use zspire_sys::netns::Netns;
use zspire_sys::process::in_netns;

use super::cluster::Cluster;
use crate::http;
use crate::mesh::lock;
use crate::process::Process;
use crate::wait::until;

/// Where certificates and discovery are.
pub(crate) const PORT: u16 = 15012;
/// The name in its certificate.
pub(crate) const NAME: &str = "istiod.istio-system.svc";
const HTTP: u16 = 8080;
const MONITORING: u16 = 15014;

/// The istiod of a cluster.
#[derive(Debug)]
pub struct Istiod {
    netns: Netns,
    address: Ipv4Addr,
    folder: PathBuf,
    process: Mutex<Option<Process>>,
}

impl Istiod {
    /// It is started by [`start`](Self::start).
    pub(super) fn new(folder: &Path, (netns, address): (&Netns, Ipv4Addr)) -> Self {
        fs::create_dir(folder.join("istiod")).expect("the test's own folder");
        Self { netns: netns.clone(), address, folder: folder.into(), process: Mutex::default() }
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.address)
    }

    /// Starts it, also again; returns when it is ready.
    #[track_caller]
    pub fn start(&self, cluster: &Cluster) {
        self.start_with(cluster, &[]);
    }

    /// The same with more variables.
    #[track_caller]
    pub fn start_with(&self, cluster: &Cluster, variables: &[(&str, &str)]) {
        let mut command = self.command(cluster);
        command.envs(variables.iter().copied());
        // The one before ends first: both want the same ports.
        drop(lock(&self.process).take());
        *lock(&self.process) = Some(Process::start("istiod", &self.folder, in_netns(&self.netns, command)));
        until("istiod to be ready", || {
            self.process(|process| assert!(process.runs(), "it has ended:\n{}", process.log()));
            match http::ask(&self.netns, HTTP, "GET /ready", &[]) {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => Err(answer.body),
                Err(error) => Err(error.to_string()),
            }
        });
    }

    fn command(&self, cluster: &Cluster) -> Command {
        let mut command = cluster.client("istiod", &["discovery"]);
        let kubeconfig = cluster.kubeconfig();
        command.arg("--kubeconfig").arg(kubeconfig).args([
            "--namespace=istio-system",
            &format!("--clusterID={}", super::CLUSTER),
            &format!("--secureGRPCAddr=:{PORT}"),
            &format!("--httpAddr=127.0.0.1:{HTTP}"),
            &format!("--monitoringAddr=127.0.0.1:{MONITORING}"),
            "--grpcAddr=127.0.0.1:15010",
            "--httpsAddr=",
        ]);
        command.envs([
            ("PILOT_ENABLE_AMBIENT", "true"),
            ("CA_TRUSTED_NODE_ACCOUNTS", "istio-system/ztunnel"),
            ("INJECT_ENABLED", "false"),
            ("VALIDATION_WEBHOOK_CONFIG_NAME", ""),
            ("POD_NAME", "istiod-0"),
            ("POD_NAMESPACE", "istio-system"),
            ("SERVICE_ACCOUNT", "istiod"),
            ("PILOT_CERT_PROVIDER", "istiod"),
            ("CLUSTER_ID", super::CLUSTER),
        ]);
        // Below it is etc/cacerts, if a test puts a CA there.
        command.current_dir(self.folder.join("istiod"));
        command
    }

    /// Ends it as a crash would.
    pub fn stop(&self) {
        drop(lock(&self.process).take());
    }

    /// Does something with its process.
    #[track_caller]
    pub fn process<T>(&self, f: impl FnOnce(&mut Process) -> T) -> T {
        f(lock(&self.process).as_mut().expect("istiod runs"))
    }

    /// Its metrics.
    #[track_caller]
    pub fn metrics(&self) -> String {
        http::ask(&self.netns, MONITORING, "GET /metrics", &[]).expect("the monitoring port answers").body
    }
}
