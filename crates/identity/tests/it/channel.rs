//! What goes with every call to the CA, and what an operator is told when there is none to make.

use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zspire_identity::grpc::{self, Channel, Roots, TokenSource};
use zspire_identity::serving::Acceptor;
use zspire_identity::tls::Policy;
use zspire_identity::{
    Bundles, Clock, Priority, PrivateKey, Source, SystemClock, Watch, WorkloadKey, istio_ca, per_identity,
};

use crate::support::{FakeCa, HOUR, TestCa, domain, id, public_key};

const WEB: &str = "spiffe://td.one/ns/shop/sa/web";

/// Asks for a certificate over this channel, once.
fn ask(channel: Channel) -> (Arc<dyn Source>, Watch) {
    let (source, driver) = istio_ca::source(channel, istio_ca::Config::default(), per_identity::Config::default());
    tokio::spawn(driver.run(CancellationToken::new()));
    let watch = source.watch(&WorkloadKey { id: id(WEB), workload: None }, Priority::OnDemand);
    (Arc::new(source), watch)
}

async fn why(channel: Channel) -> String {
    let (_source, watch) = ask(channel);
    watch.ready(Instant::now() + HOUR).await.unwrap_err().to_string()
}

/// A CA that only notes what it was called with.
fn noting() -> FakeCa {
    FakeCa::new(|_| async { Err(tonic::Status::unavailable("only noting")) })
}

#[tokio::test(start_paused = true)]
async fn every_call_reads_the_token_again_and_names_the_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    std::fs::write(&path, "first\n").unwrap();
    let fake = noting();
    let cluster = (HeaderName::from_static("clusterid"), HeaderValue::from_static("east"));
    let (_source, watch) = ask(fake.channel_with(Some(TokenSource::File(path.clone())), vec![cluster]));
    watch.ready(Instant::now() + HOUR).await.unwrap_err();
    std::fs::write(&path, "second").unwrap();
    while fake.calls().len() < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let calls = fake.calls();
    let sent = |n: usize, name: &str| calls[n].headers.get(name).map(String::as_str);
    assert_eq!((sent(0, "authorization"), sent(0, "clusterid")), (Some("Bearer first"), Some("east")));
    assert_eq!((sent(1, "authorization"), sent(1, "clusterid")), (Some("Bearer second"), Some("east")));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_cannot_be_read_is_named_and_never_sent() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("empty"), "").unwrap();
    std::fs::write(at("binary"), [0u8, 159, 146, 150]).unwrap();
    std::fs::write(at("long"), "x".repeat(1 << 20)).unwrap();
    for (name, expected) in [
        ("missing", "missing does not exist"),
        ("empty", "empty is empty"),
        ("", "is a directory"),
        ("binary", "does not hold a token"),
        ("long", "does not hold a token"),
    ] {
        let fake = noting();
        let told = why(fake.channel_with(Some(TokenSource::File(at(name))), Vec::new())).await;
        assert!(told.contains(expected), "{name}: {told}");
        assert!(fake.calls().is_empty(), "{name}: a call without a token");
    }
}

/// A TLS server on a port of its own, with a certificate of this CA for this name, that says nothing.
async fn server(ca: &TestCa, name: &str) -> String {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let key = PrivateKey::generate();
    let sans = vec![rcgen::SanType::DnsName(name.try_into().unwrap())];
    let leaf = ca.leaf(&public_key(&key), &[], clock.now(), |params| {
        params.subject_alt_names = sans;
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    let clients = Arc::new(Bundles::of(domain("td.one"), ca.bundle()));
    let acceptor = Acceptor::new(vec![leaf], &key, clients, &Policy::default(), &clock).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            drop(acceptor.accept(socket).await);
        }
    });
    address
}

#[tokio::test]
async fn a_server_that_is_not_the_right_one_is_refused_with_the_reason() {
    let now = SystemClock.now();
    let (ca, other) = (TestCa::new(now), TestCa::new(now));
    let roots = |ca: &TestCa| Roots::Inline(ca.root_pem().as_str().into());
    let right = server(&ca, "localhost").await;
    for (address, roots, expected) in [
        (right.clone(), roots(&other), "invalid peer certificate"),
        (server(&ca, "elsewhere").await, roots(&ca), "elsewhere"),
        (right.clone(), Roots::File("/nonexistent/root-cert.pem".into()), "/nonexistent/root-cert.pem"),
        (right.clone(), Roots::Inline("not PEM".into()), "root"),
        (right.clone(), Roots::Pinned([7; 32]), "does not show the root certificate that the join token names"),
        ("https://127.0.0.1:1".into(), roots(&ca), "cannot connect to 127.0.0.1:1"),
    ] {
        let told = why(Channel::new(grpc::Config::new(address, roots)).unwrap()).await;
        assert!(told.contains(expected), "{expected:?} is not in {told:?}");
    }
}
