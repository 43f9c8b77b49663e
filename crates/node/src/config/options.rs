//! The table of every variable that the proxy reads, and where its value is looked for.
//!
//! This is the one list: parsing, `docs/configuration.md` and the check for misspelt names are all
//! made from it. It knows names, defaults and help; what a value means is `super`'s.

use std::collections::BTreeMap;

/// One configuration variable.
#[derive(Debug, Clone, Copy)]
pub struct Variable {
    /// Name in the environment and in `proxyMetadata`.
    pub name: &'static str,
    /// What is used when it is not set, as an operator would write it.
    pub default: &'static str,
    /// What it means.
    pub help: &'static str,
}

/// A titled part of the table.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// Heading on the reference page.
    pub title: &'static str,
    /// The variables of this part.
    pub variables: &'static [Variable],
}

macro_rules! table {
    ($($title:literal { $($name:ident = $default:literal : $help:literal;)* })*) => {
        $($(pub(super) const $name: Variable =
            Variable { name: stringify!($name), default: $default, help: $help };)*)*
        /// Every variable, in the order of the reference page.
        pub const TABLE: &[Group] = &[
            $(Group { title: $title, variables: &[$($name),*] }),*
        ];
    };
}

table! {
    "Mode and identity of the proxy" {
        ENABLE_PROXY = "true": "Whether to carry traffic; `false` runs the admin side alone.";
        PROXY_MODE = "shared": "`shared`: the pods of a node, handed over by a CNI node agent. `dedicated`: one workload, in the network namespace of this process.";
        PROXY_WORKLOAD_INFO = "": "The workload of a dedicated proxy: `namespace/name/service-account`.";
        NETWORK = "": "Network that this node is on.";
        CLUSTER_ID = "Kubernetes": "Cluster that this node is in; `ISTIO_META_CLUSTER_ID` is read too.";
        CLUSTER_DOMAIN = "cluster.local": "DNS suffix of the cluster.";
        TRUST_DOMAIN = "cluster.local": "Trust domain of the workload of a dedicated proxy, and of workloads that name none.";
        NODE_NAME = "": "Node that this proxy serves: certificates are prefetched for its workloads.";
        POD_NAME = "": "Name of the proxy's own pod. With `POD_NAMESPACE` and `SERVICE_ACCOUNT` a shared proxy is a workload itself: its metrics can be had through a tunnel (port 15008 of its own namespace), and policies apply to them.";
        POD_NAMESPACE = "": "Namespace of the proxy's own pod.";
        SERVICE_ACCOUNT = "": "Service account of the proxy's own pod.";
        INSTANCE_IP = "1.1.1.1": "Address of the proxy's own pod, part of its node id.";
    }
    "Pods of a node (PROXY_MODE=shared)" {
        INPOD_UDS = "/var/run/ztunnel/ztunnel.sock": "Socket of the node agent that hands over pods: istio-cni, or `zspire node-agent`.";
        INPOD_PORT_REUSE = "true": "Join the ports of a proxy that serves the same pods already (SO_REUSEPORT), so that a new one takes over from an old one without a gap.";
    }
    "The node agent (zspire node-agent)" {
        ZSPIRE_AGENT_SOCKET = "/run/zspire/agent.sock": "Where it takes commands (`zspire enroll`, `unenroll`, `enrolled`); for its own user and root.";
        ZSPIRE_AGENT_STATE_DIR = "/run/zspire/enrolled": "Folder for who is enrolled and their network namespaces (mode 0700). INPOD_UDS, PACKET_MARK, RUST_LOG and LOG_FORMAT are read as by the proxy.";
        AMBIENT_DNS_CAPTURE = "false": "Whether the DNS queries of pods that are enrolled are redirected to the proxy (15053), too.";
    }
    "Discovery (xDS)" {
        XDS_ADDRESS = "https://istiod.istio-system.svc:15012 in Kubernetes, else https://localhost:15012": "Workload discovery server; the mesh file's `discoveryAddress` comes before the default; empty: none.";
        XDS_ROOT_CA = "./var/run/secrets/istio/root-cert.pem": "What the discovery server is verified against: a file, `SYSTEM`, or PEM.";
        ALT_XDS_HOSTNAME = "": "Name to verify in the discovery server's certificate, when it is not the address's.";
        XDS_ON_DEMAND = "false": "Ask for workloads and services when they are first needed, not for all of them.";
        LOCAL_XDS_PATH = "": "File of workloads, services and policies instead of a discovery server; re-read when it changes.";
        LOCAL_XDS = "": "The same as text; exclusive with `LOCAL_XDS_PATH`.";
        PREFERED_SERVICE_NAMESPACE = "": "Namespace whose service is taken when several hold the same address.";
    }
    "Certificates" {
        IDENTITY_SOURCE = "istio-ca": "`istio-ca`: `CreateCertificate` at CA_ADDRESS. `spire-broker`, `spire-delegated`, `workload-api`: from a SPIRE agent, see below. `local`: a development CA in this process, its root shared by all processes of the same user.";
        CA_ADDRESS = "https://istiod.istio-system.svc:15012 in Kubernetes, else https://localhost:15012": "The certificate authority; the mesh file's `discoveryAddress` comes before the default; empty: none.";
        CA_ROOT_CA = "./var/run/secrets/istio/root-cert.pem": "What the CA's server is verified against: a file (watched), `SYSTEM`, or PEM.";
        ALT_CA_HOSTNAME = "": "Name to verify in the CA's certificate, when it is not the address's.";
        AUTH_TOKEN = "./var/run/secrets/tokens/istio-token if it exists": "Bearer token for CA and discovery: a file, re-read for every call, or the token itself.";
        FAKE_CA = "false": "The same as `IDENTITY_SOURCE=local`; refused inside Kubernetes.";
        SECRET_TTL = "24h": "Lifetime to ask for.";
        CRL_PATH = "": "File of certificate revocation lists (PEM or DER, watched): peers that one of them names are refused, and their live connections cut.";
        CRL_UNKNOWN_STATUS = "deny": "What to do with a certificate of which no current list says anything: `deny` or `allow`.";
        TLS12_ENABLED = "false": "Allow TLS 1.2 with ECDHE and AES-GCM between proxies.";
        COMPLIANCE_POLICY = "": "`pqc`: nothing but X25519MLKEM768 for key exchange.";
        ZSPIRE_JOIN_TOKEN = "": "Token by which this node joins a zspire control plane: a file or the token itself; used once, then the certificate in ZSPIRE_STATE_DIR serves. A token that the control plane refuses is not tried again: the process stays up, says so on the readiness page, and takes up another token when the file changes.";
        ZSPIRE_STATE_DIR = "./var/lib/zspire": "Folder for what the proxy keeps between starts (mode 0700): the node's own certificate and key after a join.";
    }
    "Identities from SPIRE (IDENTITY_SOURCE=spire-broker, spire-delegated, workload-api)" {
        SPIFFE_ENDPOINT_SOCKET = "": "The Workload API: the workload's identity (`workload-api`), or the proxy's own, which the Broker API asks for (`spire-broker`). `unix:///absolute/path` or `tcp://IP:port`.";
        SPIFFE_BROKER_SOCKET = "": "The SPIFFE Broker API (`spire-broker`), always over mutual TLS.";
        SPIRE_ADMIN_ENDPOINT_SOCKET = "": "The agent's admin socket with the Delegated Identity API (`spire-delegated`).";
        SPIFFE_REFERENCE = "pod for spire-broker, pid for spire-delegated": "What the agent is asked about: `pod`, a Kubernetes pod by its UID; `pid`, a process of the pod, for which `/proc` must be the host's.";
        SPIRE_AGENT_ID = "": "SPIFFE ID that the agent behind SPIFFE_BROKER_SOCKET must prove; empty: any below `spiffe://<trust domain>/spire/agent/`.";
        SPIRE_UNATTESTED_SELECTORS = "false": "Ask the Delegated Identity API by selectors `k8s:ns`, `k8s:sa` and `k8s:pod-name` instead of by process. The agent then attests nothing: it believes what the proxy says.";
        SPIFFE_ID_TEMPLATE = "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}": "The SPIFFE ID that is expected of a workload of TRUST_DOMAIN, this node's and its peers'; `{pod}` and `{node}` can be used too. Workloads of other trust domains have Istio's.";
        SPIFFE_HINT = "": "Hint that tells SVIDs with the same SPIFFE ID apart.";
        SPIFFE_ACCEPT_OTHER_ID = "false": "Use the SVID that the agent offers also when its SPIFFE ID is not the expected one, if it is the only one.";
    }
    "Data plane" {
        IPV6_ENABLED = "true": "Listen on IPv6 as well.";
        UNSTABLE_ENABLE_SOCKS5 = "false": "Open the SOCKS5 listener (15080, loopback).";
        ISTIO_META_DNS_CAPTURE = "true": "Resolve names for pods whose queries are redirected: those of the mesh from the mesh, others by the servers in the proxy's own /etc/resolv.conf.";
        ISTIO_META_DNS_PROXY_ADDR = "localhost:15053": "Where queries are taken, in the pod: `localhost:port`, or an address and a port.";
        PACKET_MARK = "1337 shared, none dedicated": "SO_MARK of the proxy's own sockets, by which redirection rules exempt them.";
        ENABLE_ORIG_SRC = "when the process may": "Keep the source address of captured connections: `true` insists, `false` never does.";
        LOCALHOST_APP_TUNNEL = "true": "Deliver connections of an application tunnel to the loopback address.";
        ENABLE_RESPONSE_BAGGAGE = "true": "Answer CONNECT with the baggage of the destination.";
        AUTHZ_POLICY_INFO_LOGGING = "false": "Log each policy decision at level info instead of debug.";
        POOL_MAX_STREAMS_PER_CONNECTION = "100": "Connections carried by one tunnel before another is opened.";
        POOL_UNUSED_RELEASE_TIMEOUT = "5m": "How long an unused tunnel is kept.";
        HTTP2_STREAM_WINDOW_SIZE = "4194304": "Flow-control window of one connection in a tunnel, bytes.";
        HTTP2_CONNECTION_WINDOW_SIZE = "16777216": "Flow-control window of a tunnel, bytes. It is the most: where several streams queue, it shrinks to what the path holds.";
        ZSPIRE_TUNNEL_BUFFER_SIZE = "67108864": "Bytes that applications which do not read may hold in a tunnel before its other streams feel it.";
        HTTP2_FRAME_SIZE = "1048576": "Largest DATA frame accepted, bytes (16384 to 16777215).";
        KEEPALIVE_ENABLED = "true": "TCP keepalive on connections with other hosts: those within a pod need none.";
        KEEPALIVE_TIME = "180s": "Idle time before the first keepalive probe.";
        KEEPALIVE_INTERVAL = "180s": "Time between keepalive probes.";
        KEEPALIVE_RETRIES = "9": "Unanswered probes before a connection is dead.";
        USER_TIMEOUT_ENABLED = "false": "Set TCP_USER_TIMEOUT, on connections with other hosts, to KEEPALIVE_TIME + KEEPALIVE_RETRIES × KEEPALIVE_INTERVAL.";
        CONNECTION_TERMINATION_DEADLINE = "TERMINATION_GRACE_PERIOD_SECONDS − 5 s (− 1 s if that is 10 or less), else 5s": "How long live connections may go on after the proxy was told to stop.";
        TERMINATION_GRACE_PERIOD_SECONDS = "": "Grace period of the pod, seconds; see CONNECTION_TERMINATION_DEADLINE.";
        ZTUNNEL_WORKER_THREADS = "ZTUNNEL_RESOURCE_CPU_LIMIT, else max(25 % of the cores, the CPU request, 2)": "Data-plane threads: a number, a percentage of the cores, or 0 for all of them.";
        ZTUNNEL_CPU_LIMIT = "the machine's": "How many cores there are, for ZTUNNEL_WORKER_THREADS; Kubernetes gives the machine's where a pod has no limit.";
        ZTUNNEL_RESOURCE_CPU_LIMIT = "": "The pod's CPU limit in cores.";
        ZTUNNEL_RESOURCE_CPU_REQUEST = "": "The pod's CPU request in cores.";
    }
    "Addresses" {
        ZSPIRE_BIND_ADDRESS = "every address": "Address that the data-plane listeners (15001, 15006, 15008) and SOCKS5 bind.";
        ZSPIRE_ADMIN_PORT = "15000": "Admin port on loopback; the mesh file's `proxyAdminPort` comes before the default.";
        ZSPIRE_STATS_PORT = "15020": "Metrics port; the mesh file's `statsPort` comes before the default.";
        ZSPIRE_READINESS_PORT = "15021": "Readiness port.";
    }
    "Logging and metrics" {
        ZSPIRE_SERIES_GRACE = "5m": "How long the metrics of a workload are shown, at least, after it is gone and its last connection has ended.";
        RUST_LOG = "info": "Log levels: `info`, or `target=level,…`.";
        LOG_FORMAT = "plain": "`plain` or `json`.";
    }
    "Files and metadata" {
        PROXY_CONFIG = "": "YAML of the proxy's configuration, laid over the mesh file's `defaultConfig` (keys `discoveryAddress`, `proxyAdminPort`, `statsPort`, `concurrency`, `proxyMetadata`). A variable that is not in the environment is looked for in `proxyMetadata`.";
        MESH_CONFIG = "./etc/istio/config/mesh": "The mesh file.";
        ISTIO_META_ISTIO_VERSION = "": "Version of Istio, the tag of the `istio_build` metric.";
        NOTIFY_SOCKET = "": "Set by systemd: where it is told when the proxy or the node agent is ready, what it waits for, and that it stops.";
        WATCHDOG_USEC = "": "Set by systemd: how long it does without a sign of life, microseconds. The proxy gives one when its data-plane threads have all answered.";
        WATCHDOG_PID = "": "Set by systemd: the process that WATCHDOG_USEC is for.";
        KUBERNETES_SERVICE_HOST = "": "Set by Kubernetes; tells whether the proxy runs in it.";
        XDG_RUNTIME_DIR = "a folder of the user's own among temporary files": "Where processes of one user share the root of the development CA.";
    }
}

/// Families of variables: every variable that begins so is read.
pub const PREFIXES: &[(&str, &str)] = &[
    ("ISTIO_META_", "Node metadata sent to the discovery server, without the prefix."),
    ("ISTIO_METAJSON_", "The same with a JSON value."),
    ("XDS_HEADER_", "A header for every discovery call, without the prefix. Its value is never shown."),
    ("CA_HEADER_", "A header for every call to the CA, without the prefix. Its value is never shown."),
];

/// Where values come from: the environment, then `proxyMetadata`.
#[derive(Clone, Default)]
pub struct Values {
    pub(super) environment: BTreeMap<String, String>,
    pub(super) metadata: BTreeMap<String, String>,
}

impl Values {
    /// The environment of this process. Variables that are not UTF-8 are left out.
    pub fn from_environment() -> Self {
        let environment =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
        Self { environment, metadata: BTreeMap::new() }
    }

    /// Values given by name, for tests and embedders.
    pub fn from_pairs<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        let environment = pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        Self { environment, metadata: BTreeMap::new() }
    }

    /// The value as set, also when it is empty.
    pub(super) fn raw(&self, variable: &Variable) -> Option<&str> {
        self.environment.get(variable.name).or_else(|| self.metadata.get(variable.name)).map(String::as_str)
    }

    /// The value, where an empty one counts as not set.
    pub(super) fn get(&self, variable: &Variable) -> Option<&str> {
        self.raw(variable).filter(|v| !v.is_empty())
    }

    /// Every variable that begins with `prefix`, named without it.
    pub(super) fn family(&self, prefix: &str) -> BTreeMap<String, String> {
        let of = |map: &BTreeMap<String, String>| -> Vec<(String, String)> {
            map.iter().filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_owned(), v.clone()))).collect()
        };
        of(&self.metadata).into_iter().chain(of(&self.environment)).collect()
    }
}

impl std::fmt::Debug for Values {
    /// Names only: values may be tokens.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.environment.keys()).finish()
    }
}

/// Names of our own that do not exist. Names of others may be for others.
pub(super) fn misspelt(v: &Values) -> Vec<String> {
    let known = |name: &str| TABLE.iter().any(|g| g.variables.iter().any(|o| o.name == name));
    // The control plane and the build have variables of their own.
    let elsewhere = ["ZSPIRE_CP_", "ZSPIRE_CACHE"];
    v.environment
        .keys()
        .filter(|name| name.starts_with("ZSPIRE_") && !elsewhere.iter().any(|e| name.starts_with(e)))
        .filter(|name| !known(name))
        .map(|name| format!("{name} is set, but there is no such variable"))
        .collect()
}

/// The reference page, `docs/configuration.md`.
pub fn reference() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         <!-- Generated by `make docs` from the table in crates/node/src/config/options.rs. -->\n\n\
         The proxy is configured by its environment. Names, defaults and meanings are those of Istio's\n\
         ztunnel; names that begin with `ZSPIRE_`, and `IDENTITY_SOURCE`, are zspire's own. Durations are\n\
         written `250ms`, `30s`, `5m`, `1h30m`.\n",
    );
    for group in TABLE {
        page.push_str(&format!("\n## {}\n\n| Variable | Default | Meaning |\n|---|---|---|\n", group.title));
        for v in group.variables {
            let default = if v.default.is_empty() { "–".into() } else { format!("`{}`", v.default) };
            let default = if v.default.contains(' ') { v.default.to_owned() } else { default };
            page.push_str(&format!("| `{}` | {default} | {} |\n", v.name, v.help));
        }
    }
    page.push_str("\n## Families\n\n| Prefix | Meaning |\n|---|---|\n");
    for (prefix, help) in PREFIXES {
        page.push_str(&format!("| `{prefix}*` | {help} |\n"));
    }
    page
}
