//! Programs of others that are built from source: where they are, and how one is called.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What `scripts/peers/build` has built.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peers {
    /// What the script calls it, and the `make test-` target.
    pub(crate) name: &'static str,
    /// The version in the name of its folder.
    pub(crate) version: &'static str,
    /// Names another folder that has the programs.
    pub(crate) variable: &'static str,
    /// The programs that have to be there.
    pub(crate) programs: &'static [&'static str],
}

impl Peers {
    /// The folder of the programs.
    #[track_caller]
    pub(crate) fn folder(&self) -> PathBuf {
        let Self { name, version, variable, programs } = self;
        let cache = || {
            let of = |name: &str| std::env::var_os(name).map(PathBuf::from);
            let home = || Some(of("HOME")?.join(".cache"));
            of("ZSPIRE_CACHE").or_else(|| Some(of("XDG_CACHE_HOME").or_else(home)?.join("zspire")))
        };
        let given = std::env::var_os(variable).map(PathBuf::from);
        let folder = given.or_else(|| Some(cache()?.join(format!("{name}-{version}")))).expect("there is a HOME");
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
    let found = std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("{program} is not on the PATH: run `scripts/install istio`, or `make test-istio`"))
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
