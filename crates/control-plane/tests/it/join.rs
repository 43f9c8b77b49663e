//! Joining: one token, one node, once.

use std::time::Duration;

use tonic::Code;
use zspire_control_plane::{create_token, issued};
use zspire_identity::grpc::{self, Channel, Roots};
use zspire_identity::join::{JoinToken, NODE_HEADER, Node};
use zspire_identity::pem;
use zspire_identity::x509::{CertificateView, fingerprint};

use crate::support::{Running, Setup, WEB, create, csr};

const NODE_A: &str = "spiffe://cluster.local/zspire/node/a";

/// A channel that shows a join token as `node` does.
fn with_join_token(running: &Running, token: &JoinToken, node: &str) -> Channel {
    let mut config = running.join_config(node).ca;
    config.roots = Roots::Pinned(*token.root());
    config.token = Some(grpc::TokenSource::Literal(token.expose()));
    config.headers.push((NODE_HEADER.parse().unwrap(), node.parse().unwrap()));
    Channel::new(config).unwrap()
}

#[tokio::test]
async fn a_node_joins_and_renews_without_a_token() {
    let running = Running::start().await;
    let node = running.node("a").await;
    assert_eq!(node.identity().borrow().as_ref().unwrap().id().as_str(), NODE_A);
    let loaded = Node::load(running.join_config("a")).unwrap().expect("the certificate was stored");
    let channel = Channel::new(grpc::Config {
        client: Some(loaded.identity()),
        roots: loaded.roots(),
        ..running.channel_config()
    });
    let chain = create(&channel.unwrap(), csr(), 3600, None).await.unwrap();
    assert_eq!(running.metric("zspire_control_plane_join_tokens_total{result=\"accepted\"}").await, 1);
    let setup = running.stop().await;
    let records = issued(&setup.config().state, 9).unwrap();
    let told: Vec<_> = records.iter().map(|r| (r.identity.as_str(), r.caller.as_str())).collect();
    assert_eq!(told, [(NODE_A, "node a"), (NODE_A, "node a, joining")]);
    let leaf = &pem::certificates(chain[0].as_bytes()).unwrap()[0];
    let decimal = CertificateView::parse(leaf).unwrap().serial;
    assert_eq!(decimal_of(&records[0].serial), decimal, "the record has the serial number of the certificate");
}

/// Hexadecimal to decimal, for numbers of 128 bits.
fn decimal_of(hex: &str) -> String {
    u128::from_str_radix(hex, 16).unwrap().to_string()
}

#[tokio::test]
async fn a_token_is_for_one_use() {
    let running = Running::start().await;
    let token = running.token("a");
    Node::join(running.join_config("a"), &token).await.unwrap();
    let error = Node::join(running.join_config("a"), &token).await.unwrap_err();
    assert!(error.is_final(), "the token is of no use any more");
    let error = error.to_string();
    assert!(error.contains("the join token has been used already: make a new one with"), "{error}");
    assert!(error.contains("(Unauthenticated)"), "{error}");
    assert_eq!(running.metric("zspire_control_plane_join_tokens_total{result=\"used\"}").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_at_the_same_time_one_wins() {
    let running = Running::start().await;
    for _ in 0..5 {
        let token = running.token("a");
        let tries: Vec<_> = (0..20)
            .map(|_| {
                let channel = with_join_token(&running, &token, "a");
                tokio::spawn(async move { create(&channel, csr(), 60, None).await })
            })
            .collect();
        let mut won = 0;
        for attempt in tries {
            match attempt.await.unwrap() {
                Ok(_) => won += 1,
                Err(status) => {
                    assert_eq!(status.code(), Code::Unauthenticated);
                    assert!(status.message().contains("has been used already"), "{status}");
                }
            }
        }
        assert_eq!(won, 1);
    }
    assert_eq!(running.metric("zspire_control_plane_join_tokens_total{result=\"accepted\"}").await, 5);
}

#[tokio::test]
async fn what_does_not_lead_to_a_certificate_does_not_spend_the_token() {
    let running = Running::start().await;
    let token = running.token("a");
    let refused = async |node: &str, csr: String, seconds: i64, identity: Option<&'static str>| {
        let status = create(&with_join_token(&running, &token, node), csr, seconds, identity).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let (code, message) = refused("b", csr(), 60, None).await;
    assert_eq!(code, Code::Unauthenticated);
    assert!(message.contains("the join token is for another node"), "{message}");
    assert_eq!(refused("a", csr(), 60, Some(WEB)).await.0, Code::Unauthenticated, "the node only");
    assert_eq!(refused("a", "garbage".into(), 60, None).await.0, Code::InvalidArgument);
    assert_eq!(refused("a", csr(), i64::MAX, None).await.0, Code::InvalidArgument);
    Node::join(running.join_config("a"), &token).await.unwrap();
}

#[tokio::test]
async fn expired_and_unknown_tokens() {
    let running = Running::start().await;
    let expired = create_token(&running.setup.config(), "a", Duration::ZERO).unwrap().parse().unwrap();
    let error = Node::join(running.join_config("a"), &expired).await.unwrap_err().to_string();
    assert!(error.contains("the join token has expired"), "{error}");
    let unknown = JoinToken::new(*expired.root(), "x".repeat(43).into());
    let error = Node::join(running.join_config("a"), &unknown).await.unwrap_err().to_string();
    assert!(error.contains("the join token is not known here"), "{error}");
    // Without the header that says for whom.
    let channel = running.with_token(&running.token("a").expose());
    let status = create(&channel, csr(), 60, None).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "request authenticate failure"));
}

#[tokio::test]
async fn a_token_names_the_root_of_its_control_plane() {
    let (one, other) = (Running::start().await, Running::start().await);
    let token = one.token("a");
    let roots = pem::certificates(&std::fs::read(one.roots()).unwrap()).unwrap();
    assert_eq!(*token.root(), fingerprint(&roots[0]));
    let error = Node::join(other.join_config("a"), &token).await.unwrap_err();
    assert!(!error.is_final(), "the right server may answer next time");
    let error = error.to_string();
    assert!(error.contains("TLS with the control plane failed"), "{error}");
}

/// A misspelt folder makes no second CA.
#[tokio::test]
async fn there_is_no_token_without_a_control_plane() {
    let setup = Setup::new();
    let error = create_token(&setup.config(), "a", Duration::from_secs(60)).unwrap_err().to_string();
    assert!(error.contains("there is no control plane in") && error.contains("--state"), "{error}");
    assert!(!setup.config().state.exists());
    // Once it has run, it need not be running.
    let setup = setup.start().await.stop().await;
    let token = create_token(&setup.config(), "a", Duration::from_secs(60)).unwrap().parse().unwrap();
    let running = setup.start().await;
    Node::join(running.join_config("a"), &token).await.unwrap();
}

#[tokio::test]
async fn secrets_are_not_in_the_database() {
    let running = Running::start().await;
    let token = running.token("a");
    let setup = running.stop().await;
    for entry in std::fs::read_dir(setup.config().state).unwrap() {
        let content = std::fs::read(entry.unwrap().path()).unwrap();
        let secret = token.secret().as_bytes();
        assert!(!content.windows(secret.len()).any(|window| window == secret));
    }
}
