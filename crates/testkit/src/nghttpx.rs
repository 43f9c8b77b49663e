//! nghttpx (libnghttp2) in a pod, as a forward proxy: at the client's end of a tunnel it makes HTTP/2 CONNECT of HTTP/1.1 CONNECT,
//! at the server's end it does the reverse, in front of a tinyproxy that connects.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use crate::mesh::Mesh;
use crate::peers::installed;
use crate::pod::Pod;
use crate::process::Process;
use crate::wait::until;

/// Where it takes HTTP/1.1.
const FORWARD: u16 = 3128;
/// Where what connects for it takes HTTP/1.1.
const CONNECTS: u16 = 3129;
/// Where it takes tunnels.
const HBONE: u16 = 15008;

/// The client's end of a tunnel.
#[derive(Debug)]
pub struct Nghttpx {
    _process: Process,
    pod: Pod,
}

impl Nghttpx {
    /// Starts one in a pod that has no proxy, with the pod's identity and more of what it takes; whatever it is asked for, it asks
    /// another pod's proxy.
    #[track_caller]
    pub fn client(mesh: &Mesh, pod: &Pod, to: &Pod, more: &[&str]) -> Self {
        let [chain, key, roots] = &mesh.certificate(&format!("nghttpx-{}", pod.name()), &pod.spiffe_id());
        let backend = format!("--backend={},{HBONE};;proto=h2;tls;sni=hbone", to.address());
        let frontend = format!("--frontend=127.0.0.1,{FORWARD};no-tls");
        let files = [("cacert", roots), ("client-cert-file", chain), ("client-private-key-file", key)];
        let files = files.map(|(option, file)| format!("--{option}={}", file.display()));
        // A SPIFFE certificate has no name that it would look for.
        let arguments = [&[&*backend, &frontend, "--insecure"], &files.each_ref().map(|it| &**it)[..], more].concat();
        let process = start(mesh, pod, FORWARD, &arguments);
        Self { _process: process, pod: pod.clone() }
    }

    /// Where it takes requests.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{FORWARD}/")
    }

    /// Sends a request by HTTP/1.1; the connection after the head of the answer, and its status.
    pub fn ask(&self, request: &str) -> io::Result<(TcpStream, u16)> {
        let mut socket = self.pod.connect(([127, 0, 0, 1], FORWARD).into())?;
        socket.write_all(request.as_bytes())?;
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            socket.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head);
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((socket, status.ok_or_else(|| io::Error::other(format!("not an HTTP answer: {head}")))?))
    }

    /// Asks for a connection to a target.
    #[track_caller]
    pub fn connect(&self, target: SocketAddr) -> (TcpStream, u16) {
        let asked = self.ask(&format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n"));
        asked.unwrap_or_else(|error| panic!("nghttpx does not answer for {target}: {error}"))
    }

    /// Opens a connection to a target.
    #[track_caller]
    pub fn open(&self, target: SocketAddr) -> TcpStream {
        let (socket, status) = self.connect(target);
        assert_eq!(status, 200, "{target}");
        socket
    }
}

/// Starts the server's end in a pod that has no proxy, with the pod's identity and more of what nghttpx takes: what it takes tunnels by, and what connects. They end with the value.
#[track_caller]
pub fn server(mesh: &Mesh, pod: &Pod, more: &[&str]) -> [Process; 2] {
    let [chain, key, roots] = mesh.certificate(&format!("nghttpx-{}", pod.name()), &pod.spiffe_id());
    let file = mesh.path("tinyproxy.conf");
    fs::write(&file, format!("Listen 127.0.0.1\nPort {CONNECTS}\nTimeout 600\nMaxClients 200\nLogLevel Warning\n"))
        .expect("the test's own folder");
    let mut command = pod.command(&installed("tinyproxy").to_string_lossy(), &["-d", "-c"]);
    command.arg(&file);
    let connects = mesh.process_of("tinyproxy", command);
    accepts(pod, CONNECTS, &connects);
    let backend = format!("--backend=127.0.0.1,{CONNECTS}");
    let frontend = format!("--frontend=0.0.0.0,{HBONE}");
    let trusted = format!("--verify-client-cacert={}", roots.display());
    let (key, chain) = (key.display().to_string(), chain.display().to_string());
    let options = ["--verify-client", &trusted, "--tls-min-proto-version=TLSv1.3", &backend, &frontend];
    [start(mesh, pod, HBONE, &[&options, more, &[&*key, &chain]].concat()), connects]
}

#[track_caller]
fn start(mesh: &Mesh, pod: &Pod, port: u16, arguments: &[&str]) -> Process {
    // Without the file of the system's own; one worker has one tunnel.
    let common = ["--conf=/dev/null", "--http2-proxy", "--workers=1", "--errorlog-file=/dev/stderr", "--no-ocsp"];
    let limits = ["--backend-connections-per-host=1000", "--single-process"];
    let command = pod.command(&installed("nghttpx").to_string_lossy(), &[&common[..], &limits, arguments].concat());
    let process = mesh.process_of(&format!("nghttpx-{}", pod.name()), command);
    accepts(pod, port, &process);
    process
}

/// Waits until somebody listens.
#[track_caller]
fn accepts(pod: &Pod, port: u16, by: &Process) {
    until("a program to listen", || {
        pod.connect(([127, 0, 0, 1], port).into()).map(drop).map_err(|error| format!("{error}\n{}", by.log()))
    });
}
