//! Integration tests of the control plane: real connections to a real one, on loopback.
#![allow(clippy::unwrap_used)] // helpers of tests are tests too

mod authority;
mod discovery;
mod join;
mod mesh;
mod monitoring;
mod plugged_in;
mod restart;
mod support;
mod tokens;
