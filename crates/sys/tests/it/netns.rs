//! Namespaces: made, entered by threads, told apart, refused when they are something else.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;

use zspire_sys::netns::{Netns, Visit};
use zspire_sys::process::in_netns;

#[test]
fn work_in_a_namespace_leaves_the_caller_where_it_is() {
    let (here, there) = (Netns::current().unwrap(), Netns::new().unwrap());
    assert_ne!(here.inode().unwrap(), there.inode().unwrap());
    let inside = there.run(|| Netns::current().unwrap().inode().unwrap()).unwrap();
    assert_eq!(inside, there.inode().unwrap());
    assert_eq!(Netns::current().unwrap().inode().unwrap(), here.inode().unwrap());
}

#[test]
fn a_socket_stays_in_the_namespace_it_was_made_in() {
    let there = Netns::new().unwrap();
    let listener = there.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    // The loopback of the new namespace is up, and is not ours.
    let inside = there.run(|| TcpStream::connect(address)).unwrap().unwrap();
    assert_eq!(listener.accept().unwrap().1, inside.local_addr().unwrap());
    let elsewhere = Netns::new().unwrap().run(|| TcpStream::connect(address)).unwrap();
    assert_eq!(elsewhere.unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn the_value_of_the_work_comes_back_and_so_does_its_panic() {
    let netns = Netns::new().unwrap();
    let text = String::from("borrowed");
    assert_eq!(netns.run(|| text.len()).unwrap(), 8);
    let panic = std::panic::catch_unwind(|| netns.run(|| panic!("as it was meant")));
    assert_eq!(*panic.unwrap_err().downcast::<&str>().unwrap(), "as it was meant");
}

#[test]
fn a_visit_ends_at_home_also_by_a_panic() {
    let (home, there) = (Netns::current().unwrap(), Netns::new().unwrap());
    let here = home.inode().unwrap();
    let visit = Visit::new(there.clone(), home);
    let inside = visit.run(|| Netns::current().unwrap().inode().unwrap()).unwrap();
    assert_eq!(inside, there.inode().unwrap());
    assert_eq!(Netns::current().unwrap().inode().unwrap(), here);
    std::panic::catch_unwind(|| visit.run(|| panic!("as it was meant"))).unwrap_err();
    assert_eq!(Netns::current().unwrap().inode().unwrap(), here);
}

#[test]
fn only_a_network_namespace_is_one() {
    let file = File::open("/proc/self/ns/mnt").unwrap();
    assert_eq!(Netns::from_fd(file.into()).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(Netns::open("/proc/self/status").unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(Netns::open("/run/netns/no such").unwrap_err().kind(), ErrorKind::NotFound);
    let fifo = tempfile::tempdir().unwrap();
    let path = fifo.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(Netns::open(path).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_process_is_found_and_started_in_its_namespace() {
    let netns = Netns::new().unwrap();
    let mut command = Command::new("sleep");
    command.arg("infinity");
    let mut child = in_netns(&netns, command).spawn().unwrap();
    let found = Netns::of_process(child.id()).unwrap().inode().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(found, netns.inode().unwrap());
}
