//! Waiting for descriptors that the runtime has no type of its own for.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use tokio::io::unix::AsyncFd;

/// A value whose descriptor can be waited for. It owns the descriptor, or borrows it for as long as it lives (`AsFd`).
pub(crate) fn watched<T: AsFd + AsRawFd>(inner: T) -> io::Result<AsyncFd<T>> {
    #[allow(
        deprecated,
        reason = "what replaces it is unsafe, for values that may be without their descriptor; ours are not"
    )]
    AsyncFd::new(inner)
}
