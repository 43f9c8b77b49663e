//! Sequenced-packet Unix sockets that carry descriptors (`SCM_RIGHTS`).
//!
//! One message in is one message out, with the descriptors it was sent with. What the messages mean is the caller's
//! matter. A received descriptor is closed on exec from the start, and closed at once when its message is refused.

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt};
use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

/// How many descriptors a received message may carry. One with more is refused.
pub const MAX_DESCRIPTORS: usize = 16;

/// How many connections may wait for [`Listener::accept`].
const BACKLOG: i32 = 16;

/// A connected socket.
#[derive(Debug)]
pub struct SeqPacket(Socket);

/// A received message.
#[derive(Debug)]
pub struct Received {
    /// Its bytes. None, and no descriptors, means that the peer has closed the connection.
    pub bytes: Vec<u8>,
    /// Its descriptors, in the order they were sent.
    pub fds: Vec<OwnedFd>,
}

impl SeqPacket {
    /// Two sockets connected to each other.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None)?;
        Ok((Self(a), Self(b)))
    }

    /// Connects to the listener at a path.
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self(socket))
    }

    /// Connects to the listener at a path without waiting, and is non-blocking from then on. One whose queue is full is an
    /// error (`WouldBlock`).
    pub fn connect_now(path: impl AsRef<Path>) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self(socket))
    }

    /// The user that the peer ran as when it connected, or, for the one that connected, when the peer listened.
    pub fn peer_user(&self) -> io::Result<u32> {
        Ok(getsockopt(&self.0, sockopt::PeerCredentials)?.uid())
    }

    /// Takes a descriptor, if it is a sequenced-packet Unix socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let socket = Socket::from(fd);
        if socket.r#type()? != Type::SEQPACKET || socket.local_addr()?.domain() != Domain::UNIX {
            let message = "the descriptor is not a sequenced-packet unix socket";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Self(socket))
    }

    /// Sends one message. The descriptors stay the caller's; the peer gets duplicates.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        retry(|| {
            let sent = sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
            Ok(sent.map(drop)?)
        })
    }

    /// Receives one message of at most `max_bytes` bytes and [`MAX_DESCRIPTORS`] descriptors.
    ///
    /// A message with more of either is lost and an error (`InvalidData`); its descriptors are closed.
    pub fn recv(&self, max_bytes: usize) -> io::Result<Received> {
        let mut bytes = vec![0; max_bytes];
        let (length, fds, flags) = retry(|| receive(self.0.as_fd(), &mut bytes))?;
        if flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            let what = if flags & libc::MSG_TRUNC != 0 { "bytes" } else { "descriptors" };
            let message = format!("refused a message with too many {what}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        bytes.truncate(length);
        Ok(Received { bytes, fds })
    }

    /// How long an operation may wait before it fails with `WouldBlock`.
    pub fn set_timeouts(&self, time: Duration) -> io::Result<()> {
        self.0.set_read_timeout(Some(time))?;
        self.0.set_write_timeout(Some(time))
    }

    /// Whether operations that would have to wait fail with `WouldBlock` instead.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.0.set_nonblocking(nonblocking)
    }
}

impl AsFd for SeqPacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SeqPacket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A socket at a path that accepts connections.
#[derive(Debug)]
pub struct Listener(Socket);

impl Listener {
    /// Listens at a path that only the same user can connect to. A socket left there by a process that has ended is
    /// replaced; one that still answers is an error (`AddrInUse`).
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        remove_stale(path)?;
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        // Before binding, so that there is no moment at which others could connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(BACKLOG)?;
        Ok(Self(socket))
    }

    /// Waits for a connection.
    pub fn accept(&self) -> io::Result<SeqPacket> {
        self.0.accept().map(|(socket, _)| SeqPacket(socket))
    }

    /// Whether [`accept`](Self::accept) fails with `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.0.set_nonblocking(nonblocking)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = || SeqPacket::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket && refused() { fs::remove_file(path) } else { Ok(()) }
}

fn retry<T>(mut f: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match f() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Room for control messages, aligned as their headers have to be.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [u8; CONTROL_BYTES],
}

// SAFETY: CMSG_SPACE is arithmetic on its argument.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE((MAX_DESCRIPTORS * size_of::<RawFd>()) as u32) } as usize;

/// Receives one message: how many bytes, its descriptors, its flags.
///
/// Not through a wrapper: those that hide the control messages of a truncated message leak its descriptors.
fn receive(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>, libc::c_int)> {
    let mut control = Control { bytes: [0; CONTROL_BYTES] };
    let mut data = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain old data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    // SAFETY: message points to one iovec over `bytes` and to `control`, all alive, with their true lengths.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has just filled the message and the control buffer, which is still alive.
    let fds = unsafe { take_descriptors(&message) };
    Ok((length, fds, message.msg_flags))
}

/// Takes the descriptors out of a message's control buffer.
///
/// # Safety
/// `message` must have been filled by `recvmsg`, its control buffer be alive, and this be called only once for it:
/// it takes ownership of the descriptors.
unsafe fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the caller says that the control buffer is as the kernel wrote it; the macros keep to its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: a header that the macros return lies in the buffer, aligned.
        let control = unsafe { &*header };
        if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN is arithmetic on its argument.
            let start = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (control.cmsg_len as usize).saturating_sub(start) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors here, which nobody else owns.
                fds.push(unsafe {
                    let data = libc::CMSG_DATA(header).cast::<RawFd>().add(index);
                    OwnedFd::from_raw_fd(data.read_unaligned())
                });
            }
        }
        // SAFETY: as for the first header.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    fds
}
