//! Watching the packets of one network interface (`packet(7)`).
//!
//! Programs for this exist, but they insist on becoming another user first, and a user namespace has no other.

use std::fs::File;
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;

/// Longest packet that is read whole; the kernel hands over segments before they are cut into frames.
pub const MAX_PACKET: usize = 128 << 10;
/// What may wait to be read.
const BUFFER: usize = 16 << 20;

/// The packets of an interface, in both directions, from when this is made.
#[derive(Debug)]
pub struct Packets {
    socket: File,
}

impl Packets {
    /// Watches an interface of the calling thread's network namespace. Needs `CAP_NET_RAW`.
    pub fn of(interface: &str) -> io::Result<Self> {
        let index = if_nametoindex(interface)?;
        let flags = SockFlag::SOCK_CLOEXEC;
        // Without a protocol nothing is received until the socket is bound: no packet of another interface gets in.
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
        bind(&socket, index)?;
        Ok(Self { socket: File::from(socket) })
    }

    /// Reads one packet, from its link-layer header on, and returns its length. An error of kind `WouldBlock` says that
    /// none came within `patience`.
    pub fn read(&mut self, packet: &mut [u8], patience: Duration) -> io::Result<usize> {
        let timeout = TimeVal::new(patience.as_secs().cast_signed(), patience.subsec_micros().into());
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &timeout)?;
        self.socket.read(packet)
    }
}

fn bind(socket: &OwnedFd, index: u32) -> io::Result<()> {
    let protocol = (SockProtocol::EthAll as libc::c_int) as u16;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        // Already in network order.
        sll_protocol: protocol,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a whole `sockaddr_ll` that lives through the call, and its length is given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
