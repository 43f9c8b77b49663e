//! Pipes that a worker lends to whichever plain connection has much under way: the kernel moves bytes from one socket to another
//! through one without a copy to us.
//!
//! As with buffers ([`crate::lend`]), an idle connection holds none.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What a pipe is asked to hold; the kernel may have a lower limit for a user that is not root.
const SIZE: i32 = 1 << 20;

/// Pipes kept for reuse by each worker.
const KEPT: usize = 4;

/// Pipes of each worker, lent and kept: connections whose readers are slow hold theirs, and take descriptors with them.
const MOST: usize = 64;

thread_local! {
    static SPARE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
    static ALL: Cell<usize> = const { Cell::new(0) };
}

/// An empty pipe, or one whose bytes are on their way.
#[derive(Debug)]
pub(crate) struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    holds: usize,
}

/// An empty pipe; none if there are enough of them, or no descriptors are left.
pub(crate) fn take() -> Option<Pipe> {
    SPARE.with_borrow_mut(Vec::pop).or_else(|| {
        if ALL.get() == MOST {
            return None;
        }
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
        // A smaller one takes more turns, and is as good otherwise.
        let _ = fcntl(&into, FcntlArg::F_SETPIPE_SZ(SIZE));
        ALL.set(ALL.get() + 1);
        Some(Pipe { out, into, holds: 0 })
    })
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // At a worker's end the count is gone before the pipes are.
        let _ = ALL.try_with(|all| all.set(all.get() - 1));
    }
}

/// Gives a pipe back; one with bytes in it is closed instead, and they are gone.
pub(crate) fn give(pipe: Pipe) {
    SPARE.with_borrow_mut(|spare| {
        if pipe.holds == 0 && spare.len() < KEPT {
            spare.push(pipe);
        }
    });
}

impl Pipe {
    /// Takes what a socket has, as much as fits: the number of bytes, 0 at its end. Only for an empty pipe, so that "would block"
    /// is said of the socket.
    pub(crate) fn try_fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        debug_assert_eq!(self.holds, 0);
        self.holds =
            from.try_io(Interest::READABLE, || moved(splice(from, None, &self.into, None, SIZE as usize, FLAGS)))?;
        Ok(self.holds)
    }

    /// Gives a socket what it takes: the number of bytes.
    pub(crate) fn try_drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let n = to.try_io(Interest::WRITABLE, || moved(splice(&self.out, None, to, None, self.holds, FLAGS)))?;
        self.holds -= n;
        Ok(n)
    }

    /// Whether nothing is under way.
    pub(crate) fn is_empty(&self) -> bool {
        self.holds == 0
    }
}

const FLAGS: SpliceFFlags = SpliceFFlags::SPLICE_F_MOVE.union(SpliceFFlags::SPLICE_F_NONBLOCK);

fn moved(result: nix::Result<usize>) -> io::Result<usize> {
    result.map_err(io::Error::from)
}
