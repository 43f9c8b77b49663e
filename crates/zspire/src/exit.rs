//! Exit codes, the same for every command.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

/// Nothing to complain of.
pub(crate) const OK: ExitCode = ExitCode::SUCCESS;
/// What was asked was found wanting: an invalid file, a failed step.
pub(crate) fn finding() -> ExitCode {
    ExitCode::from(1)
}
/// The command line cannot be understood, or the configuration is wrong.
pub(crate) fn usage() -> ExitCode {
    ExitCode::from(2)
}
/// The proxy or file that was to be asked does not answer.
pub(crate) fn cannot_reach() -> ExitCode {
    ExitCode::from(3)
}

/// Prints to standard output. A reader that went away early (`| head`) is no failure.
pub(crate) fn print(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    OK
}

/// Says what is wrong on standard error, with causes where the error has them, and passes the exit code on.
pub(crate) fn complain(error: impl Display, code: ExitCode) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "zspire: {error:#}");
    code
}
