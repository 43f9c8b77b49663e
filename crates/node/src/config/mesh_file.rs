//! The mesh file (`defaultConfig`) and `PROXY_CONFIG`, which is laid over it.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use serde::Deserialize;

use super::Error;
use super::options::{self as opt, Values};

/// The keys in use. Both documents hold many more that are for sidecars: those are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ProxyConfig {
    pub(super) discovery_address: Option<String>,
    pub(super) proxy_admin_port: Option<u16>,
    pub(super) stats_port: Option<u16>,
    pub(super) concurrency: Option<u32>,
    pub(super) proxy_metadata: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MeshConfig {
    default_config: ProxyConfig,
}

pub(super) fn read(v: &Values) -> Result<ProxyConfig, Error> {
    let path = v.get(&opt::MESH_CONFIG);
    let mesh = match std::fs::read_to_string(path.unwrap_or(opt::MESH_CONFIG.default)) {
        Ok(text) => parse::<MeshConfig>(path.unwrap_or(opt::MESH_CONFIG.default), &text)?.default_config,
        // Without a mesh file the defaults hold; one that was named must be there.
        Err(e) if e.kind() == ErrorKind::NotFound && path.is_none() => ProxyConfig::default(),
        Err(e) => {
            let place = path.unwrap_or(opt::MESH_CONFIG.default).to_owned();
            return Err(Error::File { place, reason: format!("cannot read the mesh file: {e}") });
        }
    };
    match v.get(&opt::PROXY_CONFIG) {
        Some(text) => Ok(mesh.overlaid(parse("PROXY_CONFIG", text)?)),
        None => Ok(mesh),
    }
}

fn parse<T: serde::de::DeserializeOwned + Default>(place: &str, text: &str) -> Result<T, Error> {
    if text.trim().is_empty() {
        return Ok(T::default());
    }
    serde_saphyr::from_str(text).map_err(|e| Error::File { place: place.to_owned(), reason: e.to_string() })
}

impl ProxyConfig {
    fn overlaid(self, over: Self) -> Self {
        let mut proxy_metadata = self.proxy_metadata;
        proxy_metadata.extend(over.proxy_metadata);
        Self {
            discovery_address: over.discovery_address.or(self.discovery_address),
            proxy_admin_port: over.proxy_admin_port.or(self.proxy_admin_port),
            stats_port: over.stats_port.or(self.stats_port),
            concurrency: over.concurrency.or(self.concurrency),
            proxy_metadata,
        }
    }
}
