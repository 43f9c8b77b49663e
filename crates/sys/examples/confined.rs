//! Does what a process can do only alone, before it has threads, and prints what came of it. The tests run it as a
//! child, since a test is a thread of a process with others; it also shows the order in which the calls belong.

#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use nix::sys::prctl;
use zspire_sys::privileges::{self, Capability};
use zspire_sys::topology::{Pod, Topology};
use zspire_sys::{socket, userns};

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    match std::env::args().nth(1).as_deref() {
        Some("userns") => userns_topology(),
        Some("userns-late") => userns_late(),
        Some("capabilities") => capabilities(),
        Some("harden") => harden(),
        Some("wait") => wait(),
        _ => Err("say one of userns, userns-late, capabilities, harden, wait".into()),
    }
}

/// Becomes root of its own namespaces, builds a network there and sends something through it.
fn userns_topology() -> Outcome {
    userns::enter()?;
    println!("uid {}", nix::unistd::geteuid());
    println!("mark {}", socket::can_mark());
    let mut topology = Topology::new()?;
    let (mut a, mut b) = (topology.node("a")?, topology.node("b")?);
    let (client, server) = (a.pod("client", a.pod_address(1))?, b.pod("server", b.pod_address(1))?);
    println!("from {}", greet(&client, &server)?);
    Ok(())
}

fn greet(client: &Pod, server: &Pod) -> Result<IpAddr, Box<dyn Error>> {
    let listener = server.netns.run(|| TcpListener::bind((server.address, 0)))??;
    let to: SocketAddr = listener.local_addr()?;
    let mut stream = client.netns.run(|| TcpStream::connect(to))??;
    let (accepted, peer) = listener.accept()?;
    (&accepted).write_all(b"hello")?;
    drop(accepted);
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    if text == "hello" { Ok(peer.ip()) } else { Err("the pod said something else".into()) }
}

/// Tries it with a second thread.
fn userns_late() -> Outcome {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || held.recv());
    let error = userns::enter().err().map(|error| error.to_string());
    println!("{}", error.unwrap_or_default());
    drop(release);
    thread.join().map_err(|_| "the thread panicked")?.ok();
    Ok(())
}

/// Keeps one capability and shows that nothing else is left, in a later thread neither.
fn capabilities() -> Outcome {
    privileges::retain_capabilities(&[Capability::NetAdmin])?;
    println!("effective {:#x}", privileges::effective()?);
    println!("net_admin {}", privileges::has_capability(Capability::NetAdmin)?);
    println!("sys_admin {}", privileges::has_capability(Capability::SysAdmin)?);
    let later = std::thread::spawn(privileges::effective).join().map_err(|_| "the thread panicked")??;
    println!("thread {later:#x}");
    for line in std::fs::read_to_string("/proc/self/status")?.lines() {
        if line.starts_with("Cap") || line.starts_with("NoNewPrivs") {
            println!("{}", line.replace('\t', " "));
        }
    }
    // What a program that it executes has.
    let child = std::process::Command::new("grep").args(["CapEff", "/proc/self/status"]).output()?;
    println!("child {}", String::from_utf8(child.stdout)?.replace('\t', " ").trim());
    Ok(())
}

fn harden() -> Outcome {
    privileges::harden()?;
    println!("dumpable {}", prctl::get_dumpable()?);
    println!("core {:?}", nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE)?);
    println!("descriptors {} {}", privileges::raise_descriptor_limit()?, privileges::max_descriptors());
    Ok(())
}

/// Starts a child that would live for ever, says which, and ends when its input does.
fn wait() -> Outcome {
    let mut command = std::process::Command::new("sleep");
    let child = zspire_sys::process::die_with_parent(command.arg("infinity")).spawn()?;
    println!("{}", child.id());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
