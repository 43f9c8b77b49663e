//! The node agent's configuration.

use std::path::PathBuf;

use zspire_sys::supervisor::Supervisor;

use super::options::{self as opt, Values};
use super::process::{self, LogFormat};
use super::{Error, value};

/// The node agent's configuration.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where proxies connect.
    pub zds: PathBuf,
    /// Where commands connect.
    pub socket: PathBuf,
    pub state_dir: PathBuf,
    /// The mark of the proxies' packets.
    pub packet_mark: u32,
    pub dns_capture: bool,
    pub log_filter: String,
    pub log_format: LogFormat,
    pub supervisor: Supervisor,
}

impl AgentConfig {
    /// Reads the environment.
    pub fn load() -> Result<Self, Error> {
        let v = &Values::from_environment();
        Ok(Self {
            zds: process::inpod_uds(v),
            socket: value::text(v, &opt::ZSPIRE_AGENT_SOCKET, "/run/zspire/agent.sock").into(),
            state_dir: value::text(v, &opt::ZSPIRE_AGENT_STATE_DIR, "/run/zspire/enrolled").into(),
            packet_mark: value::parsed(v, &opt::PACKET_MARK, "a number up to 4294967295")?.unwrap_or(1337),
            dns_capture: value::flag(v, &opt::AMBIENT_DNS_CAPTURE, false)?,
            log_filter: process::log_filter(v)?,
            log_format: process::log_format(v)?,
            supervisor: process::supervisor(v),
        })
    }
}
