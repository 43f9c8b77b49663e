//! Bytes of a stream that came and that its application has not taken: in few pieces, however small the frames were.

use std::collections::VecDeque;
use std::io::IoSlice;

use smallvec::SmallVec;

/// Pieces that are written at once.
pub(crate) const GATHER: usize = 16;
/// The smallest and the largest piece of memory; each is twice as large as the one before.
const SMALLEST: usize = 256;
const LARGEST: usize = 256 << 10;

/// See the module. Empty, it holds no memory.
#[derive(Debug, Default)]
pub(crate) struct Unread {
    pieces: VecDeque<Vec<u8>>,
    /// What was taken of the first piece.
    taken: usize,
    len: usize,
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
        let mut size = SMALLEST;
        if let Some(last) = self.pieces.back_mut() {
            let n = bytes.len().min(last.capacity() - last.len());
            last.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            size = (last.capacity() * 2).min(LARGEST);
        }
        if !bytes.is_empty() {
            let mut piece = Vec::with_capacity(bytes.len().max(size));
            piece.extend_from_slice(bytes);
            self.pieces.push_back(piece);
        }
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
            self.pieces.pop_front();
        }
        if self.pieces.is_empty() {
            *self = Self::default();
        }
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
            }
        }
    }

    #[test]
    fn small_frames_cost_no_more_than_their_bytes() {
        let mut unread = Unread::default();
        for _ in 0..1 << 20 {
            unread.push(&[7]);
        }
        let memory: usize = unread.pieces.iter().map(Vec::capacity).sum();
        assert!(memory < 2 << 20 && unread.pieces.len() < 20, "{memory} bytes in {} pieces", unread.pieces.len());
        unread.consume(1 << 20);
        assert_eq!(unread.pieces.capacity(), 0);
    }
}
