//! Programs of others that are built from source: where they are, and how one is called.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What builds them, and knows where they are.
const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/peers/build");

/// What it has built.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peers {
    /// What the script calls it, and the `make test-` target.
    pub(crate) name: &'static str,
    /// Names another folder that has the programs.
    pub(crate) variable: &'static str,
    /// The programs that have to be there.
    pub(crate) programs: &'static [&'static str],
}

impl Peers {
    /// The folder of the programs.
    #[track_caller]
    pub(crate) fn folder(&self) -> PathBuf {
        let Self { name, variable, programs } = self;
        let folder = std::env::var_os(variable).map(PathBuf::from).unwrap_or_else(|| {
            let said = Command::new(BUILD).args([name, "--folder"]).output().expect("scripts/peers/build is there");
            assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
            PathBuf::from(String::from_utf8_lossy(&said.stdout).trim())
        });
        let missing: Vec<_> = programs.iter().filter(|program| !folder.join(program).is_file()).collect();
        assert!(
            missing.is_empty(),
            "{} lacks {missing:?}: run `scripts/peers/build {name}`, or `make test-{name}`",
            folder.display()
        );
        folder
    }
}

/// A program that `scripts/install` has put on the PATH, or that was there before.
#[track_caller]
pub fn installed(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let found =
        std::env::split_paths(&path).chain(system).map(|folder| folder.join(program)).find(|file| file.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "{program} is not on the PATH: run `scripts/install test`, or the target of `make` that the test belongs to"
        )
    })
}

/// A program of a folder, with nothing of this process's environment.
pub(crate) fn program(folder: &Path, name: &str) -> Command {
    let mut command = Command::new(folder.join(name));
    command.env_clear();
    command
}

/// Runs a command to its end, with this on its standard input.
pub(crate) fn feed(command: &mut Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program can be started");
    let mut stdin = child.stdin.take().expect("it is piped");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Whoever does not read to the end says why by how it ends.
            let _ = stdin.write_all(input.as_bytes());
        });
        child.wait_with_output().expect("it was started")
    })
}
