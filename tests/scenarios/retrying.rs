//! Endpoints that cannot be reached: another one is, and the application does not notice.

use std::time::{Duration, Instant};

use serde_json::Value;
use zspire_testkit::policy::deny_from;
use zspire_testkit::{Mesh, Pod, mesh, uncaptured, until};

use crate::scenario;

/// A client of a service with two endpoints, the first of which serves.
fn two_endpoints() -> (Mesh, Pod, Pod, Pod) {
    let mesh = mesh().node("a").pod("client").pod("good").node("b").pod("bad").service("api", &["good", "bad"]).start();
    let (client, good, bad) = (mesh.pod("client"), mesh.pod("good"), mesh.pod("bad"));
    (mesh, client, good, bad)
}

/// With two endpoints that are equally likely, each is chosen first in all but one of a billion runs.
const ENOUGH: usize = 30;

#[track_caller]
fn all_reach_the_good_one(mesh: &Mesh, client: &Pod) {
    for _ in 0..ENOUGH {
        assert_eq!(client.reaches(mesh.service("api")).by, "good");
    }
}

fn was_retried(line: &Value) -> bool {
    line["retries"].as_u64().is_some_and(|retries| retries > 0) && line["error"].is_null()
}

#[test]
fn application_that_does_not_listen_is_passed_over() {
    scenario(|| {
        let (mesh, client, good, bad) = two_endpoints();
        let _app = good.greet();
        all_reach_the_good_one(&mesh, &client);
        client.metric(&["zspire_upstream_retries_total", "reason=\"CONNECT\""]);
        let line = client.access("outbound", was_retried);
        assert_eq!(
            (&line["dst.workload"], &line["dst.service"]),
            (&"good".into(), &"api.test.svc.cluster.local".into())
        );
        bad.refusal("inbound", "cannot connect to");
        client.proxy(|proxy| {
            proxy.line("the endpoint that failed", |line| {
                line["message"].as_str().is_some_and(|it| it.contains("another one is tried"))
            })
        });
        // The connection is one, whichever way it went.
        let opened = client.metric(&["istio_tcp_connections_opened_total", "destination_workload=\"good\""]);
        assert!(opened.ends_with(&format!(" {ENOUGH}")), "{opened}");
        assert!(!client.metrics().lines().any(|line| {
            line.starts_with("istio_tcp_connections_opened_total") && line.contains("destination_workload=\"bad\"")
        }));
    });
}

#[test]
fn proxy_that_is_not_there_is_passed_over() {
    scenario(|| {
        let (mesh, client, good, bad) = two_endpoints();
        let _apps = (good.greet(), bad.greet());
        bad.proxy(|proxy| proxy.kill());
        all_reach_the_good_one(&mesh, &client);
        client.access("outbound", was_retried);
    });
}

#[test]
fn peer_that_is_somebody_else_is_passed_over() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod("good")
            .node("b")
            .pod(uncaptured("bad").taking_tunnels_itself())
            .service("api", &["good", "bad"])
            .start();
        let (client, good, bad) = (mesh.pod("client"), mesh.pod("good"), mesh.pod("bad"));
        let _app = good.greet();
        // Whatever answers there is not the workload.
        let mut impostor =
            bad.command("openssl", &["s_server", "-accept", "15008", "-nocert", "-psk", "0102", "-alpn", "h2"]);
        impostor.stdin(std::process::Stdio::null());
        let _impostor = mesh.process_of("impostor", impostor);
        until("the impostor to be chosen first", || {
            assert_eq!(client.reaches(mesh.service("api")).by, "good");
            let log = client.proxy(|proxy| proxy.log());
            let passed_over = |line: &str| line.contains("another one is tried") && line.contains("TLS handshake");
            if log.lines().any(passed_over) { Ok(()) } else { Err("not yet") }
        });
        client.access("outbound", was_retried);
    });
}

#[test]
fn plain_endpoint_is_passed_over() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("good"))
            .node("b")
            .pod(uncaptured("bad"))
            .service("api", &["good", "bad"])
            .start();
        let (client, good) = (mesh.pod("client"), mesh.pod("good"));
        let _app = good.greet();
        all_reach_the_good_one(&mesh, &client);
        client.access("outbound", was_retried);
    });
}

#[test]
fn denial_is_an_answer() {
    scenario(|| {
        let (mesh, client, good, bad) = two_endpoints();
        let _apps = (good.greet(), bad.greet());
        // Where the machine is busy, an endpoint may be given up that is only slow to start.
        let retries = || {
            let page = client.metrics();
            page.lines().filter(|line| line.starts_with("zspire_upstream_retries_total")).map(str::to_owned).collect()
        };
        for pod in [&good, &bad] {
            client.reaches(pod.app());
        }
        let before: Vec<String> = retries();
        let policy = deny_from("client").for_selected();
        mesh.edit(|plan| {
            plan.add_policy(policy.clone());
            plan.select("bad", &policy);
        });
        // The first that fails may be one that was allowed and is cut.
        until("a denial", || match client.ask(mesh.service("api")) {
            Err(_) if client.proxy(|proxy| proxy.log().contains("401")) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        client.refusal("outbound", "401");
        assert_eq!(retries(), before);
    });
}

#[test]
fn without_another_endpoint_the_failure_is_told() {
    scenario(|| {
        let mesh = mesh().node("a").pod("client").pod("bad").service("api", &["bad"]).start();
        let client = mesh.pod("client");
        client.is_refused(mesh.service("api"));
        client.refusal("outbound", "503");
        assert!(!client.metrics().contains("zspire_upstream_retries_total"));
    });
}

#[test]
fn endpoint_that_says_nothing_is_given_up() {
    scenario(|| {
        let (mesh, client, good, bad) = two_endpoints();
        let _apps = (good.greet(), bad.greet());
        // As a network policy does it that does not know of tunnels.
        let rules = "add table inet silence; add chain inet silence in { type filter hook input priority 0; }; \
                     add rule inet silence in tcp dport 15008 drop";
        let silenced = bad.command("nft", &[rules]).output().unwrap();
        assert!(silenced.status.success(), "{}", String::from_utf8_lossy(&silenced.stderr));
        until("the silent one to be chosen first", || {
            let began = Instant::now();
            assert_eq!(client.reaches(mesh.service("api")).by, "good");
            match began.elapsed() {
                took if took > Duration::from_secs(3) => {
                    assert!(took < Duration::from_secs(9), "{took:?}");
                    Ok(())
                }
                took => Err(format!("{took:?}")),
            }
        });
        let line = client.access("outbound", was_retried);
        assert_eq!(line["dst.workload"], "good");
    });
}
