//! Entries that come and go, and an agent that has nothing new to say.

use zspire_testkit::plan::captured;
use zspire_testkit::spire::Way;
use zspire_testkit::{Mesh, Pod, mesh, until};

use super::{by, certificate, wait_for_state};
use crate::traffic::{Load, connect, told};

by!(
    each way:
    entry_added_later_is_picked_up,
    entry_deleted_cuts_within_a_second_and_created_again_restores,
    entry_deleted_cuts_also_where_another_still_matches,
    expired_svids_are_not_used_while_the_server_is_away,
);

fn two_nodes(way: Way) -> (Mesh, Pod, Pod) {
    let mesh = mesh().spire(way).node("a").pod("client").pod("other").node("b").pod("server").start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    (mesh, client, server)
}

fn entry_added_later_is_picked_up(way: Way) {
    let late = captured("server").unregistered();
    let mesh = mesh().spire(way).node("a").pod("client").node("b").pod(late).start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _app = server.greet();
    let shown = wait_for_state(&server, "no entry matches this workload");
    let why = shown["state"].as_str().unwrap();
    assert!(why.contains(&server.spiffe_id()), "{why}");
    client.is_refused(server.app());
    mesh.spire().register(&server);
    wait_for_state(&server, "Available");
    client.reaches(server.app());
}

fn entry_deleted_cuts_within_a_second_and_created_again_restores(way: Way) {
    let (mesh, client, server) = two_nodes(way);
    let other = mesh.pod("other");
    // Both ends of a tunnel can lose their identity.
    for (losing, direction) in [(&server, "inbound"), (&client, "outbound")] {
        let app = server.listen();
        let (live, untouched) = (connect(&client, &server, &app), connect(&other, &server, &app));
        mesh.spire().deregister(losing);
        live.is_cut();
        let cut = told(losing, direction, "credentials revoked", "IDENTITY_ERROR", "credentials_revoked");
        let message = losing.proxy(|proxy| {
            let taken = "the SPIRE agent no longer offers the SVID";
            proxy.line("the agent's message", |line| line["message"].as_str().is_some_and(|it| it.contains(taken)))
        });
        let took = crate::traffic::seconds_between(&message, &cut);
        assert!(took < 1.0, "{took} s");
        let shown = wait_for_state(losing, "no entry matches this workload");
        assert_eq!(shown["certChain"].as_array().map(Vec::len), Some(0), "{shown}");
        if losing.name() == "client" {
            untouched.goes_on();
        } else {
            untouched.is_cut();
        }
        drop(app);
        let _app = server.greet();
        client.is_refused(server.app());
        mesh.spire().register(losing);
        wait_for_state(losing, "Available");
        client.reaches(server.app());
    }
}

fn entry_deleted_cuts_also_where_another_still_matches(way: Way) {
    let (mesh, client, server) = two_nodes(way);
    let another = format!("spiffe://{}/another", server.trust_domain());
    mesh.spire().register_also(&server, &another, &[]);
    until("both SVIDs to be offered", || match server.admin("GET /identities", &[]).body {
        page if page.contains(&another) && page.contains(&server.spiffe_id()) => Ok(()),
        page => Err(page),
    });
    let app = server.listen();
    let live = connect(&client, &server, &app);
    mesh.spire().deregister(&server);
    live.is_cut();
    wait_for_state(&server, &format!("the agent offers {another}"));
    drop(app);
    let _app = server.greet();
    client.is_refused(server.app());
}

fn expired_svids_are_not_used_while_the_server_is_away(way: Way) {
    let mesh = mesh().spire(way).svids_for(14).node("a").pod("client").node("b").pod("server").start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let app = server.listen();
    let live = connect(&client, &server, &app);
    let spire = mesh.spire().server(server.trust_domain());
    spire.stop();
    drop(app);
    {
        let _app = server.greet();
        let load = Load::new(&client, &server);
        // Without a server nothing is renewed, and what there is is good for a while.
        load.during(1, || load.more(50));
    }
    for pod in [&client, &server] {
        let shown = wait_for_state(pod, "expired at");
        assert_eq!(shown["certChain"].as_array().map(Vec::len), Some(0), "{shown}");
    }
    live.is_cut();
    let _app = server.greet();
    client.is_refused(server.app());
    client.refusal("outbound", "expired at");
    spire.start_again();
    for pod in [&client, &server] {
        wait_for_state(pod, "Available");
    }
    client.reaches(server.app());
    assert!(certificate(&client)["certChain"][0].is_object());
}
