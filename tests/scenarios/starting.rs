//! Starting with what is wrong: each mistake has its exit code and names itself.

use zspire_testkit::plan::captured;
use zspire_testkit::{Mesh, mesh};

use crate::scenario;

fn one_pod() -> Mesh {
    mesh().node("a").pod(captured("server").not_started()).start()
}

#[test]
fn port_that_is_taken_is_named() {
    for (port, what) in
        [(15008, "inbound"), (15001, "outbound"), (15021, "readiness"), (15000, "admin"), (15020, "metrics")]
    {
        scenario(|| {
            let mesh = one_pod();
            let server = mesh.pod("server");
            let _taken = server.listen_at(port);
            server.start();
            assert_eq!(server.ended().code(), Some(1), "{port}");
            let said = server.proxy(|proxy| proxy.log());
            let last = said.lines().last().unwrap();
            assert!(last.starts_with("zspire: cannot listen on") && last.contains(&format!(":{port}")), "{last}");
            assert!(last.contains(what), "{last}");
        });
    }
}

#[test]
fn wrong_variable_is_named() {
    let wrong = [
        ("PROXY_MODE", "sometimes"),
        ("PROXY_WORKLOAD_INFO", "one-part"),
        ("CONNECTION_TERMINATION_DEADLINE", "soon"),
        ("ZTUNNEL_WORKER_THREADS", "many"),
        ("HTTP2_FRAME_SIZE", "12"),
        ("SECRET_TTL", "-1s"),
        ("XDS_ADDRESS", "not a url"),
        ("CA_ADDRESS", "ftp://somewhere"),
        ("RUST_LOG", "loud=very"),
        ("LOG_FORMAT", "xml"),
        ("IDENTITY_SOURCE", "hope"),
        ("COMPLIANCE_POLICY", "none-such"),
        ("PACKET_MARK", "x"),
        ("ZSPIRE_ADMIN_PORT", "70000"),
        ("TRUST_DOMAIN", "Not/A/Domain"),
    ];
    scenario(|| {
        let mesh = one_pod();
        let server = mesh.pod("server");
        for (name, value) in wrong {
            let mut command = server.proxy_command();
            command.env(name, value).env_remove("LOCAL_XDS_PATH").env_remove("FAKE_CA");
            let mut proxy = mesh.process_of(&format!("wrong-{name}"), command);
            assert_eq!(proxy.ended().code(), Some(2), "{name}={value}: {}", proxy.log());
            assert!(proxy.log().contains(name), "{name}={value}: {}", proxy.log());
        }
    });
}

#[test]
fn mesh_file_that_cannot_be_read_is_named() {
    scenario(|| {
        let mesh = one_pod();
        mesh.write_file("{ \"workloads\": [ { \"name\": \"no-uid\" } ] }");
        let server = mesh.pod("server");
        server.start();
        assert_eq!(server.ended().code(), Some(1));
        let said = server.proxy(|proxy| proxy.log());
        let last = said.lines().last().unwrap();
        assert!(last.contains("LOCAL_XDS_PATH") && last.contains("mesh.json") && last.contains("uid"), "{last}");
    });
}
