//! What `istioctl` shows of zspire, from a file and from a proxy that runs; and the same as it shows of a ztunnel.

use std::fs;

use serde_json::Value;
use zspire_testkit::plan::captured;
use zspire_testkit::{Mesh, Pod, mesh, until};

use super::{comes_to_know, wait_for_state};

/// A mesh file, and what a real ztunnel has shown of it.
const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/node/tests/golden");

/// A table without its spacing: its rows, the first of which are the columns' names.
fn rows(table: &str) -> Vec<Vec<&str>> {
    table.lines().filter(|line| !line.trim().is_empty()).map(|line| line.split_whitespace().collect()).collect()
}

#[track_caller]
fn has_row(table: &str, expected: &[&str]) {
    assert!(rows(table).iter().any(|row| row == expected), "no row {expected:?} in\n{table}");
}

/// What `istioctl ztunnel-config` prints.
#[track_caller]
fn ztunnel_config(mesh: &Mesh, arguments: &[&str]) -> String {
    mesh.istio().cluster().run("istioctl", &[&["ztunnel-config"], arguments].concat())
}

/// The same of a file.
#[track_caller]
fn of_file(mesh: &Mesh, table: &str, dump: &str) -> String {
    let file = mesh.path("dump.json");
    fs::write(&file, dump).unwrap();
    ztunnel_config(mesh, &[table, "--file", &file.display().to_string()])
}

/// A mesh with a service, a policy and a live connection.
fn in_use() -> Mesh {
    let mesh = mesh().istio().node("a").pod("client").node("b").pod("server").service("api", &["server"]).start();
    let policy = r#"{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"namespace":"test","name":"allow"},
        "spec":{"rules":[{"from":[{"source":{"namespaces":["test"]}}]}]}}"#;
    mesh.istio().cluster().apply(policy);
    for name in ["client", "server"] {
        let pod = mesh.pod(name);
        comes_to_know(&pod, "policies", ("name", "allow"), |_| true);
        wait_for_state(&pod, &pod.spiffe_id(), "Available");
    }
    mesh
}

/// The tables of the proxy of the client's node, however `istioctl` is asked for them.
#[track_caller]
fn tables_are_filled(client: &Pod, table: impl Fn(&str) -> String) {
    let workloads = table("workload");
    assert_eq!(rows(&workloads)[0], ["NAMESPACE", "POD", "NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"]);
    has_row(&workloads, &["test", "client", "10.244.1.1", "a", "None", "HBONE"]);
    has_row(&workloads, &["test", "server", "10.244.2.1", "b", "None", "HBONE"]);
    has_row(&workloads, &["istio-system", "ztunnel-a", "10.10.0.1", "a", "None", "TCP"]);
    let services = table("service");
    assert_eq!(rows(&services)[0], ["NAMESPACE", "SERVICE", "NAME", "SERVICE", "VIP", "WAYPOINT", "ENDPOINTS"]);
    has_row(&services, &["test", "api", "10.96.1.1", "None", "1/1"]);
    let policies = table("policy");
    has_row(&policies, &["test", "allow", "Allow", "Namespace"]);
    let certificates = table("certificate");
    for kind in ["Leaf", "Root"] {
        let identity = client.spiffe_id();
        let of_client = |row: &Vec<&str>| row[0] == identity && row[1] == kind;
        let row = rows(&certificates).into_iter().find(of_client).unwrap_or_else(|| panic!("{certificates}"));
        assert_eq!((row[2], row[3], row.len()), ("Available", "true", 7), "{row:?}");
        assert!(
            row[4].chars().all(|c| c.is_ascii_hexdigit()) && row[5].ends_with('Z') && row[6].ends_with('Z'),
            "{row:?}"
        );
    }
    let connections = table("connections");
    let live =
        rows(&connections).into_iter().find(|row| row[0] == "client.test").unwrap_or_else(|| panic!("{connections}"));
    assert!(live[2].starts_with("client.test:"), "{live:?}");
    assert_eq!(
        [live[1], live[3], live[4], live[5]],
        ["Outbound", "server.test:15008", "api.test.svc.cluster.local:80", "HBONE"]
    );
    let all = table("all");
    for part in [&workloads, &services, &policies, &certificates] {
        rows(part).iter().for_each(|row| has_row(&all, row));
    }
    assert!(!all.to_lowercase().contains("unknown"), "{all}");
}

#[test]
fn tables_from_a_file() {
    crate::scenario(|| {
        let mesh = in_use();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let _app = server.greet();
        let _live = client.open(mesh.service("api"));
        client.metric(&["istio_tcp_connections_opened_total", "reporter=\"source\""]);
        let dump = client.dump().to_string();
        tables_are_filled(&client, |table| of_file(&mesh, table, &dump));
    });
}

/// The kubelet is a small program of ours; the way from `istioctl` over the API server to it is Kubernetes' own.
#[test]
fn tables_log_levels_and_status_of_a_proxy_that_runs() {
    crate::scenario(|| {
        let mesh = in_use();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let _app = server.greet();
        let _live = client.open(mesh.service("api"));
        client.metric(&["istio_tcp_connections_opened_total", "reporter=\"source\""]);
        let _kubelets = mesh.start_kubelets();
        tables_are_filled(&client, |table| ztunnel_config(&mesh, &[table, "ztunnel-a.istio-system"]));
        assert_eq!(
            rows(&ztunnel_config(&mesh, &["workload", "--node", "a"])),
            rows(&ztunnel_config(&mesh, &["workload", "ztunnel-a.istio-system"]))
        );

        let log = |more: &[&str]| ztunnel_config(&mesh, &[&["log", "ztunnel-a.istio-system"], more].concat());
        assert!(log(&[]).contains("current log level is info"));
        assert!(log(&["--level", "debug"]).contains("current log level is debug"));
        assert!(log(&["--level", "info,access=debug"]).contains("access=debug"));
        let wrong = mesh
            .istio()
            .cluster()
            .try_run("istioctl", &["ztunnel-config", "log", "ztunnel-a.istio-system", "--level", "loud"]);
        assert!(wrong.is_err(), "{wrong:?}");
        assert!(log(&["--reset"]).contains("current log level is info"));

        let cluster = mesh.istio().cluster();
        let status = cluster.run("istioctl", &["proxy-status"]);
        for node in ["a", "b"] {
            let name = format!("ztunnel-{node}.istio-system");
            has_row(&status, &[&name, "Kubernetes", "istiod-0", "1.31", "2", "(WADS,WDS)"]);
        }
        assert!(cluster.run("istioctl", &["version"]).contains("data plane version: 1.31 (2 proxies)"));
    });
}

/// The same file of workloads, services and policies, once in a ztunnel and once here.
#[test]
fn tables_are_those_of_a_ztunnel() {
    crate::scenario(|| {
        let file = format!("{RECORDED}/local.yaml");
        let alone = |name| captured(name).with("XDS_ADDRESS", "").with("LOCAL_XDS_PATH", &file).not_started();
        let mesh = mesh().istio().node("a").pod(alone("recorded")).start();
        let pod = mesh.pod("recorded");
        let known = until("the file to be read", || match pod.dump() {
            dump if dump["workloads"].as_array().is_some_and(|all| all.len() == 3) => Ok(dump.to_string()),
            dump => Err(dump["workloads"].to_string()),
        });
        let recorded = fs::read_to_string(format!("{RECORDED}/config_dump.json")).unwrap();
        for table in ["workload", "service", "policy"] {
            let ours = of_file(&mesh, table, &known);
            let theirs = of_file(&mesh, table, &recorded);
            assert_eq!(rows(&ours), rows(&theirs), "{table}");
            assert!(rows(&ours).len() > 1, "{ours}");
        }
        let keys = |dump: &str| {
            let dump: Value = serde_json::from_str(dump).unwrap();
            dump.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
        };
        let ours = keys(&known);
        assert!(keys(&recorded).iter().all(|key| ours.contains(key)), "{ours:?}");
    });
}
