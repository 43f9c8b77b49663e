//! Many bytes over a connection, each of which has to arrive in its place.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};

/// How much is sent and compared at once.
const BLOCK: usize = 64 << 10;

/// Sends so many bytes from each end of a connection to the other, both ways at once.
#[track_caller]
pub fn both_ways(client: &TcpStream, server: &TcpStream, size: u64) {
    let carried = std::thread::scope(|scope| {
        let there = scope.spawn(|| carry(client, server, size));
        let back = carry(server, client, size);
        there.join().expect("it does not panic").map_err(|why| format!("to the server: {why}")).and(back)
    });
    carried.unwrap_or_else(|why| panic!("of {size} bytes both ways: {why}"));
}

/// Sends so many bytes one way.
#[track_caller]
pub fn one_way(from: &TcpStream, to: &TcpStream, size: u64) {
    carry(from, to, size).unwrap_or_else(|why| panic!("of {size} bytes: {why}"));
}

/// Sends bytes, and receives exactly them.
fn carry(from: &TcpStream, to: &TcpStream, size: u64) -> Result<(), String> {
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send(from, size));
        let received = receive(to, size);
        sending.join().expect("it does not panic").map_err(|error| format!("not all are sent: {error}")).and(received)
    })
}

fn send(mut socket: &TcpStream, size: u64) -> io::Result<()> {
    let (mut told, mut block) = (Told::default(), vec![0; BLOCK]);
    let mut left = size;
    while left > 0 {
        let part = told.part(&mut block, left);
        socket.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

fn receive(mut socket: &TcpStream, size: u64) -> Result<(), String> {
    let (mut told, mut block, mut received) = (Told::default(), vec![0; BLOCK], vec![0; BLOCK]);
    let mut left = size;
    while left > 0 {
        let expected = told.part(&mut block, left);
        let received = &mut received[..expected.len()];
        socket.read_exact(received).map_err(|error| format!("{left} are missing: {error}"))?;
        if let Some(at) = received.iter().zip(expected).position(|(received, expected)| received != expected) {
            return Err(format!("the one at {} is another", size - left + at as u64));
        }
        left -= expected.len() as u64;
    }
    Ok(())
}

/// Ends both directions: the other end hears it, and nothing else before.
#[track_caller]
pub fn end(socket: &TcpStream, other: &TcpStream) {
    for (from, to) in [(socket, other), (other, socket)] {
        from.shutdown(Shutdown::Write).expect("the connection is open");
        assert_eq!(crate::ending(to), crate::Ending::Orderly);
    }
}

/// Bytes that repeat nowhere (SplitMix64): whatever is lost, doubled or moved is seen.
#[derive(Default)]
struct Told(u64);

impl Told {
    fn part<'a>(&mut self, block: &'a mut [u8], left: u64) -> &'a [u8] {
        for word in block.as_chunks_mut::<8>().0 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            *word = (mixed ^ (mixed >> 31)).to_le_bytes();
        }
        let size = usize::try_from(left).map_or(block.len(), |left| left.min(block.len()));
        &block[..size]
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn what_is_lost_or_another_is_seen() {
        const SIZE: u64 = 3 * BLOCK as u64 + 1;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let received = |spoil: fn(&mut Vec<u8>)| {
            let from = TcpStream::connect(listener.local_addr().expect("it listens")).expect("it listens");
            let (to, _) = listener.accept().expect("a connection");
            let (mut told, mut bytes, mut block) = (Told::default(), Vec::new(), vec![0; BLOCK]);
            while (bytes.len() as u64) < SIZE {
                bytes.extend_from_slice(told.part(&mut block, SIZE - bytes.len() as u64));
            }
            spoil(&mut bytes);
            std::thread::scope(|scope| {
                scope.spawn(move || (&from).write_all(&bytes).expect("it is received"));
                receive(&to, SIZE)
            })
        };
        assert_eq!(received(|_| {}), Ok(()));
        let wrong = [
            received(|bytes| bytes[BLOCK + 7] ^= 1),
            received(|bytes| _ = bytes.remove(BLOCK)),
            received(|bytes| bytes.swap(0, BLOCK)),
            received(|bytes| _ = bytes.pop()),
        ];
        assert!(wrong.iter().all(Result::is_err), "{wrong:?}");
    }
}
