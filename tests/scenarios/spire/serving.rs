//! Pods that SPIRE knows: whose identity each has, and that traffic goes on while keys are renewed and agents are killed.

use std::time::{Duration, Instant};

use zspire_testkit::plan::captured;
use zspire_testkit::policy::deny_principal;
use zspire_testkit::spire::Way;
use zspire_testkit::{Mesh, Pod, hear, mesh, say, until};

use super::{by, certificate, serial, wait_for_another, wait_for_state};
use crate::traffic::{Load, connect};

by!(
    each way:
    each_pod_has_its_own_identity_and_they_reach_each_other,
    keys_are_renewed_every_few_seconds,
    agent_ends_twenty_times,
    agents_renew_their_own_svids,
    svids_of_one_id_are_told_apart_by_hint,
    identities_of_another_form_than_istios_work_and_policies_name_them,
);

fn two_nodes(way: Way) -> (Mesh, Pod, Pod) {
    let mesh = mesh().spire(way).svids_for(14).node("a").pod("client").node("b").pod("server").start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    (mesh, client, server)
}

fn each_pod_has_its_own_identity_and_they_reach_each_other(way: Way) {
    let mesh = mesh().spire(way).node("a").pod("client").pod("other").node("b").pod("server").start();
    let [client, other, server] = ["client", "other", "server"].map(|name| mesh.pod(name));
    let _apps = [&client, &other, &server].map(Pod::greet);
    for (from, to) in [(&client, &server), (&other, &server), (&server, &client), (&client, &other)] {
        from.reaches(to.app());
        let line = to.access("inbound", |line| line["src.identity"] == from.spiffe_id());
        assert_eq!(line["dst.identity"], to.spiffe_id());
    }
    for pod in [&client, &other, &server] {
        let shown = certificate(pod);
        assert_eq!((&shown["state"], &shown["source"]), (&"Available".into(), &way.source().into()), "{shown}");
        assert_eq!((&shown["identity"], &shown["workload"]), (&pod.spiffe_id().into(), &pod.uid().into()));
    }
    assert_ne!(serial(&client), serial(&other));
}

#[test]
fn broker_is_asked_over_tcp() {
    crate::scenario(|| each_pod_has_its_own_identity_and_they_reach_each_other(Way::BrokerOverTcp));
}

fn keys_are_renewed_every_few_seconds(way: Way) {
    let (_mesh, client, server) = two_nodes(way);
    let _app = server.greet();
    let app = server.listen_at(8081);
    let (live, served) = (client.open(server.at(8081)), app.accept());
    let (load, started) = (Load::new(&client, &server), Instant::now());
    load.during(2, || {
        // Good for fourteen seconds, and renewed when half of their time is over, as SPIRE counts it: after two or three.
        while started.elapsed() < Duration::from_secs(16) {
            let before = [serial(&client), serial(&server)];
            wait_for_another(&client, &before[0]);
            wait_for_another(&server, &before[1]);
            load.more(20);
        }
    });
    // Every certificate that it began with has expired.
    for (from, to) in [(&live, &served), (&served, &live)] {
        say(from, "still here");
        hear(to, "still here");
    }
}

fn agent_ends_twenty_times(way: Way) {
    let (mesh, client, server) = two_nodes(way);
    let _app = server.greet();
    client.reaches(server.app());
    let load = Load::new(&client, &server);
    load.during(1, || {
        for round in 0..20 {
            let agent = mesh.spire().agent(if round % 2 == 0 { "a" } else { "b" });
            // Its sockets are there and refuse, or they are gone.
            if round % 4 < 2 {
                agent.kill()
            } else {
                agent.stop()
            }
            load.more(5);
            agent.start_again();
            load.more(5);
        }
    });
    // What was renewed since is from the agents that run now.
    for pod in [&client, &server] {
        wait_for_another(pod, &serial(pod));
        wait_for_state(pod, "Available");
    }
}

fn agents_renew_their_own_svids(way: Way) {
    let mesh = mesh().spire(way).svids_for(14).agents_for(14).node("a").pod("client").node("b").pod("server").start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _app = server.greet();
    let load = Load::new(&client, &server);
    load.during(1, || {
        for node in ["a", "b"] {
            // Every five seconds: the one that it began with has expired when the fourth is there.
            until("the agent to renew its own SVID", || {
                let log = mesh.spire().agent(node).log();
                match log.matches("Successfully reattested node").count() {
                    4.. => Ok(()),
                    count => Err(count),
                }
            });
        }
        for pod in [&client, &server] {
            wait_for_another(pod, &serial(pod));
        }
        load.more(20);
    });
}

fn svids_of_one_id_are_told_apart_by_hint(way: Way) {
    let (client, server) = (captured("client").not_started(), captured("server").not_started());
    let server = server.with("SPIFFE_HINT", "second");
    let mesh = mesh().spire(way).svids_for(14).node("a").pod(client).node("b").pod(server).start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    for pod in [&client, &server] {
        // Another selector of the pod's makes it another entry.
        let selector = match way {
            Way::BrokerByPod => format!("k8s:pod-name:{}", pod.name()),
            _ => format!("unix:gid:{}", mesh.spire().user(pod)),
        };
        mesh.spire().register_as(pod, &pod.spiffe_id(), &["-hint", "second", "-selector", &selector]);
        mesh.enroll(pod);
    }
    let _app = server.greet();
    wait_for_state(&server, "Available");
    // At once, or when the one expires that was there before the agent knew of the second.
    let id = client.spiffe_id();
    let both = ["several SVIDs that could be meant", &id, "(hint \"second\")"];
    let shown = wait_for_state(&client, both[0]);
    assert!(both.iter().all(|words| shown["state"].as_str().unwrap().contains(words)), "{shown}");
    client.is_refused(server.app());
    mesh.spire().deregister(&client);
    wait_for_state(&client, "Available");
    client.reaches(server.app());
}

fn identities_of_another_form_than_istios_work_and_policies_name_them(way: Way) {
    let pod = |name: &str| {
        let template = "spiffe://{trust_domain}/{namespace}/of/{service_account}";
        captured(name).with("SPIFFE_ID_TEMPLATE", template).unregistered()
    };
    let mesh = mesh().spire(way).node("a").pod(pod("client")).node("b").pod(pod("server")).start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let id = |pod: &Pod| format!("cluster.local/test/of/{}", pod.name());
    for pod in [&client, &server] {
        mesh.spire().register_as(pod, &format!("spiffe://{}", id(pod)), &[]);
        wait_for_state(pod, "Available");
    }
    let app = server.listen();
    let live = connect(&client, &server, &app);
    mesh.edit(|plan| plan.add_policy(deny_principal(&id(&client))));
    live.is_cut();
    let line = server.refusal("inbound", "explicitly denied by: test/deny-principal");
    assert_eq!(line["src.identity"], format!("spiffe://{}", id(&client)));
    drop(app);
    let _app = server.greet();
    client.is_refused(server.app());
    mesh.edit(|plan| plan.remove_policies());
    until("the policy to be gone", || client.ask(server.app()));
}
