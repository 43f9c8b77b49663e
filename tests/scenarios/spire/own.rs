//! A proxy for one workload, which is itself what the agent attests: the Workload API.

use zspire_testkit::mesh;
use zspire_testkit::spire::Way;

use super::{certificate, serial, wait_for_another, wait_for_state};
use crate::scenario;
use crate::traffic::Load;

#[test]
fn proxy_of_one_workload_has_its_identity_and_renews_it() {
    scenario(|| {
        let mesh = mesh().spire(Way::Own).svids_for(14).node("a").pod("client").node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        let load = Load::new(&client, &server);
        load.during(1, || {
            for _ in 0..3 {
                let before = [serial(&client), serial(&server)];
                wait_for_another(&client, &before[0]);
                wait_for_another(&server, &before[1]);
                load.more(10);
            }
        });
        server.access("inbound", |line| line["src.identity"] == client.spiffe_id());
        assert_eq!(certificate(&client)["source"], "workload-api");
        mesh.spire().deregister(&server);
        wait_for_state(&server, "no identity issued");
        client.is_refused(server.app());
        mesh.spire().register(&server);
        wait_for_state(&server, "Available");
        client.reaches(server.app());
    });
}
