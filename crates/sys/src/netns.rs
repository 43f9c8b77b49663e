//! Network namespaces, held by descriptor.
//!
//! A namespace is a property of a thread. [`Netns::run`] therefore never moves the calling thread: it does the work
//! on a thread of its own, so that no task of a runtime can ever wake up in somebody else's network. [`Visit`] does move
//! it, for the time of one synchronous function, where a thread for every socket would be too dear. Sockets stay in the
//! namespace they were made in, wherever they are used afterwards.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::fstat;

/// The ioctl that asks a namespace descriptor for its kind (`linux/nsfs.h`: `_IO(0xb7, 0x3)`).
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// A network namespace. It lives at least as long as this value or a clone of it does.
#[derive(Debug, Clone)]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The namespace that a file stands for, as in `/proc/<pid>/ns/net` or `/run/netns/<name>`.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        // The path may come from outside: opening a FIFO must not block.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Self::from_fd(file.into())
    }

    /// The namespace of a process. It is the caller's matter that `pid` still is the process that was meant.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// Takes a descriptor that somebody has sent, if it is one of a network namespace.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: this ioctl takes no argument; on a descriptor of any other kind it fails.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) };
        if kind != libc::CLONE_NEWNET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not a network namespace"));
        }
        Ok(Self(Arc::new(fd)))
    }

    /// Makes a namespace that has no name and ends with its last user. Its loopback is up. Needs `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            crate::link::loopback_up()?;
            Self::current()
        })?
    }

    /// Runs `f` in the namespace, on a thread that lives only for that, and waits for it.
    ///
    /// Needs `CAP_SYS_ADMIN`. A panic of `f` goes on in the caller.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_thread(|| self.enter_thread().map(|()| f()))?
    }

    /// Moves the calling thread into the namespace for good. Threads that it starts later begin there too.
    pub fn enter_thread(&self) -> io::Result<()> {
        Ok(setns(&self.0, CloneFlags::CLONE_NEWNET)?)
    }

    /// The number that tells namespaces apart for as long as both exist.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(fstat(&self.0)?.st_ino)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A way into a namespace and back, for the calling thread.
#[derive(Debug, Clone)]
pub struct Visit {
    there: Netns,
    home: Netns,
}

impl Visit {
    /// From `home`, where every thread that uses it must be.
    pub fn new(there: Netns, home: Netns) -> Self {
        Self { there, home }
    }

    /// The namespace that is visited.
    pub fn netns(&self) -> &Netns {
        &self.there
    }

    /// Runs `f` in the namespace, on the calling thread, which is back when this returns or panics. Needs `CAP_SYS_ADMIN`.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        self.there.enter_thread()?;
        let _back = Back(&self.home);
        Ok(f())
    }
}

/// Takes the thread home.
struct Back<'a>(&'a Netns);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        // The kernel needs a little memory for it. A thread that stays behind would do one pod's work in the network of
        // another, which is worse than no proxy at all.
        if (0..100).all(|_| self.0.enter_thread().is_err()) {
            std::process::abort();
        }
    }
}

/// Keeps a namespace at a path, by a bind mount, whatever becomes of its processes and of this one: it can be opened there
/// again. Needs `CAP_SYS_ADMIN`.
pub fn hold(netns: &Netns, path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let from = format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd());
    let none = None::<&str>;
    mount(Some(from.as_str()), path, none, MsFlags::MS_BIND, none).map_err(|error| {
        // What is left is an empty file.
        let _ = std::fs::remove_file(path);
        error.into()
    })
}

/// Lets go of everything that is kept in a folder: files named `*.netns`.
pub fn release_all(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "netns") {
            release(&path)?;
        }
    }
    Ok(())
}

/// Lets go of what is kept at a path, if anything.
pub fn release(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // Not mounted, or not there: what remains is a file, or nothing.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn on_thread<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, f)?;
        thread.join().map_or_else(|panic| std::panic::resume_unwind(panic), Ok)
    })
}
