//! Processes, held by descriptor: another process of the same number is never taken for the one that was meant.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A process. Its descriptor is readable when the process has ended.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// The process that has this number now.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: this system call takes two numbers and touches no memory of this process.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
        let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor, which nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes a descriptor that somebody has sent, if it is one of a process.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let pidfd = Self(fd);
        pidfd.number()?;
        Ok(pidfd)
    }

    /// The number that the process has here; none if it has ended, or cannot be seen from here.
    pub fn number(&self) -> io::Result<Option<u32>> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
        let line =
            line.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not a process"))?;
        Ok(line.trim().parse().ok().filter(|number| *number > 0))
    }

    /// Whether the process has ended. One that nobody has waited for yet has ended as well.
    pub fn ended(&self) -> io::Result<bool> {
        let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, alive through the call.
        let ready = unsafe { libc::poll(&raw mut fd, 1, 0) };
        if ready < 0 { Err(io::Error::last_os_error()) } else { Ok(ready > 0) }
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Pidfd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// When the process of this number was started, in clock ticks since the machine was: with the number, this tells processes
/// apart for as long as the machine runs.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name is in parentheses and may hold anything; the time is the 22nd field, the 20th after the name.
    let time = stat.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(19)?.parse().ok());
    time.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat cannot be understood")))
}
