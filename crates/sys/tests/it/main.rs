//! The kernel interface against the real kernel. Needs root or the same capabilities; without, it fails.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod allocator;
mod confined;
mod netns;
mod nft;
mod scm;
mod socket;
mod topology;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::SockRef;
use zspire_sys::netns::Netns;

/// How long anything may take before a test fails for it.
const DEADLINE: Duration = Duration::from_secs(10);

/// Listens in a namespace.
fn listen(netns: &Netns, address: impl Into<SocketAddr>) -> TcpListener {
    let address = address.into();
    let listener = netns.run(|| TcpListener::bind(address)).unwrap().unwrap();
    SockRef::from(&listener).set_read_timeout(Some(DEADLINE)).unwrap();
    listener
}

/// Connects from a namespace.
fn connect(netns: &Netns, address: SocketAddr) -> TcpStream {
    netns.run(|| TcpStream::connect_timeout(&address, DEADLINE)).unwrap().unwrap()
}

/// Sends a message each way and so shows that the two are the ends of one connection.
fn converse(client: &TcpStream, server: &TcpStream) {
    for (mut from, mut to, message) in [(client, server, b"ping"), (server, client, b"pong")] {
        to.set_read_timeout(Some(DEADLINE)).unwrap();
        from.write_all(message).unwrap();
        let mut received = [0; 4];
        to.read_exact(&mut received).unwrap();
        assert_eq!(&received, message);
    }
}
