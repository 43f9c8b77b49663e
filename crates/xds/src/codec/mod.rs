//! Protobuf and model, each made from the other.
//!
//! Start with [`Decoder`], which shares equal texts between everything that it decodes. Decoding checks: inside the model there
//! are only valid values. A workload or service that is not valid is an [`Error`]; a policy is kept as long as it has a name,
//! and what is not understood in it makes it deny (`unsupported`), because leaving a policy out would allow.
//!
//! [`encode`] is the inverse. A policy that could not be understood is sent on as one that denies everything.

mod decode;
mod encode;
mod policy;
mod unknown;

use std::sync::Arc;

use prost::Message as _;
use prost::bytes::Bytes;
use zspire_model::{Interner, Policy, Service, Workload};
use zspire_wire::{security, workload as wire};

pub use crate::resource::Resource;
pub use encode::{encode, encode_address, encode_policy, encode_service, encode_workload};

/// Type of workloads and services.
pub const ADDRESS_TYPE: &str = zspire_wire::type_url::ADDRESS;
/// Type of authorization policies.
pub const AUTHORIZATION_TYPE: &str = zspire_wire::type_url::AUTHORIZATION;

/// Why a resource cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not protobuf of the expected type.
    #[error("not a valid message: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A type that this program does not know.
    #[error("unknown resource type {0:?}")]
    UnknownType(String),
    /// An address that is neither a workload nor a service.
    #[error("neither a workload nor a service")]
    Empty,
    /// A field that must have a value has none.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has a value that it cannot have.
    #[error("{field}: {why}")]
    Invalid {
        /// The field, in the words of the protocol.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    fn invalid(field: &'static str, why: impl ToString) -> Self {
        Self::Invalid { field, why: why.to_string() }
    }
}

/// Decodes resources and shares what is equal among them. Keep one as long as the stream that it decodes.
#[derive(Debug, Default)]
pub struct Decoder {
    interner: Interner,
}

impl Decoder {
    /// A resource of a type.
    pub fn decode(&mut self, type_url: &str, value: Bytes) -> Result<Resource, Error> {
        match type_url {
            ADDRESS_TYPE => self.address(value),
            AUTHORIZATION_TYPE => Ok(Resource::Policy(Arc::new(self.policy(value)?))),
            other => Err(Error::UnknownType(other.chars().take(200).collect())),
        }
    }

    /// An `istio.workload.Address`.
    pub fn address(&mut self, value: Bytes) -> Result<Resource, Error> {
        match wire::Address::decode(value)?.r#type {
            Some(wire::address::Type::Workload(workload)) => {
                Ok(Resource::Workload(Arc::new(decode::workload(&mut self.interner, workload)?)))
            }
            Some(wire::address::Type::Service(service)) => {
                Ok(Resource::Service(Arc::new(decode::service(&mut self.interner, service)?)))
            }
            None => Err(Error::Empty),
        }
    }

    /// An `istio.workload.Workload`.
    pub fn workload(&mut self, value: Bytes) -> Result<Workload, Error> {
        decode::workload(&mut self.interner, wire::Workload::decode(value)?)
    }

    /// An `istio.workload.Service`.
    pub fn service(&mut self, value: Bytes) -> Result<Service, Error> {
        decode::service(&mut self.interner, wire::Service::decode(value)?)
    }

    /// What stands for a policy that cannot be decoded: one that denies, under the name that it was sent under.
    pub fn unreadable_policy(name: &str, value: &Bytes, why: &Error) -> Policy {
        policy::unreadable(name, value, why)
    }

    /// An `istio.security.Authorization`.
    pub fn policy(&mut self, value: Bytes) -> Result<Policy, Error> {
        let message = security::Authorization::decode(value.clone())?;
        policy::decode(&mut self.interner, message, unknown::field(&value))
    }
}

/// Decodes one `istio.workload.Address`.
pub fn decode_address(value: &[u8]) -> Result<Resource, Error> {
    Decoder::default().address(Bytes::copy_from_slice(value))
}

/// Decodes one `istio.workload.Workload`.
pub fn decode_workload(value: &[u8]) -> Result<Workload, Error> {
    Decoder::default().workload(Bytes::copy_from_slice(value))
}

/// Decodes one `istio.workload.Service`.
pub fn decode_service(value: &[u8]) -> Result<Service, Error> {
    Decoder::default().service(Bytes::copy_from_slice(value))
}

/// Decodes one `istio.security.Authorization`.
pub fn decode_policy(value: &[u8]) -> Result<Policy, Error> {
    Decoder::default().policy(Bytes::copy_from_slice(value))
}
