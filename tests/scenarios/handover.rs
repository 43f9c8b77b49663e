//! One proxy takes over from another on the same node, under load; and pods that come and go all the time.
//!
//! `make soak` asks for more of both than a change has to pass.

use std::time::{Duration, Instant};

use zspire_testkit::app::finish;
use zspire_testkit::plan::captured;
use zspire_testkit::zds::Agent;
use zspire_testkit::{Ending, Pod, ending, hear, mesh, say, until};

use crate::traffic::Load;
use crate::{scenario, soak};

#[test]
fn new_proxy_takes_over_without_a_refusal_or_a_cut() {
    scenario(|| {
        let patient = |name| captured(name).with("CONNECTION_TERMINATION_DEADLINE", "20s");
        let mesh = mesh().shared().node("a").pod(patient("client")).node("b").pod(patient("server")).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        let app = server.listen_at(8081);
        let load = Load::new(&client, &server);
        load.during(3, || {
            for round in 0..soak("ZSPIRE_SOAK_HANDOVERS", 10) {
                let node = if round % 2 == 0 { "a" } else { "b" };
                load.more(20);
                // One that lives while both proxies serve.
                let long = client.open(server.at(8081));
                let long_served = app.accept();
                say(&long, "before");
                hear(&long_served, "before");
                let mut old = mesh.start_successor(node);
                load.more(20);
                old.terminate();
                load.more(20);
                for (from, to) in [(&long, &long_served), (&long_served, &long)] {
                    say(from, "and after");
                    hear(to, "and after");
                }
                assert!(old.runs(), "it waits for its connections");
                finish(&long);
                assert_eq!(ending(&long_served), Ending::Orderly);
                drop((long, long_served));
                assert_eq!(old.ended().code(), Some(0));
                assert_eq!(load.failures(), Vec::<String>::new(), "in round {round}");
            }
        });
    });
}

#[test]
fn where_ports_are_not_shared_the_old_proxy_serves_until_it_ends() {
    scenario(|| {
        let alone = |name| captured(name).with("INPOD_PORT_REUSE", "false");
        let mesh = mesh().shared().node("a").pod(alone("client")).node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        client.reaches(server.app());
        let mut old = mesh.begin_succession("a");
        // From now on these are questions to the new one.
        until("the new proxy to say what it waits for", || match client.readiness() {
            Err(why) if why.contains("another proxy serves this namespace already") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        client.reaches(server.app());
        old.terminate();
        assert_eq!(old.ended().code(), Some(0));
        client.wait_until_ready();
        client.reaches(server.app());
    });
}

#[test]
fn of_two_proxies_the_newest_serves_who_is_enrolled_and_both_let_go() {
    scenario(|| {
        let not_yet = captured("late").not_started();
        let mesh = mesh().shared().node("a").pod("client").pod(not_yet).start();
        let (client, late) = (mesh.pod("client"), mesh.pod("late"));
        let old = mesh.start_successor("a");
        mesh.enroll(&late);
        let _app = late.greet();
        client.reaches(late.app());
        let served = |name: &str| {
            let state = client.dump()["workloadState"].clone();
            state.as_object().unwrap().values().any(|pod| pod["info"]["name"] == name && pod["state"] == "Up")
        };
        assert!(served("client") && served("late"));
        assert!(!old.log().contains("test/late"), "the old one is not told of it");
        let output = mesh.agent_command("a", &["unenroll", "test/client"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!served("client"));
        old.line("the end of the pod", |line| {
            line["message"] == "pod is no longer served" && line["pod"] == "test/client"
        });
        // The newest goes: the one before gets what it has not had.
        client.proxy(|proxy| proxy.kill());
        old.line("the pod", |line| line["message"] == "pod is served" && line["pod"] == "test/late");
    });
}

/// Adds and deletes in a minute.
const PACE: u32 = 1000;
/// How much more memory than before the proxy may have afterwards, kilobytes: what the allocator keeps, not what leaks.
const MORE_MEMORY: u64 = 16 << 10;

#[test]
fn pods_that_come_and_go_leave_nothing_behind() {
    scenario(|| {
        let names: Vec<String> = (0..8).map(|n| format!("passing-{n}")).collect();
        let plan = mesh().by_hand().node("a").pod("client").pod("server");
        let mesh = names.iter().fold(plan, |plan, name| plan.pod(name.as_str())).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let agent = Agent::listen(&mesh.zds("a"));
        let proxy = agent.accept();
        for pod in [&client, &server] {
            assert_eq!(proxy.add(pod.name(), pod), "");
        }
        assert_eq!(proxy.snapshot_sent(), "");
        client.wait_until_ready();
        let passing: Vec<Pod> = names.iter().map(|name| mesh.pod(name)).collect();
        let _app = server.greet();
        let _apps: Vec<_> = passing.iter().map(Pod::greet).collect();
        let load = Load::new(&client, &server);
        let come_and_go = |pod: &Pod| {
            assert_eq!(proxy.add(pod.name(), pod), "");
            client.reaches(pod.app());
            assert_eq!(proxy.del(pod.name()), "");
        };
        let id = client.proxy(|proxy| proxy.id());
        let descriptors = || std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
        let quiet = |expected: Option<usize>| {
            until("the proxies of the pods that went to end", || {
                let page = client.metrics();
                let value =
                    |name: &str| page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
                let (started, stopped) =
                    (value("workload_manager_proxies_started_total"), value("workload_manager_proxies_stopped_total"));
                let now = descriptors();
                let same = expected.is_none_or(|expected| now <= expected);
                if started == stopped.map(|n| n + 2) && same {
                    Ok(now)
                } else {
                    Err(format!("{started:?} {stopped:?} {now}"))
                }
            })
        };
        // What is made once is made before: buffers, threads, series of metrics.
        passing.iter().for_each(come_and_go);
        load.during(1, || {
            let before = quiet(None) + 16;
            let memory = client.proxy(|proxy| proxy.memory());
            let time = Duration::from_secs(soak("ZSPIRE_SOAK_CHURN", 10) as u64);
            let (started, mut count) = (Instant::now(), 0);
            while started.elapsed() < time {
                come_and_go(&passing[count as usize % passing.len()]);
                count += 1;
                // At the pace that is asked for, or as fast as it goes.
                let due = started + Duration::from_secs(60) * count / PACE;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            let reached = f64::from(count) / started.elapsed().as_secs_f64() * 60.0;
            assert!(reached > f64::from(PACE) * 0.5, "only {reached:.0} pods a minute");
            load.end();
            quiet(Some(before));
            let after = client.proxy(|proxy| proxy.memory());
            assert!(after < memory + MORE_MEMORY, "{memory} kB, then {after} kB after {count} pods");
        });
        assert_eq!(client.readiness(), Ok(()));
    });
}
