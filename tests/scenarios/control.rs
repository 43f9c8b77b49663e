//! The control plane goes away and comes back, and the mesh changes meanwhile.

use serde_json::Value;
use zspire_testkit::plan::captured;
use zspire_testkit::policy::deny_from;
use zspire_testkit::{Pod, mesh, uncaptured, until};

use crate::scenario;

/// Waits until the pod's proxy holds its certificate.
fn wait_for_certificate(pod: &Pod) {
    until(&format!("the certificate of {}", pod.name()), || {
        let certificates = pod.dump()["certificates"].clone();
        let own = |entry: &&Value| entry["identity"] == pod.spiffe_id() && entry["state"] == "Available";
        certificates.as_array().into_iter().flatten().find(own).map(drop).ok_or(certificates.clone())
    });
}

fn workload_names(pod: &Pod) -> Vec<String> {
    let dump = pod.dump();
    let names =
        dump["workloads"].as_array().into_iter().flatten().filter_map(|it| it["name"].as_str().map(str::to_owned));
    names.collect()
}

#[test]
fn control_plane_down_at_the_start_is_told_and_waited_for() {
    scenario(|| {
        let mesh = mesh().control_plane_down().node("a").pod("client").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        for pod in [&client, &server] {
            until("readiness to say what is missing", || match pod.readiness() {
                Err(why) if why.contains("cannot join the control plane") && why.contains("10.10.0.254:15012") => {
                    Ok(())
                }
                other => Err(format!("{other:?}")),
            });
        }
        mesh.start_control_plane();
        let _app = server.greet();
        for pod in [&client, &server] {
            pod.wait_until_ready();
        }
        client.reaches(server.app());
    });
}

#[test]
fn doctor_says_whether_the_control_plane_can_be_reached() {
    scenario(|| {
        let mesh = mesh().control_plane().node("a").pod("client").start();
        let client = mesh.pod("client");
        let doctor = || {
            let output = client.with_settings(&["doctor", "-o", "json"]).output().unwrap();
            let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
            (output.status.code(), said)
        };
        let outcome = |said: &Value, check: &str| {
            let mut all = said["checks"].as_array().into_iter().flatten();
            all.find(|it| it["check"] == check).map(|it| it["outcome"].as_str().unwrap_or_default().to_owned())
        };
        let (code, said) = doctor();
        assert_eq!((code, &said["failed"]), (Some(0), &Value::from(0)), "{said}");
        for check in ["CA", "discovery", "running proxy", "trust domain of the mesh"] {
            assert_eq!(outcome(&said, check).as_deref(), Some("ok"), "{check}: {said}");
        }
        mesh.stop_control_plane();
        let (code, said) = doctor();
        assert_eq!(code, Some(1), "{said}");
        for check in ["CA", "discovery"] {
            assert_eq!(outcome(&said, check).as_deref(), Some("fail"), "{check}: {said}");
        }
        let mut wrong = client.with_settings(&["doctor"]);
        let output = wrong.env("IDENTITY_SOURCE", "hope").output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    });
}

/// The process stays up and says so, and takes up another token from the file.
#[test]
fn join_token_that_is_refused_is_not_shown_again() {
    scenario(|| {
        let mesh =
            mesh().dedicated().control_plane().node("a").pod("client").pod(captured("server").not_started()).start();
        let server = mesh.pod("server");
        let path = mesh.path("server.token");
        let good = std::fs::read(&path).unwrap();
        // The client has joined with it.
        std::fs::copy(mesh.path("client.token"), &path).unwrap();
        server.start();
        until("readiness to say what is wrong", || match server.readiness() {
            Err(why) if why.contains("the join token is of no use") && why.contains("make a new one") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        std::fs::write(&path, good).unwrap();
        server.wait_until_ready();
    });
}

/// It is told, and the proxy goes on with the mesh that it has.
#[test]
fn mesh_file_that_cannot_be_used_is_told_and_changes_nothing() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let good = mesh.file();
        let _app = server.greet();
        for bad in ["", "{\"workloads\": 5}"] {
            mesh.write_file(bad);
            client.metric(&["zspire_mesh_file_rejected 1"]);
            assert!(client.readiness().is_ok(), "it serves");
            client.reaches(server.app());
            mesh.write_file(&good);
            client.metric(&["zspire_mesh_file_rejected 0"]);
        }
        client.metric(&["zspire_mesh_file_reloads_total", "rejected", " 2"]);
    });
}

/// The mesh is a file here: only certificates need the control plane.
#[test]
fn without_a_ca_plaintext_goes_on_and_tunnels_say_why_not() {
    scenario(|| {
        let of_file = |name| captured(name).with("XDS_ADDRESS", "").with("LOCAL_XDS_PATH", "mesh.json");
        let mesh = mesh()
            .control_plane()
            .node("a")
            .pod(of_file("client"))
            .pod(of_file("server"))
            .pod(uncaptured("stranger"))
            .start();
        let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
        let _app = server.greet();
        for pod in [&client, &server] {
            pod.proxy(|proxy| proxy.kill());
        }
        mesh.stop_control_plane();
        // They have joined before, and start without it.
        for pod in [&client, &server] {
            pod.start();
            if mesh.is_shared() {
                // The certificate of one pod is nothing that a node waits for.
                pod.wait_until_ready();
                continue;
            }
            until("readiness to say what is missing", || match pod.readiness() {
                Err(why) if why.contains("waiting for the certificate of") && why.contains("10.10.0.254:15012") => {
                    Ok(())
                }
                other => Err(format!("{other:?}")),
            });
        }
        stranger.reaches(server.app());
        assert_eq!(server.admin("GET /", &[]).status, 200);
        client.is_refused(server.app());
        let line = client.refusal("outbound", "10.10.0.254:15012");
        assert_eq!(line["dst.workload"], "server");
        mesh.start_control_plane();
        until("the client to have a certificate", || client.ask(server.app()));
    });
}

#[test]
fn certificates_serve_while_the_ca_is_away() {
    scenario(|| {
        let mesh = mesh().control_plane().node("a").pod("client").node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        wait_for_certificate(&client);
        wait_for_certificate(&server);
        mesh.stop_control_plane();
        let _app = server.greet();
        // No tunnel was open: this is a new handshake.
        client.reaches(server.app());
        assert_eq!(client.readiness(), Ok(()));
    });
}

#[test]
fn what_changed_while_discovery_was_away_is_learnt_at_its_return() {
    scenario(|| {
        let mesh = mesh()
            .control_plane()
            .node("a")
            .pod("client")
            .pod("intruder")
            .node("b")
            .pod("server")
            .pod(uncaptured("gone"))
            .service("api", &["server"])
            .start();
        let (client, intruder, server) = (mesh.pod("client"), mesh.pod("intruder"), mesh.pod("server"));
        let _app = server.greet();
        intruder.reaches(mesh.service("api"));
        assert!(workload_names(&client).contains(&"gone".to_owned()));
        mesh.stop_control_plane();
        mesh.edit(|plan| {
            plan.forget("gone");
            plan.add_policy(deny_from("intruder"));
        });
        until("the loss to be known", || {
            let discovery = client.dump()["discovery"].clone();
            if discovery["connected"] == false && discovery["lastError"].is_string() { Ok(()) } else { Err(discovery) }
        });
        // What was known goes on being used.
        client.reaches(mesh.service("api"));
        intruder.reaches(mesh.service("api"));
        mesh.start_control_plane();
        until("the removal to arrive", || match workload_names(&client) {
            names if names.contains(&"gone".to_owned()) => Err(names.join(" ")),
            _ => Ok(()),
        });
        until("the policy to arrive", || match intruder.ask(mesh.service("api")) {
            Ok(greeting) => Err(format!("{greeting:?}")),
            Err(_) => Ok(()),
        });
        client.reaches(mesh.service("api"));
        assert_eq!(client.dump()["discovery"]["connected"], true);
    });
}

#[test]
fn bad_mesh_file_leaves_the_last_good_one() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        let good = mesh.file();
        mesh.write_file(&good.replace("\"HBONE\"", "\"HBNOE\""));
        let error = until("the mistake to be told", || {
            let discovery = client.dump()["discovery"].clone();
            discovery["lastError"].as_str().map(str::to_owned).ok_or(discovery)
        });
        assert!(error.contains("mesh.json") && error.contains("HBNOE"), "{error}");
        client.proxy(|proxy| {
            proxy.line("an error", |line| {
                line["level"] == "error"
                    && line["message"].as_str().is_some_and(|it| it.contains("last good one stays"))
            })
        });
        assert_eq!(workload_names(&client).len(), 2);
        client.reaches(server.app());
        assert_eq!(client.readiness(), Ok(()));
        mesh.write_file(&good);
        mesh.edit(|plan| plan.forget("server"));
        until("the next good one", || {
            let dump = client.dump();
            if dump["discovery"]["lastError"].is_null() && workload_names(&client).len() == 1 {
                Ok(())
            } else {
                Err(dump["discovery"].clone())
            }
        });
    });
}
