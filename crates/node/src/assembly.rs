//! Builds the parts of the proxy, joins them, and stops them in order.
//!
//! ```text
//!  start: capabilities, limits ▶ workers ▶ readiness, admin ▶ identities (join) ▶ mesh ▶ metrics ▶ pods ▶ ready
//!  stop:  not ready ▶ pods drain ▶ deadline, or a second signal ▶ connections are cut ▶ control tasks end
//! ```
//! The control side (everything here) runs on one thread of its own; the data plane has its workers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use zspire_identity::{Priority, Revocation, Source};
use zspire_model::{SpiffeId, Str};
use zspire_proxy::flow::{Direction, Table};
use zspire_proxy::workers::Workers;
use zspire_proxy::{Keepalive, Listeners, OriginalSource, PodSpec, Proxy, Shared};
use zspire_sys::privileges::{self, Capability};

use crate::admin::dump::{self, Connection, Connections, Info, PodState};
use crate::admin::identities::Sources;
use crate::admin::{self, Admin};
use crate::config::{self, Config, Mode, WorkloadName};
use crate::discovery;
use crate::mesh::{Mesh, Prefetch};
use crate::metrics::{self, Process};
use crate::pods::identity::{Expected, PerPod};
use crate::pods::launcher::{Checks, Counts, Drains, PodLauncher, Settings};
use crate::pods::references::References;
use crate::pods::{self, PodInfo, PodView};
use crate::readiness::{self, Readiness};
use crate::shutdown::Signals;
use crate::tasks::Tasks;
use crate::telemetry::{self, Logging};
use crate::{BuildInfo, http_server, identities, spire, supervision};

/// Runs the proxy until it is told to stop and has drained. Must be called before the process has threads.
///
/// `settled` is called when privileges are what they will be, and before the first thread is started.
pub fn run(config: Config, build: BuildInfo, settled: impl FnOnce()) -> anyhow::Result<()> {
    let started = Instant::now();
    // Threads inherit what was given up: the first one, the log's, starts after this.
    let unsettled = secure(&config);
    settled();
    let (logging, _written_at_the_end) = telemetry::start(&config.log_filter, config.log_format)?;
    tracing::info!(version = build.version, revision = build.revision, "zspire starts");
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    for problem in unsettled {
        tracing::warn!("{problem}");
    }
    tracing::info!(config = %dump::settings(&config), "configuration");
    let workers = Arc::new(Workers::start(config.workers).context("cannot start the data-plane threads")?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(async {
        let node = Node { config: Arc::new(config), build: Arc::new(build), logging, workers, started };
        node.run().await
    });
    // Else the process would be there for as long as the servers of a name that is looked up are silent.
    runtime.shutdown_background();
    result
}

/// Takes what the process needs, gives up what it does not, and says what did not work.
fn secure(config: &Config) -> Vec<String> {
    // Marks and foreign source addresses; a shared proxy also enters the namespaces of its pods.
    let mut keep = vec![Capability::NetAdmin];
    if config.mode == Mode::Shared {
        keep.push(Capability::SysAdmin);
    }
    if config.identity.is_per_workload() && config.spire.by_process {
        // The namespaces of other users' processes, by which a pod's are found.
        keep.push(Capability::SysPtrace);
    }
    let mut problems = Vec::new();
    let mut note = |what: &str, done: std::io::Result<()>| {
        problems.extend(done.err().map(|error| format!("{what}: {error}")));
    };
    note("cannot raise the limit of open files", privileges::raise_descriptor_limit().map(drop));
    note("cannot give up capabilities", privileges::retain_capabilities(&keep));
    // Last: from then on the process's own files in /proc belong to root.
    note("cannot keep private keys out of core files", privileges::harden());
    problems
}

/// The process, before it runs.
struct Node {
    config: Arc<Config>,
    build: Arc<BuildInfo>,
    logging: Logging,
    workers: Arc<Workers>,
    started: Instant,
}

/// What runs for the pods, and what views show of it.
struct Served {
    shared: Arc<Shared>,
    pods: pods::Board,
    checks: OnceLock<Checks>,
    source: Arc<dyn Source>,
    /// The proxy's own SVID, where it has to show one.
    own: Option<Arc<dyn Source>>,
    revocation: Revocation,
    /// Where every pod has credentials of its own.
    per_pod: Option<PerPod>,
    discovery: discovery::Board,
}

/// What serves pods.
enum Serving {
    Nothing,
    Dedicated(Proxy),
    Shared {
        stop: CancellationToken,
        drains: Drains,
        /// The process as a workload of its own.
        own: Option<Proxy>,
    },
}

impl Node {
    async fn run(self) -> anyhow::Result<()> {
        let mut signals = Signals::new().context("cannot take over signals")?;
        let (tasks, quit) = (Tasks::default(), CancellationToken::new());
        let readiness = Readiness::new(self.started);
        let starting = readiness.block("proxy", "starting");
        // These are there from the beginning: they are how an operator learns what is waited for.
        let ready = self.anywhere("readiness", self.config.addresses.readiness)?;
        tasks.spawn("readiness", http_server::serve(ready, readiness::router(readiness.clone()), tasks.stop.clone()));
        self.supervise(&readiness, &tasks);
        let view = Arc::new(OnceLock::new());
        self.serve_admin(&view, &quit, &tasks)?;

        let control = tokio::select! {
            control = identities::start(&self.config, &readiness, &tasks) => control?,
            reason = signals.stop(&quit) => {
                tracing::info!(?reason, "stopped before the proxy was ready");
                self.config.supervisor.stopping();
                return Ok(());
            }
        };
        let mesh = self.mesh(control.source.clone());
        tasks.spawn("identities that are left", mesh.clone().give_up(tasks.stop.clone()));
        let discovery = discovery::start(&self.config, control.xds, &mesh, &readiness, &tasks)?;
        let served = Arc::new(Served {
            shared: Arc::new(Shared {
                config: self.data_plane()?,
                mesh: mesh.reader(),
                metrics: zspire_proxy::metrics::Metrics::default(),
                connections: Table::default(),
                begun: zspire_proxy::Begun::default(),
                authorization: mesh.authorization(),
                discovered: mesh.discovered(),
                trust: control.revocation.changes(),
                resolver: zspire_proxy::Resolver::system(),
                on_demand: discovery.on_demand.clone().map(|demand| Arc::new(discovery::OnDemand(demand)) as _),
            }),
            pods: pods::Board::default(),
            checks: OnceLock::new(),
            per_pod: self.per_pod(&control.source, control.references)?,
            source: control.source,
            own: control.own,
            revocation: control.revocation,
            discovery: discovery.board.clone(),
        });
        // Set once, here.
        let _ = view.set(served.clone());
        let (serving, counts) = self.start_pods(&served, &mesh, &readiness, &tasks)?;
        self.serve_metrics(&served, counts, &discovery, &tasks)?;
        tasks.spawn("series", metrics::prune(served.shared.clone(), self.config.series_grace, tasks.stop.clone()));
        starting.ready();

        let reason = tokio::select! {
            reason = signals.stop(&quit) => Some(reason),
            () = tasks.stop.cancelled() => None,
        };
        tracing::info!(?reason, deadline = ?self.config.termination_deadline, "draining");
        readiness.block("drain", "the proxy is told to stop");
        self.config.supervisor.stopping();
        self.drain(&served, serving, &mut signals, &tasks).await;
        tasks.stop.cancel();
        tasks.finished().await;
        anyhow::ensure!(reason.is_some(), "a part of the proxy has failed; the log says which");
        tracing::info!("stopped");
        Ok(())
    }

    /// Tells the service manager how the proxy is.
    fn supervise(&self, readiness: &Readiness, tasks: &Tasks) {
        let (supervisor, workers) = (&self.config.supervisor, self.workers.clone());
        tasks.spawn("status", supervision::follow(supervisor.clone(), readiness.clone(), tasks.stop.clone()));
        let answered = move || supervision::all_work(workers.clone());
        tasks.spawn("signs of life", supervision::live(supervisor.clone(), tasks.stop.clone(), answered));
    }

    fn mesh(&self, source: Arc<dyn Source>) -> Mesh {
        // Where every pod has credentials of its own, nothing is asked for before the pod is there to be attested.
        let shared = !self.config.identity.is_per_workload();
        let prefetch = match &self.config.mode {
            Mode::Shared if shared => Some(Prefetch { node: self.config.node_name.as_str().into() }),
            Mode::Shared | Mode::Dedicated(_) => None,
        };
        if let Some(id) = self.own_identity().filter(|_| shared) {
            let key = zspire_identity::WorkloadKey { id, workload: None };
            // Asked for before discovery has said anything, so that it is there when the first connection comes.
            drop(source.watch(&key, zspire_identity::Priority::WarmUp));
        }
        Mesh::new(source, &self.config.cluster_id, prefetch, self.config.spire.template.clone())
    }

    fn per_pod(&self, source: &Arc<dyn Source>, references: Option<Arc<References>>) -> anyhow::Result<Option<PerPod>> {
        let Some(references) = references else { return Ok(None) };
        Ok(Some(PerPod { source: source.clone(), references, expected: self.expected()? }))
    }

    fn expected(&self) -> anyhow::Result<Expected> {
        let trust_domain = self.config.trust_domain.parse().context("TRUST_DOMAIN")?;
        let (template, node) = (self.config.spire.template.clone(), self.config.node_name.clone());
        Ok(Expected { trust_domain, template, node })
    }

    /// The identity that a dedicated proxy will need.
    fn own_identity(&self) -> Option<SpiffeId> {
        let Mode::Dedicated(name) = &self.config.mode else { return None };
        self.expected().ok()?.of(&PodInfo::from(name)).ok()
    }

    fn data_plane(&self) -> anyhow::Result<zspire_proxy::Config> {
        let c = &*self.config;
        let mut proxy = zspire_proxy::Config::default();
        proxy.dns.domain = c.cluster_domain.clone();
        proxy.dns.preferred_namespace = c.preferred_service_namespace.as_deref().map(Into::into);
        proxy.routing.preferred_service_namespace = c.preferred_service_namespace.as_deref().map(Into::into);
        proxy.tunnel.stream_window = c.http2.stream_window;
        proxy.tunnel.connection_window = c.http2.connection_window;
        proxy.tunnel.buffered_cap = c.http2.buffered_cap;
        proxy.tunnel.frame_size = c.http2.frame_size;
        proxy.tunnel.client_streams = c.http2.pool_max_streams;
        proxy.unused_release = c.http2.pool_unused_release;
        proxy.packet_mark = c.packet_mark;
        proxy.original_source = match c.original_source {
            config::OriginalSource::WhenAllowed => OriginalSource::WhenAllowed,
            config::OriginalSource::Required => OriginalSource::Required,
            config::OriginalSource::Off => OriginalSource::Off,
        };
        proxy.keepalive = c.keepalive.enabled.then_some(Keepalive {
            time: c.keepalive.time,
            interval: c.keepalive.interval,
            retries: c.keepalive.retries,
            user_timeout: c.keepalive.user_timeout,
        });
        proxy.localhost_app_tunnel = c.localhost_app_tunnel;
        proxy.response_baggage = c.response_baggage;
        proxy.policy_info_logging = c.policy_info_logging;
        anyhow::ensure!(
            c.packet_mark.is_none() || zspire_sys::socket::can_mark(),
            "PACKET_MARK is set, but the kernel does not let this process mark its sockets (CAP_NET_ADMIN)"
        );
        Ok(proxy)
    }

    /// Starts the proxy of a dedicated pod, or to follow a node agent.
    fn start_pods(
        &self,
        served: &Served,
        mesh: &Mesh,
        readiness: &Readiness,
        tasks: &Tasks,
    ) -> anyhow::Result<(Serving, Arc<Counts>)> {
        match &self.config.mode {
            _ if !self.config.proxy => Ok((Serving::Nothing, Arc::default())),
            Mode::Shared => self.follow_agent(served, mesh, readiness, tasks),
            Mode::Dedicated(name) => {
                Ok((Serving::Dedicated(self.serve_own_pod(name, served, mesh, readiness, tasks)?), Arc::default()))
            }
        }
    }

    fn serve_own_pod(
        &self,
        name: &WorkloadName,
        served: &Served,
        mesh: &Mesh,
        readiness: &Readiness,
        tasks: &Tasks,
    ) -> anyhow::Result<Proxy> {
        let ipv6 = self.config.ipv6 && zspire_sys::socket::ipv6_available();
        let uid: Str = format!("{}/{}", name.namespace, name.name).into();
        let spec = PodSpec {
            uid: uid.clone(),
            local: mesh.follow(name, None),
            listeners: Listeners {
                dns: self.config.dns,
                ..Listeners::well_known(self.config.addresses.bind, ipv6, self.config.socks5)
            },
            place: None,
            overlap: false,
            only: None,
        };
        let proxy = Proxy::start(&self.workers, &served.shared, spec)?;
        tracing::info!(pod = %uid, listeners = ?proxy.listeners(), "pod is served");
        let waiting = readiness.block("certificate", format!("waiting for discovery to know workload {uid}"));
        let waited_for =
            readiness::wait_for_certificate(uid.to_string(), mesh.follow(name, None), waiting, tasks.stop.clone());
        tasks.spawn("own certificate", waited_for);
        served.pods.show(vec![PodView { uid: uid.to_string(), info: name.into(), pending: None }]);
        Ok(proxy)
    }

    fn follow_agent(
        &self,
        served: &Served,
        mesh: &Mesh,
        readiness: &Readiness,
        tasks: &Tasks,
    ) -> anyhow::Result<(Serving, Arc<Counts>)> {
        let launcher = PodLauncher::new(Settings {
            workers: self.workers.clone(),
            shared: served.shared.clone(),
            mesh: mesh.clone(),
            per_pod: served.per_pod.clone(),
            cluster_id: self.config.cluster_id.clone(),
            ipv6: self.config.ipv6,
            socks5: self.config.socks5,
            dns: self.config.dns,
            overlap: self.config.inpod_port_reuse,
            deadline: self.config.termination_deadline,
        })?;
        let (drains, counts, stop) = (launcher.drains(), launcher.counts(), CancellationToken::new());
        // Set once, here.
        let _ = served.checks.set(launcher.checks());
        let client = pods::Client::new(self.config.inpod_uds.clone(), launcher, readiness, served.pods.clone());
        tasks.spawn("pods", client.run(stop.clone()));
        Ok((Serving::Shared { stop, drains, own: self.serve_itself(served, mesh)? }, counts))
    }

    /// Lets peers reach the metrics of a shared proxy through a tunnel, as those of a workload that policies apply to.
    fn serve_itself(&self, served: &Served, mesh: &Mesh) -> anyhow::Result<Option<Proxy>> {
        let Some(name) = self.config.own_workload() else { return Ok(None) };
        let own = match (&served.own, self.config.identity.is_per_workload()) {
            (Some(source), true) => Some(source.watch(&spire::own_key(&self.config)?, Priority::WarmUp)),
            (None, true) => {
                tracing::warn!(
                    "metrics are not offered through a tunnel: SPIFFE_ENDPOINT_SOCKET is not set, so this process has no SVID"
                );
                return Ok(None);
            }
            (_, false) => None,
        };
        let ipv6 = self.config.ipv6 && zspire_sys::socket::ipv6_available();
        let spec = PodSpec {
            uid: format!("{}/{}", name.namespace, name.name).into(),
            local: mesh.follow(&name, own),
            listeners: Listeners::tunnels(self.config.addresses.bind, ipv6),
            place: None,
            overlap: self.config.inpod_port_reuse,
            only: Some(self.config.addresses.stats),
        };
        let proxy = Proxy::start(&self.workers, &served.shared, spec).context("cannot serve this process's own pod")?;
        tracing::info!(address = %proxy.listeners().inbound, "metrics are offered through a tunnel");
        Ok(Some(proxy))
    }

    fn serve_admin(
        &self,
        view: &Arc<OnceLock<Arc<Served>>>,
        quit: &CancellationToken,
        tasks: &Tasks,
    ) -> anyhow::Result<()> {
        let admin = Admin {
            dump: self.dump(view.clone()),
            identities: self.identities(view.clone())?,
            logging: self.logging.clone(),
            quit: quit.clone(),
        };
        for (n, address) in self.config.admin_addresses().into_iter().enumerate() {
            match http_server::bind("the admin page", address) {
                Ok(listener) => {
                    tracing::info!(address = ?listener.local_addr().ok(), "admin");
                    let app = admin::router(admin.clone());
                    tasks.spawn("admin", http_server::serve(listener, app, tasks.stop.clone()));
                }
                // Not every machine has IPv6.
                Err(error) if n > 0 => {
                    tracing::debug!(error = %format!("{:#}", anyhow::Error::new(error)), "no admin page")
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn serve_metrics(
        &self,
        served: &Served,
        counts: Arc<Counts>,
        discovery: &discovery::Discovery,
        tasks: &Tasks,
    ) -> anyhow::Result<()> {
        let listener = self.anywhere("metrics", self.config.addresses.stats)?;
        let mut registry = self.registry(served, served.source.clone(), discovery);
        registry.register_collector(Box::new(metrics::Pods { board: served.pods.clone(), counts }));
        let (stats, board) = (discovery.stats.clone(), discovery.board.clone());
        registry.register_collector(Box::new(metrics::Freshness { stats, board }));
        tasks.spawn("metrics", http_server::serve(listener, metrics::router(registry), tasks.stop.clone()));
        Ok(())
    }

    fn anywhere(&self, what: &'static str, port: u16) -> anyhow::Result<TcpListener> {
        let ipv6 = self.config.ipv6 && zspire_sys::socket::ipv6_available();
        let any = if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        let listener = http_server::bind(what, SocketAddr::new(any, port))?;
        tracing::info!(address = ?listener.local_addr().ok(), "{what}");
        Ok(listener)
    }

    fn registry(&self, served: &Served, source: Arc<dyn Source>, discovery: &discovery::Discovery) -> Registry {
        let mut registry = Registry::default();
        served.shared.metrics.register_own(registry.sub_registry_with_prefix("zspire"));
        let istio = registry.sub_registry_with_prefix("istio");
        served.shared.metrics.register_upstream(istio);
        metrics::register_build(istio, &self.config.istio_version);
        if let Some(stats) = &discovery.stats {
            istio.register_collector(Box::new(metrics::Discovery(stats.clone())));
        }
        registry
            .register_collector(Box::new(Process { workers: self.workers.metrics(), logging: self.logging.clone() }));
        let sources = [Some(source.clone()), served.own.clone()].into_iter().flatten().collect();
        registry.register_collector(Box::new(metrics::Identities(source)));
        registry.register_collector(Box::new(metrics::Sources(sources)));
        registry.register_collector(Box::new(metrics::Revocations(served.revocation.clone())));
        registry
    }

    /// Before anything is served, the dump shows the settings alone.
    fn dump(&self, view: Arc<OnceLock<Arc<Served>>>) -> admin::Page {
        let (config, build) = (self.config.clone(), self.build.clone());
        Arc::new(move || {
            let served = view.get();
            let snapshot = served.map(|served| served.shared.mesh.load()).unwrap_or_default();
            let status = served.map(|served| served.discovery.status()).unwrap_or_default();
            let states = |served: &Arc<Served>| pod_states(served, &config.trust_domain);
            dump::render(&dump::Sources {
                config: &config,
                build: &build,
                snapshot: &snapshot,
                local: config.local_xds.is_some().then_some(&*snapshot),
                identities: served.map(|served| served.source.entries()).unwrap_or_default(),
                workload_state: served.map(states).unwrap_or_default(),
                discovery: dump::Discovery {
                    source: status.source,
                    connected: status.connected,
                    last_error: status.last_error,
                },
            })
        })
    }

    fn identities(&self, view: Arc<OnceLock<Arc<Served>>>) -> anyhow::Result<admin::Page> {
        let (source, trust_domain) = (self.config.identity.name(), self.config.trust_domain.clone());
        let expected = self.expected()?;
        Ok(Arc::new(move || {
            let mut sources = Sources { source, trust_domain: trust_domain.clone(), ..Sources::default() };
            if let Some(served) = view.get() {
                let id = |pod: &PodView| expected.of(&pod.info).map_err(|e| format!("{e:#}"));
                sources.pods = served.pods.pods().into_iter().map(|pod| (pod.clone(), id(&pod))).collect();
                sources.entries = served.source.entries();
                sources.own = served.own.as_ref().map(|own| own.entries()).unwrap_or_default();
            }
            admin::identities::render(sources)
        }))
    }

    /// Live connections have until the deadline, or until the impatient operator asks again.
    async fn drain(&self, served: &Served, serving: Serving, signals: &mut Signals, tasks: &Tasks) {
        let left = || served.shared.connections.live().len();
        match serving {
            Serving::Nothing => {}
            Serving::Dedicated(proxy) => {
                proxy.drain();
                tokio::select! {
                    () = proxy.drained() => tracing::info!("all connections have ended"),
                    () = tokio::time::sleep(self.config.termination_deadline) => {
                        tracing::warn!(left = left(), "connections are cut at the deadline");
                    }
                    () = signals.again() => tracing::warn!(left = left(), "connections are cut at a second signal"),
                }
                // Cuts what is left, and waits until it has been told.
                proxy.cut().await;
            }
            Serving::Shared { stop, drains, own } => {
                stop.cancel();
                // Nothing that asks for metrics is worth waiting for beyond what pods need.
                own.iter().for_each(Proxy::drain);
                // Each pod has the deadline for itself. A part that has failed may be the one that would drain them.
                tokio::select! {
                    () = served.pods.emptied() => {}
                    () = tasks.stop.cancelled() => {}
                }
                tokio::select! {
                    () = drains.finished() => tracing::info!("all connections have ended"),
                    () = signals.again() => {
                        tracing::warn!(left = left(), "connections are cut at a second signal");
                        drains.cut();
                        drains.finished().await;
                    }
                }
                if let Some(own) = own {
                    own.cut().await;
                }
            }
        }
    }
}

fn pod_states(served: &Served, trust_domain: &str) -> BTreeMap<String, PodState> {
    let refusal = |uid: &str| served.checks.get().and_then(|checks| checks.refusal(uid));
    let mut states: BTreeMap<String, PodState> = BTreeMap::new();
    for PodView { uid, info, pending } in served.pods.pods() {
        let why = pending.or_else(|| refusal(&uid).map(|why| why.to_string()));
        let info = Info {
            name: info.name,
            namespace: info.namespace,
            service_account: info.service_account,
            trust_domain: trust_domain.to_owned(),
        };
        let state = if why.is_none() { "Up" } else { "Pending" };
        states.insert(uid, PodState { state, why, connections: Connections::default(), info });
    }
    for live in served.shared.connections.live() {
        let Some(state) = states.get_mut(&*live.pod) else { continue };
        let about = &live.about;
        let connection = Connection {
            src: about.source_address.to_string(),
            original_dst: about.original_destination.map(|address| address.to_string()),
            actual_dst: about.next_hop.to_string(),
            protocol: about.transport.as_str(),
        };
        match about.direction {
            Direction::Inbound => state.connections.inbound.push(connection),
            Direction::Outbound => state.connections.outbound.push(connection),
        }
    }
    states
}
