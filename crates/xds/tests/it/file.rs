//! The mesh as files: what is read, and what is refused, with its place.

use std::fs;
use std::sync::Arc;

use zspire_model::policy::{Action, Scope as PolicyScope};
use zspire_model::service::{HealthPolicy, IpFamilies, Mode, Scope, Visibility};
use zspire_model::workload::{ApplicationProtocol, Health, NetworkMode, WorkloadType};
use zspire_model::{GatewayDestination, Protocol, StringMatch, TrustDomain};
use zspire_xds::Resource;
use zspire_xds::file::{Mesh, diff, load, parse, parse_in};

use crate::support::{describe, put_workload, service};

const EVERYTHING: &str = r#"
# Every field of the schema.
workloads:
- uid: c//Pod/a/w
  name: w
  namespace: a
  trustDomain: td.example
  serviceAccount: sa
  network: n1
  workloadIps: ["10.0.0.1", "fd00::1"]
  hostname: w.example
  protocol: HBONE
  networkMode: HostNetwork
  status: Unhealthy
  capacity: 3
  waypoint: {destination: "n1/10.1.0.1", hboneMtlsPort: 15009}
  networkGateway: {destination: "a/gateway.example"}
  applicationTunnel: {protocol: PROXY, port: 9000}
  nativeTunnel: true
  node: node-a
  clusterId: c
  locality: {region: r, zone: z, subzone: s}
  canonicalName: app
  canonicalRevision: v1
  workloadType: cronjob
  workloadName: w
  services:
    a/h.example: {80: 8080, 443: 0}
  authorizationPolicies: [a/p]
policies:
- name: p
  namespace: a
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - namespaces: [!Exact a]
        notNamespaces: [!Prefix mon-]
        serviceAccounts: [{namespace: a, serviceAccount: sa}]
        notServiceAccounts: [{namespace: b, serviceAccount: sa}]
        principals: [!Suffix /sa/sa, !Presence]
        notPrincipals: [!Exact td/ns/a/sa/b]
        sourceIps: ["10.0.0.0/8", "192.0.2.1"]
        notSourceIps: ["10.1.0.0/16"]
        destinationIps: ["fd00::/8"]
        notDestinationIps: ["fd01::/16"]
        destinationPorts: [80]
        notDestinationPorts: [81]
services:
- name: h
  namespace: a
  hostname: h.example
  vips: ["n1/10.9.0.1", "/10.9.0.1"]
  cidrVips: ["/198.51.100.7/24"]
  ports: {443: 0, 80: 8080}
  endpoints: {}
  subjectAltNames: ["spiffe://td.example/ns/a/sa/sa"]
  waypoint: {destination: "a/waypoint.example", hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: {destination: "a/waypoint.example"}, weight: 5}]
  loadBalancer: {routingPreferences: [Region, Zone], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: IPv4
  canonical: true
  ingressUseWaypoint: true
  visibility: Namespace
"#;

#[test]
fn every_field_is_read() {
    let mesh = parse(EVERYTHING, "mesh.yaml").unwrap();
    let [Resource::Workload(w), Resource::Policy(p), Resource::Service(s)] = mesh.as_slice() else {
        panic!("{mesh:?}")
    };
    assert_eq!(w.identity().unwrap().as_str(), "spiffe://td.example/ns/a/sa/sa");
    assert_eq!((w.protocol, w.network_mode, w.status), (Protocol::Hbone, NetworkMode::HostNetwork, Health::Unhealthy));
    assert_eq!((w.capacity, w.workload_type, w.native_tunnel), (3, WorkloadType::CronJob, true));
    assert_eq!(w.addresses.len(), 2);
    assert_eq!(w.waypoint.as_ref().unwrap().to_string(), "n1/10.1.0.1 port 15009");
    let gateway = w.network_gateway.as_ref().unwrap();
    assert!(matches!(gateway.destination, GatewayDestination::Hostname(_)));
    assert_eq!(gateway.hbone_port, 15008);
    let tunnel = w.application_tunnel.unwrap();
    assert_eq!((tunnel.protocol, tunnel.port), (ApplicationProtocol::Proxy, Some(9000)));
    assert_eq!(&*w.locality.subzone, "s");
    let ports: Vec<_> = w.services[0].ports.iter().map(|port| (port.number, port.target)).collect();
    assert_eq!(ports, [(80, Some(8080)), (443, None)]);
    assert_eq!(w.authorization_policies[0].to_string(), "a/p");

    assert_eq!((p.scope, p.action, p.dry_run), (PolicyScope::WorkloadSelector, Action::Deny, true));
    let conditions = &p.groups[0][0][0];
    assert_eq!(conditions.principals, [StringMatch::Suffix("/sa/sa".into()), StringMatch::Presence]);
    assert_eq!(conditions.not_namespaces, [StringMatch::Prefix("mon-".into())]);
    assert_eq!(conditions.source_ips, ["10.0.0.0/8".parse().unwrap(), "192.0.2.1/32".parse().unwrap()]);
    assert_eq!(&*conditions.not_service_accounts[0].namespace, "b");
    assert_eq!((&conditions.destination_ports[..], &conditions.not_destination_ports[..]), (&[80][..], &[81][..]));

    assert_eq!(s.vips.len(), 2);
    assert_eq!(s.cidr_vips[0].to_string(), "/198.51.100.0/24");
    assert_eq!(s.load_balancer.preferences, [Scope::Region, Scope::Zone]);
    assert_eq!((s.load_balancer.mode, s.load_balancer.health), (Mode::Failover, HealthPolicy::AllowAll));
    assert_eq!((s.ip_families, s.visibility, s.canonical), (IpFamilies::Ipv4, Visibility::Namespace, true));
    assert_eq!(s.weighted_waypoints[0].weight, 5);
    assert_eq!(s.ports[1].target, None);
}

#[test]
fn json_is_read_the_same() {
    let text = r#"{
      "workloads": [{"uid": "w", "namespace": "a", "workloadIps": ["10.0.0.1"], "services": {"a/h": {"80": 8080}}}],
      "policies": [{"name": "p", "namespace": "a", "scope": "Global", "action": "Allow",
                    "rules": [[[{"principals": [{"Exact": "x"}, "Presence"]}]]]}]
    }"#;
    let as_json = parse(text, "mesh.json").unwrap();
    assert_eq!(as_json, parse(text, "mesh.yaml").unwrap());
    let Resource::Policy(p) = &as_json[1] else { panic!() };
    assert_eq!(p.groups[0][0][0].principals, [StringMatch::Exact("x".into()), StringMatch::Presence]);
}

#[test]
fn nothing_is_a_mesh_too() {
    for text in ["", "# nothing\n", "{}", "workloads: []\nservices:\n"] {
        assert_eq!(parse(text, "mesh.yaml").unwrap(), [], "{text:?}");
    }
}

#[test]
fn workloads_belong_to_the_trust_domain_of_the_mesh() {
    let ours: TrustDomain = "ours.example".parse().unwrap();
    let mesh = parse_in("workloads: [{uid: w, namespace: a, serviceAccount: sa}]", "m", &ours).unwrap();
    let Resource::Workload(w) = &mesh[0] else { panic!() };
    assert_eq!(w.identity().unwrap().as_str(), "spiffe://ours.example/ns/a/sa/sa");
}

/// Text, line of the mistake, and what the error must say.
const MISTAKES: &[(&str, u64, &[&str])] = &[
    ("workloads:\n- uid: w\n  nmae: x\n", 3, &["nmae", "unknown field"]),
    ("workloads:\n- uid: w\n  uid: v\n", 3, &["uid", "remove one"]),
    ("workloads:\n- name: w\n", 2, &["uid"]),
    ("workloads:\n- uid: w\n- uid: w\n", 3, &["uid", "twice", "rename"]),
    ("workloads:\n- uid: w\n  workloadIps: [\"10.0.0.300\"]\n", 3, &["workloadIps", "10.0.0.300", "IP address"]),
    ("workloads:\n- uid: w\n  protocol: HTTP\n", 3, &["HTTP", "HBONE"]),
    ("workloads:\n- uid: w\n  services: {web: {80: 80}}\n", 2, &["services", "namespace/hostname"]),
    ("workloads:\n- uid: w\n  services: {a/web: {80: 80, 80: 81}}\n", 3, &["80"]),
    ("workloads:\n- uid: w\n  namespace: a\n  serviceAccount: a/b\n", 2, &["serviceAccount"]),
    ("services:\n- {namespace: a, hostname: h, vips: [10.0.0.1]}\n", 2, &["vips", "network/address"]),
    ("services:\n- {namespace: a, hostname: h}\n- {namespace: a, hostname: h}\n", 3, &["a/h", "twice"]),
    (
        "services:\n- {namespace: a, hostname: h, vips: [/10.0.0.1]}\n- {namespace: a, hostname: i, vips: [/10.0.0.1]}\n",
        3,
        &["/10.0.0.1", "a/h", "another address"],
    ),
    ("policies:\n- {name: p, namespace: a, scope: Global, action: Audit}\n", 2, &["Audit"]),
    ("policies:\n- {name: p, namespace: a, action: Deny}\n", 2, &["scope"]),
    (
        "policies:\n- name: p\n  namespace: a\n  scope: Global\n  action: Deny\n  rules: [[[{sourceIps: [x]}]]]\n",
        2,
        &["sourceIps", "10.0.0.0/8"],
    ),
    (
        "policies:\n- {name: p, namespace: a, scope: Global, action: Deny, rules: [[[{principals: [!Like x]}]]]}\n",
        2,
        &["Like", "!Exact"],
    ),
    ("workloads: 7\n", 1, &["list"]),
    ("pods: []\n", 1, &["unknown field", "pods"]),
    ("workloads:\n- uid: [\n", 2, &[]),
];

#[test]
fn mistakes_are_refused_with_their_place() {
    for (text, line, words) in MISTAKES {
        let error = parse(text, "mesh.yaml").expect_err(text);
        let message = error.to_string();
        let (found, _) = error.place.unwrap_or_else(|| panic!("no place in {message}"));
        assert_eq!(found, *line, "{text}: {message}");
        assert!(message.starts_with("mesh.yaml:"), "{message}");
        for word in *words {
            assert!(message.contains(word), "{message:?} does not say {word:?}");
        }
    }
}

#[test]
fn json_mistakes_too() {
    for (text, word) in [
        ("{\"workloads\": [{\"uid\": \"w\", \"nmae\": 1}]}", "nmae"),
        ("{\"workloads\": [], \"workloads\": []}", "twice"),
        ("{\"services\": [{\"namespace\": \"a\", \"hostname\": \"h\", \"ports\": {\"80\": 1, \"80\": 2}}]}", "80"),
        ("{} {}", "trailing"),
    ] {
        let error = parse(text, "mesh.json").expect_err(text);
        assert_eq!(error.place.unwrap().0, 1);
        assert!(error.to_string().contains(word), "{error}");
    }
}

/// One service in two namespaces has one hostname, and may have one address.
#[test]
fn a_hostname_that_two_namespaces_define_may_share_an_address() {
    let text = "services:\n- {namespace: a, hostname: h, vips: [/10.0.0.1]}\n- {namespace: b, hostname: h, vips: [/10.0.0.1]}\n";
    assert_eq!(parse(text, "m").unwrap().len(), 2);
}

#[test]
fn aliases_cannot_blow_up() {
    let mut text = String::from("workloads:\n- uid: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..20 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        text.push_str(&format!("- uid: &a{i} [{refs}]\n"));
    }
    assert!(parse(&text, "m").is_err());
    let deep = format!("workloads: {}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(parse(&deep, "m").is_err());
    assert!(parse(&deep, "m.json").is_err());
}

#[test]
fn a_folder_is_one_mesh() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("b.yaml", "workloads: [{uid: w}]");
    write("a.json", r#"{"workloads": [{"uid": "v"}]}"#);
    write("c.yml", "services: [{namespace: a, hostname: h, vips: [/10.0.0.1]}]");
    write(".hidden.yaml", "nonsense: [");
    write("README.md", "nonsense: [");
    let names: Vec<_> = load(folder.path()).unwrap().resources.iter().map(|it| it.name().to_string()).collect();
    assert_eq!(names, ["v", "w", "a/h"]);
    write("d.yaml", "\nworkloads: [{uid: w}]");
    let error = load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("d.yaml:2") && error.contains("b.yaml") && error.contains("twice"), "{error}");
    write("d.yaml", "\nservices: [{namespace: b, hostname: i, vips: [/10.0.0.1]}]");
    let error = load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("d.yaml:2") && error.contains("c.yml"), "{error}");
}

#[test]
fn what_cannot_be_read_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let error = load(folder.path().join("missing.yaml")).unwrap_err();
    assert!(error.to_string().contains("missing.yaml: cannot be read"), "{error}");
    assert_eq!(error.source.unwrap().kind(), std::io::ErrorKind::NotFound);
    let binary = folder.path().join("binary.yaml");
    fs::write(&binary, [0xff, 0xfe, 0x00]).unwrap();
    assert!(load(&binary).is_err());
}

#[test]
fn the_difference_of_two_meshes_leads_from_one_to_the_other() {
    let old = Mesh {
        findings: Vec::new(),
        resources: vec![put_workload("w1", "10.0.0.1"), put_workload("w2", "10.0.0.2"), service("h", "10.9.0.1")],
    };
    let new = Mesh {
        findings: Vec::new(),
        resources: vec![put_workload("w1", "10.0.0.1"), put_workload("w2", "10.0.0.9"), service("i", "10.9.0.1")],
    };
    let mut changes: Vec<_> = diff(&old, &new).iter().map(describe).collect();
    changes.sort();
    assert_eq!(changes, ["+s a/i", "+w w2", "-s a/h"]);
    assert!(diff(&new, &new).is_empty());
    assert_eq!(new.changes().len(), 3);
}

/// What replicas share is in memory once.
#[test]
fn equal_parts_are_shared() {
    let text = "workloads:\n- {uid: a, namespace: x, services: {x/h: {80: 80}}}\n- {uid: b, namespace: x, services: {x/h: {80: 80}}}\n";
    let mesh = parse(text, "m").unwrap();
    let [Resource::Workload(a), Resource::Workload(b)] = mesh.as_slice() else { panic!() };
    assert!(Arc::ptr_eq(&a.services, &b.services));
    assert!(Arc::ptr_eq(&a.namespace, &b.namespace));
}

fn refused(text: &str) -> String {
    zspire_xds::file::parse(text, "m.yaml").unwrap_err().to_string()
}

#[test]
fn an_address_belongs_to_one_workload() {
    let two = |more: &str| {
        format!(
            "workloads:\n- {{uid: a, workloadIps: [10.0.0.1]}}\n- {{uid: b, workloadIps: [10.0.0.2, 10.0.0.1]{more}}}\n"
        )
    };
    let error = refused(&two(""));
    assert!(error.starts_with("m.yaml:3:"), "{error}");
    assert!(
        error.contains("/10.0.0.1 is an address of workload a too (in m.yaml): give one of them another"),
        "{error}"
    );
    for fine in [", network: elsewhere", ", networkMode: HostNetwork"] {
        zspire_xds::file::parse(&two(fine), "m.yaml").unwrap();
    }
}

#[test]
fn ranges_of_virtual_addresses_do_not_overlap() {
    let services = |ranges: &[(&str, &str)]| {
        let entry = |(hostname, range): &(&str, &str)| {
            format!("- {{name: s, namespace: a, hostname: {hostname}, cidrVips: [{range:?}], ports: {{1: 1}}}}\n")
        };
        format!("services:\n{}", ranges.iter().map(entry).collect::<String>())
    };
    for ranges in [
        [("x", "/10.0.0.0/8"), ("y", "/10.1.0.0/16")],
        [("x", "/10.1.0.0/16"), ("y", "/10.0.0.0/8")],
        [("x", "/10.1.0.0/16"), ("y", "/10.1.0.0/16")],
        [("x", "n/fd00::/8"), ("y", "n/fd00:1::/32")],
    ] {
        let error = refused(&services(&ranges));
        assert!(error.starts_with("m.yaml:3:") && error.contains(" overlaps with "), "{error}");
    }
    let apart = [("x", "/10.0.0.0/16"), ("y", "/10.1.0.0/16"), ("z", "n/10.0.0.0/8"), ("v", "/fd00::/8")];
    zspire_xds::file::parse(&services(&apart), "m.yaml").unwrap();
}

#[test]
fn references_that_lead_nowhere_are_found_with_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.yaml");
    let text = "\
workloads:
- uid: a
  workloadIps: [10.0.0.1]
  services:
    a/here: {80: 80}
    a/gone: {80: 80}
  authorizationPolicies: [a/deny]
- {uid: ab, waypoint: {destination: /10.9.9.9}, authorizationPolicies: [a/here]}
- {uid: b, waypoint: {destination: /10.0.0.1}, networkGateway: {destination: a/here}}
services:
- name: s
  namespace: a
  hostname: here
  waypoint: {destination: a/nobody}
policies:
- {name: here, namespace: a, action: Allow, scope: WorkloadSelector, rules: []}
";
    std::fs::write(&path, text).unwrap();
    let mesh = zspire_xds::file::load(&path).unwrap();
    let found: Vec<_> = mesh.findings.iter().map(|it| it.split("/m.yaml:").nth(1).unwrap()).collect();
    assert_eq!(
        found,
        [
            "6: services: there is no service a/gone: define it, or take it out",
            "7: authorizationPolicies: there is no policy a/deny: define it, or take it out; until it is there, every \
             connection to the workload is denied",
            "8: waypoint: neither a service nor a workload is /10.9.9.9: define it, or take it out",
            "14: waypoint: neither a service nor a workload is a/nobody: define it, or take it out",
        ]
    );
    assert_eq!(mesh.resources.len(), 5, "nothing is refused");
}
