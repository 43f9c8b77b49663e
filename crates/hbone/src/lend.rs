//! Buffers that a worker lends to whichever connection has bytes under way, and takes back when it has none.
//!
//! An idle connection holds no buffer, so memory follows the traffic and not the number of connections.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Size of a lent buffer: what TLS opens at once, and a little more.
pub(crate) const LENT: usize = 576 << 10;

/// Buffers kept for reuse by each worker; more than these are given back to the allocator.
const KEPT: usize = 4;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`LENT`] bytes that goes back when it is dropped.
#[derive(Debug)]
pub(crate) struct Lent(Box<[u8]>);

/// A buffer. What it held before is not cleared.
pub(crate) fn take() -> Lent {
    Lent(SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; LENT].into_boxed_slice()))
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // A thread that ends drops its connections after its spare buffers.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < KEPT {
                spare.push(buffer);
            }
        });
    }
}
