//! Applications in pods: plain sockets under a test's own control, and a server that says whom it sees.
//!
//! Every wait for the other side has a deadline, after which the test fails.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::SockRef;
use zspire_sys::netns::Netns;

use crate::wait::DEADLINE;

/// How a direction of a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By a FIN.
    Orderly,
    /// By a RST.
    Reset,
}

/// An application that accepts connections when the test says so.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    pub(crate) fn new(netns: &Netns, port: u16) -> Self {
        let listener = listen(netns, port);
        SockRef::from(&listener).set_read_timeout(Some(DEADLINE)).expect("a socket option");
        Self(listener)
    }

    /// The next connection.
    #[track_caller]
    pub fn accept(&self) -> TcpStream {
        match self.0.accept() {
            Ok((socket, _)) => patient(socket),
            Err(error) => panic!("no connection arrived: {error}"),
        }
    }

    /// Whether nobody waits to be accepted.
    pub fn is_idle(&self) -> bool {
        self.0.set_nonblocking(true).expect("a socket option");
        let accepted = self.0.accept();
        self.0.set_nonblocking(false).expect("a socket option");
        matches!(accepted, Err(error) if error.kind() == ErrorKind::WouldBlock)
    }
}

/// What the greeting server says to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The pod that has answered.
    pub by: String,
    /// Where the server sees the client.
    pub from: IpAddr,
}

/// A server that greets its clients by their address, then sends back what they send. Ends with its value.
#[derive(Debug)]
pub struct Greeter {
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Greeter {
    pub(crate) fn start(netns: &Netns, name: &str, port: u16) -> Self {
        let listener = Arc::new(listen(netns, port));
        let (accepting, name) = (listener.clone(), name.to_owned());
        let thread = std::thread::spawn(move || {
            while let Ok((socket, from)) = accepting.accept() {
                let greeting = format!("{name} {}\n", from.ip().to_canonical());
                // It ends when the client does, which is before the test does.
                std::thread::spawn(move || greet(patient(socket), &greeting));
            }
        });
        Self { listener, thread: Some(thread) }
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        // On Linux this wakes `accept` with an error.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn greet(mut socket: TcpStream, greeting: &str) {
    if socket.write_all(greeting.as_bytes()).is_ok()
        && let Ok(mut writer) = socket.try_clone()
    {
        // However it ends, the client sees it.
        let _ = io::copy(&mut socket, &mut writer);
    }
}

/// Reads a greeting.
pub fn greeting(mut socket: &TcpStream) -> io::Result<Greeting> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while line.last() != Some(&b'\n') {
        socket.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let wrong = || io::Error::new(ErrorKind::InvalidData, "not a greeting");
    let line = String::from_utf8(line).map_err(|_| wrong())?;
    let (by, from) = line.trim().split_once(' ').ok_or_else(wrong)?;
    Ok(Greeting { by: by.into(), from: from.parse().map_err(|_| wrong())? })
}

/// Listens on all addresses of a namespace.
fn listen(netns: &Netns, port: u16) -> TcpListener {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let bind = || TcpListener::bind(&any.map(|ip| SocketAddr::new(ip, port))[..]);
    netns
        .run(bind)
        .expect("the namespace can be entered")
        .unwrap_or_else(|error| panic!("cannot listen on {port}: {error}"))
}

/// Opens a connection from a namespace that is no pod's, and waits to be greeted.
pub fn ask(netns: &Netns, to: SocketAddr) -> io::Result<Greeting> {
    greeting(&connect(netns, to)?)
}

/// Opens a connection from a namespace.
pub(crate) fn connect(netns: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    netns.run(|| TcpStream::connect_timeout(&to, DEADLINE))?.map(patient)
}

/// The same from an address of the namespace.
pub(crate) fn connect_from(netns: &Netns, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let open = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
        socket.connect_timeout(&to.into(), DEADLINE)?;
        Ok(socket.into())
    };
    netns.run(open)?.map(patient)
}

fn patient(socket: TcpStream) -> TcpStream {
    let limit: Option<Duration> = Some(DEADLINE);
    socket.set_read_timeout(limit).and_then(|()| socket.set_write_timeout(limit)).expect("a socket option");
    socket
}

/// Sends a text.
#[track_caller]
pub fn say(mut socket: &TcpStream, text: &str) {
    socket.write_all(text.as_bytes()).unwrap_or_else(|error| panic!("cannot say {text:?}: {error}"));
}

/// Receives exactly this text.
#[track_caller]
pub fn hear(mut socket: &TcpStream, text: &str) {
    let mut heard = vec![0; text.len()];
    socket.read_exact(&mut heard).unwrap_or_else(|error| panic!("cannot hear {text:?}: {error}"));
    assert_eq!(String::from_utf8_lossy(&heard), text);
}

/// Waits for the other side to end its direction, and fails if it says something before.
#[track_caller]
pub fn ending(mut socket: &TcpStream) -> Ending {
    let mut byte = [0; 64];
    let read = loop {
        match socket.read(&mut byte) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => break read,
        }
    };
    match read {
        Ok(0) => Ending::Orderly,
        Ok(n) => panic!("more was said: {:?}", String::from_utf8_lossy(&byte[..n])),
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => Ending::Reset,
        Err(error) => panic!("the other side neither ended nor reset the connection: {error}"),
    }
}

/// Ends the own direction.
#[track_caller]
pub fn finish(socket: &TcpStream) {
    socket.shutdown(Shutdown::Write).expect("the connection is open");
}

/// Resets the connection.
pub fn reset(socket: TcpStream) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).expect("a socket option");
    drop(socket);
}
