//! Applications that ask by SOCKS5, with curl and nginx.

use std::process::Command;

use zspire_testkit::plan::captured;
use zspire_testkit::policy::deny_from;
use zspire_testkit::process::Process;
use zspire_testkit::{Mesh, Pod, mesh, until};

use crate::scenario;

/// A web server in the pod that tells its clients where they come from.
fn nginx(mesh: &Mesh, pod: &Pod) -> Process {
    let folder = mesh.path("nginx");
    std::fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap();
    let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|it| format!("{it}_temp_path {folder}/{it};"))
        .concat();
    let configuration = format!(
        "user root; daemon off; master_process off; error_log stderr; pid {folder}/pid; events {{}}\n\
         http {{ {paths} access_log off; server {{ listen {}; return 200 \"you are $remote_addr\\n\"; }} }}\n",
        pod.app().port()
    );
    let file = mesh.path("nginx.conf");
    std::fs::write(&file, configuration).unwrap();
    let mut command = Command::new("nginx");
    command.args(["-p", folder, "-c", file.to_str().unwrap()]);
    let process = mesh.process("nginx", pod.netns(), command);
    until("nginx to listen", || pod.connect(([127, 0, 0, 1], pod.app().port()).into()));
    process
}

fn curl(pod: &Pod, url: &str) -> (Option<i32>, String) {
    let arguments = ["-sS", "--max-time", "20", "--socks5-hostname", "127.0.0.1:15080", url];
    let output = pod.command("curl", &arguments).output().unwrap();
    (
        output.status.code(),
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
    )
}

#[test]
fn curl_reaches_a_service_by_name_and_is_told_of_refusals() {
    scenario(|| {
        let with_socks = |name| captured(name).with("UNSTABLE_ENABLE_SOCKS5", "true");
        let mesh = mesh()
            .node("a")
            .pod(with_socks("client"))
            .pod(with_socks("intruder"))
            .node("b")
            .pod("server")
            .service("api", &["server"])
            .policy(deny_from("intruder"))
            .start();
        let (client, intruder, server) = (mesh.pod("client"), mesh.pod("intruder"), mesh.pod("server"));
        let _nginx = nginx(&mesh, &server);
        let expected = (Some(0), format!("you are {}\n", client.address()));
        assert_eq!(curl(&client, "http://api.test.svc.cluster.local/"), expected);
        assert_eq!(curl(&client, &format!("http://{}/", mesh.service("api"))), expected);
        assert_eq!(curl(&client, &format!("http://{}/", server.app())), expected);
        let line = server.access("inbound", |line| line["error"].is_null());
        assert_eq!(line["src.identity"], client.spiffe_id());
        // 97: the proxy refused. The answers are those of RFC 1928.
        for (from, url, why) in [
            (&intruder, "http://api.test.svc.cluster.local/".to_owned(), "(2)"),
            (&client, format!("http://{}/", server.at(8081)), "(4)"),
            (&client, "http://127.0.0.1:15001/".to_owned(), "(2)"),
        ] {
            let (code, said) = curl(from, &url);
            assert!(code == Some(97) && said.contains(why), "{url}: {code:?} {said}");
        }
    });
}
