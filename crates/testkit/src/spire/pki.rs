//! The certificates by which nodes prove to be themselves (`x509pop`): a CA, and a leaf with the node's name. Made with openssl.

use std::path::Path;
use std::process::Command;

/// The CA's certificate.
pub(super) const CA: &str = "nodes-ca.pem";
const CA_KEY: &str = "nodes-ca.key";

/// Makes the CA.
#[track_caller]
pub(super) fn make(folder: &Path) {
    let ca = ["-keyout", CA_KEY, "-out", CA, "-subj", "/CN=nodes", "-addext", "keyUsage=critical,keyCertSign"];
    certificate(folder, &ca);
}

/// Makes the key and the certificate of a node: `<node>-node.key` and `<node>-node.pem`.
#[track_caller]
pub(super) fn node(folder: &Path, node: &str) {
    let (key, certificate_file, name) = (format!("{node}-node.key"), format!("{node}-node.pem"), format!("/CN={node}"));
    let files = ["-keyout", &key, "-out", &certificate_file, "-subj", &name, "-CA", CA, "-CAkey", CA_KEY];
    let uses = ["-addext", "keyUsage=critical,digitalSignature", "-addext", "extendedKeyUsage=clientAuth"];
    let leaf = ["-addext", "basicConstraints=critical,CA:FALSE"];
    certificate(folder, &[&files[..], &uses, &leaf].concat());
}

#[track_caller]
fn certificate(folder: &Path, arguments: &[&str]) {
    let key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"];
    let output =
        Command::new("openssl").args(key).args(arguments).current_dir(folder).output().expect("openssl is there");
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
}
