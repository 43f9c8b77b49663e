//! Certificates made with openssl, where a program of others is to be given some.

use std::path::Path;
use std::process::Command;

/// Makes a key and a certificate in a folder, good for a day: more of what `openssl req -x509` takes.
#[track_caller]
pub(crate) fn certificate(folder: &Path, arguments: &[&str]) {
    let key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"];
    let output =
        Command::new("openssl").args(key).args(arguments).current_dir(folder).output().expect("openssl is there");
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
}
