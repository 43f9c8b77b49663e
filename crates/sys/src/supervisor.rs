//! The service manager that this process runs under: what it is told of the process's life, by the protocol of `sd_notify(3)`.
//!
//! It does not know what it is to be ready; whoever owns the process's life says so. The environment is the caller's to read.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// A service manager, or none: then nothing is told.
#[derive(Debug, Clone, Default)]
pub struct Supervisor {
    socket: Option<SocketAddr>,
    watchdog: Option<Duration>,
}

impl Supervisor {
    /// The one that the values of `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` speak of.
    ///
    /// A socket that is no Unix socket, and a watchdog of another process, are none of ours.
    pub fn new(socket: Option<&str>, watchdog_usec: Option<&str>, watchdog_pid: Option<&str>) -> Self {
        let socket = socket.and_then(|name| match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name).ok(),
            [b'/', ..] => SocketAddr::from_pathname(name).ok(),
            _ => None,
        });
        let ours = watchdog_pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
        let period = watchdog_usec.and_then(|usec| usec.parse().ok()).filter(|usec| *usec > 0);
        let watchdog = period.filter(|_| ours && socket.is_some()).map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// How often it wants a sign of life: twice in the time after which it gives the process up.
    pub fn pulse(&self) -> Option<Duration> {
        self.watchdog.map(|period| period / 2)
    }

    /// The process can serve.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The process ends.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// The process lives.
    pub fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    /// What the process is about, in a line for an operator.
    pub fn status(&self, text: &str) {
        self.tell(&format!("STATUS={}", text.replace('\n', "; ")));
    }

    /// Best effort: who does not listen learns nothing, and nobody waits for it.
    fn tell(&self, what: &str) {
        let Some(socket) = &self.socket else { return };
        let _ = send(socket, what);
    }
}

fn send(to: &SocketAddr, what: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(what.as_bytes(), to).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(listener: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = listener.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_manager_is_told_by_file_and_by_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let abstract_name = format!("zspire-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let both = [
            (path.to_str().unwrap().to_owned(), UnixDatagram::bind(&path).unwrap()),
            (format!("@{abstract_name}"), UnixDatagram::bind_addr(&address).unwrap()),
        ];
        for (name, listener) in both {
            let supervisor = Supervisor::new(Some(&name), Some("3000000"), None);
            assert_eq!(supervisor.pulse(), Some(Duration::from_millis(1500)));
            supervisor.ready();
            supervisor.status("waiting\nfor two things");
            supervisor.alive();
            supervisor.stopping();
            let told: Vec<_> = (0..4).map(|_| heard(&listener)).collect();
            assert_eq!(told, ["READY=1", "STATUS=waiting; for two things", "WATCHDOG=1", "STOPPING=1"]);
        }
    }

    #[test]
    fn what_is_not_for_this_process_is_left_alone() {
        let own = std::process::id().to_string();
        for (socket, usec, pid, there, pulse) in [
            (None, Some("1000"), None, false, None),
            (Some(""), None, None, false, None),
            (Some("vsock:2:9999"), Some("1000"), None, false, None),
            (Some("/run/x"), None, Some(&*own), true, None),
            (Some("/run/x"), Some("0"), None, true, None),
            (Some("/run/x"), Some("soon"), None, true, None),
            (Some("/run/x"), Some("1000"), Some("1"), true, None),
            (Some("/run/x"), Some("1000"), Some(&*own), true, Some(Duration::from_micros(500))),
        ] {
            let supervisor = Supervisor::new(socket, usec, pid);
            assert_eq!((supervisor.is_there(), supervisor.pulse()), (there, pulse), "{socket:?} {usec:?} {pid:?}");
            // Nobody listens.
            supervisor.ready();
        }
    }
}
