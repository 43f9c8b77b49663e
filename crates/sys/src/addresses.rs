//! The addresses of the interfaces of a network namespace, and word of their changes (`rtnetlink(7)`).
//!
//! Both act on the namespace of the calling thread; the socket that hears of changes stays with it.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recv, socket,
};

/// What one message may have, by far; a longer one is cut, which is a change as well.
const MESSAGE: usize = 8192;

/// All addresses that the interfaces have.
pub fn all() -> io::Result<Vec<IpAddr>> {
    let found = getifaddrs()?;
    Ok(found.filter_map(|interface| interface.address.as_ref().and_then(ip)).collect())
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
}

/// Hears of addresses that come and go, from when it is made. Its descriptor is readable when there is word.
#[derive(Debug)]
pub struct Changes(OwnedFd);

impl Changes {
    /// Non-blocking, closed on exec.
    pub fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        let groups = libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups as u32))?;
        Ok(Self(socket))
    }

    /// Takes what there is to hear; an error of kind `WouldBlock` says that there was nothing.
    pub fn take(&self) -> io::Result<()> {
        let (mut message, mut heard) = ([0; MESSAGE], false);
        loop {
            match recv(self.0.as_raw_fd(), &mut message, MsgFlags::empty()) {
                // More than fitted into the socket's buffer has been lost, which is word enough.
                Ok(_) | Err(Errno::ENOBUFS) => heard = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if heard => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
