//! A user namespace of one's own: root over new namespaces without being root on the machine.
//!
//! The demo and the tests run in it where nobody may become root. Nothing of the production data plane uses it.

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// Why there is no user namespace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel lets only a process of one thread change its user namespace.
    #[error("cannot enter a user namespace with {threads} threads: it has to come first in the program")]
    Threads {
        /// How many threads there are.
        threads: usize,
    },
    /// The system forbids them.
    #[error(
        "user namespaces are forbidden here: run as root, or allow them with one of \
         `sysctl kernel.unprivileged_userns_clone=1` (Debian), `sysctl user.max_user_namespaces=10000`, \
         `sysctl kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu)"
    )]
    Forbidden(#[source] io::Error),
    /// The user namespace exists but this process is not its root.
    #[error(
        "cannot write {file}: run as root, or allow user namespaces with \
         `sysctl kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu)"
    )]
    Map {
        /// The file.
        file: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The new network namespace is not usable.
    #[error("cannot bring the loopback interface up in the new network namespace")]
    Loopback(#[source] io::Error),
    /// The new mounts are not apart from the old ones.
    #[error("cannot make the mounts of the new mount namespace private")]
    Mounts(#[source] io::Error),
    /// `/proc` does not answer.
    #[error("cannot count the threads of this process: is /proc mounted?")]
    Proc(#[source] io::Error),
}

/// Moves this process into new user, network and mount namespaces, where it is root; the loopback is up.
///
/// Must be called **before any thread exists** and before [`crate::privileges::harden`]. Works for root, too: the
/// namespaces are then nested in those of the machine. It cannot be undone.
pub fn enter() -> Result<(), Error> {
    let threads = fs::read_dir("/proc/self/task").map_err(Error::Proc)?.count();
    if threads > 1 {
        return Err(Error::Threads { threads });
    }
    // Inside the new namespace, and before the maps are written, both would read as "nobody".
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .map_err(|error| Error::Forbidden(error.into()))?;
    // Without this, an unprivileged process may not map a group: it could leave groups that deny it something.
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {user} 1"))?;
    write("/proc/self/gid_map", &format!("0 {group} 1"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(|error| Error::Mounts(error.into()))?;
    crate::link::loopback_up().map_err(Error::Loopback)
}

/// Gives the calling thread, and what it starts from then on, mounts of its own: they end with the last of them. Needs root,
/// on the machine or in a user namespace.
pub fn own_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?)
}

fn write(file: &'static str, text: &str) -> Result<(), Error> {
    fs::write(file, text).map_err(|source| Error::Map { file, source })
}
