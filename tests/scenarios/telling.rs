//! What a proxy tells of itself: commands, admin port, and what neither of them nor the log may hold.

use std::process::Output;

use serde_json::Value;
use zspire_testkit::plan::captured;
use zspire_testkit::policy::{allow_from, deny_from};
use zspire_testkit::{Mesh, hear, mesh, say};

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
            ("services", vec!["api", "10.96.0.1", "1/1"]),
            ("policies", vec!["deny-nobody", "Deny", "Namespace"]),
            ("certificates", vec!["spiffe://cluster.local/ns/test/sa/client", "Leaf", "Root", "Available"]),
            ("connections", vec!["client", "10.244.2.1:15008", "10.96.0.1:80", "HBONE"]),
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
    let mut all = [pod.admin("GET /config_dump", &[]).body, pod.metrics(), pod.proxy(|proxy| proxy.log())].concat();
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
        let token = std::fs::read_to_string(mesh.path("client.token")).unwrap();
        let all = everything(&mesh, "client") + &std::fs::read_to_string(mesh.path("control-plane.log")).unwrap();
        assert!(token.trim().len() > 20, "{token}");
        assert!(!all.contains(token.trim()), "the join token is shown");
        assert!(!all.contains("PRIVATE KEY"), "a key is shown");
    });
}
