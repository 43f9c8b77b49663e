//! ZDS, the protocol by which a CNI node agent hands over pods: one message, one answer, in order.
//!
//! A sequence-packet socket carries one protobuf message a packet, an `add` with one descriptor of the pod's
//! network namespace beside it. The agent waits for each answer; whatever is wrong with a message is said in
//! its answer, and concerns neither the connection nor another pod. Unasked messages are never sent: the
//! agent would close the connection. This module knows messages, not sockets or proxies.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use prost::Message;
use tokio::time::Instant;
use zspire_wire::workload::zds::{
    Ack, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_request, workload_response,
};

use super::{Launcher, Namespace, PodInfo, Pods};

/// Largest message of the agent, as upstream's.
pub const MAX_MESSAGE: usize = 1024;
/// Descriptors taken from one message; more than one is refused, but must be closed.
pub const MAX_DESCRIPTORS: usize = 8;
/// Longest UID or name that is kept.
const MAX_NAME: usize = 253;

/// The first message of a connection.
pub fn hello() -> Vec<u8> {
    ZdsHello { version: Version::V1.into() }.encode_to_vec()
}

/// A message with the descriptors that came with it.
#[derive(Debug)]
pub struct Packet {
    pub message: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
    /// The message or its descriptors did not fit and were cut.
    pub truncated: bool,
}

/// What one packet did.
#[derive(Debug)]
pub struct Handled {
    /// To be sent back.
    pub answer: Vec<u8>,
    /// It was the end of the snapshot.
    pub snapshot_ended: bool,
}

/// Carries out one message. Descriptors that are not used are closed.
pub fn handle<L: Launcher>(pods: &mut Pods<L>, packet: Packet, inode: Inode, now: Instant) -> Handled {
    let outcome = read(packet).and_then(|request| apply(pods, request, inode, now));
    let (error, snapshot_ended) = match outcome {
        Ok(snapshot_ended) => (String::new(), snapshot_ended),
        Err(error) => (error, false),
    };
    if !error.is_empty() {
        tracing::warn!(%error, "the node agent's message was refused");
    }
    let answer = WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) };
    Handled { answer: answer.encode_to_vec(), snapshot_ended }
}

/// Tells the inode of a network namespace, or why the descriptor is not one.
pub type Inode = fn(&OwnedFd) -> std::io::Result<u64>;

enum Request {
    Add { uid: String, info: PodInfo, descriptor: OwnedFd },
    Keep { uid: String },
    Delete { uid: String },
    SnapshotSent,
}

/// A message that is well formed, with the descriptors that it must have.
fn read(packet: Packet) -> Result<Request, String> {
    let Packet { message, mut descriptors, truncated } = packet;
    if truncated {
        return Err(format!("message too long: at most {MAX_MESSAGE} bytes and one descriptor"));
    }
    let request = WorkloadRequest::decode(&message[..]).map_err(|e| format!("malformed message: {e}"))?;
    let payload = request.payload.ok_or("malformed message: unknown request")?;
    let wanted = usize::from(matches!(payload, workload_request::Payload::Add(_)));
    if descriptors.len() != wanted {
        return Err(format!("expected {wanted} descriptors, got {}", descriptors.len()));
    }
    match payload {
        workload_request::Payload::Add(add) => {
            let info = add.workload_info.ok_or("add without workload_info")?;
            let descriptor = descriptors.pop().ok_or("add without a network namespace")?;
            let info = PodInfo {
                name: name("name", info.name)?,
                namespace: name("namespace", info.namespace)?,
                service_account: name("service_account", info.service_account)?,
            };
            Ok(Request::Add { uid: name("uid", add.uid)?, info, descriptor })
        }
        workload_request::Payload::Keep(keep) => Ok(Request::Keep { uid: name("uid", keep.uid)? }),
        workload_request::Payload::Del(del) => Ok(Request::Delete { uid: name("uid", del.uid)? }),
        workload_request::Payload::SnapshotSent(_) => Ok(Request::SnapshotSent),
    }
}

fn name(field: &str, value: String) -> Result<String, String> {
    if value.is_empty() || value.len() > MAX_NAME || value.chars().any(|c| c.is_control() || c == '/') {
        return Err(format!("{field}: expected 1 to {MAX_NAME} printable characters without a slash"));
    }
    Ok(value)
}

/// Whether the snapshot ended.
fn apply<L: Launcher>(pods: &mut Pods<L>, request: Request, inode: Inode, now: Instant) -> Result<bool, String> {
    match request {
        Request::Add { uid, info, descriptor } => {
            let inode = inode(&descriptor).map_err(|e| format!("not a network namespace: {e}"))?;
            pods.add(&uid, info, Namespace { descriptor: Arc::new(descriptor), inode }, now)?;
        }
        Request::Keep { uid } => pods.keep(&uid)?,
        Request::Delete { uid } => pods.delete(&uid),
        Request::SnapshotSent => {
            pods.end_snapshot();
            return Ok(true);
        }
    }
    Ok(false)
}
