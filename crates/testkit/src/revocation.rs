//! Revocation lists of the development CA, made with `openssl ca` from its root.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::mesh::Mesh;
use crate::pod::Pod;

const SETTINGS: &str = "[ca]\ndefault_ca = it\n[it]\ndatabase = index.txt\ncrlnumber = number\ndefault_md = sha256\n\
                        default_crl_days = 1\ncertificate = root.pem\nprivate_key = root.pem\n";

impl Mesh {
    /// Replaces a file of this test by the development CA's list of revoked certificates: those of these pods as they are now.
    #[track_caller]
    pub fn revoke(&self, file: &str, pods: &[&Pod]) {
        let folder = self.path(&format!("{file}.made"));
        fs::create_dir_all(&folder).expect("the test's own folder");
        let root = self.path("run").join("zspire/development-ca.pem");
        fs::copy(root, folder.join("root.pem"))
            .expect("there is a development CA as soon as a proxy or a peer was started");
        let revoked: String = pods.iter().map(|pod| entry(&serial(pod, &folder))).collect();
        let files = [("settings", SETTINGS), ("index.txt", &revoked), ("index.txt.attr", ""), ("number", "01\n")];
        for (name, text) in files {
            fs::write(folder.join(name), text).expect("the test's own folder");
        }
        run(&folder, &["ca", "-gencrl", "-config", "settings", "-out", "list.pem"]);
        fs::rename(folder.join("list.pem"), self.path(file)).expect("the test's own folder");
    }
}

/// As `openssl ca` keeps it: revoked, until when it is valid, since when it is revoked, its serial number, and what does not matter.
fn entry(serial: &str) -> String {
    format!("R\t491231235959Z\t240101000000Z\t{serial}\tunknown\t/O=any\n")
}

/// The serial number of a pod's own certificate, hexadecimal.
fn serial(pod: &Pod, folder: &Path) -> String {
    let pem = crate::wait::until(&format!("the certificate of {}", pod.name()), || {
        let dump = pod.dump();
        let all = dump["certificates"].as_array().into_iter().flatten();
        let own = all
            .filter(|entry| entry["identity"] == pod.spiffe_id())
            .find_map(|entry| entry["certChain"][0]["pem"].as_str().map(str::to_owned));
        own.ok_or(dump["certificates"].clone())
    });
    // The dump has the PEM in base64 once more, as upstream's.
    fs::write(folder.join("certificate.base64"), pem).expect("the test's own folder");
    let decoded = run(folder, &["base64", "-d", "-A", "-in", "certificate.base64"]);
    fs::write(folder.join("certificate.pem"), decoded).expect("the test's own folder");
    let said = run(folder, &["x509", "-noout", "-serial", "-in", "certificate.pem"]);
    said.trim().trim_start_matches("serial=").to_owned()
}

fn run(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("openssl").args(arguments).current_dir(folder).output().expect("openssl can be started");
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}
