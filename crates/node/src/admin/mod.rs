//! The admin server on loopback: what the proxy knows, log levels, profiles, and the way to stop it.
//!
//! | Method, path | What |
//! |---|---|
//! | `GET /` | this list |
//! | `GET /config_dump` | configuration and state, in ztunnel's JSON shape ([`dump`]) |
//! | `GET /identities` | each pod's identity and what has happened to it ([`identities`]) |
//! | `POST /logging[?level=L][&reset]` | shows or changes log levels |
//! | `POST /quitquitquit` | drains and stops |
//! | `GET /debug/pprof/profile[?seconds=N][&frequency=HZ]` | CPU profile |
//! | `GET /debug/pprof/heap` | heap profile |
//!
//! It answers only requests that were addressed to loopback by name (a web page cannot reach it by
//! rebinding a name, nor post to it across origins). It holds no state of its own.

pub mod dump;
pub mod identities;
mod pprof;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use tokio_util::sync::CancellationToken;

use crate::telemetry::Logging;

const INDEX: &str = "<!doctype html><title>zspire</title><h1>zspire</h1><ul>\
<li><a href=\"config_dump\">config_dump</a>: configuration and state\
<li><a href=\"identities\">identities</a>: each pod's identity and what has happened to it\
<li>POST logging?level=LEVEL: change log levels; logging?reset: back to the start's; logging: show them\
<li>POST quitquitquit: drain and stop\
<li><a href=\"debug/pprof/profile\">debug/pprof/profile</a>?seconds=10&amp;frequency=99: CPU profile\
<li><a href=\"debug/pprof/heap\">debug/pprof/heap</a>: heap profile\
</ul>\n";

/// Makes a page when it is asked for.
pub type Page = Arc<dyn Fn() -> String + Send + Sync>;

/// What the admin server shows and changes.
#[derive(Clone)]
pub struct Admin {
    /// The configuration dump as JSON text.
    pub dump: Page,
    /// The identities as JSON text.
    pub identities: Page,
    pub logging: Logging,
    /// Cancelled by `/quitquitquit`.
    pub quit: CancellationToken,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin").finish_non_exhaustive()
    }
}

/// The admin server's routes.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/", get(|| async { Html(INDEX) }))
        .route("/config_dump", get(|State(admin): State<Admin>| page(admin.dump)))
        .route("/identities", get(|State(admin): State<Admin>| page(admin.identities)))
        .route("/logging", post(logging))
        .route("/quitquitquit", post(quit))
        .route("/debug/pprof/profile", get(pprof::profile))
        .route("/debug/pprof/heap", get(pprof::heap))
        .layer(middleware::from_fn(same_machine_only))
        .with_state(admin)
}

/// Refuses what a browser was tricked into sending: a foreign `Host` (rebinding), a foreign `Origin`.
async fn same_machine_only(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let host_is_ours = match headers.get(header::HOST).map(|h| h.to_str().unwrap_or("?")) {
        None | Some("") => true,
        Some(host) => is_loopback(host),
    };
    if !host_is_ours || !origin_is_ours(headers) {
        return (
            StatusCode::FORBIDDEN,
            "the admin port answers requests to localhost, 127.0.0.1 or [::1], from no other origin\n",
        )
            .into_response();
    }
    next.run(request).await
}

fn origin_is_ours(headers: &HeaderMap) -> bool {
    match headers.get(header::ORIGIN).map(|o| o.to_str().unwrap_or("?")) {
        None => true,
        Some(origin) => origin.split_once("://").is_some_and(|(_, host)| is_loopback(host)),
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn page(page: Page) -> Response {
    // With many workloads this takes a while: not on the control thread.
    match tokio::task::spawn_blocking(move || page()).await {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the page failed\n").into_response(),
    }
}

async fn logging(State(admin): State<Admin>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    let level = query.get("level").map(String::as_str).unwrap_or_default();
    let changed = match (query.contains_key("reset"), level) {
        (true, level) => admin.logging.reset(level),
        (false, "") => Ok(()),
        (false, level) => admin.logging.set(level),
    };
    match changed {
        Ok(()) => format!("current log level is {}\n", admin.logging.current()).into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

async fn quit(State(admin): State<Admin>) -> &'static str {
    admin.quit.cancel();
    "shutdown now\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_are_ours() {
        for host in ["localhost", "localhost:15000", "LOCALHOST", "127.0.0.1:1", "127.9.9.9", "[::1]:15000", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["evil.example", "evil.example:15000", "10.0.0.1", "[fe80::1]:1", "localhost.evil.example", "?"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
