//! Roots that istiod is given, each with a CA below it: what Istio calls a plugged-in CA.

use std::fs;
use std::path::{Path, PathBuf};

use crate::openssl::{Certificate, certificate, leaf};

/// A root and the CA below it.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    name: String,
}

impl Authority {
    /// Makes one.
    #[track_caller]
    pub(super) fn new(folder: &Path, name: &str) -> Self {
        let authority = Self { folder: folder.into(), name: name.into() };
        let uses = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"];
        let root = [("-keyout", authority.file("root.key")), ("-out", authority.file("root.pem"))];
        let subject = format!("/O=test/CN={name} root");
        certificate(folder, &[&options(&root)[..], &["-subj", &subject], &uses].concat());
        let ca = [
            ("-keyout", authority.file("ca.key")),
            ("-out", authority.file("ca.pem")),
            ("-CA", authority.file("root.pem")),
            ("-CAkey", authority.file("root.key")),
        ];
        let subject = format!("/O=test/CN={name} CA");
        certificate(folder, &[&options(&ca)[..], &["-subj", &subject], &uses].concat());
        authority
    }

    /// Lays it out as istiod reads it, with the roots that the mesh is to trust.
    #[track_caller]
    pub(super) fn install(&self, cacerts: &Path, trusted: &[&Self]) {
        fs::create_dir_all(cacerts).expect("the test's own folder");
        let roots: String = trusted.iter().map(|authority| authority.root()).collect();
        let files = [
            ("ca-cert.pem", self.read("ca.pem")),
            ("ca-key.pem", self.read("ca.key")),
            ("cert-chain.pem", self.read("ca.pem")),
            ("root-cert.pem", roots),
        ];
        for (name, text) in files {
            fs::write(cacerts.join(name), text).expect("the test's own folder");
        }
    }

    /// Its root's certificate, PEM.
    pub fn root(&self) -> String {
        self.read("root.pem")
    }

    /// Makes a certificate for an identity, in the CA's place: the files of the chain, of the key and of the root.
    #[track_caller]
    pub fn issue(&self, name: &str, id: &str) -> Certificate {
        let ca = (self.folder.join(self.file("ca.pem")), self.folder.join(self.file("ca.key")));
        let (leaf, key) = leaf(&self.folder, name, id, (&ca.0, &ca.1));
        let chain = self.folder.join(format!("{name}-chain.pem"));
        let leaf = fs::read_to_string(leaf).expect("openssl has written it");
        fs::write(&chain, leaf + &self.read("ca.pem")).expect("the test's own folder");
        [chain, key, self.folder.join(self.file("root.pem"))]
    }

    fn file(&self, end: &str) -> String {
        format!("{}-{end}", self.name)
    }

    fn read(&self, end: &str) -> String {
        fs::read_to_string(self.folder.join(self.file(end))).expect("openssl has written it")
    }
}

fn options<'a>(all: &'a [(&'a str, String)]) -> Vec<&'a str> {
    all.iter().flat_map(|(option, value)| [*option, value]).collect()
}
