//! Enrolment without Kubernetes: what it changes in a pod, that all of it goes again, and that nothing passes meanwhile.

use std::io::{ErrorKind, Read as _, Write as _};
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use serde_json::Value;
use zspire_testkit::{Mesh, Pod, hear, mesh, say, uncaptured, until};

use crate::scenario;
use crate::traffic::connect;

/// A client and a server on two nodes, both enrolled, and a place outside the mesh beside the server.
fn enrolled() -> Mesh {
    mesh().shared().node("a").pod("client").node("b").pod("server").pod(uncaptured("outsider")).start()
}

/// The same with nobody enrolled yet.
fn not_enrolled() -> Mesh {
    let not_yet = |name| zspire_testkit::captured(name).not_started();
    mesh()
        .shared()
        .node("a")
        .pod(not_yet("client"))
        .node("b")
        .pod(not_yet("server"))
        .pod(uncaptured("outsider"))
        .start()
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", said(output));
    said(output)
}

#[track_caller]
fn fails(output: &Output, code: i32, why: &str) {
    assert_eq!(output.status.code(), Some(code), "{}", said(output));
    assert!(said(output).contains(why), "{}", said(output));
}

#[track_caller]
fn unenroll(mesh: &Mesh, node: &str, pod: &Pod) {
    let output = mesh.agent_command(node, &["unenroll", &format!("test/{}", pod.name())]).output().unwrap();
    succeeds(&output);
}

/// Who is enrolled at a node.
fn list(mesh: &Mesh, node: &str) -> Vec<Value> {
    let output = mesh.agent_command(node, &["enrolled", "-o", "json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Everything in a pod that enrolment changes.
fn network(pod: &Pod) -> String {
    let commands: [(&str, &[&str]); 5] = [
        ("nft", &["list", "ruleset"]),
        ("ip", &["-4", "rule"]),
        ("ip", &["-6", "rule"]),
        ("ip", &["-4", "route", "show", "table", "100"]),
        ("ip", &["-6", "route", "show", "table", "100"]),
    ];
    // A table without routes may exist or not: the kernel keeps one that was there.
    let printed = |(program, arguments): &(&str, &[&str])| pod.command(program, arguments).output().unwrap().stdout;
    commands.iter().map(|command| String::from_utf8_lossy(&printed(command)).into_owned()).collect()
}

#[track_caller]
fn wait_for_network(pod: &Pod, expected: &str) {
    until("the pod's network to be as it was", || match network(pod) {
        now if now == expected => Ok(()),
        now => Err(now),
    });
}

#[test]
fn unenrolled_pod_is_as_it_was_and_can_be_enrolled_again() {
    scenario(|| {
        let mesh = not_enrolled();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let before = network(&client);
        mesh.enroll(&server);
        let _app = server.greet();
        for _ in 0..2 {
            mesh.enroll(&client);
            // Enrolling is idempotent, and so are the rules.
            let after = network(&client);
            assert_ne!(after, before);
            mesh.enroll(&client);
            assert_eq!(network(&client), after);
            client.reaches(server.app());
            server.access("inbound", |line| line["src.identity"] == client.spiffe_id());
            let pods = list(&mesh, "a");
            assert_eq!((pods.len(), &pods[0]["name"], &pods[0]["pending"]), (1, &"client".into(), &Value::Null));
            unenroll(&mesh, "a", &client);
            wait_for_network(&client, &before);
            assert!(list(&mesh, "a").is_empty());
            assert_eq!(std::fs::read_dir(mesh.path("a.enrolled")).unwrap().count(), 0);
        }
        fails(&mesh.agent_command("a", &["unenroll", "test/client"]).output().unwrap(), 1, "no pod test/client");
        fails(&mesh.agent_command("a", &["unenroll", "--uid", "x"]).output().unwrap(), 1, "no pod with the uid x");
    });
}

#[test]
fn what_cannot_be_enrolled_is_named_and_leaves_nothing() {
    scenario(|| {
        let mesh = not_enrolled();
        let client = mesh.pod("client");
        let enroll = |place: &[&str], name: &str, more: &[&str]| {
            let who = ["--name", name, "--namespace", "test", "--service-account", name];
            mesh.agent_command("a", &[&["enroll"], place, &who, more].concat()).output().unwrap()
        };
        let netns = mesh.enroll_command(&client);
        let netns: Vec<_> = netns.get_args().map(|it| it.to_str().unwrap().to_owned()).collect();
        let netns = netns[2].as_str();
        fails(&enroll(&["--netns", "/proc/self/ns/net"], "node", &[]), 1, "the network namespace of the node itself");
        fails(&enroll(&["--netns", "/no/such/file"], "client", &[]), 3, "/no/such/file");
        fails(&enroll(&["--netns", "/proc/self/ns/mnt"], "client", &[]), 3, "not a network namespace");
        fails(&enroll(&["--pid", "4194304"], "client", &[]), 3, "4194304");
        fails(&enroll(&[], "client", &[]), 2, "--netns");
        fails(&enroll(&["--netns", netns], "../client", &[]), 1, "name \"../client\"");
        let before = network(&client);
        mesh.enroll(&client);
        fails(&enroll(&["--netns", netns], "other", &[]), 1, "enrolled already, as test/client");
        let outsider = mesh.enroll_command(&mesh.pod("outsider"));
        let outsider: Vec<_> = outsider.get_args().map(|it| it.to_str().unwrap().to_owned()).collect();
        fails(&enroll(&["--netns", &outsider[2]], "client", &[]), 1, "another network namespace");
        fails(&enroll(&["--netns", &outsider[2]], "b", &["--uid", "test.client"]), 1, "the uid test.client");
        unenroll(&mesh, "a", &client);
        wait_for_network(&client, &before);
    });
}

#[test]
fn two_enrolments_at_once_are_one() {
    scenario(|| {
        let mesh = not_enrolled();
        let client = mesh.pod("client");
        let running: Vec<_> = (0..6)
            .map(|_| {
                let mut command = mesh.enroll_command(&client);
                command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
                command.spawn().unwrap()
            })
            .collect();
        for child in running {
            succeeds(&child.wait_with_output().unwrap());
        }
        assert_eq!(list(&mesh, "a").len(), 1);
    });
}

#[test]
fn folder_that_cannot_be_written_enrols_nobody() {
    scenario(|| {
        let mesh = not_enrolled();
        let client = mesh.pod("client");
        let before = network(&client);
        // As on a disk without room: no file can be made any more. Root is not kept out by a mode.
        let folder = mesh.path("a.enrolled");
        let full = ["-t", "tmpfs", "-o", "nr_inodes=1", "none", folder.to_str().unwrap()];
        succeeds(&std::process::Command::new("mount").args(full).output().unwrap());
        fails(&mesh.enroll_command(&client).output().unwrap(), 1, folder.to_str().unwrap());
        assert_eq!(network(&client), before);
        assert!(list(&mesh, "a").is_empty());
    });
}

#[test]
fn without_a_proxy_everything_is_refused_and_the_command_says_so() {
    scenario(|| {
        let mesh = not_enrolled();
        let (client, outsider) = (mesh.pod("client"), mesh.pod("outsider"));
        let _app = outsider.greet();
        client.reaches(outsider.app());
        client.wait_until_ready();
        client.proxy(|proxy| proxy.kill());
        until("the agent to notice", || {
            let log = mesh.agent("a", |agent| agent.log());
            if log.contains("no longer connected") { Ok(()) } else { Err(log) }
        });
        let mut waiting = mesh.enroll_command(&client);
        let waiting = waiting.stderr(std::process::Stdio::piped()).spawn().unwrap();
        until("the rules to be there", || match client.ask(outsider.app()) {
            Ok(greeting) => Err(format!("{greeting:?}")),
            Err(_) => Ok(()),
        });
        client.is_refused(outsider.app());
        let output = waiting.wait_with_output().unwrap();
        fails(&output, 1, "no node proxy is connected");
        assert!(list(&mesh, "a")[0]["pending"].is_string());
        client.start();
        until("the pod to be served", || client.ask(outsider.app()));
        assert!(list(&mesh, "a")[0]["pending"].is_null());
    });
}

#[test]
fn connections_that_are_older_than_enrolment_are_reset() {
    // Connection tracking knows a connection from its first packet on, or only since something asked for it.
    for tracked in [false, true] {
        scenario(|| {
            let mesh = not_enrolled();
            let (client, outsider) = (mesh.pod("client"), mesh.pod("outsider"));
            if tracked {
                let rules = "add table inet other; add chain inet other c { type nat hook output priority 0; }; \
                             add rule inet other c ct state established accept";
                succeeds(&client.command("nft", &[rules]).output().unwrap());
            }
            let (there, here) = (outsider.listen(), client.listen());
            let out = client.open(outsider.app());
            let out_served = there.accept();
            let back = outsider.open(client.app());
            let back_served = here.accept();
            let waiting = client.open(outsider.app());
            let waiting_served = there.accept();
            let quiet = outsider.open(client.app());
            let quiet_served = here.accept();
            for (near, far) in
                [(&out, &out_served), (&back, &back_served), (&waiting, &waiting_served), (&quiet, &quiet_served)]
            {
                say(near, "before");
                hear(far, "before");
            }
            let recording = mesh.record();
            mesh.enroll(&client);
            // Who only waits is told as well.
            for mut socket in [&waiting, &waiting_served] {
                let heard = socket.read(&mut [0; 8]).unwrap_err().kind();
                assert!(!matches!(heard, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{heard}");
            }
            // Whoever speaks is told, and not heard by the other.
            for (what, mut socket) in
                [("inside", &out), ("inside", &back_served), ("outside", &back), ("outside", &quiet)]
            {
                let _ = socket.write_all(format!("said-{what}-after-enrolment").as_bytes());
                let heard = socket.read(&mut [0; 8]);
                assert!(!matches!(heard, Ok(1..)), "{what}, tracked: {tracked}: {heard:?}");
            }
            for heard in [&out_served, &quiet_served] {
                heard.set_nonblocking(true).unwrap();
                assert!(!matches!((&*heard).read(&mut [0; 8]), Ok(1..)), "tracked: {tracked}");
            }
            let packets = recording.end();
            assert!(packets.with(&outsider.app().port().to_be_bytes()) > 0, "the recording sees what crosses the link");
            assert_eq!(packets.with(b"said-inside-after-enrolment"), 0, "tracked: {tracked}");
        });
    }
}

#[test]
fn enrolment_survives_a_crash_of_the_agent() {
    scenario(|| {
        let mesh = enrolled();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        let before = network(&client);
        for _ in 0..2 {
            mesh.agent("a", |agent| agent.kill());
            client.reaches(server.app());
            // What an administrator's mistake takes away is put back.
            succeeds(&client.command("nft", &["delete", "table", "inet", "zspire"]).output().unwrap());
            mesh.start_agent("a");
            assert_eq!(network(&client), before);
            client.wait_until_ready();
            client.reaches(server.app());
            until("the pod to be served", || match list(&mesh, "a") {
                pods if pods.len() == 1 && pods[0]["pending"].is_null() => Ok(()),
                pods => Err(format!("{pods:?}")),
            });
        }
        // In good order it ends the same way: the rules stay.
        mesh.agent("a", |agent| agent.terminate());
        assert_eq!(mesh.agent("a", |agent| agent.ended()).code(), Some(0));
        assert_eq!(network(&client), before);
        client.reaches(server.app());
    });
}

#[test]
fn process_that_ends_takes_its_pod_with_it() {
    scenario(|| {
        let mesh = not_enrolled();
        let client = mesh.pod("client");
        let before = network(&client);
        for crashed in [false, true] {
            let mut process = mesh.process("pause", client.netns(), client.command("sleep", &["infinity"]));
            let id = process.id().to_string();
            let arguments = ["enroll", "--pid", &id, "--name", "client", "--namespace", "test"];
            let arguments = [&arguments[..], &["--service-account", "client", "--uid", "of-a-process"]].concat();
            succeeds(&mesh.agent_command("a", &arguments).output().unwrap());
            assert_eq!(list(&mesh, "a")[0]["uid"], "of-a-process");
            if crashed {
                mesh.agent("a", |agent| agent.kill());
            }
            process.kill();
            if crashed {
                mesh.start_agent("a");
            }
            until("the pod to be gone", || match list(&mesh, "a") {
                pods if pods.is_empty() => Ok(()),
                pods => Err(format!("{pods:?}")),
            });
            wait_for_network(&client, &before);
        }
    });
}

/// Whatever is killed, nothing that the pods say to each other can be read between the nodes.
#[test]
fn nothing_passes_in_plain_text_while_proxy_and_agent_are_killed() {
    const CANARY: &str = "a-canary-that-must-not-be-seen";
    scenario(|| {
        let mesh = enrolled();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let _app = server.greet();
        let recording = mesh.record();
        let (stop, answered, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Relaxed) {
                        let Ok(mut socket) = client.connect(server.app()) else {
                            refused.fetch_add(1, Relaxed);
                            // A refusal costs nothing: this is what keeps the test from being nothing but refusals.
                            std::thread::sleep(Duration::from_millis(1));
                            continue;
                        };
                        let heard = socket.write_all(CANARY.as_bytes()).is_ok()
                            && zspire_testkit::app::greeting(&socket).is_ok();
                        if heard { &answered } else { &refused }.fetch_add(1, Relaxed);
                    }
                });
            }
            for round in 0..6 {
                let node = if round % 2 == 0 { &client } else { &server };
                let name = if round % 2 == 0 { "a" } else { "b" };
                let (before, were) = (answered.load(Relaxed), refused.load(Relaxed));
                if round % 3 != 1 {
                    mesh.agent(name, |agent| agent.kill());
                }
                node.proxy(|proxy| proxy.kill());
                until("refusals", || if refused.load(Relaxed) > were { Ok(()) } else { Err("there are none") });
                node.start();
                if round % 3 != 1 {
                    mesh.start_agent(name);
                }
                node.wait_until_ready();
                until("answers", || if answered.load(Relaxed) > before + 5 { Ok(()) } else { Err("there are none") });
            }
            stop.store(true, Relaxed);
        });
        let packets = recording.end();
        assert!(packets.with(&15008_u16.to_be_bytes()) > 20, "the recording sees the tunnels");
        assert_eq!(packets.with(CANARY.as_bytes()), 0);
    });
}

/// The two ends of a tunnel within a process are on one worker, whichever has opened it: what flows there wakes no other.
#[test]
fn tunnel_between_two_pods_of_a_proxy_is_on_one_worker() {
    scenario(|| {
        let clients = ["one", "two", "three"];
        let mesh = clients.iter().fold(mesh().shared().node("a").pod("server"), |mesh, name| mesh.pod(*name)).start();
        let server = mesh.pod("server");
        let app = server.listen();
        for client in clients.iter().flat_map(|name| [mesh.pod(name), mesh.pod(name)]) {
            let live = connect(&client, &server, &app);
            let before = wakings(&server.metrics());
            for _ in 0..100 {
                live.goes_on();
            }
            let after = wakings(&server.metrics());
            let mut more: Vec<_> = after.iter().zip(before).map(|(after, before)| after - before).collect();
            more.sort_unstable();
            assert!(
                more.len() == 2 && more[0] < 50 && more[1] >= 100,
                "{} wakes the workers {more:?} times",
                client.name()
            );
        }
    });
}

/// How often each worker went to sleep.
fn wakings(page: &str) -> Vec<u64> {
    let of_workers = page.lines().filter(|line| line.starts_with("tokio_worker_park_count_total{"));
    of_workers.filter_map(|line| line.rsplit_once(' ')?.1.parse().ok()).collect()
}
