//! Crashes and renewals: what goes on, and that what does not is never taken for a good end.

use serde_json::Value;
use zspire_testkit::app::finish;
use zspire_testkit::plan::captured;
use zspire_testkit::{Ending, Pod, ending, hear, mesh, say, until};

use crate::scenario;

#[test]
fn crash_of_a_proxy_is_a_reset_and_the_next_one_serves() {
    for crashing in ["client", "server"] {
        scenario(|| {
            let mesh = mesh().node("a").pod("client").node("b").pod("server").start();
            let (client, server) = (mesh.pod("client"), mesh.pod("server"));
            let app = server.listen();
            let asking = client.open(server.app());
            let served = app.accept();
            say(&asking, "hello");
            hear(&served, "hello");
            mesh.pod(crashing).proxy(|proxy| proxy.kill());
            // The kernel ends the sockets of the process that is gone, in good order. The other proxy must know better.
            let far = if crashing == "client" { &served } else { &asking };
            assert_eq!(ending(far), Ending::Reset, "{crashing}");
            drop(app);
            let _app = server.greet();
            mesh.pod(crashing).start();
            mesh.pod(crashing).wait_until_ready();
            client.reaches(server.app());
        });
    }
}

/// The serial number of the pod's own certificate.
fn serial(pod: &Pod) -> Value {
    let dump = pod.dump();
    let own = dump["certificates"].as_array().into_iter().flatten().find(|entry| entry["identity"] == pod.spiffe_id());
    own.map_or(Value::Null, |entry| entry["certChain"][0]["serialNumber"].clone())
}

#[test]
fn certificates_are_renewed_under_live_connections() {
    scenario(|| {
        let short = |name| captured(name).with("SECRET_TTL", "4s");
        let mesh = mesh().node("a").pod(short("client")).node("b").pod(short("server")).start();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let app = server.listen();
        let asking = client.open(server.app());
        let served = app.accept();
        say(&asking, "hello");
        hear(&served, "hello");
        for pod in [&client, &server] {
            for _ in 0..3 {
                let before = serial(pod);
                until("another certificate", || match serial(pod) {
                    now if now != before && !now.is_null() => Ok(()),
                    now => Err(now),
                });
            }
        }
        // Every certificate that the connection began with has expired.
        say(&served, "still here");
        hear(&asking, "still here");
        finish(&asking);
        assert_eq!(ending(&served), Ending::Orderly);
        drop(app);
        let _app = server.greet();
        client.reaches(server.app());
    });
}
