//! Certificates: what they say, and every way in which none is issued.

use std::time::Duration;

use tonic::Code;
use zspire_identity::grpc::Channel;
use zspire_identity::{Priority, Source as _, WorkloadKey, istio_ca, per_identity};

use crate::support::{DB, Running, WEB, create, csr, openssl, workload};

#[tokio::test]
async fn openssl_accepts_the_chain_and_sees_istiods_profile() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let chain = create(&node, csr(), 3600, Some(WEB)).await.unwrap();
    assert_eq!(chain.len(), 2, "leaf and root");
    let folder = running.setup.folder.path();
    std::fs::write(folder.join("leaf.pem"), &chain[0]).unwrap();
    std::fs::write(folder.join("root.pem"), &chain[1]).unwrap();
    for purpose in ["sslclient", "sslserver"] {
        let (fine, text) =
            openssl(&["verify", "-x509_strict", "-purpose", purpose, "-CAfile", "root.pem", "leaf.pem"], folder);
        assert!(fine, "{text}");
    }
    let (_, text) = openssl(&["x509", "-in", "leaf.pem", "-noout", "-text"], folder);
    for expected in [
        "X509v3 Subject Alternative Name: critical\n                URI:spiffe://cluster.local/ns/shop/sa/web\n",
        "X509v3 Key Usage: critical\n                Digital Signature, Key Encipherment\n",
        "TLS Web Server Authentication, TLS Web Client Authentication\n",
        "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
        "Issuer: O = cluster.local\n",
        "Subject: \n",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    let (_, root) = openssl(&["x509", "-in", "root.pem", "-noout", "-text"], folder);
    assert!(root.contains("Certificate Sign\n") && root.contains("CA:TRUE"), "{root}");
    assert_eq!(std::fs::read_to_string(running.roots()).unwrap(), chain[1]);
}

#[tokio::test]
async fn rsa_and_p384_keys_of_openssl_are_certified() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let folder = running.setup.folder.path();
    for (kind, name) in [("rsa:2048", ""), ("ec", "P-384")] {
        let mut arguments = vec!["req", "-new", "-newkey", kind, "-nodes", "-keyout", "key.pem", "-subj", "/CN=x"];
        let curve = format!("ec_paramgen_curve:{name}");
        if !name.is_empty() {
            arguments.extend(["-pkeyopt", &curve]);
        }
        let (fine, request) = openssl(&arguments, folder);
        assert!(fine, "{request}");
        let begin = request.find("-----BEGIN CERT").unwrap();
        let chain = create(&node, request[begin..].to_owned(), 0, Some(WEB)).await.unwrap();
        std::fs::write(folder.join("leaf.pem"), &chain[0]).unwrap();
        let (fine, text) = openssl(&["verify", "-CAfile", running.roots().to_str().unwrap(), "leaf.pem"], folder);
        assert!(fine, "{text}");
        let (_, subject) = openssl(&["x509", "-in", "leaf.pem", "-noout", "-subject"], folder);
        assert_eq!(subject.trim(), format!("subject=CN = {WEB}"), "a request with a common name gets one");
    }
}

#[tokio::test]
async fn the_proxys_own_client_gets_its_credentials() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let (source, driver) = istio_ca::source(node, istio_ca::Config::default(), per_identity::Config::default());
    let stop = tokio_util::sync::CancellationToken::new();
    let task = tokio::spawn(driver.run(stop.clone()));
    let key = WorkloadKey { id: WEB.parse().unwrap(), workload: None };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let credentials = source.watch(&key, Priority::OnDemand).ready(deadline).await.unwrap();
    assert_eq!(credentials.id().as_str(), WEB);
    stop.cancel();
    task.await.unwrap();
}

async fn refused(channel: &Channel, csr: String, seconds: i64, identity: Option<&str>) -> (Code, String) {
    let status = create(channel, csr, seconds, identity).await.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn a_stranger_gets_nothing() {
    let running = Running::start().await;
    let expected = (Code::Unauthenticated, "request authenticate failure".to_owned());
    assert_eq!(refused(&running.stranger(), csr(), 60, None).await, expected);
    assert_eq!(refused(&running.stranger(), csr(), 60, Some(WEB)).await, expected);
    assert_eq!(refused(&running.with_token("anything"), csr(), 60, Some(WEB)).await, expected);
    assert_eq!(running.metric("citadel_server_authentication_failure_count").await, 3);
    assert_eq!(running.metric("citadel_server_csr_count").await, 3);
    assert_eq!(running.metric("citadel_server_success_cert_issuance_count").await, 0);
}

#[tokio::test]
async fn a_node_gets_only_what_runs_on_it() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let expected = (Code::Unauthenticated, "request impersonation authentication failure".to_owned());
    for identity in [
        DB,
        "spiffe://cluster.local/ns/shop/sa/nobody",
        "spiffe://elsewhere/ns/shop/sa/far",
        "spiffe://cluster.local/ns/shop/sa/far",
        "spiffe://elsewhere/ns/shop/sa/web",
        "spiffe://cluster.local/zspire/node/b",
        "not an identity",
    ] {
        assert_eq!(refused(&node, csr(), 60, Some(identity)).await, expected, "{identity}");
    }
    assert!(create(&node, csr(), 60, Some(WEB)).await.is_ok());
    assert_eq!(running.metric("citadel_server_id_extraction_err_count").await, 2);
}

#[tokio::test]
async fn a_workload_renews_itself_and_nobody_else() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let web = running.with_certificate(workload(&node, WEB).await);
    assert!(create(&web, csr(), 60, None).await.is_ok());
    assert!(create(&web, csr(), 60, Some(WEB)).await.is_ok());
    let (code, _) = refused(&web, csr(), 60, Some(DB)).await;
    assert_eq!(code, Code::Unauthenticated);
    let setup = running.stop().await;
    let records = zspire_control_plane::issued(&setup.config().state, 9).unwrap();
    let told: Vec<_> = records.iter().map(|r| (r.identity.as_str(), r.caller.as_str())).collect();
    assert_eq!(
        told,
        [(WEB, WEB), (WEB, WEB), (WEB, "node a"), ("spiffe://cluster.local/zspire/node/a", "node a, joining")]
    );
}

#[tokio::test]
async fn lifetimes_and_requests_that_are_refused() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let ttl = "CSR signing error (requested TTL 2160h0m1s is greater than the max allowed TTL 2160h0m0s)";
    assert_eq!(refused(&node, csr(), 90 * 86_400 + 1, Some(WEB)).await, (Code::InvalidArgument, ttl.into()));
    let encoding = "CSR signing error (certificate signing request is not properly encoded)";
    assert_eq!(refused(&node, "garbage".into(), 60, Some(WEB)).await, (Code::InvalidArgument, encoding.into()));
    let (code, _) = refused(&node, "x".repeat(100_000), 60, Some(WEB)).await;
    assert_eq!(code, Code::OutOfRange, "longer than any request");
    let (code, message) = refused(&node, spoiled(&csr()), 60, Some(WEB)).await;
    assert_eq!((code, message.starts_with("CSR signing error (")), (Code::InvalidArgument, true), "{message}");
    assert_eq!(running.metric("citadel_server_csr_sign_err_count{error=\"TTL_ERROR\"}").await, 1);
    assert_eq!(running.metric("citadel_server_csr_sign_err_count{error=\"CSR_ERROR\"}").await, 2);
    assert_eq!(running.metric("citadel_server_csr_parsing_err_count").await, 2);
}

/// A request whose signature is not its own.
fn spoiled(csr: &str) -> String {
    let other = self::csr();
    let mut lines: Vec<_> = csr.lines().collect();
    let foreign: Vec<_> = other.lines().collect();
    let last = lines.len() - 2;
    lines[last] = foreign[last];
    lines.join("\n")
}
