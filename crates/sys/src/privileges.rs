//! What this process may do, and giving up what it need not: descriptor limits, core files, capabilities.
//!
//! It does not decide which capabilities are needed; whoever assembles the process does.

use std::io;

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// How many descriptors this process may have open, or -1 if that cannot be told.
pub fn max_descriptors() -> i64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(-1, |(soft, _)| i64::try_from(soft).unwrap_or(i64::MAX))
}

/// Raises the number of open descriptors to what the administrator allows, and says how many that is.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// Keeps private keys out of core files and away from debuggers of the same user.
///
/// From then on the files in `/proc/<pid>` belong to root: [`crate::userns::enter`] has to come before.
pub fn harden() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(prctl::set_dumpable(false)?)
}

/// The capabilities that a node proxy may have a use for (`capabilities(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Ports below 1024.
    NetBindService,
    /// Marks, transparent sockets, interfaces and rules.
    NetAdmin,
    /// Marks and transparent sockets.
    NetRaw,
    /// The namespaces of other processes.
    SysPtrace,
    /// Entering and making namespaces.
    SysAdmin,
}

impl Capability {
    /// Its bit in a set as the kernel writes it.
    pub fn bit(self) -> u64 {
        // The numbers of linux/capability.h.
        let number = match self {
            Self::NetBindService => 10,
            Self::NetAdmin => 12,
            Self::NetRaw => 13,
            Self::SysPtrace => 19,
            Self::SysAdmin => 21,
        };
        1 << number
    }
}

/// Gives up every capability but those in `keep`, and every way to gain one: by executing a file, too.
///
/// Capabilities belong to threads: call this **before another thread is started**, since threads inherit them from
/// the one that starts them. The bounding set is reduced as well where that is permitted (`CAP_SETPCAP`); without
/// it, `no_new_privs` still keeps programs from gaining anything.
pub fn retain_capabilities(keep: &[Capability]) -> io::Result<()> {
    let keep = keep.iter().fold(0, |set, capability| set | capability.bit());
    drop_bounding(keep)?;
    prctl::set_no_new_privs()?;
    let now = Sets::of_thread()?;
    // The kernel takes out of the ambient set whatever is no longer permitted and inheritable.
    Sets { effective: now.effective & keep, permitted: now.permitted & keep, inheritable: now.inheritable & keep }
        .apply()
}

/// Whether the calling thread can use a capability now.
pub fn has_capability(capability: Capability) -> io::Result<bool> {
    Ok(effective()? & capability.bit() != 0)
}

/// The capabilities the calling thread can use now, one bit each.
pub fn effective() -> io::Result<u64> {
    Ok(Sets::of_thread()?.effective)
}

fn drop_bounding(keep: u64) -> io::Result<()> {
    for number in 0..u64::BITS {
        // SAFETY: these two operations take a number and touch no memory of this process.
        let present = unsafe { libc::prctl(libc::PR_CAPBSET_READ, number as libc::c_ulong, 0, 0, 0) };
        if present < 0 {
            break; // The kernel knows no capability of this number, nor of a higher one.
        }
        if present == 0 || keep & (1 << number) != 0 {
            continue;
        }
        // SAFETY: as above.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number as libc::c_ulong, 0, 0, 0) } < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::EPERM) { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

/// The capability sets of a thread, as `capget(2)` has them.
struct Sets {
    effective: u64,
    permitted: u64,
    inheritable: u64,
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// `struct __user_cap_data_struct`, of which version 3 has two: the low and the high 32 bits.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`; process 0 is the calling thread.
const THIS_THREAD: Header = Header { version: 0x2008_0522, pid: 0 };

impl Sets {
    fn of_thread() -> io::Result<Self> {
        let mut header = THIS_THREAD;
        let mut halves = [Half::default(); 2];
        // SAFETY: header and halves have the layout the kernel expects of version 3, and outlive the call.
        let status = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) };
        if status < 0 {
            return Err(io::Error::last_os_error());
        }
        let whole = |part: fn(&Half) -> u32| u64::from(part(&halves[1])) << 32 | u64::from(part(&halves[0]));
        Ok(Self {
            effective: whole(|half| half.effective),
            permitted: whole(|half| half.permitted),
            inheritable: whole(|half| half.inheritable),
        })
    }

    fn apply(&self) -> io::Result<()> {
        let mut header = THIS_THREAD;
        let half = |shift: u32| Half {
            effective: (self.effective >> shift) as u32,
            permitted: (self.permitted >> shift) as u32,
            inheritable: (self.inheritable >> shift) as u32,
        };
        let halves = [half(0), half(32)];
        // SAFETY: header and halves have the layout the kernel expects of version 3, and outlive the call.
        let status = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, halves.as_ptr()) };
        if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
