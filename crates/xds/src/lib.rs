//! Discovery: how a mesh gets from a control plane, or from files, into the model, and back onto the wire.
//!
//! Owns the translation between protobuf and model ([`codec`]), the delta discovery protocol from both ends ([`client`] and
//! [`server`]), and the mesh as files ([`mod@file`]). It does not know how a connection to a control plane is made or
//! authenticated (the caller brings a channel), nor what is done with a mesh once it is known (the caller brings a
//! [`client::Sink`]). It spawns no tasks: the caller runs what it gets.
#![forbid(unsafe_code)]

pub mod client;
pub mod codec;
pub mod file;
mod resource;
pub mod server;

pub use codec::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
pub use resource::{Kind, Resource};
