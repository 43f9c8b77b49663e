//! Messages with descriptors, and those that are refused.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use zspire_sys::netns::Netns;
use zspire_sys::scm::{Listener, MAX_DESCRIPTORS, SeqPacket};

#[test]
fn a_message_keeps_its_bounds_and_its_descriptors() {
    let (a, b) = SeqPacket::pair().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"through the descriptor").unwrap();
    a.send(b"first", &[file.as_fd()]).unwrap();
    a.send(b"second", &[]).unwrap();
    let first = b.recv(64).unwrap();
    assert_eq!((first.bytes.as_slice(), first.fds.len()), (&b"first"[..], 1));
    let second = b.recv(64).unwrap();
    assert_eq!((second.bytes.as_slice(), second.fds.len()), (&b"second"[..], 0));

    let fd = first.fds.into_iter().next().unwrap();
    let flags = fcntl(&fd, FcntlArg::F_GETFD).unwrap();
    assert_eq!(flags, nix::libc::FD_CLOEXEC);
    let (mut file, mut text) = (File::from(fd), String::new());
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through the descriptor");
}

#[test]
fn a_namespace_travels() {
    let (a, b) = SeqPacket::pair().unwrap();
    let netns = Netns::new().unwrap();
    a.send(b"pod", &[netns.as_fd()]).unwrap();
    let fd = b.recv(16).unwrap().fds.remove(0);
    assert_eq!(Netns::from_fd(fd).unwrap().inode().unwrap(), netns.inode().unwrap());
}

/// A refused message's descriptors must not stay open: the other end of a pipe sees whether they are.
fn refused(bytes: &[u8], copies: usize) -> String {
    let (a, b) = SeqPacket::pair().unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let writer = OwnedFd::from(writer);
    a.send(bytes, &vec![writer.as_fd(); copies]).unwrap();
    drop(writer);
    let error = b.recv(8).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "all writing ends are closed");
    a.send(b"next", &[]).unwrap();
    assert_eq!(b.recv(8).unwrap().bytes, b"next", "the connection goes on");
    error.to_string()
}

#[test]
fn too_many_bytes_are_refused_with_their_descriptors() {
    assert_eq!(refused(b"more than 8", 1), "refused a message with too many bytes");
}

#[test]
fn too_many_descriptors_are_refused_and_closed() {
    assert_eq!(refused(b"few", MAX_DESCRIPTORS + 1), "refused a message with too many descriptors");
}

#[test]
fn exactly_the_limits_are_accepted() {
    let (a, b) = SeqPacket::pair().unwrap();
    a.send(b"12345678", &[a.as_fd(); MAX_DESCRIPTORS]).unwrap();
    let received = b.recv(8).unwrap();
    assert_eq!((received.bytes.len(), received.fds.len()), (8, MAX_DESCRIPTORS));
}

#[test]
fn a_closed_peer_is_an_empty_message_and_sending_to_it_an_error() {
    let (a, b) = SeqPacket::pair().unwrap();
    drop(a);
    let received = b.recv(8).unwrap();
    assert!(received.bytes.is_empty() && received.fds.is_empty());
    assert_eq!(b.send(b"late", &[]).unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn what_is_not_there_would_block() {
    let (a, _b) = SeqPacket::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    assert_eq!(a.recv(8).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_listener_replaces_a_dead_socket_but_not_a_live_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    drop(Listener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(Listener::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);

    let client = SeqPacket::connect(&path).unwrap();
    client.send(b"hello", &[]).unwrap();
    let _probe = listener.accept().unwrap(); // The refused second listener's look whether anybody answers.
    assert_eq!(listener.accept().unwrap().recv(8).unwrap().bytes, b"hello");
}

#[test]
fn only_a_packet_socket_is_one() {
    let (a, _b) = UnixStream::pair().unwrap();
    assert_eq!(SeqPacket::from_fd(a.into()).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(SeqPacket::from_fd(tempfile::tempfile().unwrap().into()).is_err());
    let (a, _b) = SeqPacket::pair().unwrap();
    assert!(SeqPacket::from_fd(a.as_fd().try_clone_to_owned().unwrap()).is_ok());
    assert!(a.as_raw_fd() > 2);
}
