//! Certificates from istiod: whom it signs for, and what an operator sees where it does not.

use std::fs;

use zspire_testkit::plan::captured;
use zspire_testkit::{Mesh, Pod, mesh, until};

use super::{certificate_of, wait_for_state};

/// The node's proxy asks for its own pods, each by its identity, and for no others.
#[test]
fn each_pod_has_a_certificate_that_istiod_signed_for_it() {
    crate::scenario(|| {
        let mesh = mesh().istio().node("a").pod("client").pod("second").node("b").pod("server").start();
        let (client, second, server) = (mesh.pod("client"), mesh.pod("second"), mesh.pod("server"));
        for pod in [&client, &second, &server] {
            let certificate = wait_for_state(pod, &pod.spiffe_id(), "Available");
            assert_eq!(certificate["certChain"].as_array().map(Vec::len), Some(1), "{certificate}");
            assert_eq!(certificate["rootCerts"].as_array().map(Vec::len), Some(1), "{certificate}");
        }
        assert_eq!(certificate_of(&client, &server.spiffe_id()), None, "it is on another node");
        let metrics = mesh.istio().istiod().metrics();
        let count = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        // The proxies' own pods too.
        assert!(count("citadel_server_success_cert_issuance_count").is_some_and(|count| count >= 3.0), "{metrics}");
        assert_eq!(count("citadel_server_authentication_failure_count").unwrap_or_default(), 0.0, "{metrics}");
    });
}

/// Adds a pod whose certificate the node's proxy will ask for at once.
fn newcomer(mesh: &Mesh, name: &str) -> Pod {
    let pod = mesh.pod(name);
    mesh.istio().add(&pod);
    pod
}

#[test]
fn token_that_istiod_refuses_is_told_and_another_is_taken_up() {
    crate::scenario(|| {
        let names = ["garbage", "audience", "expired", "empty"];
        let mut plan = mesh().istio().node("a").pod("client").pod("server");
        for name in names {
            plan = plan.pod(captured(name).not_listed());
        }
        let mesh = plan.start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        let istio = mesh.istio();
        for name in names {
            let (token, why) = match name {
                "garbage" => ("garbage".to_owned(), "request authenticate failure"),
                "audience" => (istio.make_token("a", "somebody-else"), "request authenticate failure"),
                "expired" => (istio.expired_token("a"), "request authenticate failure"),
                _ => (String::new(), "a.token is empty"),
            };
            istio.write_token("a", &token);
            let pod = newcomer(&mesh, name);
            wait_for_state(&client, &pod.spiffe_id(), why);
            client.reaches(server.app());
            istio.give_token("a");
            wait_for_state(&client, &pod.spiffe_id(), "Available");
        }
    });
}

/// The file is not there, or is something else.
#[test]
fn token_file_that_cannot_be_read_is_told() {
    crate::scenario(|| {
        let pods = ["missing", "directory"];
        let mut plan = mesh().istio().node("a").pod("client").pod("server");
        for name in pods {
            plan = plan.pod(captured(name).not_listed());
        }
        let mesh = plan.start();
        let client = mesh.pod("client");
        let file = mesh.path("a.token");
        for name in pods {
            fs::remove_file(&file).unwrap();
            if name == "directory" {
                fs::create_dir(&file).unwrap();
            }
            let pod = newcomer(&mesh, name);
            let why = if name == "directory" { "is a directory" } else { "does not exist" };
            wait_for_state(&client, &pod.spiffe_id(), &format!("a.token {why}"));
            if name == "directory" {
                fs::remove_dir(&file).unwrap();
            }
            mesh.istio().give_token("a");
            wait_for_state(&client, &pod.spiffe_id(), "Available");
        }
    });
}

/// istiod looks where Kubernetes says that the pod is.
#[test]
fn identity_of_another_node_is_refused_and_delays_nothing() {
    crate::scenario(|| {
        let mesh = mesh()
            .istio()
            .node("a")
            .pod("client")
            .pod(captured("misplaced").not_listed())
            .pod(captured("late").not_listed())
            .node("b")
            .pod("server")
            .start();
        let (client, server, misplaced) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("misplaced"));
        let _apps = [server.greet(), misplaced.greet()];
        mesh.istio().add_on(&misplaced, "b");
        mesh.enroll(&misplaced);
        let why = "request impersonation authentication failure (Unauthenticated)";
        wait_for_state(&client, &misplaced.spiffe_id(), why);
        misplaced.is_refused(server.app());
        misplaced.refusal("outbound", why);
        let late = newcomer(&mesh, "late");
        mesh.enroll(&late);
        late.reaches(server.app());
        client.reaches(server.app());
    });
}

/// The pod of the proxy is deleted, and with it what its token is worth.
#[test]
fn token_of_a_deleted_pod_is_worth_nothing() {
    crate::scenario(|| {
        let mesh = mesh().istio().node("a").pod("client").pod("server").pod(captured("late").not_listed()).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        mesh.istio().cluster().delete(&["-n", "istio-system", "pod", "ztunnel-a"]);
        let late = newcomer(&mesh, "late");
        wait_for_state(&client, &late.spiffe_id(), "request impersonation authentication failure");
        // What the API server has said of a token before, it does not believe for longer than ten seconds.
        wait_for_state(&client, &late.spiffe_id(), "request authenticate failure");
        client.reaches(server.app());
    });
}

#[test]
fn proxy_of_a_cluster_that_istiod_does_not_know_gets_nothing() {
    crate::scenario(|| {
        let mesh = mesh()
            .istio()
            .node("a")
            .pod("client")
            .node("b")
            .pod(captured("stray").with("CLUSTER_ID", "elsewhere").not_started())
            .start();
        let stray = mesh.pod("stray");
        until("readiness to say why", || match stray.readiness() {
            Err(why) if why.contains("authentication failure") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        assert_eq!(certificate_of(&stray, &stray.spiffe_id()), None);
    });
}
