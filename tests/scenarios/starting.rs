//! Starting with what is wrong: each mistake has its exit code and names itself.

use zspire_testkit::plan::captured;
use zspire_testkit::policy::deny_from;
use zspire_testkit::{Discovery, Mesh, Pod, mesh, uncaptured, until};

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

/// A pod whose proxy has the mesh from [`Discovery`].
fn discovering(name: &str) -> zspire_testkit::plan::PodPlan {
    captured(name).with("XDS_ADDRESS", Discovery::URL).with("LOCAL_XDS_PATH", "").not_started()
}

/// Starts a proxy and waits until it has heard from discovery.
fn start(pod: &Pod, heard: impl Fn(&serde_json::Value) -> bool) {
    pod.start();
    until("the first answer of discovery", || {
        // There is an admin page before there is anything else.
        if pod.readiness().is_err_and(|why| why.starts_with("no answer")) {
            return Err(serde_json::Value::Null);
        }
        let dump = pod.dump();
        if heard(&dump) { Ok(()) } else { Err(dump["discovery"].clone()) }
    });
}

#[test]
fn nothing_is_decided_without_the_policies() {
    scenario(|| {
        let mesh = mesh()
            .node("a")
            .pod("client")
            .pod(uncaptured("stranger"))
            .node("b")
            .pod(discovering("server"))
            .policy(deny_from("client"))
            .start();
        let (client, stranger, server) = (mesh.pod("client"), mesh.pod("stranger"), mesh.pod("server"));
        let discovery = Discovery::start(&mesh);
        discovery.tell_addresses();
        start(&server, |dump| dump["workloads"].as_array().is_some_and(|all| !all.is_empty()));
        let (_app, _elsewhere) = (server.greet(), stranger.greet());
        std::thread::scope(|scope| {
            for from in [&client, &stranger] {
                scope.spawn(|| from.is_refused(server.app()));
            }
            scope.spawn(|| server.is_refused(stranger.app()));
        });
        for direction in ["inbound", "outbound"] {
            server.refusal(direction, "waiting for discovery to tell all workloads and policies");
        }
        server.metric(&["zspire_early_denials_total", "reason=\"no_discovery\"", "reporter=\"destination\""]);
        let waiting = server.readiness().unwrap_err();
        assert!(waiting.contains("discovery"), "{waiting}");
        discovery.tell_policies();
        server.wait_until_ready();
        stranger.reaches(server.app());
        server.reaches(stranger.app());
        client.is_refused(server.app());
        server.refusal("inbound", &deny_from("client").key());
    });
}

#[test]
fn nothing_passes_in_plain_text_without_the_workloads() {
    scenario(|| {
        let client = discovering("client").with("UNSTABLE_ENABLE_SOCKS5", "true");
        let mesh = mesh().node("a").pod(client).node("b").pod("server").start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let discovery = Discovery::start(&mesh);
        discovery.tell_policies();
        start(&client, |dump| dump["discovery"]["connected"] == true);
        let app = server.listen();
        client.is_refused(server.app());
        client.refusal("outbound", "waiting for discovery to tell all workloads and policies");
        assert!(app.is_idle());
        drop(app);
        let _app = server.greet();
        // A connection that was there before the workloads waits for them.
        let early = client.open(server.app());
        discovery.tell_addresses();
        assert_eq!(zspire_testkit::app::greeting(&early).unwrap().by, "server");
        drop(early);
        server.access("inbound", |line| line["src.identity"] == client.spiffe_id() && line["error"].is_null());
        client.wait_until_ready();
    });
}

#[test]
fn readiness_waits_for_the_workload_and_its_certificate() {
    scenario(|| {
        let without_ca = |name| captured(name).with("FAKE_CA", "false").with("CA_ADDRESS", "https://127.0.0.1:1");
        let mesh = mesh().node("a").pod(without_ca("server").not_started()).start();
        let server = mesh.pod("server");
        mesh.edit(|plan| plan.forget("server"));
        server.start();
        let waits_for = |what: &str| {
            until(what, || match server.readiness() {
                Err(why) if why.contains(what) => Ok(why),
                other => Err(format!("{other:?}")),
            })
        };
        waits_for("waiting for discovery to know workload test/server");
        mesh.edit(|plan| plan.remember("server"));
        waits_for(&format!("waiting for the certificate of {}: ", server.spiffe_id()));
        waits_for("127.0.0.1:1");
    });
}
