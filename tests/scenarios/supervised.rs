//! What a service manager is told: sd_notify(3), spoken to a socket of the test.

use std::cell::RefCell;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Command;

use zspire_testkit::plan::captured;
use zspire_testkit::{DEADLINE, Pod, mesh, uncaptured};

use crate::scenario;

/// Abstract, so that it belongs to the pod's namespace.
const SOCKET: &str = "@manager";
/// The proxy gives a sign of life in half of this.
const WATCHDOG: &str = "200000";

/// The service manager of a pod's namespace.
struct Manager {
    socket: UnixDatagram,
    told: RefCell<Vec<String>>,
}

impl Manager {
    fn new(pod: &Pod) -> Self {
        let address = SocketAddr::from_abstract_name(&SOCKET[1..]).unwrap();
        let socket = pod.run(|| UnixDatagram::bind_addr(&address)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { socket, told: RefCell::default() }
    }

    /// Waits until it is told something that begins like this.
    #[track_caller]
    fn hears(&self, beginning: &str) -> String {
        loop {
            let mut buffer = [0; 4096];
            let length = self.socket.recv(&mut buffer).unwrap_or_else(|error| {
                panic!("nothing begins with {beginning}: {error}; told so far: {:?}", self.told.borrow())
            });
            let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
            self.told.borrow_mut().push(message.clone());
            if message.starts_with(beginning) {
                return message;
            }
        }
    }

    fn has_heard(&self, message: &str) -> bool {
        self.told.borrow().iter().any(|told| told == message)
    }
}

fn supervised(mut command: Command) -> Command {
    command.env("NOTIFY_SOCKET", SOCKET).env("WATCHDOG_USEC", WATCHDOG);
    command
}

#[test]
fn proxy_says_what_it_waits_for_that_it_is_ready_that_it_lives_and_that_it_stops() {
    scenario(|| {
        let server = captured("server").with("NOTIFY_SOCKET", SOCKET).with("WATCHDOG_USEC", WATCHDOG).not_started();
        let mesh = mesh().dedicated().control_plane_down().node("a").pod(server).start();
        let server = mesh.pod("server");
        let manager = Manager::new(&server);
        server.start();
        manager.hears("STATUS=");
        let waiting = manager.hears("STATUS=");
        assert!(waiting.contains("cannot join"), "{waiting}");
        manager.hears("WATCHDOG=1");
        assert!(!manager.has_heard("READY=1"));
        mesh.start_control_plane();
        manager.hears("READY=1");
        manager.hears("STATUS=ready");
        manager.hears("WATCHDOG=1");
        server.drain();
        manager.hears("STOPPING=1");
        assert_eq!(server.ended().code(), Some(0));
    });
}

#[test]
fn node_agent_and_control_plane_say_the_same() {
    scenario(|| {
        let mesh = mesh().node("a").pod(uncaptured("agent")).pod(uncaptured("control-plane")).start();
        let (agent, control_plane) = (mesh.pod("agent"), mesh.pod("control-plane"));
        let mut agent_command = supervised(agent.program(&["node-agent"]));
        for (variable, file) in
            [("INPOD_UDS", "zds"), ("ZSPIRE_AGENT_SOCKET", "agent"), ("ZSPIRE_AGENT_STATE_DIR", "own.enrolled")]
        {
            agent_command.env(variable, mesh.path(file));
        }
        let mut control_plane_command = supervised(control_plane.program(&["control-plane"]));
        control_plane_command.env("ZSPIRE_CP_MESH", mesh.path("mesh.json"));
        for (pod, command) in [(agent, agent_command), (control_plane, control_plane_command)] {
            let manager = Manager::new(&pod);
            let mut process = mesh.process_of(&format!("supervised-{}", pod.name()), command);
            manager.hears("READY=1");
            manager.hears("WATCHDOG=1");
            manager.hears("WATCHDOG=1");
            process.terminate();
            manager.hears("STOPPING=1");
            assert_eq!(process.ended().code(), Some(0));
        }
    });
}
