//! Pods that Istio's own node agent hands over, with its rules in them: what it does about them, and what they come to.

use std::net::SocketAddr;

use serde_json::Value;
use zspire_testkit::flows::{Answer, Answering, Call, Protocol, answer};
use zspire_testkit::istio::Cni;
use zspire_testkit::plan::{NAMESPACE, captured};
use zspire_testkit::process::{pause, resume};
use zspire_testkit::{Mesh, Pod, app, hear, mesh, say, uncaptured, until};

use super::{comes_to_be_refused, comes_to_know};
use crate::scenario;
use crate::traffic::Load;
use crate::zds::wait_for_state;

/// A client and a server, each with an agent and a proxy of its own node.
fn two_nodes() -> Mesh {
    let late = captured("late").not_started();
    let (client, server) = (captured("client").dual_stack(), captured("server").dual_stack());
    mesh().istio_cni().node("a").pod(client).node("b").pod(server).pod(late).start()
}

/// What an administrator says of a pod: `istio.io/dataplane-mode`.
fn set_mode(mesh: &Mesh, pod: &Pod, mode: &str) {
    let label = format!("istio.io/dataplane-mode={mode}");
    mesh.istio().cluster().kubectl(&["-n", NAMESPACE, "label", "--overwrite", "pod", pod.name(), &label]);
}

/// Whether the agent's rules are in a pod.
fn has_rules(pod: &Pod) -> bool {
    let output = pod.command("nft", &["list", "ruleset"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).contains("ISTIO_OUTPUT")
}

/// Waits until a pod's proxy knows from istiod how another pod takes connections.
#[track_caller]
fn wait_for_protocol(of: &Pod, pod: &Pod, protocol: &str) {
    comes_to_know(of, "workloads", ("name", pod.name()), |workload| workload["protocol"] == protocol);
}

/// A connection that both proxies know by its identities.
#[track_caller]
fn reaches_in_a_tunnel(client: &Pod, server: &Pod, to: SocketAddr) {
    wait_for_protocol(client, server, "HBONE");
    assert_eq!(client.reaches(to).from, client.address());
    server.access("inbound", |line| {
        line["src.identity"] == client.spiffe_id()
            && line["dst.hbone_addr"] == to.to_string()
            && line["error"].is_null()
    });
}

/// Waits until no proxy listens in a pod any more.
#[track_caller]
fn wait_until_left(pod: &Pod) {
    until("the pod to be left", || match pod.connect(pod.at(15008)) {
        Ok(_) => Err("somebody listens"),
        Err(_) => Ok(()),
    });
}

/// How often a pod's proxy has connected to the agent.
fn connections(pod: &Pod) -> usize {
    pod.proxy(|proxy| proxy.log()).matches("connected to the node agent").count()
}

#[track_caller]
fn wait_for_agents_word(mesh: &Mesh, node: &str, word: &str) {
    until(&format!("the agent of {node} to say {word:?}"), || {
        let log = mesh.cni(node).agent(|agent| agent.log());
        if log.contains(word) { Ok(()) } else { Err("it has not") }
    });
}

#[test]
fn pods_are_served_from_the_snapshot_on_and_leave_by_label_end_and_deletion() {
    scenario(|| {
        let mesh = two_nodes();
        let (client, server) = (mesh.pod("client"), mesh.pod("server"));
        let uid = mesh.istio().uid(&server);
        let _app = server.greet();
        reaches_in_a_tunnel(&client, &server, server.app());
        wait_for_state(&server, &uid, "Up");
        let v6 = SocketAddr::from((server.v6(), server.app().port()));
        assert_eq!(client.reaches(v6).from, client.v6());
        server.access("inbound", |line| line["dst.hbone_addr"] == v6.to_string() && line["error"].is_null());
        // The agent says everything twice when it starts.
        server.metric(&["workload_manager_proxies_started_total 1"]);

        set_mode(&mesh, &server, "none");
        mesh.istio().wait_for_redirection(&server, None);
        assert!(server.dump()["workloadState"][&uid].is_null() && !has_rules(&server));
        wait_for_protocol(&client, &server, "TCP");
        client.reaches(server.app());
        server.reaches(server.app());
        client.access("outbound", |line| line["dst.addr"] == server.app().to_string());

        set_mode(&mesh, &server, "ambient");
        mesh.istio().wait_for_redirection(&server, Some("enabled"));
        assert!(has_rules(&server));
        reaches_in_a_tunnel(&client, &server, server.app());
        server.metric(&["workload_manager_proxies_started_total 2"]);

        // A job that is done, and whose object goes later: the agent deletes it twice.
        mesh.istio().set_phase(&server, "Succeeded");
        until("the pod to be left", || match server.dump()["workloadState"][&uid].clone() {
            state if state.is_null() => Ok(()),
            state => Err(state),
        });
        comes_to_be_refused(&client, server.app());
        mesh.istio().remove(&server);
        // And one that it has never handed over.
        let (late, never) = (mesh.pod("late"), mesh.istio().uid(&mesh.pod("late")));
        mesh.istio().remove(&late);
        for uid in [&uid, &never] {
            wait_for_agents_word(&mesh, "b", &format!("sending delete pod to all ztunnels: {uid}"));
        }
        assert_eq!(connections(&server), 1, "whatever was asked, nothing has ended the connection to the agent");
        server.metric(&["workload_manager_proxies_stopped_total 2"]);
    });
}

#[test]
fn pod_is_served_from_its_first_packet_on_and_in_each_new_sandbox() {
    scenario(|| {
        let sandbox = captured("sandbox").not_started();
        let mesh = mesh()
            .istio_cni()
            .node("a")
            .pod("client")
            .pod(captured("late").not_started())
            .pod(sandbox)
            .pod(captured("taken").not_started())
            .start();
        let [client, late, sandbox, taken] = ["client", "late", "sandbox", "taken"].map(|name| mesh.pod(name));
        let (istio, cni) = (mesh.istio(), mesh.cni("a"));
        let uid = istio.uid(&late);
        // It has no address yet where the agent could read it.
        cni.run_pod(&uid, &late);
        cni.plug(&late, &late).unwrap();
        wait_for_state(&client, &uid, "Up");
        assert!(has_rules(&late));
        let _apps = [client.greet(), late.greet()];
        // Its first connection is earlier than the news of its address, and waits for that.
        let early = late.open(client.app());
        late.proxy(|proxy| assert!(!proxy.log().contains("\"outbound\"")));
        istio.set_ready(&late, true);
        assert_eq!(app::greeting(&early).unwrap().by, "client");
        reaches_in_a_tunnel(&client, &late, late.app());
        reaches_in_a_tunnel(&late, &client, client.app());

        // Its sandbox has ended, and the kubelet has another one made, with another address. Nobody deletes anything.
        cni.end_pod(&late);
        cni.run_pod(&uid, &sandbox);
        cni.plug(&late, &sandbox).unwrap();
        istio.set_addresses(&late, &sandbox);
        let _app = sandbox.greet();
        until("the new address to be known and served", || client.ask(sandbox.app()));
        late.access("inbound", |line| line["dst.hbone_addr"] == sandbox.app().to_string() && line["error"].is_null());
        wait_until_left(&late);

        // A pod that cannot be served does not start, and is told why.
        let uid = istio.uid(&taken);
        cni.run_pod(&uid, &taken);
        let port = taken.listen_at(15008);
        let why = cni.plug(&taken, &taken).unwrap_err();
        assert!(why.contains("15008"), "{why}");
        wait_for_state(&client, &uid, "Pending");
        drop(port);
        cni.plug(&taken, &taken).unwrap();
        wait_for_state(&client, &uid, "Up");
    });
}

#[test]
fn pods_are_served_while_the_agent_is_stopped_killed_and_back() {
    scenario(|| {
        let mesh = mesh()
            .istio_cni()
            .node("a")
            .pod("client")
            .node("b")
            .pod("server")
            .pod("kept")
            .pod("gone")
            .pod(captured("late").not_started())
            .start();
        let [client, server, kept, gone, late] =
            ["client", "server", "kept", "gone", "late"].map(|name| mesh.pod(name));
        let (istio, cni) = (mesh.istio(), mesh.cni("b"));
        let uids = [&server, &kept, &gone].map(|pod| istio.uid(pod));
        let _apps = [server.greet(), kept.greet(), gone.greet()];
        let app = server.listen_at(8081);
        for pod in [&server, &kept, &gone] {
            reaches_in_a_tunnel(&client, pod, pod.app());
        }
        let long = client.open(server.at(8081));
        let long_served = app.accept();
        assert!(cni.stop().success());
        until("readiness to say what is missing", || match server.readiness() {
            Err(why) if why.contains("ztunnel.sock") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        let still_served = || {
            assert!(has_rules(&server));
            istio.wait_for_redirection(&server, Some("enabled"));
            reaches_in_a_tunnel(&client, &server, server.app());
            say(&long, "still");
            hear(&long_served, "still");
        };
        still_served();
        // Meanwhile one pod goes, and of another the agent will find no process to have its namespace from.
        istio.remove(&gone);
        cni.end_pod(&kept);
        cni.start();
        server.wait_until_ready();
        wait_for_agents_word(&mesh, "b", "sending 'keep' to ztunnel");
        still_served();
        assert_eq!(wait_for_state(&server, &uids[1], "Up")["info"]["name"], "kept");
        reaches_in_a_tunnel(&client, &kept, kept.app());
        assert!(server.dump()["workloadState"][&uids[2]].is_null());
        server.metric(&["workload_manager_proxies_stopped_total 1"]);

        cni.kill();
        still_served();
        cni.start();
        server.wait_until_ready();
        still_served();
        // What it has missed is made up for.
        let uid = istio.uid(&late);
        cni.kill();
        cni.run_pod(&uid, &late);
        istio.set_ready(&late, true);
        let _app = late.greet();
        cni.start();
        istio.wait_for_redirection(&late, Some("enabled"));
        reaches_in_a_tunnel(&client, &late, late.app());
        server.metric(&["workload_manager_proxies_started_total 4"]);
    });
}

/// How many proxies have left the agent.
fn left(cni: &Cni) -> usize {
    cni.agent(|agent| agent.log()).matches("ztunnel disconnected, total").count()
}

/// Both have the snapshot; the newest alone is told of new pods, both of those that go.
#[track_caller]
fn successor_takes_over(mesh: &Mesh) {
    let [client, server, late] = ["client", "server", "late"].map(|name| mesh.pod(name));
    let (istio, cni) = (mesh.istio(), mesh.cni("b"));
    let app = server.listen_at(8081);
    let load = Load::new(&client, &server);
    load.during(2, || {
        let long = client.open(server.at(8081));
        let long_served = app.accept();
        let mut old = mesh.start_successor("b");
        let uid = istio.uid(&late);
        cni.run_pod(&uid, &late);
        istio.set_ready(&late, true);
        istio.wait_for_redirection(&late, Some("enabled"));
        wait_for_state(&server, &uid, "Up");
        assert!(!old.log().contains("test/late"), "the old one is not told of it");
        reaches_in_a_tunnel(&client, &late, late.app());
        load.more(20);
        istio.remove(&late);
        until("the pod to be left", || match server.dump()["workloadState"][&uid].clone() {
            state if state.is_null() => Ok(()),
            state => Err(state),
        });
        // The old one stops, and takes its time for what lives.
        let before = left(cni);
        old.terminate();
        load.more(20);
        say(&long, "still");
        hear(&long_served, "still");
        drop((long, long_served));
        assert_eq!(old.ended().code(), Some(0));
        load.more(20);
        until("the agent to notice", || if left(cni) > before { Ok(()) } else { Err("it has not") });
    });
    reaches_in_a_tunnel(&client, &server, server.app());
}

/// Pods that come are told to the one before; nobody has those that only the newest was told of.
#[track_caller]
fn newest_goes_for_good(mesh: &Mesh) {
    let [client, server, late] = ["client", "server", "late"].map(|name| mesh.pod(name));
    let (istio, cni) = (mesh.istio(), mesh.cni("b"));
    let other = mesh.start_successor("b");
    istio.add(&late);
    let uid = istio.uid(&late);
    cni.run_pod(&uid, &late);
    cni.plug(&late, &late).unwrap();
    reaches_in_a_tunnel(&client, &late, late.app());
    let before = left(cni);
    server.proxy(|proxy| proxy.kill());
    until("the agent to notice", || if left(cni) > before { Ok(()) } else { Err("it has not") });
    client.is_refused(late.app());
    set_mode(mesh, &server, "none");
    istio.wait_for_redirection(&server, None);
    other.line("the end of the pod", |line| line["message"] == "pod is no longer served");
    set_mode(mesh, &server, "ambient");
    istio.wait_for_redirection(&server, Some("enabled"));
    wait_for_protocol(&client, &server, "HBONE");
    let before = other.log().matches("\"inbound\"").count();
    client.reaches(server.app());
    until("the older proxy to serve", || {
        if other.log().matches("\"inbound\"").count() > before { Ok(()) } else { Err("it has not") }
    });
    assert!(!other.log().contains(&uid));
    // The next has them all.
    server.start();
    server.wait_until_ready();
    reaches_in_a_tunnel(&client, &late, late.app());
}

#[test]
fn pods_are_served_again_by_a_proxy_that_was_killed_and_by_a_successor() {
    scenario(|| {
        let mesh = two_nodes();
        let [client, server, late] = ["client", "server", "late"].map(|name| mesh.pod(name));
        let _apps = [client.greet(), server.greet(), late.greet()];
        reaches_in_a_tunnel(&client, &server, server.app());

        // With rules and without a proxy: nothing in or out, except for the node, which has to probe pods.
        server.proxy(|proxy| proxy.kill());
        client.is_refused(server.app());
        server.is_refused(client.app());
        let probe = app::ask(mesh.node("b"), server.app()).unwrap();
        assert_eq!(probe.from.to_string(), "169.254.7.127");
        server.start();
        server.wait_until_ready();
        reaches_in_a_tunnel(&client, &server, server.app());

        successor_takes_over(&mesh);
        newest_goes_for_good(&mesh);
    });
}

#[test]
fn pod_that_cannot_be_served_is_pending_until_it_can_be() {
    scenario(|| {
        let mesh = two_nodes();
        let [client, server, late] = ["client", "server", "late"].map(|name| mesh.pod(name));
        let (istio, cni) = (mesh.istio(), mesh.cni("b"));
        let uid = istio.uid(&late);
        let _apps = [client.greet(), server.greet(), late.greet()];
        let port = late.listen_at(15008);
        cni.run_pod(&uid, &late);
        istio.set_ready(&late, true);
        istio.wait_for_redirection(&late, Some("pending"));
        assert!(wait_for_state(&server, &uid, "Pending")["why"].as_str().unwrap().contains("15008"));
        // Its rules are there, so nothing passes; others do not notice.
        assert!(has_rules(&late));
        late.is_refused(client.app());
        reaches_in_a_tunnel(&client, &server, server.app());
        drop(port);
        istio.wait_for_redirection(&late, Some("enabled"));
        reaches_in_a_tunnel(&client, &late, late.app());
        reaches_in_a_tunnel(&late, &client, client.app());

        // A proxy that does not answer in time. The agent gives up, and asks again.
        let proxy = server.proxy(|proxy| proxy.id());
        set_mode(&mesh, &late, "none");
        istio.wait_for_redirection(&late, None);
        pause(proxy);
        set_mode(&mesh, &late, "ambient");
        istio.wait_for_redirection(&late, Some("pending"));
        wait_for_agents_word(&mesh, "b", "timed out waiting for valid ztunnel response");
        let why = cni.plug(&late, &late).unwrap_err();
        assert!(why.contains("deadline exceeded"), "{why}");
        resume(proxy);
        istio.wait_for_redirection(&late, Some("enabled"));
        server.wait_until_ready();
        wait_for_state(&server, &uid, "Up");
        reaches_in_a_tunnel(&client, &late, late.app());
        reaches_in_a_tunnel(&late, &client, client.app());
        // No answer was one too many, for the agent would take it for the next: it is told the truth again.
        set_mode(&mesh, &late, "none");
        istio.wait_for_redirection(&late, None);
        wait_until_left(&late);
        let port = late.listen_at(15008);
        set_mode(&mesh, &late, "ambient");
        istio.wait_for_redirection(&late, Some("pending"));
        drop(port);
        istio.wait_for_redirection(&late, Some("enabled"));
        assert_eq!(connections(&server), 1);
    });
}

#[test]
fn pods_own_annotations_change_their_rules_and_nothing_else() {
    scenario(|| {
        let mesh = mesh()
            .istio_cni()
            .node("a")
            .pod("client")
            .pod(captured("bypass").not_started())
            .pod(captured("names").not_started())
            .node("b")
            .pod(uncaptured("peer"))
            .start();
        let [client, bypass, names, peer] = ["client", "bypass", "names", "peer"].map(|name| mesh.pod(name));
        let annotations =
            [(&bypass, "ambient.istio.io/bypass-inbound-capture=true"), (&names, "ambient.istio.io/dns-capture=false")];
        for (pod, annotation) in annotations {
            mesh.istio().cluster().kubectl(&["-n", NAMESPACE, "annotate", "pod", pod.name(), annotation]);
            mesh.cni("a").run_pod(&mesh.istio().uid(pod), pod);
            mesh.istio().set_ready(pod, true);
            mesh.istio().wait_for_redirection(pod, Some("enabled"));
        }
        let _apps = [bypass.greet(), names.greet(), peer.greet()];
        for server in [&bypass, &names] {
            reaches_in_a_tunnel(&client, server, server.app());
            server.reaches(peer.app());
            server.access("outbound", |line| line["dst.addr"] == peer.app().to_string());
        }
        // Who is not in the mesh gets to one of them past the proxy, to the other through it.
        for server in [&bypass, &names] {
            peer.reaches(server.app());
        }
        let plain = |line: &Value| line["src.identity"].is_null() && line["src.workload"] == "peer";
        names.access("inbound", plain);
        let log = bypass.proxy(|proxy| proxy.log());
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        assert!(!lines.any(|line| line["direction"] == "inbound" && line["dst.workload"] == "bypass" && plain(&line)));
        let mut resolver = Answering::default();
        resolver.at(peer.netns(), "peer", (Protocol::Udp, peer.at(53)), None);
        let call = Call { protocol: Protocol::Udp, mark: None, to: peer.at(53) };
        assert_eq!(answer(names.netns(), call), Answer::By("peer".into()));
    });
}

#[test]
fn virtual_machine_behind_a_pod_is_the_pod_to_others() {
    scenario(|| {
        let mesh = mesh()
            .istio_cni()
            .node("a")
            .pod(captured("host").not_started())
            .node("b")
            .pod("server")
            .pod(uncaptured("peer"))
            .start();
        let [host, server, peer] = ["host", "server", "peer"].map(|name| mesh.pod(name));
        let virtual_interface = "istio.io/reroute-virtual-interfaces=virt0";
        mesh.istio().cluster().kubectl(&["-n", NAMESPACE, "annotate", "pod", host.name(), virtual_interface]);
        let guest = host.guest("virt0");
        mesh.cni("a").run_pod(&mesh.istio().uid(&host), &host);
        mesh.istio().set_ready(&host, true);
        mesh.istio().wait_for_redirection(&host, Some("enabled"));
        let _apps = [server.greet(), peer.greet()];
        wait_for_protocol(&host, &server, "HBONE");
        for to in [&server, &peer] {
            assert_eq!(app::ask(&guest, to.app()).unwrap().from, host.address());
        }
        server.access("inbound", |line| line["src.identity"] == host.spiffe_id());
    });
}
