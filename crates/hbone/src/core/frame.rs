//! Frames as they lie on the wire (RFC 9113 §4.1, §6).

use crate::error::Flood;

/// What a client says first (RFC 9113 §3.4).
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length of a frame's header.
pub(crate) const HEADER: usize = 9;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const ACK: u8 = 0x1;
pub(crate) const END_STREAM: u8 = 0x1;
pub(crate) const END_HEADERS: u8 = 0x4;
pub(crate) const PADDED: u8 = 0x8;
pub(crate) const PRIORITIZED: u8 = 0x20;

/// The first nine bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) length: u32,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
}

impl Frame {
    pub(crate) fn parse(bytes: [u8; HEADER]) -> Self {
        let [a, b, c, kind, flags, stream @ ..] = bytes;
        // The first bit of the stream is reserved and to be ignored.
        let stream = u32::from_be_bytes(stream) & 0x7fff_ffff;
        Self { length: u32::from_be_bytes([0, a, b, c]), kind, flags, stream }
    }

    pub(crate) fn bytes(self) -> [u8; HEADER] {
        let [_, a, b, c] = self.length.to_be_bytes();
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, d, e, f, g]
    }

    pub(crate) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// What too many of a kind are.
    pub(crate) fn flood(kind: u8) -> Flood {
        match kind {
            DATA => Flood::Data,
            HEADERS => Flood::Headers,
            PRIORITY => Flood::Priority,
            RST_STREAM => Flood::Reset,
            SETTINGS => Flood::Settings,
            PING => Flood::Ping,
            GOAWAY => Flood::GoAway,
            WINDOW_UPDATE => Flood::WindowUpdate,
            CONTINUATION => Flood::Continuation,
            _ => Flood::Unknown,
        }
    }
}

/// A number of 32 bits at the beginning of a payload that was checked to be long enough.
pub(crate) fn number(payload: &[u8]) -> u32 {
    payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_they_are_written() {
        for frame in [
            Frame { length: 0, kind: SETTINGS, flags: ACK, stream: 0 },
            Frame { length: 0xff_ffff, kind: 0xfe, flags: 0xff, stream: 0x7fff_ffff },
            Frame { length: 0x01_0203, kind: DATA, flags: END_STREAM | PADDED, stream: 0x0405_0607 },
        ] {
            assert_eq!(Frame::parse(frame.bytes()), frame);
        }
        let reserved = Frame::parse([0, 0, 0, 0, 0, 0x80, 0, 0, 1]);
        assert_eq!(reserved.stream, 1);
    }
}
