//! Frames that wait to be written, in one piece of memory that is lent while there are any.

use std::io::IoSliceMut;

use smallvec::SmallVec;

use super::frame::{Frame, HEADER};
use crate::lend::{self, LENT, Lent};

/// Bytes of frames with application data that are gathered at once: whole records of TLS, and less than it seals at once, so
/// that the other frames of a turn go with them.
pub(super) const GATHER: usize = 31 * (16 << 10);

/// Where bytes are put that are to be sent: one place, unless the peer takes small frames only.
pub(crate) type Places<'a> = SmallVec<[IoSliceMut<'a>; 1]>;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Out {
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
    /// Nothing more is gathered.
    shut: bool,
}

#[derive(Debug)]
enum Buffer {
    Lent(Lent),
    /// For more than a lent buffer holds: a peer that reads nothing has made us answer much.
    Own(Vec<u8>),
}

impl Buffer {
    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Lent(lent) => lent,
            Self::Own(own) => own,
        }
    }
}

impl Out {
    /// Takes nothing more; what waits may still be written.
    pub(super) fn shut(&mut self) {
        self.shut = true;
    }

    /// Takes nothing more, and nobody will write what waits.
    pub(crate) fn clear(&mut self) {
        *self = Self { shut: true, ..Self::default() };
    }

    pub(super) fn is_shut(&self) -> bool {
        self.shut
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    /// What waits.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.buffer {
            Some(Buffer::Lent(lent)) => &lent[self.start..self.end],
            Some(Buffer::Own(own)) => &own[self.start..self.end],
            None => &[],
        }
    }

    /// The first `n` bytes have been written.
    pub(crate) fn written(&mut self, n: usize) {
        self.start += n;
        self.tidy();
    }

    /// Application data that may be added in frames of at most `size` bytes.
    pub(super) fn room(&self, size: usize) -> usize {
        let left = GATHER.saturating_sub(self.end);
        left / (HEADER + size) * size + (left % (HEADER + size)).saturating_sub(HEADER)
    }

    /// Where the data of the next frames goes, `n` bytes in all; each becomes one by [`data`](Self::data).
    pub(super) fn space(&mut self, n: usize, size: usize) -> Places<'_> {
        let total = n + n.div_ceil(size) * HEADER;
        let frames = self.reserve(total)[..total].chunks_mut(HEADER + size);
        frames.map(|frame| IoSliceMut::new(&mut frame[HEADER..])).collect()
    }

    /// What was put into [`space`](Self::space) is this frame's.
    pub(super) fn data(&mut self, frame: Frame) {
        let end = self.end;
        self.reserve(HEADER)[..HEADER].copy_from_slice(&frame.bytes());
        self.end = end + HEADER + frame.length as usize;
    }

    /// Gives the memory back if nothing waits in it.
    pub(super) fn tidy(&mut self) {
        if self.is_empty() {
            *self = Self { shut: self.shut, ..Self::default() };
        }
    }

    /// A frame of which everything is known.
    pub(super) fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("our frames are short");
        self.put(&Frame { length, kind, flags, stream }.bytes());
        self.put(payload);
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        if self.shut {
            return;
        }
        self.reserve(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    /// The memory behind what waits, at least `n` bytes.
    fn reserve(&mut self, n: usize) -> &mut [u8] {
        if self.buffer.as_mut().is_some_and(|buffer| self.end + n > buffer.bytes().len()) {
            self.make_room(n);
        }
        let buffer = self.buffer.get_or_insert_with(|| Buffer::Lent(lend::take()));
        &mut buffer.bytes()[self.end..]
    }

    /// What waits moves to the front, where what was written is: in place if that is at least half of the memory, so that bytes are
    /// not moved again and again; otherwise to more memory. Either way the memory follows what waits, not what was ever written.
    fn make_room(&mut self, n: usize) {
        let Some(buffer) = &mut self.buffer else { return };
        let (waits, bytes) = (self.start..self.end, buffer.bytes());
        let len = waits.len();
        if self.start >= bytes.len() / 2 && len + n <= bytes.len() {
            bytes.copy_within(waits, 0);
        } else {
            let mut own = Vec::with_capacity((2 * (len + n)).next_multiple_of(LENT));
            own.extend_from_slice(&bytes[waits]);
            own.resize(own.capacity(), 0);
            *buffer = Buffer::Own(own);
        }
        (self.start, self.end) = (0, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that always leaves a little unread.
    #[test]
    fn memory_follows_what_waits_and_not_what_was_written() {
        let mut out = Out::default();
        let (mut said, mut heard) = (0_u32, 0_u32);
        let mut say = |out: &mut Out| {
            out.put(&said.to_be_bytes());
            said += 1;
        };
        (0..1000).for_each(|_| say(&mut out));
        for _ in 0..1_000_000 {
            say(&mut out);
            assert_eq!(out.bytes()[..4], heard.to_be_bytes());
            heard += 1;
            out.written(4);
        }
        assert_eq!(out.len(), 4000);
        assert!(out.buffer.as_mut().unwrap().bytes().len() <= 2 * LENT);
        // And one that reads nothing for a while.
        (0..400_000).for_each(|_| say(&mut out));
        assert!(out.buffer.as_mut().unwrap().bytes().len() <= 2 * out.len() + 2 * LENT);
        while !out.is_empty() {
            assert_eq!(out.bytes()[..4], heard.to_be_bytes());
            heard += 1;
            out.written(4);
        }
    }
}
