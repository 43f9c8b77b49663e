//! The dashboard that Istio publishes for ztunnel, under a real Prometheus: each of its queries is answered, and moves.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};
use zspire_testkit::istio::proxy_pod;
use zspire_testkit::plan::captured;
use zspire_testkit::process::Process;
use zspire_testkit::{Mesh, Pod, installed, mesh, say, uncaptured, until};

use crate::names;
use crate::scenario;

const API: &str = "127.0.0.1:9090";
/// What the dashboard leaves to Grafana: four times the time between two looks at a proxy.
const RATE_INTERVAL: &str = "4s";

/// What the kubelet tells of containers, and no proxy.
const OF_THE_KUBELET: [&str; 2] = ["container_memory_working_set_bytes", "container_cpu_usage_seconds_total"];

/// The queries of the dashboard, with names in the place of what Grafana fills in.
fn published(mesh: &Mesh) -> Vec<String> {
    let helm = mesh.istio().cluster().client("helm", &[]);
    let file = Path::new(helm.get_program()).with_file_name("dashboards/ztunnel-dashboard.gen.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let targets = |panel: &Value| panel["targets"].as_array().cloned().unwrap_or_default();
    let all = dashboard["panels"].as_array().unwrap().iter().flat_map(targets);
    let queries = all.map(|target| target["expr"].as_str().unwrap().replace("$__rate_interval", RATE_INTERVAL));
    queries.filter(|query| !OF_THE_KUBELET.iter().any(|metric| query.contains(metric))).collect()
}

/// A Prometheus that looks at the proxies of all nodes, in a pod.
struct Prometheus {
    process: Process,
    pod: Pod,
}

impl Prometheus {
    fn start(mesh: &Mesh, pod: Pod, nodes: &[&str]) -> Self {
        // In Kubernetes these labels come from what is known of a pod.
        let target = |node: &&str| {
            json!({ "targets": [mesh.node_at(node, 15020).to_string()],
                    "labels": { "app": "ztunnel", "pod": proxy_pod(node), "namespace": "istio-system" } })
        };
        let targets: Vec<_> = nodes.iter().map(target).collect();
        let job = json!({ "job_name": "pods", "metrics_path": "/stats/prometheus", "static_configs": targets });
        let config = json!({ "global": { "scrape_interval": "1s" }, "scrape_configs": [job] });
        let file = mesh.path("prometheus.yml");
        fs::write(&file, config.to_string()).unwrap();
        let program = installed("prometheus").display().to_string();
        let mut command = pod.command(&program, &["--log.level=warn", "--web.listen-address", API]);
        command.arg("--config.file").arg(&file).arg("--storage.tsdb.path").arg(mesh.path("prometheus"));
        let mut prometheus = Self { process: mesh.process_of("prometheus", command), pod };
        until("Prometheus to have looked at every proxy", || {
            assert!(prometheus.process.runs(), "{}", prometheus.process.log());
            match prometheus.values("count(up == 1)").first() {
                Some(seen) if seen.last().is_some_and(|up| up.parse() == Ok(nodes.len())) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        prometheus
    }

    /// What a query has been answered in the last two minutes, second by second: values of each series.
    fn values(&self, query: &str) -> Vec<Vec<String>> {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let parameters =
            [format!("query={query}"), format!("start={}", now - 120), format!("end={now}"), "step=1".to_owned()];
        let mut command = self.pod.command("curl", &["--silent", "--get", &format!("http://{API}/api/v1/query_range")]);
        for parameter in &parameters {
            command.args(["--data-urlencode", parameter]);
        }
        let output = command.output().unwrap();
        let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout) else { return Vec::new() };
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        let values = |series: &Value| {
            let pairs = series["values"].as_array().into_iter().flatten();
            pairs.map(|pair| pair[1].as_str().unwrap().to_owned()).collect()
        };
        answer["data"]["result"].as_array().unwrap().iter().map(values).collect()
    }

    /// Whether a series of the answer has had more than one value.
    fn moves(&self, query: &str) -> Result<(), String> {
        let answer = self.values(query);
        if answer.iter().any(|series| series.iter().any(|value| *value != series[0])) {
            return Ok(());
        }
        Err(format!("{query}: {answer:?}"))
    }
}

#[test]
fn every_query_of_ztunnels_dashboard_is_answered_by_series_that_move() {
    scenario(|| {
        let mesh = mesh()
            .istio()
            .node("a")
            .pod("client")
            .pod(captured("late").not_started())
            .pod(uncaptured("prometheus"))
            .node("b")
            .pod("server")
            .start();
        let [client, late, server] = ["client", "late", "server"].map(|name| mesh.pod(name));
        let queries = published(&mesh);
        assert!(queries.len() >= 13, "{queries:#?}");
        let prometheus = Prometheus::start(&mesh, mesh.pod("prometheus"), &["a", "b"]);
        let istio_build = queries.iter().find(|query| query.contains("istio_build")).unwrap();
        // Its value is how many proxies are of one version, and there are two all the time.
        assert_eq!(prometheus.values(istio_build).first().and_then(|seen| seen.last()), Some(&"2".to_owned()));

        // A pod that cannot be served at first, because its port is taken.
        let taken = late.listen_at(15008);
        let mut enrolling = mesh.process_of("enroll-late", mesh.enroll_command(&late));
        let pending = queries.iter().find(|query| query.contains("pending_proxy_count")).unwrap();
        until("a pod to be pending", || prometheus.moves(pending));
        drop(taken);
        enrolling.ended();

        // A rate needs a series that is there already: the first loss of istiod makes it, the second moves it.
        let terminations = queries.iter().find(|query| query.contains("xds_connection_terminations")).unwrap();
        for _ in 0..2 {
            mesh.istio().istiod().stop();
            mesh.istio().start_istiod();
            until("the loss of istiod to be seen", || match prometheus.values(terminations) {
                none if none.is_empty() => Err("no series"),
                _ => Ok(()),
            });
        }

        let _app = server.greet();
        client.redirect_dns();
        let anywhere: SocketAddr = "192.0.2.53:53".parse().unwrap();
        let question = names::query("late.test.svc.cluster.local", names::A);
        let sink = server.listen_at(8081);
        let mut open = Vec::new();
        for query in queries.iter().filter(|query| *query != istio_build) {
            until("a query's answer to move", || {
                client.reaches(server.app());
                names::over_udp(&client, anywhere, &question);
                let held = client.open(server.at(8081));
                say(&held, "held open");
                open.push((held, sink.accept()));
                prometheus.moves(query)
            });
        }
    });
}
