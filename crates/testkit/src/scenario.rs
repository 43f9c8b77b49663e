//! Running a test that needs root over network namespaces: as root right here, otherwise once more in a user namespace.

use std::path::Path;
use std::process::Command;

/// Says to the second run that it is one.
const INSIDE: &str = "ZSPIRE_TEST_INSIDE";

/// Runs a test's body where namespaces can be made.
///
/// A user namespace can be entered only before a process has threads, and tests have them: a program that does nothing else
/// ([`enter`]) starts this test binary again for this one test.
#[track_caller]
pub fn scenario(entering: &Path, body: impl FnOnce()) {
    if nix::unistd::geteuid().is_root() {
        // Namespaces of pods are kept by mounts, which end with the test.
        zspire_sys::userns::own_mounts().expect("root may have mounts of its own");
        return body();
    }
    assert!(std::env::var_os(INSIDE).is_none(), "not root in a user namespace of our own");
    let name = test_name();
    let test = std::env::current_exe().expect("a test has a file");
    let output = Command::new(entering)
        .arg(test)
        .args(["--exact", &name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("the program beside the tests can be started");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    // A name that is not found is no failure to the test harness, but it is one to us.
    let ran = output.status.success() && said.contains("1 passed");
    assert!(ran, "{name} failed in its user namespace:\n{said}");
}

/// The name of the test that runs: its thread's, or, where it has none of its own, what the command line asks for.
pub(crate) fn test_name() -> String {
    let thread = std::thread::current();
    let mut arguments = std::env::args().skip(1);
    let asked = || arguments.by_ref().skip_while(|argument| argument != "--exact").find(|it| !it.starts_with("--"));
    thread
        .name()
        .filter(|name| *name != "main")
        .map(str::to_owned)
        .or_else(asked)
        .expect("a test has a name: give one with --exact, or more than one test thread")
}

/// The program that enters a user namespace and becomes its arguments.
pub fn enter() -> std::io::Error {
    use std::os::unix::process::CommandExt;
    if let Err(error) = zspire_sys::userns::enter() {
        return std::io::Error::other(error);
    }
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(program) => Command::new(program).args(arguments).exec(),
        None => std::io::Error::other("which program?"),
    }
}
