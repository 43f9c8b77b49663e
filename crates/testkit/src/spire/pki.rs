//! Certificates that SPIRE is given: by which nodes prove to be themselves (`x509pop`), a CA and a leaf with the node's name; and
//! roots that sign for its CA, if not SPIRE itself. Made with openssl.

use std::fs;
use std::path::Path;

use crate::openssl::certificate;

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

/// The folder of the control plane's CA, laid out as Istio's `cacerts`.
pub(crate) const CACERTS: &str = "cacerts";
/// What signs for SPIRE's CA.
pub(super) const UPSTREAM: &str = "upstream.pem";
pub(super) const UPSTREAM_KEY: &str = "upstream.key";

/// Makes a root for the control plane, which signs for SPIRE's CA too.
#[track_caller]
pub(super) fn control_plane(folder: &Path) {
    root(folder);
    let cacerts = folder.join(CACERTS);
    fs::create_dir(&cacerts).expect("the test's own folder");
    for (from, to) in [(UPSTREAM, "ca-cert.pem"), (UPSTREAM, "root-cert.pem"), (UPSTREAM_KEY, "ca-key.pem")] {
        fs::copy(folder.join(from), cacerts.join(to)).expect("the test's own folder");
    }
    fs::write(cacerts.join("cert-chain.pem"), "").expect("the test's own folder");
}

/// Makes a root for SPIRE's CA, also another one: the server reads it when it makes its next CA.
#[track_caller]
pub(super) fn root(folder: &Path) {
    let files = ["-keyout", UPSTREAM_KEY, "-out", UPSTREAM, "-subj", "/CN=root"];
    certificate(folder, &[&files[..], &["-addext", "keyUsage=critical,keyCertSign,cRLSign"]].concat());
}
