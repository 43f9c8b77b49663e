//! A node agent that does what a test says: the other side of ZDS.

use std::path::Path;
use std::time::Duration;

use prost::Message as _;
use zspire_sys::netns::Netns;
use zspire_sys::scm::{Listener, SeqPacket};
use zspire_wire::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    ZdsHello, workload_request::Payload, workload_response,
};

use std::os::fd::{AsFd as _, BorrowedFd};

use crate::plan::NAMESPACE;
use crate::pod::Pod;
use crate::wait::until;

/// Longest answer.
const ANSWER: usize = 4096;

/// An agent that listens.
#[derive(Debug)]
pub struct Agent(Listener);

/// A proxy that has connected and said hello.
#[derive(Debug)]
pub struct Connected(SeqPacket);

impl Agent {
    /// Listens at a path.
    #[track_caller]
    pub fn listen(path: &Path) -> Self {
        let listener = Listener::bind(path).expect("the test's own folder");
        listener.set_nonblocking(true).expect("a socket option");
        Self(listener)
    }

    /// The next proxy; its hello has been read.
    #[track_caller]
    pub fn accept(&self) -> Connected {
        let socket = until("a proxy to connect", || self.0.accept());
        socket.set_nonblocking(true).expect("a socket option");
        let connected = Connected(socket);
        let hello = connected.receive();
        let hello = ZdsHello::decode(&hello[..]).expect("a hello comes first");
        assert_eq!(hello.version, i32::from(Version::V1));
        connected
    }
}

impl Connected {
    /// Adds a pod with its own namespace; the error that is answered, or none.
    #[track_caller]
    pub fn add(&self, uid: &str, pod: &Pod) -> String {
        self.add_at(uid, pod.name(), pod.netns())
    }

    /// Adds a pod with some namespace.
    #[track_caller]
    pub fn add_at(&self, uid: &str, name: &str, netns: &Netns) -> String {
        self.ask(&add(uid, name), &[netns.as_fd()])
    }

    /// Deletes a pod.
    #[track_caller]
    pub fn del(&self, uid: &str) -> String {
        self.ask(&del(uid), &[])
    }

    /// Keeps a pod.
    #[track_caller]
    pub fn keep(&self, uid: &str) -> String {
        self.ask(&Payload::Keep(KeepWorkload { uid: uid.into() }), &[])
    }

    /// Ends the snapshot.
    #[track_caller]
    pub fn snapshot_sent(&self) -> String {
        self.ask(&Payload::SnapshotSent(SnapshotSent {}), &[])
    }

    /// Asks and waits for the answer, which has to come in a second.
    #[track_caller]
    pub fn ask(&self, payload: &Payload, descriptors: &[BorrowedFd<'_>]) -> String {
        self.ask_raw(&WorkloadRequest { payload: Some(payload.clone()) }.encode_to_vec(), descriptors)
    }

    /// Asks without waiting for the answer.
    #[track_caller]
    pub fn ask_in_vain(&self, payload: &Payload) {
        let message = WorkloadRequest { payload: Some(payload.clone()) }.encode_to_vec();
        self.0.send(&message, &[]).expect("the proxy's queue has room");
    }

    /// The same with any bytes.
    #[track_caller]
    pub fn ask_raw(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> String {
        self.0.send(message, descriptors).expect("the proxy reads");
        let asked = std::time::Instant::now();
        let error = self.answer();
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(2), "answered after {took:?}");
        error
    }

    /// Waits for an answer: the error, or none.
    #[track_caller]
    pub fn answer(&self) -> String {
        let answer = WorkloadResponse::decode(&self.receive()[..]).expect("an answer");
        let Some(workload_response::Payload::Ack(ack)) = answer.payload else { panic!("not an ack") };
        ack.error
    }

    #[track_caller]
    fn receive(&self) -> Vec<u8> {
        until("the proxy to say something", || self.0.recv(ANSWER)).bytes
    }

    /// Whether it has said nothing that was not asked for.
    pub fn is_silent(&self) -> bool {
        self.0.recv(ANSWER).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }
}

/// A deletion.
pub fn del(uid: &str) -> Payload {
    Payload::Del(DelWorkload { uid: uid.into() })
}

/// An add of a pod of the mesh's namespace, with the service account that has its name.
pub fn add(uid: &str, name: &str) -> Payload {
    let info = WorkloadInfo { name: name.into(), namespace: NAMESPACE.into(), service_account: name.into() };
    Payload::Add(AddWorkload { uid: uid.into(), workload_info: Some(info) })
}
