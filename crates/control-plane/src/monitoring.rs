//! The monitoring port: metrics, health and a JSON status. Plain HTTP without authentication, so on loopback by default;
//! it only reads.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::Authenticator;
use crate::ca::{Ca, to_hex};
use crate::config::Config;
use crate::mesh::{Mesh, streams};
use crate::metrics::Metrics;
use crate::serving::Serving;
use crate::shortage::Shortage;
use crate::state::WriterStats;
use crate::time_text::rfc3339;

const CONNECTIONS: usize = 64;
const HEADER_TIME: Duration = Duration::from_secs(10);
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// How long a question may take that is answered without a free descriptor.
const SHORT_TIME: Duration = Duration::from_millis(500);

/// What the pages show.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) config: Arc<Config>,
    pub(crate) ca: Ca,
    pub(crate) serving: Arc<Serving>,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) discovery: zspire_xds::server::Server,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) writer: Arc<WriterStats>,
    pub(crate) authenticator: Arc<Authenticator>,
    /// Set when the control plane is told to stop.
    pub(crate) stop: CancellationToken,
}

impl View {
    fn status(&self) -> Value {
        let issuing = self.ca.current();
        let jwt = self
            .authenticator
            .tokens
            .as_ref()
            .map(|tokens| json!({"issuer": tokens.issuer(), "keys": tokens.keys().count()}));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "trustDomain": self.config.trust_domain.as_str(),
            "ca": {
                "source": if self.config.cacerts.is_some() { "plugged-in" } else { "self-signed" },
                "root": to_hex(&issuing.root()),
                "roots": issuing.authority.roots().roots().len(),
                "notAfter": rfc3339(issuing.authority.not_after()),
                "issued": self.metrics.issued.get(),
                "recordsLost": self.writer.lost.load(std::sync::atomic::Ordering::Relaxed),
            },
            "servingCertificate": {"notAfter": rfc3339(self.serving.not_after())},
            "jwt": jwt,
            "mesh": self.mesh.status(),
            "connections": self.metrics.connections.get(),
            "discovery": streams(self.discovery.connections()),
        })
    }
}

fn router(view: View) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/stats/prometheus", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/ready", get(ready))
        .route("/status", get(async |State(view): State<Arc<View>>| Json(view.status())))
        .with_state(Arc::new(view))
}

async fn metrics(State(view): State<Arc<View>>) -> Response {
    let text = view.metrics.text(&view.ca.current(), &view.writer, SystemTime::now());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// The port is only served once everything is loaded, so what is left to say is that it is going away.
async fn ready(State(view): State<Arc<View>>) -> Response {
    if view.stop.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response();
    }
    "ready\n".into_response()
}

/// Serves until `end`.
pub(crate) async fn serve(listener: TcpListener, view: View, end: CancellationToken) {
    let app = router(view);
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let connections = TaskTracker::new();
    let mut shortage = Shortage::with_reserve("metrics and status");
    loop {
        let slot = slots.clone().acquire_owned().await.expect("it is never closed");
        let accepted = tokio::select! {
            () = end.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (app, end) = (app.clone(), end.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = end.cancelled() => {}
                        () = connection(stream, app, CONNECTION_TIME) => {}
                    }
                    drop(slot);
                });
            }
            Err(error) => tokio::select! {
                () = end.cancelled() => break,
                () = shortage.answer_one(&listener, &error, |stream| connection(stream, app.clone(), SHORT_TIME)) => {}
            },
        }
    }
    connections.close();
    connections.wait().await;
}

async fn connection(stream: TcpStream, app: Router, limit: Duration) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME.min(limit))
        .keep_alive(limit > SHORT_TIME)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    // A client that goes away or stalls concerns nobody else.
    drop(tokio::time::timeout(limit, connection).await);
}
