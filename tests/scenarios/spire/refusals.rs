//! What may not have an identity has none and says why, and nothing passes; what had one and is gone has lost it.

use zspire_testkit::plan::captured;
use zspire_testkit::process::{kill, pause, resume};
use zspire_testkit::spire::{Way, proxy_id};
use zspire_testkit::{Mesh, Pod, mesh, until};

use super::{by, certificate, serial, wait_for_another, wait_for_state};
use crate::traffic::connect;

by!(
    each way:
    proxy_that_may_not_ask_is_told_so,
    proxy_that_is_not_registered_is_told_so,
    pod_that_goes_takes_its_identity_along,
);
by!(
    process:
    process_of_root_does_not_get_the_proxys_identity,
    process_that_ends_loses_its_identity_also_as_a_zombie,
    number_of_a_process_that_is_another_now_is_worth_nothing,
    process_of_another_user_is_passed_over,
);

/// A client that is served, and a server that is not yet enrolled.
fn server_to_come(way: Way, more: &[(&str, &str)]) -> (Mesh, Pod, Pod) {
    let server = more.iter().fold(captured("server").not_started(), |pod, (name, value)| pod.with(name, value));
    let mesh = mesh().spire(way).svids_for(14).node("a").pod("client").node("b").pod(server).start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    (mesh, client, server)
}

fn proxy_that_may_not_ask_is_told_so(way: Way) {
    let (mesh, client, server) = server_to_come(way, &[]);
    let _app = server.greet();
    mesh.spire().agent("b").trust_the_proxy(false);
    mesh.enroll(&server);
    wait_for_state(
        &server,
        match way {
            Way::DelegatedByProcess => "caller not configured as an authorized delegate",
            _ => "refuses the proxy's own SVID, spiffe://cluster.local/ns/istio-system/sa/ztunnel",
        },
    );
    client.is_refused(server.app());
    mesh.spire().agent("b").trust_the_proxy(true);
    wait_for_state(&server, "Available");
    client.reaches(server.app());
}

fn proxy_that_is_not_registered_is_told_so(way: Way) {
    let (mesh, client, server) = server_to_come(way, &[]);
    let _app = server.greet();
    mesh.spire().deregister_proxy("b");
    mesh.enroll(&server);
    wait_for_state(&server, "no identity issued");
    client.is_refused(server.app());
    mesh.spire().register_proxy("b");
    wait_for_state(&server, "Available");
    client.reaches(server.app());
}

fn pod_that_goes_takes_its_identity_along(way: Way) {
    let (mesh, client, server) = server_to_come(way, &[]);
    let app = server.listen();
    mesh.enroll(&server);
    let live = connect(&client, &server, &app);
    if way == Way::BrokerByPod {
        // As far as the agent is concerned, a pod that it has attested once goes on for ever.
        mesh.spire().kubelet("b").remove(&server);
        let before = wait_for_another(&server, &serial(&server));
        wait_for_another(&server, &before);
        live.goes_on();
    }
    let output = mesh.agent_command("b", &["unenroll", "test/server"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    until("the certificate to be gone", || match certificate(&server) {
        none if none.is_null() => Ok(()),
        still => Err(still["state"].clone()),
    });
    // The drain ends with that, if not before.
    live.is_cut();
}

fn process_of_root_does_not_get_the_proxys_identity(way: Way) {
    for accepting in ["false", "true"] {
        let (mesh, client, server) = server_to_come(way, &[("SPIFFE_ACCEPT_OTHER_ID", accepting)]);
        let spire = mesh.spire();
        let of_root = spire.process(&server, 0);
        spire.application(&server, |process| *process = Some(of_root));
        mesh.enroll(&server);
        // What an agent finds of such a process is what it finds of the proxy.
        let offered = format!("the agent offers {}, expected {}", proxy_id(server.trust_domain()), server.spiffe_id());
        wait_for_state(&server, &offered);
        let _app = server.greet();
        client.is_refused(server.app());
    }
}

/// Enrolled by its namespace, so that it stays when a process of it ends.
fn enrolled_by_namespace(way: Way) -> (Mesh, Pod, Pod) {
    let (mesh, client, server) = server_to_come(way, &[]);
    let process = mesh.spire().application(&server, Option::take);
    mesh.enroll(&server);
    mesh.spire().application(&server, |application| *application = process);
    wait_for_state(&server, "Available");
    (mesh, client, server)
}

fn process_that_ends_loses_its_identity_also_as_a_zombie(way: Way) {
    let (mesh, client, server) = enrolled_by_namespace(way);
    let spire = mesh.spire();
    let app = server.listen();
    let live = connect(&client, &server, &app);
    let process = spire.application(&server, Option::take).unwrap();
    // Nobody waits for it yet: to the agent it is a process like others.
    kill(process.id());
    live.is_cut();
    wait_for_state(&server, "no process of the pod runs in its network namespace yet");
    drop(app);
    let _app = server.greet();
    client.is_refused(server.app());
    let state = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap();
    assert!(state.contains(") Z "), "{state}");
    let next = spire.process(&server, spire.user(&server));
    // Who waits for it has it asked about soon.
    until("the next process to be served", || client.ask(server.app()));
    drop((next, process));
}

fn number_of_a_process_that_is_another_now_is_worth_nothing(way: Way) {
    let (mesh, client, server) = enrolled_by_namespace(way);
    let spire = mesh.spire();
    let app = server.listen();
    let live = connect(&client, &server, &app);
    let mut process = spire.application(&server, Option::take).unwrap();
    let (id, proxy) = (process.id(), server.proxy(|proxy| proxy.id()));
    // The proxy sees nothing between the one and the other.
    pause(proxy);
    process.kill();
    let stranger = spire.user(&server) + 1000;
    let _another = until("the number to be given again", || {
        // The kernel gives out the next one, unless somebody else is faster.
        std::fs::write("/proc/sys/kernel/ns_last_pid", (id - 1).to_string()).map_err(|error| error.to_string())?;
        let process = spire.process(&server, stranger);
        if process.id() == id { Ok(process) } else { Err(format!("{} instead of {id}", process.id())) }
    });
    resume(proxy);
    live.is_cut();
    let shown = wait_for_state(&server, "no entry matches this workload");
    assert!(shown["state"].as_str().unwrap().contains(&format!("process {id}")), "{shown}");
    drop(app);
    let _app = server.greet();
    client.is_refused(server.app());
}

/// As a supervisor of another user than the application, which is older than it.
fn process_of_another_user_is_passed_over(way: Way) {
    let (mesh, client, server) = server_to_come(way, &[]);
    let spire = mesh.spire();
    drop(spire.application(&server, Option::take));
    let _app = server.greet();
    let _supervisor = spire.process(&server, spire.user(&server) + 1000);
    mesh.enroll(&server);
    wait_for_state(&server, "no entry matches this workload");
    let _application = spire.process(&server, spire.user(&server));
    wait_for_state(&server, "Available");
    client.reaches(server.app());
}

#[test]
fn pod_that_the_kubelet_does_not_know_yet_is_asked_about_again() {
    crate::scenario(|| {
        let (mesh, client, server) = server_to_come(Way::BrokerByPod, &[]);
        let _app = server.greet();
        let kubelet = mesh.spire().kubelet("b");
        kubelet.remove(&server);
        mesh.enroll(&server);
        wait_for_state(&server, "not found on agent node");
        client.is_refused(server.app());
        kubelet.add(&server);
        wait_for_state(&server, "Available");
        client.reaches(server.app());
    });
}
