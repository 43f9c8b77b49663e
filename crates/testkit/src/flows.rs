//! Who gets what is sent: sockets that say who they are to whoever calls, and calls with the mark of a proxy or without.

use std::fmt;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};
use zspire_sys::netns::Netns;

use crate::wait::DEADLINE;

/// How often whoever answers looks whether it still should.
const LOOK: Duration = Duration::from_millis(50);
/// Longest name.
const NAME: usize = 64;

/// What carries a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

use Protocol::{Tcp, Udp};

/// A call that somebody makes.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub protocol: Protocol,
    /// The mark of its packets.
    pub mark: Option<u32>,
    pub to: SocketAddr,
}

/// Who has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    By(String),
    Refused,
    Silence,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::By(name) => f.write_str(name),
            Self::Refused => f.write_str("refused"),
            Self::Silence => f.write_str("silence"),
        }
    }
}

/// Those who answer. They end with the value.
#[derive(Debug, Default)]
pub struct Answering {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Answering {
    /// Answers with this name at an address of a namespace, with packets of this mark.
    #[track_caller]
    pub fn at(&mut self, netns: &Netns, name: &str, (protocol, at): (Protocol, SocketAddr), mark: Option<u32>) {
        let bound = netns.run(|| bound(protocol, at, mark)).expect("the namespace can be entered");
        let socket = bound.unwrap_or_else(|error| panic!("cannot listen at {at} for {name}: {error}"));
        let (over, name) = (self.over.clone(), name.to_owned());
        self.threads.push(std::thread::spawn(move || match protocol {
            Tcp => answer_connections(&socket.into(), &name, &over),
            Udp => answer_datagrams(&socket.into(), &name, &over),
        }));
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Who answers a call from a namespace.
#[track_caller]
pub fn answer(netns: &Netns, call: Call) -> Answer {
    match netns.run(|| asked(call)).expect("the namespace can be entered") {
        Ok(name) => Answer::By(name),
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) => {
            Answer::Refused
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Answer::Silence,
        Err(error) => panic!("{call:?}: {error}"),
    }
}

fn asked(Call { protocol, mark, to }: Call) -> io::Result<String> {
    let mut socket = socket(protocol, to.ip(), mark)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.connect_timeout(&to.into(), DEADLINE)?;
    let mut name = [0; NAME];
    let length = match protocol {
        Tcp => {
            let mut text = Vec::new();
            socket.read_to_end(&mut text)?;
            name[..text.len()].copy_from_slice(&text);
            text.len()
        }
        Udp => {
            socket.send(b"who?")?;
            socket.read(&mut name)?
        }
    };
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

fn socket(protocol: Protocol, ip: IpAddr, mark: Option<u32>) -> io::Result<Socket> {
    let domain = if ip.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, if protocol == Tcp { Type::STREAM } else { Type::DGRAM }, None)?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

fn bound(protocol: Protocol, at: SocketAddr, mark: Option<u32>) -> io::Result<Socket> {
    let socket = socket(protocol, at.ip(), mark)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.set_read_timeout(Some(LOOK))?;
    if protocol == Tcp {
        socket.listen(16)?;
    }
    Ok(socket)
}

fn answer_connections(listener: &TcpListener, name: &str, over: &AtomicBool) {
    while !over.load(Relaxed) {
        if let Ok((mut socket, _)) = listener.accept() {
            // Whoever has gone away does not want to know.
            let _ = socket.write_all(name.as_bytes());
            let _ = SockRef::from(&socket).shutdown(std::net::Shutdown::Write);
        }
    }
}

fn answer_datagrams(socket: &UdpSocket, name: &str, over: &AtomicBool) {
    while !over.load(Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut [0; NAME]) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    }
}
