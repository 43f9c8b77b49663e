//! Child processes: in which network namespace they start, and that they do not outlive their parent.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

use crate::netns::Netns;

/// Has the command's process start in a network namespace. Needs `CAP_SYS_ADMIN`.
pub fn in_netns(netns: &Netns, mut command: Command) -> Command {
    let netns = netns.clone();
    // SAFETY: between fork and exec the closure makes one system call on a descriptor it owns, and allocates nothing.
    unsafe { command.pre_exec(move || netns.enter_thread()) };
    command
}

/// Has the kernel kill the command's process when its parent ends, however that ends.
///
/// The kernel takes the *thread* that starts the process for its parent: start it from one that lives as long as the
/// process should.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = Pid::this();
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing: an error is its number.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have ended before the wish was known; then nobody would send the signal any more.
            if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
        })
    }
}

/// The user that this process runs as.
pub fn user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// Asks a child to end in good order (SIGTERM). One that has ended already and was waited for is left alone.
pub fn terminate(child: &mut std::process::Child) {
    // A child that was waited for has no process any more, and its number may be another's.
    if matches!(child.try_wait(), Ok(None)) {
        let process = nix::unistd::Pid::from_raw(child.id().cast_signed());
        let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM);
    }
}

/// Makes this process the parent of its descendants' orphans, so that it can wait for them.
pub fn become_subreaper() -> io::Result<()> {
    Ok(prctl::set_child_subreaper(true)?)
}
