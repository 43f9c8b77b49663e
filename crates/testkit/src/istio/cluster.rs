//! A Kubernetes API server on etcd, with Istio's and the Gateway API's resources, and `kubectl` to speak to it.
//!
//! There is no kubelet, scheduler or controller: what they would do, a test does, by the same API.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as BASE64URL};
use serde_json::{Value, json};
use zspire_sys::netns::Netns;
use zspire_sys::process::in_netns;

use crate::peers::{feed, program};
use crate::process::Process;
use crate::wait::until;

const PORT: u16 = 6443;
const ETCD: &str = "http://127.0.0.1:2379";
/// The token of the test's administrator; the API server is reached from the test's own network alone.
const TOKEN: &str = "administrator-of-the-test";

/// A cluster that runs, in a namespace of the network.
#[derive(Debug)]
pub struct Cluster {
    // In the order in which they end.
    api: Process,
    etcd: Process,
    netns: Netns,
    address: Ipv4Addr,
    folder: PathBuf,
    programs: PathBuf,
}

impl Cluster {
    /// Starts one; returns when it serves Istio's resources.
    #[track_caller]
    pub(super) fn start(folder: &Path, (netns, address): (&Netns, Ipv4Addr), programs: &Path) -> Self {
        let own = folder.join("kubernetes");
        fs::create_dir(&own).expect("the test's own folder");
        keys(&own);
        let etcd = Process::start("etcd", folder, in_netns(netns, etcd(&own, programs)));
        let api = Process::start("kube-apiserver", folder, in_netns(netns, api_server(&own, address, programs)));
        let (netns, folder, programs) = (netns.clone(), folder.to_owned(), programs.to_owned());
        let mut cluster = Self { api, etcd, netns, address, folder, programs };
        until("the API server to be ready", || {
            for process in [&mut cluster.etcd, &mut cluster.api] {
                assert!(process.runs(), "it has ended:\n{}", process.log());
            }
            // It makes its own certificate.
            let authority = fs::read(own.join("pki/apiserver.crt")).map_err(|error| error.to_string())?;
            fs::write(own.join("kubeconfig"), kubeconfig(&cluster.url(), &authority)).expect("the test's own folder");
            cluster.try_kubectl(&["get", "--raw", "/readyz"], "").map(drop)
        });
        cluster.define();
        cluster
    }

    /// Adds the definitions of Istio's and the Gateway API's resources.
    #[track_caller]
    fn define(&self) {
        let crds = self.programs.join("crds").display().to_string();
        self.kubectl(&["apply", "--server-side", "-f", &crds]);
        until("Istio's resources to be served", || {
            let all = self.get(&["crd"]);
            let established = |crd: &&Value| {
                let conditions = crd["status"]["conditions"].as_array().into_iter().flatten();
                conditions.clone().any(|it| it["type"] == "Established" && it["status"] == "True")
            };
            let items = all["items"].as_array().expect("a list");
            let waiting: Vec<_> =
                items.iter().filter(|crd| !established(crd)).map(|crd| &crd["metadata"]["name"]).collect();
            if waiting.is_empty() { Ok(()) } else { Err(format!("{waiting:?}")) }
        });
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.address)
    }

    /// The same as the variables of pods have it.
    pub(super) fn service(&self) -> (Ipv4Addr, u16) {
        (self.address, PORT)
    }

    /// What its certificate is verified against.
    pub(super) fn authority(&self) -> PathBuf {
        self.folder.join("kubernetes/pki/apiserver.crt")
    }

    /// The folder with Istio's programs and charts.
    pub(super) fn programs(&self) -> &PathBuf {
        &self.programs
    }

    /// What its clients are told.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubernetes/kubeconfig")
    }

    /// A program of the peers' folder that knows where the cluster is, in the namespace of the cluster.
    pub fn client(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = program(&self.programs, name);
        let home = self.folder.join("kubernetes");
        command.args(arguments).env("KUBECONFIG", self.kubeconfig()).env("HOME", &home).current_dir(&home);
        in_netns(&self.netns, command)
    }

    /// What such a program prints; it has to succeed.
    #[track_caller]
    pub fn run(&self, name: &str, arguments: &[&str]) -> String {
        self.try_run(name, arguments).unwrap_or_else(|why| panic!("{name} {arguments:?}: {why}"))
    }

    /// What such a program prints, or what it says when it fails.
    pub fn try_run(&self, name: &str, arguments: &[&str]) -> Result<String, String> {
        said(feed(&mut self.client(name, arguments), ""))
    }

    /// What `kubectl` prints.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments, "").unwrap_or_else(|why| panic!("kubectl {arguments:?}: {why}"))
    }

    /// The same, with an input, which may fail.
    pub fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        said(feed(&mut self.client("kubectl", arguments), input))
    }

    /// Makes objects, or changes them: YAML or JSON.
    #[track_caller]
    pub fn apply(&self, objects: &str) {
        self.apply_with(objects, &[]);
    }

    /// The same for the status of objects, in the place of whoever says it.
    #[track_caller]
    pub fn apply_status(&self, objects: &str) {
        self.apply_with(objects, &["--subresource=status", "--field-manager=kubelet"]);
    }

    #[track_caller]
    fn apply_with(&self, objects: &str, more: &[&str]) {
        let arguments = [&["apply", "--server-side", "--force-conflicts", "-f", "-"], more].concat();
        if let Err(why) = self.try_kubectl(&arguments, objects) {
            panic!("kubectl {arguments:?}: {why}\n{objects}");
        }
    }

    /// Deletes objects at once, as `kubectl delete` names them.
    #[track_caller]
    pub fn delete(&self, what: &[&str]) {
        self.kubectl(&[&["delete", "--grace-period=0", "--force", "--timeout=20s"], what].concat());
    }

    /// A token with other claims, signed by the same key.
    #[track_caller]
    pub(super) fn sign_again(&self, token: &str, change: impl FnOnce(&mut Value)) -> String {
        let (signed, _) = token.rsplit_once('.').expect("a JWT");
        let (header, claims) = signed.split_once('.').expect("a JWT");
        let mut claims = serde_json::from_slice(&BASE64URL.decode(claims).expect("a JWT")).expect("a JWT");
        change(&mut claims);
        let signed = format!("{header}.{}", BASE64URL.encode(claims.to_string()));
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-sha256", "-sign"]).arg(self.folder.join("kubernetes/pki/accounts.key"));
        let made = feed(&mut openssl, &signed);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        format!("{signed}.{}", BASE64URL.encode(made.stdout))
    }

    /// Objects, as `kubectl get` names them.
    #[track_caller]
    pub fn get(&self, what: &[&str]) -> Value {
        let text = self.kubectl(&[&["get", "-o", "json"], what].concat());
        serde_json::from_str(&text).expect("JSON")
    }
}

/// A list of objects, as `kubectl` takes it.
pub(super) fn list(objects: &[Value]) -> String {
    json!({ "apiVersion": "v1", "kind": "List", "items": objects }).to_string()
}

fn said(output: Output) -> Result<String, String> {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stdout) + &text(output.stderr)),
    }
}

/// The key by which service accounts' tokens are signed, and the administrator's token.
#[track_caller]
fn keys(own: &Path) {
    let pki = own.join("pki");
    fs::create_dir(&pki).expect("the test's own folder");
    fs::set_permissions(&pki, fs::Permissions::from_mode(0o700)).expect("the test's own folder");
    fs::write(pki.join("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n"))
        .expect("the test's own folder");
    let key = pki.join("accounts.key");
    let made = Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048").output().expect("openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn etcd(own: &Path, programs: &Path) -> Command {
    let mut command = program(programs, "etcd");
    command.arg("--data-dir").arg(own.join("etcd")).args([
        "--unsafe-no-fsync",
        "--log-level=warn",
        &format!("--listen-client-urls={ETCD}"),
        &format!("--advertise-client-urls={ETCD}"),
        "--listen-peer-urls=http://127.0.0.1:2380",
    ]);
    command
}

fn api_server(own: &Path, address: Ipv4Addr, programs: &Path) -> Command {
    let mut command = program(programs, "kube-apiserver");
    let file = |name: &str| own.join("pki").join(name).display().to_string();
    command.args([
        &format!("--etcd-servers={ETCD}"),
        &format!("--bind-address={address}"),
        &format!("--advertise-address={address}"),
        &format!("--secure-port={PORT}"),
        &format!("--cert-dir={}", own.join("pki").display()),
        &format!("--token-auth-file={}", file("tokens.csv")),
        &format!("--service-account-key-file={}", file("accounts.key")),
        &format!("--service-account-signing-key-file={}", file("accounts.key")),
        "--service-account-issuer=https://kubernetes.default.svc",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--authorization-mode=RBAC",
        "--enable-priority-and-fairness=false",
        "--profiling=false",
    ]);
    command
}

fn kubeconfig(url: &str, authority: &[u8]) -> String {
    let authority = STANDARD.encode(authority);
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": { "server": url, "certificate-authority-data": authority } }],
        "users": [{ "name": "admin", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "admin" } }],
    })
    .to_string()
}
