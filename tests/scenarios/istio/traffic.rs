//! Traffic between pods of an Istio mesh.

use zspire_testkit::{mesh, uncaptured};

#[test]
fn pods_reach_each_other_by_address_and_by_service() {
    crate::scenario(|| {
        let mesh = mesh()
            .istio()
            .node("a")
            .pod("client")
            .pod("near")
            .node("b")
            .pod("far")
            .pod(uncaptured("plain"))
            .service("both", &["near", "far"])
            .start();
        let (client, near, far) = (mesh.pod("client"), mesh.pod("near"), mesh.pod("far"));
        let _servers = [near.greet(), far.greet(), mesh.pod("plain").greet()];
        for server in [&near, &far] {
            client.reaches(server.app());
            let inbound = server.access("inbound", |line| line["error"].is_null());
            assert_eq!(inbound["src.identity"], client.spiffe_id());
        }
        client.reaches(mesh.service("both"));
    });
}
