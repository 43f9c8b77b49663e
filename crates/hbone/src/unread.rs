//! Bytes of a stream that came and that its application has not taken: in few pieces, however small the frames were.

use std::collections::VecDeque;
use std::io::IoSlice;

use smallvec::SmallVec;

/// Pieces that are written at once.
pub(crate) const GATHER: usize = 16;
/// The smallest and the largest piece of memory; between them each is as large as all that waits.
const SMALLEST: usize = 256;
const LARGEST: usize = 256 << 10;
/// The memory is at most this many times what waits.
const SPARSE: usize = 4;

/// See the module. Empty, it holds no memory.
#[derive(Debug, Default)]
pub(crate) struct Unread {
    pieces: VecDeque<Vec<u8>>,
    /// What was taken of the first piece.
    taken: usize,
    len: usize,
    /// Of all pieces.
    capacity: usize,
}

impl Unread {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn push(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len();
        if let Some(last) = self.pieces.back_mut() {
            let n = bytes.len().min(last.capacity() - last.len());
            last.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
        }
        if !bytes.is_empty() {
            let size = self.len.clamp(SMALLEST, LARGEST);
            self.add(bytes, size);
        }
    }

    fn add(&mut self, bytes: &[u8], size: usize) {
        let mut piece = Vec::with_capacity(bytes.len().max(size));
        piece.extend_from_slice(bytes);
        self.capacity += piece.capacity();
        self.pieces.push_back(piece);
    }

    /// Whether [`Self::slices`] are all there is.
    pub(crate) fn is_in_one_go(&self) -> bool {
        self.pieces.len() <= GATHER
    }

    /// The bytes that come first.
    pub(crate) fn slices(&self) -> SmallVec<[IoSlice<'_>; GATHER]> {
        let taken = std::iter::once(self.taken).chain(std::iter::repeat(0));
        self.pieces.iter().zip(taken).take(GATHER).map(|(piece, taken)| IoSlice::new(&piece[taken..])).collect()
    }

    /// The first bytes, in one piece; none if there are none.
    pub(crate) fn first(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| &piece[self.taken..])
    }

    /// `n` bytes were taken.
    pub(crate) fn consume(&mut self, n: usize) {
        self.len -= n;
        self.taken += n;
        while let Some(first) = self.pieces.front()
            && self.taken >= first.len()
        {
            self.taken -= first.len();
            self.capacity -= first.capacity();
            self.pieces.pop_front();
        }
        if self.pieces.is_empty() {
            *self = Self::default();
        } else if self.capacity > (SPARSE * self.len).max(2 * SMALLEST) {
            self.compact();
        }
    }

    /// Little is left of much: it moves to memory of its size. Three times as much was taken since, so that this costs next to
    /// nothing.
    fn compact(&mut self) {
        let old = std::mem::take(self);
        let mut bytes = Vec::with_capacity(old.len);
        let taken = std::iter::once(old.taken).chain(std::iter::repeat(0));
        old.pieces.iter().zip(taken).for_each(|(piece, taken)| bytes.extend_from_slice(&piece[taken..]));
        *self = Self { len: old.len, ..Self::default() };
        self.capacity = bytes.capacity();
        self.pieces.push_back(bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps: Vec<(Vec<u8>, u16)>) {
            let (mut unread, mut model) = (Unread::default(), Vec::new());
            for (bytes, take) in steps {
                unread.push(&bytes);
                model.extend(bytes);
                let shown: Vec<u8> = unread.slices().iter().flat_map(|slice| slice.to_vec()).collect();
                prop_assert!(model.starts_with(&shown) && shown.starts_with(unread.first()));
                prop_assert_eq!(shown.is_empty(), model.is_empty());
                let n = usize::from(take).min(shown.len());
                unread.consume(n);
                model.drain(..n);
                prop_assert_eq!(unread.len(), model.len());
                let memory: usize = unread.pieces.iter().map(Vec::capacity).sum();
                prop_assert_eq!(unread.capacity, memory);
                prop_assert!(memory <= (SPARSE * model.len()).max(2 * SMALLEST), "{} bytes for {}", memory, model.len());
            }
        }
    }

    #[test]
    fn small_frames_cost_no_more_than_their_bytes() {
        let mut unread = Unread::default();
        for _ in 0..1 << 20 {
            unread.push(&[7]);
        }
        assert!(unread.capacity < 2 << 20, "{} bytes", unread.capacity);
        assert!(unread.pieces.len() < 20, "{} pieces", unread.pieces.len());
        unread.consume(1 << 20);
        assert_eq!(unread.pieces.capacity(), 0);
    }

    #[test]
    fn a_byte_that_is_left_of_much_holds_little() {
        let mut unread = Unread::default();
        for _ in 0..40 {
            unread.push(&[7; 100_000]);
        }
        unread.consume(4_000_000 - 1);
        assert_eq!((unread.first(), unread.capacity), (&[7][..], 1));
        unread.push(&[8; 10]);
        assert!(unread.capacity <= 2 * SMALLEST, "{} bytes for 11", unread.capacity);
    }
}
