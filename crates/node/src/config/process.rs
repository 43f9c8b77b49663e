//! What the proxy and the node agent are told alike: how they log, who supervises them, and the socket at which they meet.

use std::path::PathBuf;

use zspire_sys::supervisor::Supervisor;

use super::options::{self as opt, Values};
use super::{Error, value};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Plain,
    Json,
}

pub(super) fn inpod_uds(v: &Values) -> PathBuf {
    value::text(v, &opt::INPOD_UDS, "/var/run/ztunnel/ztunnel.sock").into()
}

pub(super) fn log_filter(v: &Values) -> Result<String, Error> {
    let filter = v.get(&opt::RUST_LOG).unwrap_or("info");
    if tracing_subscriber::EnvFilter::builder().parse(filter).is_err() {
        let expected = "expected error, warn, info, debug, trace, off, or target=level,…";
        return Err(value::error(&opt::RUST_LOG, filter, expected));
    }
    Ok(filter.to_owned())
}

pub(super) fn log_format(v: &Values) -> Result<LogFormat, Error> {
    match v.get(&opt::LOG_FORMAT).unwrap_or("plain") {
        "plain" => Ok(LogFormat::Plain),
        "json" => Ok(LogFormat::Json),
        other => Err(value::error(&opt::LOG_FORMAT, other, "expected plain or json")),
    }
}

pub(super) fn supervisor(v: &Values) -> Supervisor {
    let of = |variable| v.environment.get(variable).map(String::as_str);
    Supervisor::new(of(opt::NOTIFY_SOCKET.name), of(opt::WATCHDOG_USEC.name), of(opt::WATCHDOG_PID.name))
}
