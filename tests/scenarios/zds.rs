//! Pods handed over by a node agent, with the test in the agent's place: what it may do wrong, and that nobody else notices.

use std::os::fd::AsFd as _;

use serde_json::Value;
use zspire_testkit::process::{pause, resume};
use zspire_testkit::zds::{Agent, Connected, add, del};
use zspire_testkit::{Mesh, Pod, ending, hear, mesh, say, uncaptured, until};

use crate::scenario;

/// Two pods on a node whose proxy has connected.
fn two_pods() -> (Mesh, Agent, Connected) {
    let mesh = mesh().by_hand().node("a").pod("client").pod("server").pod(uncaptured("stranger")).start();
    let agent = Agent::listen(&mesh.zds("a"));
    let proxy = agent.accept();
    (mesh, agent, proxy)
}

/// Hands both over, as a snapshot.
#[track_caller]
fn hand_over(mesh: &Mesh, proxy: &Connected) {
    for name in ["client", "server"] {
        assert_eq!(proxy.add(name, &mesh.pod(name)), "");
    }
    assert_eq!(proxy.snapshot_sent(), "");
}

/// Waits until new connections are refused: a listener goes on for the handshakes that have begun.
#[track_caller]
fn wait_for_refusal(client: &Pod, server: &Pod) {
    until("new connections to be refused", || match client.ask(server.app()) {
        Ok(greeting) => Err(format!("{greeting:?}")),
        Err(_) => Ok(()),
    });
}

fn state(pod: &Pod, uid: &str) -> Value {
    pod.dump()["workloadState"][uid].clone()
}

/// Waits until the view of a pod says so.
#[track_caller]
pub(crate) fn wait_for_state(pod: &Pod, uid: &str, expected: &str) -> Value {
    until(&format!("pod {uid} to be {expected}"), || match state(pod, uid) {
        state if state["state"] == expected => Ok(state),
        state => Err(state),
    })
}

#[test]
fn pods_of_a_snapshot_are_served_and_then_the_proxy_is_ready() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        assert!(client.readiness().is_err());
        hand_over(&mesh, &proxy);
        client.wait_until_ready();
        let _app = server.greet();
        assert_eq!(client.reaches(server.app()).from, client.address());
        assert_eq!(mesh.pod("stranger").reaches(server.app()).from, mesh.pod("stranger").address());
        let line = server.access("inbound", |line| line["src.identity"] == client.spiffe_id());
        assert_eq!(line["dst.hbone_addr"], server.app().to_string());
        for (name, value) in [("active", 2), ("pending", 0)] {
            client.metric(&[&format!("workload_manager_{name}_proxy_count {value}")]);
        }
        client.metric(&["workload_manager_proxies_started_total 2"]);
        assert_eq!(wait_for_state(&client, "server", "Up")["info"]["serviceAccount"], "server");
        assert!(proxy.is_silent());
    });
}

#[test]
fn pods_go_on_being_served_without_the_agent_and_readiness_says_what_is_missing() {
    scenario(|| {
        let (mesh, agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        hand_over(&mesh, &proxy);
        client.wait_until_ready();
        let _app = server.greet();
        drop((proxy, agent));
        until("readiness to say why not", || match client.readiness() {
            Err(why) if why.contains("a.zds") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        client.reaches(server.app());
        // Another one; it has no namespace for one pod, and does not know the other any more.
        std::fs::remove_file(mesh.zds("a")).unwrap();
        let agent = Agent::listen(&mesh.zds("a"));
        let proxy = agent.accept();
        assert_eq!(proxy.keep("client"), "");
        client.reaches(server.app());
        assert_eq!(proxy.snapshot_sent(), "");
        client.wait_until_ready();
        wait_for_refusal(&client, &server);
        assert!(state(&client, "server").is_null());
        client.metric(&["workload_manager_proxies_stopped_total 1"]);
        assert!(proxy.keep("client").contains("snapshot"));
    });
}

#[test]
fn an_identity_is_used_only_where_its_address_is() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        assert_eq!(proxy.add("server", &server), "");
        // The agent is wrong about the namespace: it is another pod's.
        assert_eq!(proxy.add_at("client", "client", mesh.pod("stranger").netns()), "");
        assert_eq!(proxy.snapshot_sent(), "");
        client.wait_until_ready();
        let why = wait_for_state(&client, "client", "Pending")["why"].to_string();
        assert!(
            why.contains(&client.address().to_string()) && why.contains(&mesh.pod("stranger").address().to_string())
        );
        client.metric(&["zspire_pods_refused_total 1"]);
        client.proxy(|proxy| proxy.line("the refusal", |line| line["message"] == "the pod's connections are refused"));
        let _app = server.greet();
        // Redirection is not needed to speak to a proxy.
        let stranger = mesh.pod("stranger");
        let own = stranger.open(stranger.at(15008));
        ending(&own);
        client.refusal("inbound", "holds no address of the workload");
        // The right one.
        assert_eq!(proxy.add("client", &client), "");
        wait_for_state(&client, "client", "Up");
        client.reaches(server.app());
    });
}

#[test]
fn an_address_that_leaves_the_namespace_takes_the_identity_with_it() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        hand_over(&mesh, &proxy);
        client.wait_until_ready();
        let app = server.listen();
        let asking = client.open(server.app());
        let served = app.accept();
        say(&asking, "hello");
        hear(&served, "hello");
        // Discovery moves the workload elsewhere: what its namespace has is no longer its own.
        let text = mesh.file();
        mesh.write_file(&text.replace(&format!("\"{}\"", server.address()), "\"10.244.1.77\""));
        assert_eq!(ending(&served), zspire_testkit::Ending::Reset);
        wait_for_state(&client, "server", "Pending");
        mesh.write_file(&text);
        wait_for_state(&client, "server", "Up");
        drop(app);
        let _app = server.greet();
        client.reaches(server.app());
        // The namespace loses the address, and has it again.
        let address = format!("{}/32", server.address());
        let ip = |what: &str| {
            let output = server.command("ip", &["address", what, &address, "dev", "eth0"]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        ip("del");
        wait_for_state(&client, "server", "Pending");
        ip("add");
        wait_for_state(&client, "server", "Up");
    });
}

#[test]
fn a_start_that_fails_is_refused_and_retried() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let taken = server.listen_at(15008);
        assert_eq!(proxy.add("client", &client), "");
        let error = proxy.add("server", &server);
        assert!(error.contains(":15008") && error.contains("in use"), "{error}");
        assert_eq!(proxy.snapshot_sent(), "");
        let why = client.readiness().unwrap_err();
        assert!(why.contains("test/server") && why.contains(":15008"), "{why}");
        client.metric(&["workload_manager_pending_proxy_count 1"]);
        wait_for_state(&client, "server", "Pending");
        drop(taken);
        client.wait_until_ready();
        assert!(proxy.is_silent(), "nothing is said that was not asked for");
        let _app = server.greet();
        client.reaches(server.app());
    });
}

#[test]
fn a_new_sandbox_of_a_pod_replaces_the_old_one() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        // The first sandbox is another namespace.
        assert_eq!(proxy.add("client", &client), "");
        assert_eq!(proxy.add_at("server", "server", mesh.pod("stranger").netns()), "");
        assert_eq!(proxy.snapshot_sent(), "");
        client.wait_until_ready();
        assert_eq!(proxy.add("server", &server), "");
        let _app = server.greet();
        until("the new one to be served", || client.ask(server.app()));
        // The old one has been left: nobody listens there any more.
        until("the old one to be left", || match mesh.pod("stranger").connect(mesh.pod("stranger").at(15008)) {
            Ok(_) => Err("somebody listens"),
            Err(_) => Ok(()),
        });
        // The agent repeats itself, which changes nothing.
        for _ in 0..3 {
            assert_eq!(proxy.add("server", &server), "");
        }
        client.metric(&["workload_manager_proxies_started_total 3"]);
        assert_eq!((proxy.del("server"), proxy.del("server"), proxy.del("never")), Default::default());
        wait_for_refusal(&client, &server);
    });
}

#[test]
fn a_pod_that_is_deleted_keeps_its_live_connections_and_gets_no_new_ones() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        hand_over(&mesh, &proxy);
        client.wait_until_ready();
        let (app, _greeter) = (server.listen_at(8081), server.greet());
        let asking = client.open(server.at(8081));
        let served = app.accept();
        say(&asking, "before");
        hear(&served, "before");
        assert_eq!(proxy.del("server"), "");
        // Its listeners are closed, and its pooled and served tunnels take no more streams.
        wait_for_refusal(&client, &server);
        for (from, to) in [(&asking, &served), (&served, &asking)] {
            say(from, "and after");
            hear(to, "and after");
        }
        zspire_testkit::app::finish(&asking);
        assert_eq!(ending(&served), zspire_testkit::Ending::Orderly);
        drop(served);
        assert_eq!(ending(&asking), zspire_testkit::Ending::Orderly);
        client.metric(&["workload_manager_proxies_stopped_total 1"]);
    });
}

#[test]
fn an_answer_for_which_the_agent_no_longer_waits_is_not_sent() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        hand_over(&mesh, &proxy);
        client.wait_until_ready();
        // It is too slow: the agent asks for the next thing. Istio's takes the first answer for that one's.
        let id = client.proxy(|proxy| proxy.id());
        pause(id);
        proxy.ask_in_vain(&add("without-a-namespace", "client"));
        proxy.ask_in_vain(&del("never"));
        resume(id);
        assert_eq!(proxy.answer(), "", "the deletion's");
        assert!(proxy.keep("client").contains("snapshot"), "one answer for one question again");
        assert!(proxy.is_silent());
        let _app = server.greet();
        client.reaches(server.app());
    });
}

#[test]
fn certificates_of_the_node_come_and_go_with_its_workloads() {
    scenario(|| {
        // No pod is handed over: these are fetched before anybody asks.
        let mesh = mesh().by_hand().node("a").pod("client").pod("server").node("b").pod("elsewhere").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let wait_for = |pod: &Pod, there: bool| {
            until(&format!("the certificate of {}: {there}", pod.name()), || {
                let certificates = client.dump()["certificates"].clone();
                let all = certificates.as_array().unwrap().iter();
                let found =
                    all.filter(|entry| entry["state"] == "Available").any(|it| it["identity"] == pod.spiffe_id());
                if found == there { Ok(()) } else { Err(certificates) }
            });
        };
        until("the proxy to answer", || client.connect_admin());
        wait_for(&client, true);
        wait_for(&server, true);
        wait_for(&mesh.pod("elsewhere"), false);
        mesh.edit(|plan| plan.forget("server"));
        wait_for(&server, false);
        wait_for(&client, true);
        mesh.edit(|plan| plan.remember("server"));
        wait_for(&server, true);
    });
}

#[test]
fn malformed_messages_close_nothing_but_themselves() {
    scenario(|| {
        let (mesh, _agent, proxy) = two_pods();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        hand_over(&mesh, &proxy);
        client.wait_until_ready();
        let id = client.proxy(|proxy| proxy.id());
        let open = || std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
        let before = open();
        let netns = server.netns().as_fd();
        let refused = |descriptors: usize, payload| {
            let error = proxy.ask(&payload, &vec![netns; descriptors]);
            assert!(!error.is_empty(), "{payload:?} with {descriptors} descriptors is taken");
        };
        for _ in 0..20 {
            refused(0, add("more", "more"));
            refused(2, add("more", "more"));
            refused(16, add("more", "more"));
            refused(17, add("more", "more"));
            refused(1, add("../more", "more"));
            refused(1, add("more", ""));
            assert!(!proxy.ask_raw(&[0xff; 100], &[]).is_empty());
            assert!(!proxy.ask_raw(&[0xff; 1024], &[netns]).is_empty());
            assert!(!proxy.ask_raw(&[0; 1025], &[netns]).is_empty());
            let file = std::fs::File::open("/dev/null").unwrap();
            let error = proxy.ask(&add("more", "more"), &[file.as_fd()]);
            assert!(error.contains("not a network namespace"), "{error}");
        }
        // Of what was asked before, the last connection may just have been closed.
        zspire_testkit::until("descriptors to be closed", || match open() {
            now if now <= before => Ok(()),
            now => Err(format!("{now} are open, {before} were")),
        });
        let _app = server.greet();
        client.reaches(server.app());
        assert_eq!(client.readiness(), Ok(()));
    });
}
