//! Enters a user namespace and becomes its arguments: how tests that need root run without it. See `zspire_testkit::scenario`.

#![forbid(unsafe_code)]

use std::io::Write as _;

fn main() -> std::process::ExitCode {
    let error = zspire_testkit::scenario::enter();
    let _ = writeln!(std::io::stderr(), "zspire-enter: {error}");
    std::process::ExitCode::FAILURE
}
