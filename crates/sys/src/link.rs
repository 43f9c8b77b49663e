//! Network interfaces of the calling thread's namespace: only what a fresh namespace needs to be usable.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use socket2::{Domain, Socket, Type};

/// Brings the loopback interface up. A new namespace has one, but down, and then not even 127.0.0.1 answers.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let mut request = request_for("lo");
    interface_ioctl(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the kernel has just filled the flags member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    interface_ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain old data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero, so that the name always ends.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn interface_ioctl(socket: impl AsFd, operation: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: both interface ioctls used here read and write exactly one ifreq, which the reference keeps alive.
    let status = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), operation as _, std::ptr::from_mut(request)) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
