//! What flows while something happens: a live connection that is looked at, and connections one after the other.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use zspire_testkit::app::greeting;
use zspire_testkit::{Ending, Listener, Pod, ending, hear, say, until};

/// A live connection: its client's end and its server's.
pub(crate) struct Live {
    pub(crate) client: TcpStream,
    pub(crate) served: TcpStream,
}

/// Opens a connection and sees that it works.
#[track_caller]
pub(crate) fn connect(from: &Pod, to: &Pod, app: &Listener) -> Live {
    connect_to(from, to.app(), app)
}

/// The same at another port than the application's own.
#[track_caller]
pub(crate) fn connect_to(from: &Pod, to: SocketAddr, app: &Listener) -> Live {
    let client = from.open(to);
    let live = Live { client, served: app.accept() };
    live.goes_on();
    live
}

impl Live {
    #[track_caller]
    pub(crate) fn goes_on(&self) {
        say(&self.client, "question");
        hear(&self.served, "question");
        say(&self.served, "answer");
        hear(&self.client, "answer");
    }

    #[track_caller]
    pub(crate) fn is_cut(&self) {
        assert_eq!((ending(&self.client), ending(&self.served)), (Ending::Reset, Ending::Reset));
    }
}

/// Waits for the reason of an end, in the access log and in the metric.
#[track_caller]
pub(crate) fn told(pod: &Pod, direction: &str, why: &str, flag: &str, reason: &str) -> Value {
    let line = pod.refusal(direction, why);
    let reporter = if direction == "inbound" { "destination" } else { "source" };
    let reporter = format!("reporter=\"{reporter}\"");
    pod.metric(&["istio_tcp_connections_closed_total", &reporter, &format!("response_flags=\"{flag}\"")]);
    pod.metric(&["zspire_connections_cut_total", &reporter, &format!("reason=\"{reason}\"")]);
    line
}

/// What has passed between two lines in the log of the same process, which has times to the microsecond.
pub(crate) fn seconds_between(first: &Value, second: &Value) -> f64 {
    let time = |line: &Value| {
        let text = line["time"].as_str().expect("a line has a time");
        let seconds: f64 = text[17..text.len() - 1].parse().expect("RFC 3339");
        text[14..16].parse::<f64>().expect("RFC 3339") * 60.0 + seconds
    };
    (time(second) - time(first)).rem_euclid(3600.0)
}

/// Connections one after the other, each greeted and then asked to send something back, until told to end.
pub(crate) struct Load<'a> {
    client: &'a Pod,
    server: &'a Pod,
    ended: AtomicBool,
    served: AtomicUsize,
    failed: Mutex<Vec<String>>,
}

impl<'a> Load<'a> {
    pub(crate) fn new(client: &'a Pod, server: &'a Pod) -> Self {
        Self { client, server, ended: AtomicBool::new(false), served: AtomicUsize::new(0), failed: Mutex::default() }
    }

    /// Runs from several threads while something happens; then no connection may have failed.
    #[track_caller]
    pub(crate) fn during(&self, threads: usize, something: impl FnOnce()) {
        std::thread::scope(|scope| {
            // Also when what happens fails: the scope waits for its threads.
            let _end = End(self);
            for _ in 0..threads {
                scope.spawn(|| self.run());
            }
            something();
        });
        assert_eq!(self.failures(), Vec::<String>::new());
    }

    /// What went wrong so far.
    pub(crate) fn failures(&self) -> Vec<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until so many more connections were served.
    #[track_caller]
    pub(crate) fn more(&self, count: usize) {
        let before = self.served.load(Relaxed);
        until("connections to be served", || match self.served.load(Relaxed) {
            now if now >= before + count => Ok(()),
            now => Err(format!("{} of {count}; failures: {:?}", now - before, self.failures())),
        });
    }

    /// No connection is begun any more.
    pub(crate) fn end(&self) {
        self.ended.store(true, Relaxed);
    }

    fn run(&self) {
        while !self.ended.load(Relaxed) {
            match self.one() {
                Ok(()) => drop(self.served.fetch_add(1, Relaxed)),
                Err(error) => {
                    let failure = format!("after {}: {error}", self.served.load(Relaxed));
                    self.failed.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
                }
            }
        }
    }

    fn one(&self) -> std::io::Result<()> {
        let mut socket = self.client.connect(self.server.app())?;
        greeting(&socket)?;
        socket.write_all(b"and back")?;
        let mut back = [0; 8];
        socket.read_exact(&mut back)
    }
}

struct End<'a, 'b>(&'a Load<'b>);

impl Drop for End<'_, '_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
