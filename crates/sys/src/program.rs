//! Running the system's own network tools (`ip`, `nft`) and saying usefully why they failed.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::netns::Netns;
use crate::process::in_netns;

/// Where administrators' tools are, which the search path of a service often leaves out.
const FOLDERS: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Why a program did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not installed.
    #[error("the program `{name}` is not installed: install the package `{package}`")]
    Missing {
        /// The program.
        name: &'static str,
        /// The package that has it in the common distributions.
        package: &'static str,
    },
    /// It could not be started or spoken to.
    #[error("cannot run `{name}`")]
    Run {
        /// The program.
        name: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It ended with an error.
    #[error("`{name}` refused: {message}")]
    Refused {
        /// The program.
        name: &'static str,
        /// What it wrote, on one line.
        message: String,
    },
}

/// A program of a known package.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    name: &'static str,
    package: &'static str,
}

pub(crate) const IP: Program = Program { name: "ip", package: "iproute2" };
pub(crate) const SS: Program = Program { name: "ss", package: "iproute2" };
pub(crate) const NFT: Program = Program { name: "nft", package: "nftables" };

impl Program {
    /// Runs it in the calling thread's network namespace, or in another, and returns its standard output.
    pub(crate) fn run(self, netns: Option<&Netns>, arguments: &[&str], input: &str) -> Result<String, Error> {
        let mut command = Command::new(self.path());
        command.args(arguments).env("LC_ALL", "C");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let command = match netns {
            Some(netns) => in_netns(netns, command),
            None => command,
        };
        let output = feed(command, input).map_err(|source| self.not_run(source))?;
        if !output.status.success() {
            return Err(Error::Refused { name: self.name, message: message(&output) });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn path(self) -> PathBuf {
        let known = FOLDERS.iter().map(|folder| Path::new(folder).join(self.name)).find(|path| path.is_file());
        // Elsewhere the system's own search may still find it.
        known.unwrap_or_else(|| PathBuf::from(self.name))
    }

    fn not_run(self, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::NotFound => Error::Missing { name: self.name, package: self.package },
            _ => Error::Run { name: self.name, source },
        }
    }
}

fn feed(mut command: Command, input: &str) -> io::Result<Output> {
    let mut child = command.spawn()?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    // A program that ends early closes its input; then its own message says more than the broken pipe.
    match written {
        Err(error) if output.status.success() => Err(error),
        _ => Ok(output),
    }
}

fn message(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { output.status.to_string() } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let program = Program { name: "no-such-program-of-ours", package: "some-package" };
        let error = program.run(None, &[], "").unwrap_err().to_string();
        assert!(error.contains("no-such-program-of-ours") && error.contains("some-package"), "{error}");
    }

    #[test]
    fn a_refusal_says_what_the_program_said() {
        let error = IP.run(None, &["link", "show", "no-such-link"], "").unwrap_err().to_string();
        assert!(error.contains("no-such-link"), "{error}");
    }
}
