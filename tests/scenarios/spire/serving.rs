//! Pods that SPIRE knows: whose identity each has, and that traffic goes on while keys are renewed and agents are killed.

use zspire_testkit::spire::Way;
use zspire_testkit::{Mesh, Pod, mesh};

use super::{by, certificate, serial, wait_for_another, wait_for_state};
use crate::traffic::Load;

by!(
    each way:
    each_pod_has_its_own_identity_and_they_reach_each_other,
    keys_are_renewed_every_few_seconds,
    agent_ends_twenty_times,
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
    let load = Load::new(&client, &server);
    load.during(2, || {
        // Good for fourteen seconds, and renewed when half of their time is over, as SPIRE counts it: after two or three.
        for _ in 0..6 {
            let before = [serial(&client), serial(&server)];
            wait_for_another(&client, &before[0]);
            wait_for_another(&server, &before[1]);
            load.more(20);
        }
    });
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
