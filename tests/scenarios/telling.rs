//! What a proxy tells of itself: commands, admin port, and what neither of them nor the log may hold.

use std::process::Output;

use serde_json::Value;
use zspire_testkit::plan::captured;
use zspire_testkit::policy::{allow_from, deny_from};
use zspire_testkit::{Mesh, Peer, Pod, hear, mesh, say, uncaptured, until};

use crate::scenario;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command prints; it must succeed.
#[track_caller]
fn printed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn commands_show_what_the_proxy_knows() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .node("b")
            .pod("server")
            .service("api", &["server"])
            .policy(deny_from("nobody"))
            .start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let app = server.listen();
        let asking = client.open(mesh.service("api"));
        let served = app.accept();
        say(&asking, "hello");
        hear(&served, "hello");
        let expected = [
            ("workloads", vec!["server", "10.244.2.1", "HBONE"]),
            ("services", vec!["api", "10.96.1.1", "1/1"]),
            ("policies", vec!["deny-nobody", "Deny", "Namespace"]),
            ("certificates", vec!["spiffe://cluster.local/ns/test/sa/client", "Leaf", "Root", "Available"]),
            ("connections", vec!["client", "10.244.2.1:15008", "10.96.1.1:80", "HBONE"]),
        ];
        for (command, words) in expected {
            let table = printed(&client.zspire(&[command]));
            for word in words {
                assert!(table.contains(word), "{command} shows no {word}:\n{table}");
            }
            let json = printed(&client.zspire(&[command, "-o", "json"]));
            let json: Value = serde_json::from_str(&json).unwrap();
            assert!(
                json.as_array().map_or(json.as_object().map_or(0, serde_json::Map::len), Vec::len) > 0,
                "{command}: {json}"
            );
            let none = printed(&client.zspire(&[command, "-n", "elsewhere"]));
            assert!(none.lines().count() <= 1, "{none}");
        }
    });
}

#[test]
fn commands_have_exit_codes() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").start();
        let client = mesh.pod("client");
        let code = |arguments: &[&str]| client.zspire(arguments).status.code();
        assert_eq!(code(&["certificates"]), Some(0));
        assert_eq!(code(&["certificates", "--output", "poem"]), Some(2));
        assert_eq!(code(&["certificats"]), Some(2));
        assert_eq!(code(&["certificates", "--admin", "127.0.0.1:1"]), Some(3));
        assert_eq!(code(&["certificates", "--file", "/nowhere"]), Some(3));
        assert_eq!(code(&["validate", mesh.path("mesh.json").to_str().unwrap()]), Some(0));
        mesh.write_file("{ \"workloads\": 7 }");
        assert_eq!(code(&["validate", mesh.path("mesh.json").to_str().unwrap()]), Some(1));
    });
}

#[test]
fn identities_are_listed_shown_explained_and_watched() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("server").start();
        let client = mesh.pod("client");
        let id = client.spiffe_id();
        let list = printed(&client.zspire(&["identity", "list"]));
        assert!(
            list.lines().any(|line| line.contains("client") && line.contains(&id) && line.contains("Ready")),
            "{list}"
        );
        let name = "test/client";
        let shown = printed(&client.zspire(&["identity", "show", name]));
        for word in ["local", &id, "serial", "cluster.local: 1 root"] {
            assert!(shown.contains(word), "no {word} in\n{shown}");
        }
        let explained = printed(&client.zspire(&["identity", "explain", "client"]));
        assert!(
            explained.contains(&format!("test/client is {id}")) && explained.contains("Nothing: it is renewed"),
            "{explained}"
        );
        let shown: Value =
            serde_json::from_str(&printed(&client.zspire(&["identity", "show", name, "-o", "json"]))).unwrap();
        assert_eq!(shown["expectedId"], id);
        assert_eq!(
            shown["certificate"]["serialNumber"],
            client.dump()["certificates"][0]["certChain"][0]["serialNumber"]
        );
        assert!(client.metrics().contains("zspire_identity_svids{source=\"local\"} "), "{}", client.metrics());

        // A page that was saved is read like one that is asked for.
        let page = mesh.path("identities.json");
        std::fs::write(&page, client.admin("GET /identities", &[]).body).unwrap();
        let file = page.to_str().unwrap();
        let watched = printed(&client.zspire(&["identity", "watch", "--file", file]));
        assert!(watched.starts_with(&format!("test/client  Ready  {id}  serial ")), "{watched}");

        let code = |arguments: &[&str]| client.zspire(&[&["identity"], arguments].concat()).status.code();
        assert_eq!(code(&["explain", "nobody"]), Some(2));
        assert_eq!(code(&["show", name, "--admin", "127.0.0.1:1"]), Some(3));
        assert_eq!(code(&["list", "--file", mesh.path("mesh.json").to_str().unwrap()]), Some(3), "not such a page");
    });
}

#[test]
fn identity_that_is_missing_is_explained_with_what_to_do() {
    scenario(|| {
        let from_spire = captured("client")
            .with("IDENTITY_SOURCE", "workload-api")
            .with("FAKE_CA", "false")
            .with("SPIFFE_ENDPOINT_SOCKET", "unix:///nowhere/agent.sock")
            .not_started();
        // The source is the process's own.
        let mesh = mesh().dedicated().node("a").pod(from_spire).start();
        let client = mesh.pod("client");
        client.start();
        let explained = until("the agent was asked", || {
            let output = client.zspire(&["identity", "explain", "client"]);
            let said = text(&output.stdout);
            if said.contains("Unavailable") { Ok((output.status.code(), said)) } else { Err(said) }
        });
        assert_eq!(explained.0, Some(1), "something was found");
        for words in
            ["has no identity", "about this process", "cannot connect to unix:///nowhere/agent.sock", "zspire doctor"]
        {
            assert!(explained.1.contains(words), "no {words} in\n{}", explained.1);
        }
        let metrics = client.metrics();
        let errors = "zspire_identity_errors_total{source=\"workload-api\",code=\"Unavailable\"}";
        assert!(
            metrics.contains(errors) && metrics.contains("zspire_identity_subscriptions{source=\"workload-api\"} 1"),
            "{metrics}"
        );
    });
}

#[test]
fn admin_port_answers_nobody_that_a_web_page_sends() {
    scenario(|| {
        let mesh = mesh().node("a").pod("server").start();
        let server = mesh.pod("server");
        for host in ["evil.example", "evil.example:15000", "10.244.1.1:15000", "localhost.evil.example"] {
            for request in ["GET /config_dump", "POST /quitquitquit", "GET /"] {
                assert_eq!(server.admin(request, &[&format!("Host: {host}")]).status, 403, "{request} of {host}");
            }
        }
        assert_eq!(server.admin("POST /quitquitquit", &["Origin: https://evil.example"]).status, 403);
        assert_eq!(server.admin("GET /config_dump", &["Host: [::1]:15000"]).status, 200);
        assert_eq!(server.readiness(), Ok(()));
    });
}

#[test]
fn log_level_can_be_changed() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        assert_eq!(client.admin("POST /logging?level=nonsense=", &[]).status, 400);
        assert_eq!(client.admin("POST /logging?level=debug", &[]).status, 200);
        client.reaches(server.app());
        client.proxy(|proxy| proxy.line("the route", |line| line["level"] == "debug" && line["message"] == "routed"));
    });
}

/// Everything that can be read of a pod's proxy without being root.
fn everything(mesh: &Mesh, name: &str) -> String {
    let pod = mesh.pod(name);
    let mut all = [
        pod.admin("GET /config_dump", &[]).body,
        pod.admin("GET /identities", &[]).body,
        pod.metrics(),
        pod.proxy(|proxy| proxy.log()),
    ]
    .concat();
    for view in ["certificates", "workloads", "connections"] {
        all += &printed(&pod.zspire(&[view, "-o", "json"]));
    }
    all
}

#[test]
fn nothing_that_is_secret_is_shown() {
    scenario(|| {
        let secret = |name: &str| {
            captured(name)
                .with("RUST_LOG", "debug")
                .with("AUTH_TOKEN", "canary-token")
                .with("XDS_HEADER_X_KEY", "canary-of-xds")
                .with("CA_HEADER_X_KEY", "canary-of-ca")
                .with("PROXY_CONFIG", "{\"proxyMetadata\":{\"SOME_PASSWORD\":\"canary-metadata\"}}")
        };
        let mesh = mesh().node("a").pod(secret("client")).pod(secret("server")).policy(allow_from("client")).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        client.reaches(server.app());
        for name in ["client", "server"] {
            let all = everything(&mesh, name);
            assert!(all.contains("SOME_PASSWORD"), "the names are shown");
            assert!(all.contains("BEGIN CERTIFICATE") || all.contains("serialNumber"), "certificates are shown");
            for secret in ["canary", "PRIVATE KEY"] {
                let found =
                    all.find(secret).map(|at| all[at.saturating_sub(200)..].chars().take(400).collect::<String>());
                assert_eq!(found, None, "{secret}");
            }
        }
    });
}

#[test]
fn no_key_or_token_of_a_control_plane_is_shown() {
    scenario(|| {
        let mesh = mesh().control_plane().node("a").pod(captured("client").with("RUST_LOG", "debug")).start();
        let token = mesh.token(&mesh.pod("client"));
        let all = everything(&mesh, "client") + &std::fs::read_to_string(mesh.path("control-plane.log")).unwrap();
        assert!(token.trim().len() > 20, "{token}");
        assert!(!all.contains(token.trim()), "the join token is shown");
        assert!(!all.contains("PRIVATE KEY"), "a key is shown");
    });
}

/// Every metric of a page with the names of its labels, in order; comments and values left out.
fn shapes(page: &str) -> std::collections::BTreeSet<String> {
    let shape = |line: &str| {
        let (name, rest) = line.split_at(line.find(['{', ' '])?);
        let labels = rest.strip_prefix('{').and_then(|rest| rest.split_once("\"} ")).map_or("", |(labels, _)| labels);
        let names = labels.split("\",").filter_map(|pair| pair.split_once('=')).map(|(name, _)| name);
        Some(format!("{name} {}", names.collect::<Vec<_>>().join(",")).trim_end().to_owned())
    };
    page.lines().filter(|line| !line.starts_with('#')).filter_map(shape).collect()
}

const TCP: &str = "reporter,source_workload,source_canonical_service,source_canonical_revision,source_workload_namespace,\
    source_principal,source_app,source_version,source_cluster,destination_service,destination_service_namespace,\
    destination_service_name,destination_workload,destination_canonical_service,destination_canonical_revision,\
    destination_workload_namespace,destination_principal,destination_app,destination_version,destination_cluster,\
    request_protocol,response_flags,connection_security_policy,source_region,source_zone,destination_region,\
    destination_zone";

/// All names and label sets after some of everything: what is upstream's has upstream's, and nothing comes or goes unnoticed.
#[test]
fn metrics_have_these_names_and_labels() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("stranger"))
            .node("b")
            .pod("server")
            .pod("bad")
            .service("api", &["server", "bad"])
            .policy(deny_from("stranger"))
            .start();
        let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
        let greeter = server.greet();
        for _ in 0..20 {
            client.reaches(mesh.service("api"));
        }
        client.is_refused(server.at(8081));
        stranger.reaches(server.app());
        let live = client.open(server.app());
        zspire_testkit::app::greeting(&live).unwrap();
        mesh.edit(|plan| plan.add_policy(deny_from("client")));
        client.metric(&["istio_tcp_connections_closed_total", "destination_workload=\"server\""]);
        server.metric(&["zspire_connections_cut_total"]);
        drop((live, greeter));
        let _ = stranger
            .connect(server.at(15008))
            .map(|mut socket| std::io::Write::write_all(&mut socket, b"GET / HTTP/1.1\r\n\r\n"));
        server.metric(&["zspire_tls_handshake_failures_total"]);
        let peer = Peer::new(&mesh, &stranger, "spiffe://cluster.local/ns/test/sa/stranger");
        peer.say(&server, b"GET / HTTP/1.1\r\n\r\n").unwrap();
        server.metric(&["zspire_tunnel_offences_total", "reason=\"protocol_error\""]);
        let both: std::collections::BTreeSet<String> =
            shapes(&client.metrics()).into_iter().chain(shapes(&server.metrics())).collect();
        let tcp = ["opened", "closed", "failed"].map(|what| format!("istio_tcp_connections_{what}_total {TCP}"));
        let bytes = ["sent", "received"].map(|what| format!("istio_tcp_{what}_bytes_total {TCP}"));
        let expected: std::collections::BTreeSet<String> =
            tcp.into_iter().chain(bytes).chain(OTHERS.iter().map(|&other| other.to_owned())).collect();
        let missing: Vec<_> = expected.difference(&both).collect();
        let unknown: Vec<_> = both.difference(&expected).collect();
        assert!(missing.is_empty() && unknown.is_empty(), "missing: {missing:#?}\nnot in the list: {unknown:#?}");
    });
}

/// Besides those of connections. Upstream's have no `zspire_` before them.
const OTHERS: &[&str] = &[
    "istio_build component,tag",
    "istio_crl_policy_rejections_total reporter",
    "istio_crl_untracked_connections_total reporter",
    "istio_tcp_sockets_open reporter",
    "process_max_fds",
    "process_open_fds",
    "tokio_global_queue_depth",
    "tokio_num_alive_tasks",
    "tokio_num_workers",
    "tokio_worker_park_count_total worker",
    "tokio_worker_park_unpark_count_total worker",
    "tokio_worker_total_busy_duration_seconds_total worker",
    "workload_manager_active_proxy_count",
    "workload_manager_pending_proxy_count",
    "workload_manager_proxies_started_total",
    "workload_manager_proxies_stopped_total",
    "zspire_ca_request_duration_seconds_bucket le",
    "zspire_ca_request_duration_seconds_count",
    "zspire_ca_request_duration_seconds_sum",
    "zspire_certificate_age_seconds identity",
    "zspire_certificate_expiry_timestamp_seconds identity",
    "zspire_certificate_prefetches_turned_away_total",
    "zspire_certificate_requests_in_flight",
    "zspire_certificates_issued_total",
    "zspire_certificates_queued",
    "zspire_connections_cut_total reporter,reason",
    "zspire_early_denials_total reporter,reason",
    "zspire_identity_bundle_age_seconds source,trust_domain",
    "zspire_identity_first_svid_seconds_bucket le,source",
    "zspire_identity_first_svid_seconds_count source",
    "zspire_identity_first_svid_seconds_sum source",
    "zspire_identity_subscriptions source",
    "zspire_identity_svids source",
    "zspire_identity_updates_total source",
    "zspire_log_lines_dropped_total",
    "zspire_mesh_file_rejected",
    "zspire_mesh_file_reloads_total result",
    "zspire_pods_refused_total",
    "zspire_tls_handshake_failures_total reporter,reason",
    "zspire_tls_handshake_seconds_bucket le,reporter",
    "zspire_tls_handshake_seconds_count reporter",
    "zspire_tls_handshake_seconds_sum reporter",
    "zspire_tunnel_offences_total reporter,reason",
    "zspire_tunnel_waits_total",
    "zspire_tunnels",
    "zspire_tunnels_awaited",
    "zspire_upstream_retries_total reason",
];

/// The series of a workload that is gone go too, but not while it has connections.
#[test]
fn series_of_a_workload_that_is_gone_are_dropped() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod(uncaptured("client"))
            .pod(uncaptured("other"))
            .node("b")
            .pod(captured("server").with("ZSPIRE_SERIES_GRACE", "500ms"))
            .start();
        let (client, other, server) = (mesh.pod("client"), mesh.pod("other"), mesh.pod("server"));
        let _app = server.greet();
        client.reaches(server.app());
        other.reaches(server.app());
        let held = client.open(server.app());
        zspire_testkit::app::greeting(&held).unwrap();
        for name in ["client", "other"] {
            server.metric(&["istio_tcp_connections_opened_total", &format!("source_workload=\"{name}\"")]);
        }
        mesh.edit(|plan| plan.forget("other"));
        let gone = |name: &str| {
            let of_it = format!("source_workload=\"{name}\"");
            until("its series to be gone", || match server.metrics().lines().find(|line| line.contains(&of_it)) {
                None => Ok(()),
                Some(line) => Err(line.to_owned()),
            });
        };
        gone("other");
        server.metric(&["istio_tcp_connections_opened_total", "source_workload=\"client\""]);
        mesh.edit(|plan| plan.forget("client"));
        // It still has a connection when the other's series would be long gone.
        until("the news to have been used", || match server.dump()["workloads"].as_array().map(Vec::len) {
            Some(1) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        server.metric(&["istio_tcp_connections_opened_total", "source_workload=\"client\""]);
        drop(held);
        gone("client");
    });
}

/// The access log of a real ztunnel: connections by a tunnel, by a service, denied, and in plain text, from both sides.
const RECORDED: &str = include_str!("recorded/access.jsonl");

/// The fields of a line in order, without those that depend on what the mesh file says of its workloads.
fn fields(line: &Value) -> String {
    let all = line.as_object().into_iter().flat_map(|fields| fields.keys().map(String::as_str));
    all.filter(|field| !["src.cluster", "dst.cluster"].contains(field)).collect::<Vec<_>>().join(" ")
}

/// What kind of connection a line is about.
fn kind(line: &Value) -> String {
    let is = |field: &str| !line[field].is_null();
    let level = line["level"].as_str().unwrap_or_default();
    format!(
        "{} {level} tunnel={} service={}",
        line["direction"].as_str().unwrap_or_default(),
        is("dst.hbone_addr"),
        is("dst.service")
    )
}

#[test]
fn access_log_has_the_recorded_fields() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("plain"))
            .node("b")
            .pod("server")
            .pod("denying")
            .service("api", &["server"])
            .policy(deny_from("client").for_selected())
            .start();
        mesh.edit(|plan| plan.select("denying", &deny_from("client")));
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let (denying, plain) = (mesh.pod("denying"), mesh.pod("plain"));
        let _apps = (server.greet(), plain.greet(), denying.greet());
        client.reaches(mesh.service("api"));
        client.reaches(plain.app());
        // The first that fails may be one that was allowed and is cut.
        until("the denial", || match client.ask(denying.app()) {
            Err(_) if denying.proxy(|proxy| proxy.log().contains("policy rejection")) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        denying.refusal("inbound", "policy rejection");
        client.refusal("outbound", "401");
        server.access("inbound", |_| true);
        client.access("outbound", |line| line["dst.workload"] == "plain");
        // Asked for by its own address once more: without a service.
        client.access("outbound", |line| line["dst.workload"] == "server");
        let lines = |text: &str| {
            let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.filter(|line| line["scope"] == "access" && !line["bytes_sent"].is_null()).collect::<Vec<_>>()
        };
        let recorded = lines(RECORDED);
        let (mut compared, mut kinds) = (0, std::collections::BTreeSet::new());
        for pod in [&client, &server, &denying] {
            for line in lines(&pod.proxy(|proxy| proxy.log())) {
                // Our inbound side says which service a connection probably asked for; the recorded one does not.
                let mut line = line;
                if line["direction"] == "inbound" {
                    line.as_object_mut().unwrap().shift_remove("dst.service");
                }
                let same = recorded.iter().find(|other| kind(other) == kind(&line));
                let Some(same) = same else { continue };
                assert_eq!(fields(&line), fields(same), "{}", kind(&line));
                assert_eq!(line["message"], same["message"]);
                kinds.insert(kind(&line));
                compared += 1;
            }
        }
        assert!(compared >= 5 && kinds.len() >= 4, "{kinds:?}");
    });
}

#[test]
fn metrics_of_a_shared_proxy_are_had_through_a_tunnel() {
    scenario(|| {
        let mesh = mesh()
            .shared()
            .proxies_as_workloads()
            .node("a")
            .pod("prometheus")
            .pod("nosy")
            .node("b")
            .pod("server")
            .policy(deny_from("nosy"))
            .start();
        let (prometheus, nosy, server) = (mesh.pod("prometheus"), mesh.pod("nosy"), mesh.pod("server"));
        let get = |from: &Pod, port: u16| {
            let url = format!("http://{}/metrics", mesh.node_at("b", port));
            text(&from.command("curl", &["-s", "--max-time", "10", &url]).output().unwrap().stdout)
        };
        let recording = mesh.record();
        let page = get(&prometheus, 15020);
        assert!(page.contains("istio_build{"), "{page}");
        assert_eq!(recording.end().with(b"istio_build"), 0, "metrics are seen on the wire");
        let told = |what: &str, is_it: &dyn Fn(&Value) -> bool| {
            let own = |line: &Value| line["scope"] == "access" && line["dst.workload"] == "proxy-b" && is_it(line);
            server.proxy(|proxy| proxy.line(what, own))
        };
        let access = told("the access to the metrics", &|line| line["src.workload"] == "prometheus");
        assert_eq!(access["dst.identity"], "spiffe://cluster.local/ns/test/sa/proxy-b");
        // Nothing else of the node is to be had that way, and policies apply.
        for port in [15000, 15021, 22] {
            assert_eq!(get(&prometheus, port), "");
            server.refusal("inbound", &format!("the proxy offers port 15020 to the mesh, not {port}"));
        }
        assert_eq!(get(&nosy, 15020), "");
        told("a denial", &|line| line["error"].as_str().is_some_and(|error| error.contains("policy rejection")));
        server.metric(&["istio_tcp_connections_opened_total", "reporter=\"destination\"", "proxy-b"]);
    });
}
