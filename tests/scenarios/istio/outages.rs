//! istiod is not there, comes back, or signs with another root, while pods talk to each other.

use std::fs;
use std::time::Instant;

use serde_json::Value;
use zspire_testkit::plan::{PodPlan, captured};
use zspire_testkit::process::{pause, resume};
use zspire_testkit::{Pod, mesh, until};

use super::{certificate_of, comes_to_reach, wait_for_state};
use crate::traffic::{Load, connect_to};

#[test]
fn istiod_that_is_absent_at_the_start_is_waited_for() {
    crate::scenario(|| {
        let mesh = mesh().istiod_down().node("a").pod("client").node("b").pod("server").start();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let _app = server.greet();
        until("readiness to say what is missing", || match client.readiness() {
            Err(why) if why.contains("10.10.0.254:15012") || why.contains("root-cert.pem") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        mesh.istio().start_istiod();
        client.wait_until_ready();
        server.wait_until_ready();
        comes_to_reach(&client, server.app());
    });
}

#[test]
fn istiod_is_killed_and_restarted_under_load() {
    crate::scenario(|| {
        let mesh =
            mesh().istio().node("a").pod("client").node("b").pod("server").pod(captured("late").not_listed()).start();
        let [client, server, late] = ["client", "server", "late"].map(|name| mesh.pod(name));
        let (_apps, app) = ([server.greet(), late.greet()], server.listen_at(8081));
        let live = connect_to(&client, server.at(8081), &app);
        let load = Load::new(&client, &server);
        load.during(2, || {
            load.more(50);
            mesh.istio().istiod().stop();
            let away = Instant::now();
            mesh.istio().add(&late);
            mesh.enroll(&late);
            load.more(200);
            assert_eq!(
                certificate_of(&server, &late.spiffe_id()).map_or(Value::Null, |it| it["state"].clone()),
                Value::Null
            );
            mesh.istio().start_istiod();
            let ready = Instant::now();
            comes_to_reach(&client, late.app());
            wait_for_state(&server, &late.spiffe_id(), "Available");
            println!(
                "istiod was away for {:.1?}; a new pod was served {:.1?} after it was ready",
                ready - away,
                ready.elapsed()
            );
            load.more(50);
            live.goes_on();
            assert_eq!(load.failures(), Vec::<String>::new());
        });
    });
}

/// It takes connections and says nothing.
#[test]
fn istiod_that_does_not_answer_delays_only_what_is_new() {
    crate::scenario(|| {
        let mesh =
            mesh().istio().node("a").pod("client").pod(captured("late").not_listed()).node("b").pod("server").start();
        let [client, server, late] = ["client", "server", "late"].map(|name| mesh.pod(name));
        let _apps = [server.greet(), late.greet()];
        let istio = mesh.istio();
        istio.istiod().process(|istiod| pause(istiod.id()));
        istio.add(&late);
        mesh.enroll(&late);
        let load = Load::new(&client, &server);
        load.during(2, || load.more(200));
        late.is_refused(server.app());
        istio.istiod().process(|istiod| resume(istiod.id()));
        comes_to_reach(&late, server.app());
        comes_to_reach(&client, late.app());
    });
}

/// The serial number and the roots of a pod's certificate.
fn shown(pod: &Pod) -> (Value, usize) {
    let certificate = certificate_of(pod, &pod.spiffe_id()).unwrap_or_default();
    let roots = certificate["rootCerts"].as_array().map_or(0, Vec::len);
    (certificate["certChain"][0]["serialNumber"].clone(), roots)
}

/// From one plugged-in CA to another: the old root, both, and then the new one alone.
#[test]
fn root_is_rotated_under_load() {
    crate::scenario(|| {
        let brief = |name: &str| -> PodPlan { captured(name).with("SECRET_TTL", "20s") };
        let mesh = mesh().istiod_down().node("a").pod(brief("client")).node("b").pod(brief("server")).start();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let istio = mesh.istio();
        let (old, new) = (istio.authority("old"), istio.authority("new"));
        istio.plug_in(&old, &[&old]);
        istio.start_istiod();
        [&client, &server].into_iter().for_each(Pod::wait_until_ready);
        let _apps = server.greet();
        let app = server.listen_at(8081);
        let live = connect_to(&client, server.at(8081), &app);
        let load = Load::new(&client, &server);
        load.during(2, || {
            for (signs, trusted) in [(&old, &[&old, &new][..]), (&new, &[&old, &new]), (&new, &[&new])] {
                let (before, started) = ([&client, &server].map(shown), Instant::now());
                istio.plug_in(signs, trusted);
                istio.start_istiod();
                for (pod, before) in [&client, &server].into_iter().zip(before) {
                    until(&format!("{} to have a certificate by the new roots", pod.name()), || match shown(pod) {
                        now if now.0 != before.0 && now.1 == trusted.len() => Ok(()),
                        now => Err(format!("{now:?}")),
                    });
                }
                println!("all certificates are by the next roots {:.1?} after istiod was stopped", started.elapsed());
                load.more(100);
                live.goes_on();
                assert_eq!(load.failures(), Vec::<String>::new(), "{trusted:?}");
            }
        });
    });
}

/// The file is what a kubelet makes of a ConfigMap: it may be caught empty, cut off, or with something else in it.
#[test]
fn root_file_that_is_broken_is_told_and_the_roots_before_are_kept() {
    crate::scenario(|| {
        let names = ["empty", "truncated", "other"];
        let plan = mesh().istio().node("a").pod("client").pod("server");
        let mesh = names.into_iter().fold(plan, |plan, name| plan.pod(captured(name).not_listed())).start();
        let [client, server] = ["client", "server"].map(|name| mesh.pod(name));
        let _app = server.greet();
        let istio = mesh.istio();
        let file = mesh.path("root-cert.pem");
        let good = fs::read_to_string(&file).unwrap();
        for name in names {
            let broken = match name {
                "empty" => String::new(),
                "truncated" => good[..good.len() / 2].to_owned(),
                _ => istio.authority("stranger").root(),
            };
            // As a careless writer does it: in place, in two steps.
            fs::write(&file, "").unwrap();
            fs::write(&file, broken).unwrap();
            let pod = mesh.pod(name);
            istio.add(&pod);
            if name == "other" {
                // That is another root, whatever it is good for.
                wait_for_state(
                    &client,
                    &pod.spiffe_id(),
                    "check that its roots (CA_ROOT_CA, XDS_ROOT_CA) are those of its CA",
                );
                fs::write(&file, &good).unwrap();
            }
            wait_for_state(&client, &pod.spiffe_id(), "Available");
            client.reaches(server.app());
            fs::write(&file, &good).unwrap();
        }
        for why in ["no CERTIFICATE block found", "missing section end marker"] {
            client.proxy(|proxy| {
                proxy.line("that the file is of no use", |line| {
                    let said = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
                    said("message").contains("keeping the roots") && said("why").contains(why)
                })
            });
        }
    });
}
