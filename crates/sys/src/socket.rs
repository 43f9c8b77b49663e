//! Options of TCP sockets that the standard library has no face for, and sockets made with them.
//!
//! Everything here acts on the network namespace of the calling thread; it does not know which one that is
//! (see [`crate::netns`]). Nothing here blocks: sockets come back non-blocking and unconnected.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd as _};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

/// Sets the mark (`SO_MARK`) of every packet this socket sends. Needs `CAP_NET_ADMIN` or `CAP_NET_RAW`.
pub fn set_mark(fd: impl AsFd, mark: u32) -> io::Result<()> {
    SockRef::from(&fd).set_mark(mark)
}

/// Where the peer of an accepted connection wanted to go before a redirection rule sent it here; `end` is the address of either
/// end of the connection.
///
/// Answers what the kernel's connection tracking says. A connection that no rule has touched gives its own local
/// address, or an error (`ENOENT`) when it is not tracked at all. IPv4-mapped addresses come back as IPv4.
pub fn original_destination(fd: impl AsFd, end: SocketAddr) -> io::Result<SocketAddr> {
    let socket = SockRef::from(&fd);
    // A dual-stack listener gives IPv6 sockets for IPv4 connections, which are tracked as IPv4.
    let answer = if canonical(end).is_ipv4() { socket.original_dst_v4()? } else { socket.original_dst_v6()? };
    address(&answer).map(canonical)
}

/// Lets the socket use addresses that are not this host's own (`IP_TRANSPARENT`). Needs `CAP_NET_ADMIN` or
/// `CAP_NET_RAW`.
pub fn set_transparent(fd: impl AsFd, v6: bool) -> io::Result<()> {
    let socket = SockRef::from(&fd);
    if v6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

/// Defers the choice of a port from `bind` to `connect` (`IP_BIND_ADDRESS_NO_PORT`), where the whole four-tuple
/// is known: otherwise each bound source address has only as many connections as there are ephemeral ports.
pub fn set_bind_address_no_port(fd: impl AsFd) -> io::Result<()> {
    // The option lives at level IP for sockets of both families.
    Ok(setsockopt(&fd, sockopt::IpBindAddressNoPort, &true)?)
}

/// What a listening socket should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// The address to listen on. Port 0 lets the kernel choose.
    pub address: SocketAddr,
    /// The mark of the packets of accepted connections.
    pub mark: Option<u32>,
    /// Whether several sockets may listen on the same address, as two generations do while one replaces the other.
    pub reuse_port: bool,
    /// Whether connections to addresses that are not this host's own may be accepted.
    pub transparent: bool,
    /// Whether an IPv6 socket refuses IPv4 connections. Ignored for an IPv4 address.
    pub v6_only: bool,
    /// How many connections may wait to be accepted.
    pub backlog: i32,
}

/// Opens a listening socket: non-blocking, closed on exec, `SO_REUSEADDR`.
pub fn listen(options: &Listen) -> io::Result<TcpListener> {
    let v6 = options.address.is_ipv6();
    let socket = tcp(options.address)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.reuse_port)?;
    if let Some(mark) = options.mark {
        set_mark(&socket, mark)?;
    }
    if options.transparent {
        set_transparent(&socket, v6)?;
    }
    if v6 {
        socket.set_only_v6(options.v6_only)?;
    }
    socket.bind(&options.address.into())?;
    socket.listen(options.backlog)?;
    Ok(socket.into())
}

/// What a socket that will connect should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Connect {
    /// The address to connect from; the kernel chooses when there is none.
    pub source: Option<IpAddr>,
    /// The mark of the packets of the connection.
    pub mark: Option<u32>,
    /// Whether `source` may be an address that is not this host's own.
    pub transparent: bool,
    /// Whether it has a port of its own before it connects. Otherwise the kernel chooses one with the destination, so that it may be one
    /// that connections to others have.
    pub early_port: bool,
}

/// Makes a non-blocking socket that the caller connects to `to`.
pub fn stream(to: SocketAddr, options: &Connect) -> io::Result<Socket> {
    let socket = tcp(to)?;
    if let Some(mark) = options.mark {
        set_mark(&socket, mark)?;
    }
    match options.source {
        Some(source) => bind_source(&socket, source, to, options)?,
        None if options.early_port => socket.bind(&SocketAddr::new(unspecified(to), 0).into())?,
        None => {}
    }
    Ok(socket)
}

fn unspecified(like: SocketAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn bind_source(socket: &Socket, source: IpAddr, to: SocketAddr, options: &Connect) -> io::Result<()> {
    if source.is_ipv6() != to.is_ipv6() {
        let message = format!("cannot connect to {to} from {source}: they are not of the same address family");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    if options.transparent {
        // Which lets it be bound to addresses that no interface has, too.
        set_transparent(socket, source.is_ipv6())?;
    }
    if !options.early_port {
        set_bind_address_no_port(socket)?;
    }
    socket.bind(&SocketAddr::new(source, 0).into())
}

/// Has the kernel hand the clients that wait at a listener to another one of the same port when it is closed, instead of
/// resetting them (`net.ipv4.tcp_migrate_req`, which is for both families). It is a setting of the network namespace.
pub fn migrate_waiting_clients() -> io::Result<()> {
    std::fs::write("/proc/sys/net/ipv4/tcp_migrate_req", "1")
}

/// Has the kernel give new clients of a shared port to listeners that were added after the first `own`, if there are as many
/// (`SO_ATTACH_REUSEPORT_CBPF`): who stops listening has no client in the middle of a handshake then. Where there are no others,
/// clients come as before. Needs no privilege; an error says that the port is not shared.
pub fn prefer_later_listeners(fd: impl AsFd, own: u32) -> io::Result<()> {
    // The same number on every architecture that there are other numbers for (`asm-generic/socket.h`); unknown to `libc` here.
    const SO_ATTACH_REUSEPORT_CBPF: libc::c_int = 51;
    let own = own.max(1);
    let instruction = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let random = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM).cast_unsigned();
    // A number that no listener has, as when there are too few others, leaves the choice to the kernel.
    let mut program = [
        instruction((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, random),
        instruction((libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K) as u16, own),
        instruction((libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K) as u16, own),
        instruction((libc::BPF_RET | libc::BPF_A) as u16, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the option's value is one sock_fprog, whose program lives through the call; the kernel copies both.
    let status = unsafe {
        let value = (&raw const filter).cast();
        libc::setsockopt(fd, libc::SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, value, length)
    };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A congestion control that does not pace. Every kernel has it.
pub const UNPACED: &[u8] = b"reno";

/// The congestion control that connections of this namespace have unless something else is chosen for them, if it paces what they
/// send, as `bbr` does.
pub fn pacing_control() -> io::Result<Option<Box<[u8]>>> {
    let name = scratch()?.tcp_congestion()?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(name.starts_with(b"bbr").then(|| name.into()))
}

/// Chooses the congestion control of a connection, or of those that a listener accepts (`TCP_CONGESTION`). A connection that was
/// made with one that paces keeps the timers of the pace when it gets another.
pub fn set_congestion_control(fd: impl AsFd, name: &[u8]) -> io::Result<()> {
    SockRef::from(&fd).set_tcp_congestion(name)
}

/// Whether this process may mark packets.
pub fn can_mark() -> bool {
    scratch().and_then(|socket| set_mark(socket, 1)).is_ok()
}

/// Whether this process may use addresses that are not this host's own.
pub fn can_be_transparent() -> bool {
    scratch().and_then(|socket| set_transparent(socket, false)).is_ok()
}

/// Whether the network namespace of the calling thread has a usable IPv6 loopback.
pub fn ipv6_available() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

fn tcp(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

fn scratch() -> io::Result<Socket> {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn address(address: &SockAddr) -> io::Result<SocketAddr> {
    address.as_socket().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not an internet socket"))
}
