//! Compiles the protobuf definitions with protox, so that no `protoc` is needed.

use std::path::Path;

const PROTOS: &[&str] = &[
    "istio/ca.proto",
    "istio/workload.proto",
    "istio/authorization.proto",
    "istio/zds.proto",
    "envoy/discovery.proto",
    "spiffe/workloadapi.proto",
    "spiffe/brokerapi.proto",
    "spire/delegatedidentity.proto",
];

/// Messages that carry a private key: their `Debug` is written by hand and shows none of it.
const WITH_KEYS: &[&str] =
    &[".X509SVID", ".spiffe.broker.X509SVID", ".spire.api.agent.delegatedidentity.v1.X509SVIDWithKey"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    let files = protox::compile(PROTOS.iter().map(|p| root.join(p)), [root])?;
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .skip_debug(WITH_KEYS)
        .include_file("all.rs")
        .compile_fds(files)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
