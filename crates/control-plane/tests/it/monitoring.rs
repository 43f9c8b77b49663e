//! The monitoring port, who may hold the state, and strangers that only connect.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use zspire_control_plane::ControlPlane;
use zspire_identity::grpc::{self, Channel, ConnectHook};

use crate::support::{Running, WEB, create, csr, http};

#[tokio::test]
async fn metrics_have_istiods_names() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    create(&node, csr(), 60, Some(WEB)).await.unwrap();
    create(&node, "garbage".into(), 60, Some(WEB)).await.unwrap_err();
    let page = running.metrics().await;
    for line in [
        "# HELP citadel_server_csr_count The number of CSRs received by Citadel server.",
        "# TYPE citadel_server_csr_count counter",
        "citadel_server_csr_count 3",
        "citadel_server_authentication_failure_count 0",
        "citadel_server_csr_parsing_err_count 1",
        "citadel_server_id_extraction_err_count 0",
        "citadel_server_csr_sign_err_count{error=\"CSR_ERROR\"} 1",
        "citadel_server_success_cert_issuance_count 2",
    ] {
        assert!(page.lines().any(|it| it == line), "no {line:?} in\n{page}");
    }
    assert!(!page.lines().any(|line| line.starts_with("citadel_server") && line.contains("_total")), "{page}");
    let ten_years = 3650 * 86_400;
    for name in ["root_cert", "cert_chain"] {
        let left = running.metric(&format!("citadel_server_{name}_expiry_seconds")).await;
        assert!((ten_years - 60..=ten_years).contains(&left), "{name}: {left}");
        assert!(running.metric(&format!("citadel_server_{name}_expiry_timestamp")).await > left);
    }
}

#[tokio::test]
async fn health_readiness_and_status() {
    let running = Running::start().await;
    assert_eq!(http(running.admin, "/healthz").await, (200, "ok\n".into()));
    assert_eq!(http(running.admin, "/ready").await, (200, "ready\n".into()));
    assert_eq!(http(running.admin, "/nothing").await.0, 404);
    let status = running.status().await;
    assert_eq!(status["trustDomain"], "cluster.local");
    assert_eq!(status["ca"]["source"], "self-signed");
    assert_eq!(status["ca"]["root"].as_str().unwrap().len(), 64);
    assert_eq!(status["mesh"]["workloads"], 3);
    assert_eq!(status["mesh"]["services"], 1);
    assert!(status["jwt"].is_null());
}

#[tokio::test]
async fn the_state_is_closed_to_others_and_held_by_one() {
    let running = Running::start().await;
    let mode = |name: &str| running.setup.path(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("state"), 0o700);
    assert_eq!(mode("state/ca.pem"), 0o600);
    let error = ControlPlane::start(running.setup.config()).await.unwrap_err();
    assert!(error.to_string().starts_with("another control plane uses "), "{error}");
    assert!(!error.is_configuration());
    let setup = running.stop().await;
    setup.start().await.stop().await;
}

#[tokio::test]
async fn connections_that_say_nothing_are_in_nobodys_way() {
    let running = Running::start().await;
    let node = running.node("a").await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(TcpStream::connect(running.address).await.unwrap());
    }
    // 128 of one address are waited for; the others have been closed.
    let begin = std::time::Instant::now();
    while running.metric("zspire_control_plane_tls_handshake_errors_total").await < 172 {
        assert!(begin.elapsed() < Duration::from_secs(9), "the surplus is not closed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let open = running.metric("zspire_control_plane_connections").await;
    assert!((128..=129).contains(&open), "{open} are open, the node's may still be closing");
    let from_elsewhere: ConnectHook = Arc::new(|socket| {
        let address: SocketAddr = ([127, 0, 0, 2], 0).into();
        socket2::SockRef::from(&socket).bind(&address.into())
    });
    let channel = Channel::new(grpc::Config {
        client: Some(node.identity()),
        connect_hook: Some(from_elsewhere),
        ..running.channel_config()
    });
    create(&channel.unwrap(), csr(), 60, Some(WEB)).await.unwrap();
    drop(idle);
}
