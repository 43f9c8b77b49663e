//! The Helm chart: what it renders is what Kubernetes accepts and the proxy understands, for each combination of values in `ci/`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use zspire_testkit::istio::{Cluster, SYSTEM};
use zspire_testkit::{Mesh, mesh, uncaptured, until};

use super::{comes_to_reach, wait_for_state};
use crate::scenario;

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/zspire");

/// The files of values, by name.
fn combinations() -> BTreeMap<String, PathBuf> {
    let files = fs::read_dir(Path::new(CHART).join("ci")).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_suffix("-values.yaml")?.to_owned();
        Some((name, path))
    };
    files.map(|path| named(path.clone()).unwrap_or_else(|| panic!("{}", path.display()))).collect()
}

/// What the chart renders with these arguments of `helm`.
fn render(cluster: &Cluster, arguments: &[&str]) -> String {
    cluster.run("helm", &[&["template", "zspire", CHART, "-n", SYSTEM], arguments].concat())
}

/// The objects that the API server would make of it.
#[track_caller]
fn accepted(cluster: &Cluster, manifest: &str) -> Vec<Value> {
    let arguments = ["apply", "-n", SYSTEM, "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-"];
    let said = cluster.try_kubectl(&arguments, manifest).unwrap_or_else(|why| panic!("{why}\n{manifest}"));
    let mut one: Value = serde_json::from_str(&said).unwrap();
    match one["items"].take() {
        Value::Array(items) => items,
        _ => vec![one],
    }
}

fn named<'a>(objects: &'a [Value], kind: &str) -> Option<&'a Value> {
    objects.iter().find(|object| object["kind"] == kind)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// What the pod would be told of itself.
fn of_the_pod(from: &Value) -> &'static str {
    match (from["fieldRef"]["fieldPath"].as_str(), from["resourceFieldRef"]["resource"].as_str()) {
        (Some("metadata.name"), _) => "ztunnel-x",
        (Some("metadata.namespace"), _) => SYSTEM,
        (Some("spec.nodeName"), _) => "a",
        (Some("status.podIP"), _) => "10.1.0.1",
        (Some("spec.serviceAccountName"), _) => "ztunnel",
        (_, Some("limits.cpu" | "requests.cpu")) => "2",
        other => panic!("{other:?}"),
    }
}

/// The settings that the program knows: names, and families by prefix.
fn settings(mesh: &Mesh) -> BTreeSet<String> {
    let page = mesh.pod("plain").zspire(&["docs", "configuration"]);
    let page = String::from_utf8(page.stdout).unwrap();
    let (proxy, _) = page.split_once("## The control plane").unwrap();
    let rows = proxy.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split('`').next().unwrap().to_owned()).collect()
}

fn is_known(settings: &BTreeSet<String>, name: &str) -> bool {
    let of_family = |setting: &String| setting.strip_suffix('*').is_some_and(|prefix| name.starts_with(prefix));
    settings.contains(name) || settings.iter().any(of_family)
}

/// The Prometheus operator's resource, as far as the chart uses it: the API server refuses every other field.
const POD_MONITORS: &str = r#"{
  "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
  "metadata": { "name": "podmonitors.monitoring.coreos.com" },
  "spec": { "group": "monitoring.coreos.com", "scope": "Namespaced",
    "names": { "kind": "PodMonitor", "listKind": "PodMonitorList", "plural": "podmonitors", "singular": "podmonitor" },
    "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": {
      "type": "object", "required": ["spec"], "properties": { "spec": {
        "type": "object", "required": ["selector", "podMetricsEndpoints"], "properties": {
          "selector": { "type": "object", "properties": {
            "matchLabels": { "type": "object", "additionalProperties": { "type": "string" } } } },
          "namespaceSelector": { "type": "object", "properties": {
            "matchNames": { "type": "array", "items": { "type": "string" } } } },
          "podMetricsEndpoints": { "type": "array", "items": { "type": "object", "properties": {
            "port": { "type": "string" }, "path": { "type": "string" },
            "interval": { "type": "string" }, "scrapeTimeout": { "type": "string" },
            "relabelings": { "type": "array", "items": { "type": "object", "properties": {
              "action": { "type": "string" }, "targetLabel": { "type": "string" },
              "replacement": { "type": "string" } } } } } } } } } } } } }] } }"#;

/// An API server that knows the resources of the chart.
fn cluster() -> Mesh {
    let mesh = mesh().istio().node("a").pod(uncaptured("plain")).start();
    mesh.istio().cluster().apply(POD_MONITORS);
    until("pod monitors to be served", || {
        mesh.istio().cluster().try_kubectl(&["get", "podmonitors", "-A"], "").map(drop)
    });
    mesh
}

#[test]
fn every_combination_is_accepted_by_kubernetes_and_starts_the_proxy() {
    scenario(|| {
        let mesh = cluster();
        let (cluster, settings) = (mesh.istio().cluster(), settings(&mesh));
        let readme = fs::read_to_string(Path::new(CHART).join("README.md")).unwrap();
        for (name, file) in combinations() {
            assert!(readme.contains(&format!("`{name}`")), "the chart's README does not tell of {name}");
            let file = file.to_str().unwrap();
            cluster.run("helm", &["lint", "--strict", "--quiet", CHART, "-f", file]);
            let objects = accepted(cluster, &render(cluster, &["-f", file]));
            let Some(daemon_set) = named(&objects, "DaemonSet") else {
                assert_eq!(name, "cluster-scope");
                continue;
            };
            let pod = &daemon_set["spec"]["template"]["spec"];
            let container = &pod["containers"][0];
            let environment: Vec<_> = list(&container["env"]).map(variable).collect();
            for (variable, _) in &environment {
                assert!(is_known(&settings, variable), "{name}: {variable} is no setting");
            }
            has_no_more_privileges_than_it_needs(&name, pod);
            starts(&mesh, &name, &environment, &capabilities(container));
        }
    });
}

#[test]
fn the_proxy_starts_as_istios_own_chart_has_it() {
    scenario(|| {
        let mesh = cluster();
        let cluster = mesh.istio().cluster();
        let manifest = cluster.run("helm", &["template", "ztunnel", &charts(cluster, "ztunnel"), "-n", SYSTEM]);
        let objects = accepted(cluster, &manifest);
        let container = &named(&objects, "DaemonSet").unwrap()["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["args"], json!(["proxy", "ztunnel"]));
        let environment: Vec<_> = list(&container["env"]).map(variable).collect();
        starts(&mesh, "ztunnel", &environment, &capabilities(container));
    });
}

/// One of Istio's own charts.
fn charts(cluster: &Cluster, name: &str) -> String {
    let helm = cluster.client("helm", &[]);
    Path::new(helm.get_program()).with_file_name("charts").join(name).display().to_string()
}

fn variable(of: &Value) -> (&str, &str) {
    (of["name"].as_str().unwrap(), of["value"].as_str().unwrap_or_else(|| of_the_pod(&of["valueFrom"])))
}

fn capabilities(container: &Value) -> Vec<&str> {
    list(&container["securityContext"]["capabilities"]["add"]).filter_map(Value::as_str).collect()
}

fn has_no_more_privileges_than_it_needs(name: &str, pod: &Value) {
    let container = &pod["containers"][0];
    let context = &container["securityContext"];
    let by_process = ["spire-broker-process", "spire-delegated"].contains(&name);
    let needed = if by_process { &["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"][..] } else { &["NET_ADMIN", "SYS_ADMIN"] };
    assert_eq!(capabilities(container), needed, "{name}");
    assert_eq!(context["capabilities"]["drop"], json!(["ALL"]), "{name}");
    assert_eq!(context["privileged"], false, "{name}");
    assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
    assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault", "{name}");
    assert_eq!(pod["hostPID"] == true, by_process, "{name}");
    assert_ne!(pod["hostNetwork"], true, "{name}");
    assert_eq!(pod["automountServiceAccountToken"], false, "{name}");
    for mount in list(&container["volumeMounts"]) {
        assert_eq!(mount["readOnly"], true, "{name}: {mount}");
    }
}

/// The program starts with such an environment, in a file system that cannot be written to, with no capability but those.
fn starts(mesh: &Mesh, name: &str, environment: &[(&str, &str)], capabilities: &[&str]) {
    let plain = mesh.pod("plain");
    let program = plain.program(&[]).get_program().to_str().unwrap().to_owned();
    let kept: String = capabilities.iter().map(|it| format!(",+{}", it.to_lowercase())).collect();
    let script = format!(
        "mount -o remount,bind,ro / && exec setpriv --bounding-set=-all{kept} --inh-caps=-all {program} proxy ztunnel"
    );
    let mut command = plain.command("unshare", &["--mount", "sh", "-c", &script]);
    command.env_remove("XDG_RUNTIME_DIR").envs(environment.iter().copied());
    command.env("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let mut process = mesh.process_of(&format!("chart-{name}"), command);
    until(&format!("the proxy of {name} to show whether it is ready"), || {
        assert!(process.runs(), "{name}: it has ended:\n{}", process.log());
        plain.connect(plain.at(15021)).map(drop)
    });
    process.terminate();
    let (ended, log) = (process.ended(), process.log());
    assert!(ended.success() && log.contains("zspire starts"), "{name}: {ended}\n{log}");
    for complaint in ["there is no such variable", "cannot give up", "cannot raise", "cannot keep private keys"] {
        assert!(!log.contains(complaint), "{name}:\n{log}");
    }
}

#[test]
fn values_that_are_misspelt_or_contradict_each_other_are_refused() {
    scenario(|| {
        let mesh = cluster();
        let cluster = mesh.istio().cluster();
        for (set, why) in [
            ("hubb=x", "'hubb' not allowed"),
            ("global.networkPolicy.enable=true", "'enable' not allowed"),
            ("spire.broker.sokcet=x", "'sokcet' not allowed"),
            ("updateStrategy.rollingUpdate.maxSurges=1", "maxSurges"),
            ("identitySource=spire", "must be one of"),
            ("peerCaCrl.unknownStatus=maybe", "must be one of"),
            ("terminationGracePeriodSeconds=soon", "want integer"),
            ("priorityClass.value=2000000000", "maximum"),
            ("env.bad-name=1", "bad-name"),
            ("spire.idTemplate=spiffe://x/{pod}", "spire.idTemplate is for identities from SPIRE"),
            ("spire.unattestedSelectors=true", "spire.unattestedSelectors is for identitySource=spire-delegated"),
            ("identitySource=spire-broker,spire.workloadApi.enabled=false", "needs spire.workloadApi.enabled"),
            ("identitySource=spire-delegated,spire.reference=pod", "takes processes only"),
            ("spire.broker.impersonation=true", "set trustDomain"),
        ] {
            let output = cluster.client("helm", &["template", "zspire", CHART, "--set", set]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && said.contains(why), "{set}: {said}");
        }
    });
}

#[test]
fn the_chart_is_installed_upgraded_and_uninstalled_beside_ztunnels() {
    scenario(|| {
        let mesh = cluster();
        let cluster = mesh.istio().cluster();
        let helm = |arguments: &[&str]| cluster.run("helm", &[arguments, &["-n", SYSTEM]].concat());
        // The account of the proxies of this test, which Istio's chart brings along.
        cluster.delete(&["-n", SYSTEM, "serviceaccount", "ztunnel"]);
        let ztunnel = &charts(cluster, "ztunnel");
        helm(&["install", "ztunnel", ztunnel]);
        // As docs/istio.md has it: pods that run go on running, and keep off nodes with a label.
        let file = mesh.path("keep-off.yaml");
        fs::write(&file, told_in_the_documents("affinity:")).unwrap();
        helm(&["upgrade", "ztunnel", ztunnel, "--reuse-values", "-f", file.to_str().unwrap()]);
        let kept_off = cluster.get(&["-n", SYSTEM, "daemonset", "ztunnel"]);
        assert_eq!(kept_off["spec"]["updateStrategy"]["type"], "OnDelete");
        let affinity = &kept_off["spec"]["template"]["spec"]["affinity"]["nodeAffinity"];
        let terms = &affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
        assert_eq!(terms[0]["matchExpressions"][0]["key"], "zspire.io/ztunnel");
        let values = |name: &str| combinations()[name].to_str().unwrap().to_owned();
        helm(&["install", "zspire", CHART, "-f", &values("beside-ztunnel")]);
        let daemon_sets = || names(&cluster.get(&["-n", SYSTEM, "daemonsets"]));
        assert_eq!(daemon_sets(), ["ztunnel", "ztunnel-zspire"]);

        let upgraded = ["--reuse-values", "-f", &values("guarded"), "--set", "logLevel=debug"];
        helm(&[&["upgrade", "zspire", CHART], &upgraded[..]].concat());
        let daemon_set = cluster.get(&["-n", SYSTEM, "daemonset", "ztunnel-zspire"]);
        let environment = &daemon_set["spec"]["template"]["spec"]["containers"][0]["env"];
        let level = list(environment).map(variable).find(|(name, _)| *name == "RUST_LOG");
        assert_eq!(level, Some(("RUST_LOG", "debug")));
        assert_eq!(daemon_set["metadata"]["generation"], 2);
        let ours = ["daemonset", "serviceaccount", "networkpolicy", "poddisruptionbudget"];
        for kind in ours {
            cluster.get(&["-n", SYSTEM, kind, "ztunnel-zspire"]);
        }
        cluster.get(&["priorityclass", "ztunnel-zspire"]);

        helm(&["uninstall", "zspire"]);
        assert_eq!(daemon_sets(), ["ztunnel"]);
        let left = cluster.get(&["-n", SYSTEM, &ours.join(","), "-l", "app.kubernetes.io/instance=zspire"]);
        assert_eq!(names(&left), Vec::<String>::new());
        assert_eq!(names(&cluster.get(&["priorityclass", "-l", "app.kubernetes.io/instance=zspire"])).len(), 0);

        let in_place = ["upgrade", "ztunnel", CHART, "-n", SYSTEM, "-f", &values("istio")];
        let why = cluster.try_run("helm", &in_place).unwrap_err();
        assert!(why.contains("field is immutable"), "{why}");

        // In ztunnel's place, with ztunnel's names.
        helm(&["uninstall", "ztunnel"]);
        helm(&["install", "zspire", CHART, "-f", &values("istio")]);
        assert_eq!(daemon_sets(), ["ztunnel"]);
        helm(&["uninstall", "zspire"]);
    });
}

/// Both node proxies' accounts, as docs/istio.md has them trusted by istiod.
const BOTH: &str = "istio-system/ztunnel,istio-system/ztunnel-zspire";

#[test]
fn istiod_trusts_a_pod_of_the_chart_beside_ztunnels() {
    scenario(|| {
        let mesh = mesh().istiod_down().node("a").pod("client").node("b").pod("server").start();
        let (istio, cluster) = (mesh.istio(), mesh.istio().cluster());
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let values = combinations()["beside-ztunnel"].to_str().unwrap().to_owned();
        let said = cluster.run("helm", &["install", "zspire", CHART, "-n", SYSTEM, "-f", &values]);
        let trusted = format!("CA_TRUSTED_NODE_ACCOUNTS: {BOTH}");
        assert!(said.contains(&trusted) && told_in_the_documents("env:").contains(&trusted), "{said}");

        // In the place of the controller of DaemonSets, and of the kubelet.
        let set = cluster.get(&["-n", SYSTEM, "daemonset", "ztunnel-zspire"]);
        let template = &set["spec"]["template"];
        let (mut metadata, mut spec) = (template["metadata"].clone(), template["spec"].clone());
        (metadata["name"], metadata["namespace"]) = ("ztunnel-zspire-x".into(), SYSTEM.into());
        spec["nodeName"] = "a".into();
        let mut pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec });
        cluster.apply(&pod.to_string());
        let status = pod.as_object_mut().unwrap();
        status.remove("spec");
        status.insert("status".into(), json!({ "phase": "Running" }));
        cluster.apply_status(&pod.to_string());
        let of =
            ["create", "token", "ztunnel-zspire", "--bound-object-kind=Pod", "--bound-object-name=ztunnel-zspire-x"];
        let token = cluster.kubectl(&[&["-n", SYSTEM], &of[..], &["--audience=istio-ca"]].concat());
        istio.write_token("a", token.trim());

        istio.start_istiod();
        wait_for_state(&client, &client.spiffe_id(), "Unavailable");
        istio.istiod().start_with(cluster, &[("CA_TRUSTED_NODE_ACCOUNTS", BOTH)]);
        wait_for_state(&client, &client.spiffe_id(), "Available");
        let _app = server.greet();
        comes_to_reach(&client, server.app());
    });
}

/// The block of docs/istio.md that has such a line.
fn told_in_the_documents(line: &str) -> String {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/istio.md")).unwrap();
    let mut blocks = page.split("```").skip(1).step_by(2);
    let block = blocks.find(|block| block.lines().any(|it| it.trim() == line)).unwrap();
    block.split_once('\n').unwrap().1.to_owned()
}

fn names(objects: &Value) -> Vec<String> {
    list(&objects["items"]).filter_map(|it| it["metadata"]["name"].as_str()).map(str::to_owned).collect()
}
