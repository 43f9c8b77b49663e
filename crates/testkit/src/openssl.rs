//! Certificates made with openssl, where a program of others is to be given some.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use zspire_identity::local;

use crate::mesh::Mesh;

/// What a program of others shows and asks for: the files of its certificate with the chain, of its key, and of the roots.
pub type Certificate = [PathBuf; 3];

/// Makes a key and a certificate in a folder, good for a day: more of what `openssl req -x509` takes.
#[track_caller]
pub(crate) fn certificate(folder: &Path, arguments: &[&str]) {
    let key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"];
    let output =
        Command::new("openssl").args(key).args(arguments).current_dir(folder).output().expect("openssl is there");
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes a key and a certificate for an identity, `<name>.key` and `<name>.pem`, signed by a CA of these files.
#[track_caller]
pub(crate) fn leaf(folder: &Path, name: &str, id: &str, (ca, ca_key): (&Path, &Path)) -> (PathBuf, PathBuf) {
    let (key, leaf) = (folder.join(format!("{name}.key")), folder.join(format!("{name}.pem")));
    let id = format!("subjectAltName=critical,URI:{id}");
    let files = [("-keyout", &*key), ("-out", &*leaf), ("-CA", ca), ("-CAkey", ca_key)];
    let mut arguments = vec!["-subj", "/", "-addext", &id];
    arguments.extend([
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-addext",
        "keyUsage=critical,digitalSignature",
    ]);
    arguments.extend(["-addext", "extendedKeyUsage=serverAuth,clientAuth"]);
    arguments.extend(files.iter().flat_map(|(option, file)| [*option, file.to_str().expect("a plain name")]));
    certificate(folder, &arguments);
    (leaf, key)
}

impl Mesh {
    /// Makes a certificate of the development CA for an identity, for a program of others.
    #[track_caller]
    pub fn certificate(&self, name: &str, id: &str) -> Certificate {
        let ca = self.path("run").join("zspire").join(local::FILE);
        let (leaf, key) = leaf(&self.path(""), name, id, (&ca, &ca));
        // The file has the CA's certificate and its key, which is nobody else's business.
        let text = fs::read_to_string(ca).expect("the development CA of the mesh");
        let (root, _) = text.split_once("-----BEGIN PRIVATE KEY").expect("a certificate and a key");
        let roots = self.path("root.pem");
        fs::write(&roots, root).expect("the test's own folder");
        [leaf, key, roots]
    }
}
