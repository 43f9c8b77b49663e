//! Whose certificates are believed: SPIRE's CA is rotated, and trust domains begin and end to federate.

use serde_json::Value;
use zspire_testkit::plan::captured;
use zspire_testkit::spire::{Authorities, Way};
use zspire_testkit::{Mesh, Pod, mesh, until};

use super::{by, certificate, serial, wait_for_another, wait_for_state};
use crate::traffic::{Load, connect, told};

by!(
    each way:
    authority_is_rotated_under_load,
    authority_of_a_federated_domain_is_rotated_under_load,
    federation_begins_and_ends,
    mesh_moves_from_the_control_plane,
);

/// Waits until a pod trusts so many roots of a trust domain.
#[track_caller]
fn wait_for_roots(pod: &Pod, trust_domain: &str, count: usize) {
    until(&format!("{} to trust {count} roots of {trust_domain}", pod.name()), || {
        let page: Value = serde_json::from_str(&pod.admin("GET /identities", &[]).body).map_err(|e| e.to_string())?;
        let mut identities = page["identities"].as_array().into_iter().flatten();
        let own = identities.find(|identity| identity["pod"]["name"] == pod.name());
        let mut bundles = own.and_then(|own| own["bundles"].as_array()).into_iter().flatten();
        match bundles.find(|bundle| bundle["trustDomain"] == trust_domain) {
            Some(bundle) if bundle["roots"] == count => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn authority_is_rotated_under_load_where_each_proxy_asks_for_itself() {
    crate::scenario(|| authority_is_rotated_under_load(Way::Own));
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
            pods.iter().for_each(|pod| wait_for_roots(pod, pod.trust_domain(), 2));
            load.more(20);
            spire.authority("activate", &new);
            next();
            load.more(20);
            spire.authority("taint", &old);
            next();
            next();
            load.more(20);
            spire.authority("revoke", &old);
            pods.iter().for_each(|pod| wait_for_roots(pod, pod.trust_domain(), 1));
            load.more(20);
        }
    });
    zspire_testkit::say(&long, "still here");
    zspire_testkit::hear(&long_served, "still here");
}

/// A client and a server of two trust domains, which nobody has registered.
fn two_domains(way: Way) -> (Mesh, Pod, Pod) {
    let of = |name: &str, domain: &str| captured(name).of_trust_domain(domain).unregistered();
    let (client, server) = (of("client", "one.test"), of("server", "two.test"));
    let mesh = mesh().spire(way).svids_for(14).node("a").pod(client).node("b").pod(server).start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    (mesh, client, server)
}

/// Has the two trust each other, and registers the pods with that.
fn federate(mesh: &Mesh, client: &Pod, server: &Pod) {
    let spire = mesh.spire();
    for (pod, other) in [(client, server), (server, client)] {
        spire.server(pod.trust_domain()).federate_with(spire.server(other.trust_domain()));
    }
    for (pod, other) in [(client, server), (server, client)] {
        spire.register_as(pod, &pod.spiffe_id(), &["-federatesWith", &format!("spiffe://{}", other.trust_domain())]);
        wait_for_roots(pod, other.trust_domain(), 1);
    }
}

fn federation_begins_and_ends(way: Way) {
    let (mesh, client, server) = two_domains(way);
    let spire = mesh.spire();
    // To have identities is not enough.
    for pod in [&client, &server] {
        spire.register(pod);
        wait_for_state(pod, "Available");
    }
    let greeter = server.greet();
    client.is_refused(server.app());
    client.refusal("outbound", "is of a trust domain that is not trusted here");
    drop(greeter);
    [&client, &server].into_iter().for_each(|pod| spire.deregister(pod));
    federate(&mesh, &client, &server);
    let app = server.listen();
    let live = connect(&client, &server, &app);
    // One of the two no longer trusts the other.
    spire.server("two.test").end_federation_with(spire.server("one.test"));
    live.is_cut();
    told(&server, "inbound", "the certificate of the client is no longer valid", "TLS_FAILURE", "peer_untrusted");
    drop(app);
    let _app = server.greet();
    client.is_refused(server.app());
}

fn authority_of_a_federated_domain_is_rotated_under_load(way: Way) {
    let (mesh, client, server) = two_domains(way);
    federate(&mesh, &client, &server);
    let _app = server.greet();
    let two = mesh.spire().server("two.test");
    let roots = |count| [&client, &server].map(|pod| wait_for_roots(pod, "two.test", count));
    let load = Load::new(&client, &server);
    load.during(1, || {
        let Authorities { active: old, prepared: new, .. } = two.prepare_authority();
        // The other domain's server asks every few seconds.
        roots(2);
        two.authority("activate", &new);
        let before = serial(&server);
        two.authority("taint", &old);
        wait_for_another(&server, &before);
        load.more(20);
        two.authority("revoke", &old);
        roots(1);
        load.more(20);
    });
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
        nodes.iter().for_each(|(_, pod)| wait_for_roots(pod, pod.trust_domain(), 2));
        spire.authority("activate", &prepared);
        let before = nodes.map(|(_, pod)| serial(pod));
        spire.root("taint", &root);
        (0..).zip(nodes).for_each(|(n, (_, pod)): (usize, _)| drop(wait_for_another(pod, &before[n])));
        load.more(20);
        spire.root("revoke", &root);
        nodes.iter().for_each(|(_, pod)| wait_for_roots(pod, pod.trust_domain(), 1));
        load.more(20);
    });
    // What the control plane has signed is worth nothing any more.
    mesh.move_back("b").kill();
    wait_for_state(&server, "Available");
    assert_eq!(certificate(&server)["source"], "istio-ca");
    client.is_refused(server.app());
    client.refusal("outbound", "does not lead to a root of its trust domain");
}
