//! Buffers that a worker lends to whichever connection has bytes under way, and takes back when it has none.
//!
//! An idle connection holds no buffer, so memory follows the traffic and not the number of connections.

use std::cell::RefCell;

/// Size of a lent buffer.
pub(crate) const LENT: usize = 512 << 10;

/// Buffers kept for reuse by each worker; more than these are given back to the allocator.
const KEPT: usize = 4;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`LENT`] bytes. What it held before is not cleared.
pub(crate) fn take() -> Box<[u8]> {
    SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; LENT].into_boxed_slice())
}

/// Gives a buffer back.
pub(crate) fn give(buffer: Box<[u8]>) {
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < KEPT {
            spare.push(buffer);
        }
    });
}
