//! Traffic between pods of an Istio mesh.

use std::collections::BTreeSet;

use zspire_testkit::{mesh, uncaptured, until};

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
        let [client, near, far, plain] = ["client", "near", "far", "plain"].map(|name| mesh.pod(name));
        let _servers = [near.greet(), far.greet(), plain.greet()];
        for server in [&near, &far] {
            client.reaches(server.app());
            let inbound = server.access("inbound", |line| line["error"].is_null());
            assert_eq!(inbound["src.identity"], client.spiffe_id());
        }
        let mut seen = BTreeSet::new();
        until("both endpoints to be chosen", || {
            seen.insert(client.reaches(mesh.service("both")).by);
            if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}")) }
        });
        // Who has no proxy is reached and reaches others in plaintext.
        client.reaches(plain.app());
        client.access("outbound", |line| line["dst.workload"] == "plain" && line["dst.hbone_addr"].is_null());
        plain.reaches(far.app());
        far.access("inbound", |line| line["src.workload"] == "plain" && line["src.identity"].is_null());
    });
}
