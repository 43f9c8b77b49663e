//! Whose certificates are believed: SPIRE's CA is rotated, and trust domains begin and end to federate.

use zspire_testkit::plan::captured;
use zspire_testkit::spire::{Authorities, Way};
use zspire_testkit::{Pod, mesh, until};

use super::{by, certificate, serial, wait_for_another, wait_for_state};
use crate::traffic::{Load, connect, told};

by!(each way: authority_is_rotated_under_load, federation_begins_and_ends, mesh_moves_from_the_control_plane);

/// Waits until a pod trusts so many roots.
#[track_caller]
fn wait_for_roots(pod: &Pod, count: usize) {
    until(&format!("{} to trust {count} roots", pod.name()), || {
        match certificate(pod)["rootCerts"].as_array().map(Vec::len) {
            Some(now) if now == count => Ok(()),
            now => Err(format!("{now:?}")),
        }
    });
}

fn authority_is_rotated_under_load(way: Way) {
    let mesh = mesh().spire(way).svids_for(14).node("a").pod("client").node("b").pod("server").start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let pods = [&client, &server];
    let app = server.listen_at(8081);
    let (long, long_served) = (client.open(server.at(8081)), app.accept());
    let _app = server.greet();
    let spire = mesh.spire().server(server.trust_domain());
    let load = Load::new(&client, &server);
    let next = || pods.map(|pod| wait_for_another(pod, &serial(pod)));
    load.during(2, || {
        for _ in 0..2 {
            let Authorities { active: old, prepared: new, .. } = spire.prepare_authority();
            pods.iter().for_each(|pod| wait_for_roots(pod, 2));
            load.more(20);
            spire.authority("activate", &new);
            next();
            load.more(20);
            spire.authority("taint", &old);
            next();
            next();
            load.more(20);
            spire.authority("revoke", &old);
            pods.iter().for_each(|pod| wait_for_roots(pod, 1));
            load.more(20);
        }
    });
    zspire_testkit::say(&long, "still here");
    zspire_testkit::hear(&long_served, "still here");
}

fn federation_begins_and_ends(way: Way) {
    let of = |name: &str, domain: &str| captured(name).of_trust_domain(domain).unregistered();
    let mesh =
        mesh().spire(way).node("a").pod(of("client", "one.test")).node("b").pod(of("server", "two.test")).start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let spire = mesh.spire();
    let (one, two) = (spire.server("one.test"), spire.server("two.test"));
    // To have identities is not enough.
    spire.register(&client);
    spire.register(&server);
    wait_for_state(&client, "Available");
    wait_for_state(&server, "Available");
    {
        let _app = server.greet();
        client.is_refused(server.app());
    }
    client.refusal("outbound", "two.test");
    one.federate_with(two);
    two.federate_with(one);
    for (pod, other) in [(&client, "two.test"), (&server, "one.test")] {
        spire.deregister(pod);
        spire.register_as(pod, &pod.spiffe_id(), &["-federatesWith", &format!("spiffe://{other}")]);
    }
    {
        let _app = server.greet();
        until("both to know the other's roots", || client.ask(server.app()));
    }
    let app = server.listen();
    let live = connect(&client, &server, &app);
    // One of the two no longer trusts the other.
    two.end_federation_with(one);
    live.is_cut();
    told(&server, "inbound", "the certificate of the client is no longer valid", "TLS_FAILURE", "peer_untrusted");
    drop(app);
    let _app = server.greet();
    client.is_refused(server.app());
}

/// One node after the other, then the root that both had: nothing but SPIRE vouches for anybody in the end.
fn mesh_moves_from_the_control_plane(way: Way) {
    let mesh = mesh().spire(way).from_control_plane().node("a").pod("client").node("b").pod("server").start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let nodes = [("a", &client), ("b", &server)];
    let spire = mesh.spire().server(server.trust_domain());
    let _app = server.greet();
    client.reaches(server.app());
    let load = Load::new(&client, &server);
    load.during(2, || {
        for (node, pod) in nodes {
            assert_eq!(certificate(pod)["source"], "istio-ca");
            let mut old = mesh.move_to_spire(node);
            load.more(20);
            old.terminate();
            assert_eq!(old.ended().code(), Some(0));
            load.more(20);
            wait_for_state(pod, "Available");
            assert_eq!(certificate(pod)["source"], way.source());
        }
        mesh.spire().change_root();
        let Authorities { prepared, root, .. } = spire.prepare_authority();
        nodes.iter().for_each(|(_, pod)| wait_for_roots(pod, 2));
        spire.authority("activate", &prepared);
        let before = nodes.map(|(_, pod)| serial(pod));
        spire.root("taint", &root);
        (0..).zip(nodes).for_each(|(n, (_, pod)): (usize, _)| drop(wait_for_another(pod, &before[n])));
        load.more(20);
        spire.root("revoke", &root);
        nodes.iter().for_each(|(_, pod)| wait_for_roots(pod, 1));
        load.more(20);
    });
    // What the control plane has signed is worth nothing any more.
    mesh.move_back("b").kill();
    wait_for_state(&server, "Available");
    assert_eq!(certificate(&server)["source"], "istio-ca");
    client.is_refused(server.app());
    client.refusal("outbound", "does not lead to a root of its trust domain");
}
