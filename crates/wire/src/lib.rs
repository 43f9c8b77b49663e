//! Generated protobuf: the messages and services of the protocols that zspire speaks.
//!
//! Owns the `.proto` files under `proto/` (written from the field tables of the protocols, only the
//! parts in use) and nothing else. It does not know what the messages mean: the codec to and from the
//! model lives in `xds`, the meaning of identities in `identity`.

#![forbid(unsafe_code)]
#![allow(clippy::all, clippy::pedantic, missing_docs)]

mod generated {
    include!(concat!(env!("OUT_DIR"), "/all.rs"));
}

/// `envoy.service.discovery.v3`: delta discovery.
pub use generated::envoy::service::discovery::v3 as discovery;
/// `google.rpc`: the status that a rejection carries.
pub use generated::google::rpc;
/// `istio.security`: L4 authorization policies.
pub use generated::istio::security;
/// `istio.v1.auth`: the certificate service of Istio's CA.
pub use generated::istio::v1::auth as ca;
/// `istio.workload`: workloads and services; `istio.workload.zds` below it: pods from a CNI node agent.
pub use generated::istio::workload;
/// `spiffe.broker`: SPIFFE Broker API.
pub use generated::spiffe::broker;
/// SPIRE's Delegated Identity API.
pub use generated::spire::api::agent::delegatedidentity::v1 as delegated_identity;
/// `spire.api.types`: what SPIRE's APIs share.
pub use generated::spire::api::types as spire_types;

/// SPIFFE Workload API; its service has no package by specification.
pub mod workload_api {
    pub use crate::generated::{
        X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
        spiffe_workload_api_client, spiffe_workload_api_server,
    };
}

/// Type URLs of the discovery resources.
pub mod type_url {
    /// Workloads and services.
    pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
    /// Workloads only.
    pub const WORKLOAD: &str = "type.googleapis.com/istio.workload.Workload";
    /// Authorization policies.
    pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
}

mod redacted {
    //! `Debug` for the messages that hold a private key.
    use std::fmt::{Debug, Formatter, Result};

    impl Debug for crate::workload_api::X509svid {
        fn fmt(&self, f: &mut Formatter<'_>) -> Result {
            f.debug_struct("X509SVID").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
        }
    }

    impl Debug for crate::broker::X509svid {
        fn fmt(&self, f: &mut Formatter<'_>) -> Result {
            f.debug_struct("X509SVID").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
        }
    }

    impl Debug for crate::delegated_identity::X509svidWithKey {
        fn fmt(&self, f: &mut Formatter<'_>) -> Result {
            f.debug_struct("X509SVIDWithKey").field("x509_svid", &self.x509_svid).finish_non_exhaustive()
        }
    }
}
