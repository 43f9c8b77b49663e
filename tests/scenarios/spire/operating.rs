//! What an operator is told is true: the command that is printed registers, the checks fail for what is wrong and for nothing else.

use zspire_testkit::plan::captured;
use zspire_testkit::spire::{Way, proxy_id};
use zspire_testkit::{mesh, until};

use super::{by, wait_for_state};

by!(each way: missing_entry_is_explained_by_the_command_that_makes_it, doctor_finds_what_is_wrong_and_nothing_else);

fn missing_entry_is_explained_by_the_command_that_makes_it(way: Way) {
    let late = captured("server").unregistered();
    let mesh = mesh().spire(way).node("a").pod("client").node("b").pod(late).start();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _app = server.greet();
    wait_for_state(&server, "no entry matches this workload");
    let output = server.zspire(&["identity", "explain", "test/server"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected = format!("Expected: {}.", server.spiffe_id());
    for words in ["Nothing matches the workload", &expected, "Register it:"] {
        assert!(said.contains(words), "no {words} in\n{said}");
    }
    let command = said.split("spire-server ").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("a command");
    // A shell's ends of lines; and who the agent is, only the Broker API tells.
    let node = "spiffe://cluster.local/node/b";
    let words = command.split_whitespace().filter(|word| *word != "\\");
    let words: Vec<&str> = words.map(|word| if word == "PARENT" { node } else { word }).collect();
    assert_eq!(command.contains("PARENT"), way == Way::DelegatedByProcess, "{said}");
    mesh.spire().server("cluster.local").run(&words);
    wait_for_state(&server, "Available");
    client.reaches(server.app());
    let explained = server.zspire(&["identity", "explain", "test/server"]);
    assert_eq!(explained.status.code(), Some(0), "{}", String::from_utf8_lossy(&explained.stdout));
}

fn doctor_finds_what_is_wrong_and_nothing_else(way: Way) {
    let mesh = mesh().spire(way).node("a").pod("client").node("b").pod("server").start();
    let server = mesh.pod("server");
    wait_for_state(&server, "Available");
    let doctor = |code: i32, words: &[&str]| {
        until(&format!("the doctor to find {words:?}"), || {
            let output = server.with_settings(&["doctor"]).output().unwrap();
            let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            let all = output.status.code() == Some(code) && words.iter().all(|word| said.contains(word));
            if all { Ok(()) } else { Err(said) }
        });
    };
    let asks = if way == Way::DelegatedByProcess { "authorized as a delegate" } else { "authorized as a broker" };
    doctor(
        0,
        &["ok    settings", &format!("ok    {asks}"), "1 of 1 pods have an identity", "Nothing stands in the way."],
    );

    let agent = mesh.spire().agent("b");
    agent.trust_the_proxy(false);
    let (proxy, refused) = (proxy_id("cluster.local"), format!("FAIL  {asks}"));
    match way {
        Way::DelegatedByProcess => doctor(1, &[&refused, &format!("authorized_delegates = [\"{proxy}\"]")]),
        _ => doctor(1, &[&refused, &format!("id = \"{proxy}\"")]),
    }
    agent.kill();
    doctor(1, &["the SPIRE agent does not run", &format!("skip  {asks}")]);
    agent.trust_the_proxy(true);
    doctor(0, &["Nothing stands in the way."]);
}
