//! What only a process of one thread can do: see the example `confined`, which these run.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const NOBODY: u32 = 65534;
/// `CAP_NET_ADMIN`.
const NET_ADMIN: &str = "0000000000001000";

/// The example, which is built next to the tests.
fn confined() -> PathBuf {
    let folder = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples");
    let path = folder.join("confined");
    assert!(path.is_file(), "{} is missing: run `cargo build -p zspire-sys --examples`", path.display());
    path
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn root_enters_a_user_namespace_and_builds_a_network() {
    let output = run(Command::new(confined()).arg("userns"));
    assert_eq!(output, "uid 0\nmark true\nfrom 10.244.1.1\n");
}

#[test]
fn nobody_enters_a_user_namespace_and_builds_a_network() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    // The target folder need not be open to everybody. Not copied by this process: while another test starts a
    // child, that child has our descriptor for writing, and then the copy cannot be executed.
    let program = folder.path().join("confined");
    run(Command::new("cp").arg(confined()).arg(&program));
    let output = run(Command::new(program).arg("userns").uid(NOBODY).gid(NOBODY).current_dir("/"));
    assert_eq!(output, "uid 0\nmark true\nfrom 10.244.1.1\n");
}

#[test]
fn a_process_with_threads_is_told_that_it_is_too_late() {
    let output = run(Command::new(confined()).arg("userns-late"));
    assert_eq!(output, "cannot enter a user namespace with 2 threads: it has to come first in the program\n");
}

#[test]
fn only_the_retained_capability_is_left_everywhere() {
    let output = run(Command::new(confined()).arg("capabilities"));
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines[..4], ["effective 0x1000", "net_admin true", "sys_admin false", "thread 0x1000"]);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(lines.contains(&format!("{set}: {NET_ADMIN}").as_str()), "{set} in {output}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert!(lines.contains(&format!("{set}: 0000000000000000").as_str()), "{set} in {output}");
    }
    assert!(lines.contains(&"NoNewPrivs: 1"), "{output}");
    assert!(lines.contains(&format!("child CapEff: {NET_ADMIN}").as_str()), "{output}");
}

#[test]
fn a_hardened_process_leaves_no_core_and_has_all_descriptors_it_may() {
    let output = run(Command::new(confined()).arg("harden"));
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines[..2], ["dumpable false", "core (0, 0)"]);
    let numbers: Vec<_> = lines[2].split(' ').skip(1).collect();
    assert_eq!(numbers[0], numbers[1]);
}

#[test]
fn a_child_dies_with_its_parent() {
    let mut parent = Command::new(confined());
    let mut parent = parent.arg("wait").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // The orphan comes to us, so that its end can be waited for.
    zspire_sys::process::become_subreaper().unwrap();
    let mut line = String::new();
    BufReader::new(parent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let child = nix::unistd::Pid::from_raw(line.trim().parse().unwrap());
    parent.stdin.take().unwrap().flush().unwrap();
    parent.wait().unwrap();
    let status = nix::sys::wait::waitpid(child, None).unwrap();
    assert!(
        matches!(status, nix::sys::wait::WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)),
        "{status:?}"
    );
}
