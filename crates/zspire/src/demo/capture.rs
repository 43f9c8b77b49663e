//! A packet capture: TLS records by their headers, and whether a text was among the bytes.
//!
//! Understands Ethernet, IPv4 and TCP. Segments of a direction are put in order before records are counted, since a record may
//! begin anywhere in a segment.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use zspire_sys::packets::{MAX_PACKET, Packets};

/// What is kept at most; the demo sends a few kilobytes.
const KEPT: usize = 64 << 20;

/// A capture under way.
#[derive(Debug)]
pub(super) struct Recorder {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Vec<Vec<u8>>>>,
}

impl Recorder {
    /// Records what these packets are from now on.
    pub(super) fn start(packets: Packets) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::Builder::new().name("capture".into()).spawn(move || record(packets, &told))?;
        Ok(Self { stop, thread })
    }

    /// Ends it and returns the packets.
    pub(super) fn stop(self) -> anyhow::Result<Vec<Vec<u8>>> {
        self.stop.store(true, Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the capture panicked"))?
    }
}

fn record(mut packets: Packets, stop: &AtomicBool) -> anyhow::Result<Vec<Vec<u8>>> {
    let (mut kept, mut bytes, mut buffer) = (Vec::new(), 0, vec![0; MAX_PACKET]);
    loop {
        // What has arrived before the end is read before the end.
        let ending = stop.load(Relaxed);
        match packets.read(&mut buffer, Duration::from_millis(50)) {
            Ok(n) => {
                bytes += n;
                anyhow::ensure!(bytes <= KEPT, "more than {KEPT} bytes between the nodes");
                kept.push(buffer[..n].to_vec());
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if ending {
                    return Ok(kept);
                }
            }
            Err(error) => return Err(error).context("cannot read packets"),
        }
    }
}

/// What was seen.
#[derive(Debug, Default, Clone, Serialize)]
pub(super) struct Seen {
    /// Packets of TCP with content.
    pub(super) packets: usize,
    /// Bytes in them.
    pub(super) bytes: usize,
    /// TLS records with application data.
    pub(super) tls_records: usize,
    /// Handshakes in which the server chose TLS 1.3.
    pub(super) tls13_handshakes: usize,
    /// Bytes between the HBONE ports that are not TLS records.
    pub(super) not_tls: usize,
    /// Packets in which the text occurs.
    pub(super) canary_found: usize,
}

type Direction = (SocketAddrV4, SocketAddrV4);

/// Looks through captured packets.
pub(super) fn look(packets: &[Vec<u8>], hbone_port: u16, canary: &[u8]) -> Seen {
    let mut seen = Seen::default();
    let mut flows: BTreeMap<Direction, BTreeMap<u32, &[u8]>> = BTreeMap::new();
    for packet in packets {
        seen.canary_found += usize::from(packet.windows(canary.len()).any(|window| window == canary));
        let Some((direction, sequence, payload)) = segment(packet) else { continue };
        if payload.is_empty() {
            continue;
        }
        seen.packets += 1;
        seen.bytes += payload.len();
        if direction.0.port() == hbone_port || direction.1.port() == hbone_port {
            flows.entry(direction).or_default().insert(sequence, payload);
        }
    }
    for segments in flows.values() {
        records(&segments.values().copied().flatten().copied().collect::<Vec<u8>>(), &mut seen);
    }
    seen
}

/// Addresses, sequence number and content of a TCP segment.
fn segment(packet: &[u8]) -> Option<(Direction, u32, &[u8])> {
    let ip = packet.get(14..).filter(|ip| packet[12..14] == [0x08, 0x00] && ip.len() >= 20)?;
    let header = usize::from(ip.first()? & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    let tcp = ip.get(header..total).filter(|_| ip[9] == 6)?;
    let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
    let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
    let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
    let direction = (SocketAddrV4::new(address(12)?, port(0)?), SocketAddrV4::new(address(16)?, port(2)?));
    Some((direction, sequence, tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?))
}

/// Counts the records of one direction (RFC 8446 §5.1: type, version, length).
fn records(mut bytes: &[u8], seen: &mut Seen) {
    while let [kind, 3, _, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        match kind {
            20 | 21 => {}
            22 => seen.tls13_handshakes += usize::from(chooses_tls13(&rest[..length.min(rest.len())])),
            23 => seen.tls_records += 1,
            _ => break,
        }
        bytes = rest.get(length..).unwrap_or_default();
    }
    seen.not_tls += bytes.len();
}

/// A ServerHello whose `supported_versions` extension says 0x0304 (RFC 8446 §4.2.1).
fn chooses_tls13(handshake: &[u8]) -> bool {
    const SERVER_HELLO: u8 = 2;
    handshake.first() == Some(&SERVER_HELLO) && handshake.windows(6).any(|window| window == [0, 43, 0, 2, 3, 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packets with these segments from 10.0.0.1:4711 to 10.0.0.2:15008: sequence number and content.
    fn packets(segments: &[(u32, &[u8])]) -> Vec<Vec<u8>> {
        let packet = |(sequence, payload): &(u32, &[u8])| {
            let mut packet = vec![0; 12];
            packet.extend_from_slice(&[8, 0, 0x45, 0]);
            packet.extend_from_slice(&(40 + payload.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            packet.extend_from_slice(&4711u16.to_be_bytes());
            packet.extend_from_slice(&15008u16.to_be_bytes());
            packet.extend_from_slice(&sequence.to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
            packet.extend_from_slice(payload);
            packet
        };
        segments.iter().map(packet).collect()
    }

    #[test]
    fn records_are_found_across_segments_in_any_order() {
        let hello = [22, 3, 3, 0, 7, 2, 0, 43, 0, 2, 3, 4];
        let seen = look(&packets(&[(15, &[3, 0, 3, 1, 2, 3]), (1, &hello), (13, &[23, 3])]), 15008, b"secret");
        assert_eq!((seen.packets, seen.tls_records, seen.tls13_handshakes, seen.not_tls), (3, 1, 1, 0));
    }

    #[test]
    fn plain_text_is_found() {
        let seen = look(&packets(&[(1, b"GET / secret")]), 15008, b"secret");
        assert_eq!((seen.canary_found, seen.not_tls), (1, 12));
        let seen = look(&[vec![0; 13], vec![8; 20], vec![0; 200]], 15008, b"secret");
        assert_eq!((seen.packets, seen.canary_found), (0, 0));
    }
}
