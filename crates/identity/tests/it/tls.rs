//! Who is let in and who is not, and what each side is told.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex};
use zspire_identity::tls::{ClientTls, Error, Fault, KeyExchange, Policy, Rejection, ServerTls};
use zspire_identity::{Bundles, Clock, Credentials, ExpectedPeers, Invalid, Peer, PrivateKey, Svid};

use crate::support::{HOUR, TestCa, TestClock, domain, id, public_key};

const WEB: &str = "spiffe://td.one/ns/shop/sa/web";
const DB: &str = "spiffe://td.one/ns/shop/sa/db";
const FOREIGN: &str = "spiffe://td.two/ns/shop/sa/web";

type Sides = (Result<(ClientTls<DuplexStream>, Peer), Error>, Result<(ServerTls<DuplexStream>, Peer), Error>);

async fn handshake(client: &Credentials, server: &Credentials, expected: &ExpectedPeers) -> Sides {
    let (near, far) = duplex(1 << 16);
    tokio::join!(client.connect(near, expected), server.accept(far))
}

fn expect(name: &str) -> ExpectedPeers {
    ExpectedPeers::one(id(name))
}

fn clock() -> Arc<dyn Clock> {
    TestClock::new()
}

/// After a handshake of TLS 1.3 the client learns of a refusal with its first read.
async fn first_read(client: Result<(ClientTls<DuplexStream>, Peer), Error>) -> Error {
    match client {
        Err(error) => error,
        Ok((mut stream, _)) => Error::from_io(stream.read_u8().await.unwrap_err()),
    }
}

#[tokio::test(start_paused = true)]
async fn peers_of_one_trust_domain_see_each_other() {
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let trusted = [("td.one", &ca)];
    let (web, db) = (ca.credentials(WEB, &trusted, &clock), ca.credentials(DB, &trusted, &clock));
    let (client, server) = handshake(&web, &db, &expect(DB)).await;
    let ((mut client, to), (mut server, from)) = (client.unwrap(), server.unwrap());
    assert_eq!((to.id, from.id), (id(DB), id(WEB)));
    assert_eq!(from.not_after, web.not_after());
    assert_eq!(from.fingerprint, web.fingerprint());
    assert_eq!(client.key_exchange(), Some("X25519MLKEM768"));
    client.write_all(b"hello").await.unwrap();
    client.flush().await.unwrap();
    let mut read = [0; 5];
    server.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"hello");
}

#[tokio::test(start_paused = true)]
async fn trust_domains_are_kept_apart() {
    let clock = clock();
    let (one, two) = (TestCa::new(clock.now()), TestCa::new(clock.now()));
    let both = [("td.one", &one), ("td.two", &two)];
    let web = one.credentials(WEB, &both, &clock);
    let foreign = two.credentials(FOREIGN, &both, &clock);

    // Federated: each is checked against its own roots.
    let (client, server) = handshake(&foreign, &web, &expect(WEB)).await;
    assert_eq!(client.unwrap().1.id, id(WEB));
    assert_eq!(server.unwrap().1.id, id(FOREIGN));

    // Not federated: refused whatever the chain leads to.
    let alone = one.credentials(WEB, &[("td.one", &one)], &clock);
    let (client, server) = handshake(&foreign, &alone, &expect(WEB)).await;
    let error = server.unwrap_err();
    assert!(
        matches!(&error, Error::Rejected(Rejection::UnknownTrustDomain { id: seen }) if *seen == id(FOREIGN)),
        "{error:?}"
    );
    assert_eq!(error.fault(), Fault::Peer);
    let error = first_read(client).await;
    assert!(matches!(error, Error::Alert(_)), "{error:?}");
    assert_eq!(error.fault(), Fault::Us);

    // A CA of one domain that claims identities of another: its roots are trusted, but not for that domain.
    let forger = Credentials::new(
        Svid { id: id(FOREIGN), ..one.svid(FOREIGN, &[("td.two", &one), ("td.one", &one)], clock.now()) },
        &Policy::default(),
        &clock,
    )
    .unwrap();
    let (_, server) = handshake(&forger, &web, &expect(WEB)).await;
    let error = server.unwrap_err();
    assert!(matches!(&error, Error::Rejected(Rejection::Untrusted { .. })), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn the_server_must_be_one_of_the_expected() {
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let trusted = [("td.one", &ca)];
    let (web, db) = (ca.credentials(WEB, &trusted, &clock), ca.credentials(DB, &trusted, &clock));

    let several = ExpectedPeers::from_iter([id(WEB), id(DB), id(WEB)]);
    assert_eq!(handshake(&web, &db, &several).await.0.unwrap().1.id, id(DB));

    let (client, server) = handshake(&web, &db, &expect(FOREIGN)).await;
    let error = client.unwrap_err();
    assert!(
        matches!(&error, Error::Rejected(Rejection::UnexpectedPeer { id: seen, .. }) if *seen == id(DB)),
        "{error:?}"
    );
    let said = error_chain(&error);
    assert_eq!(said, format!("refused the peer's certificate: the peer is {DB}, expected {FOREIGN}"));
    // The server is told within the handshake: nothing was ever sent to it.
    assert!(matches!(server.unwrap_err(), Error::Alert(_)));

    let (client, _) = handshake(&web, &db, &ExpectedPeers::from_iter([])).await;
    assert!(matches!(client.unwrap_err(), Error::Rejected(Rejection::UnexpectedPeer { .. })));
}

fn error_chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", error_chain(source)),
        None => error.to_string(),
    }
}

/// A server of its own making, so that it can present what [`Credentials`] would not take.
async fn present(ca: &TestCa, uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Error {
    let clock = clock();
    let key = PrivateKey::generate();
    let leaf = ca.leaf(&public_key(&key), uris, clock.now(), change);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(der_of(&key)).unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let client = ca.credentials(WEB, &[("td.one", ca)], &clock);
    let (near, far) = duplex(1 << 16);
    let expected = expect(DB);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let (client, _) = tokio::join!(client.connect(near, &expected), acceptor.accept(far));
    client.unwrap_err()
}

pub(crate) fn der_of(key: &PrivateKey) -> Vec<u8> {
    use rustls::pki_types::pem::PemObject as _;
    rustls::pki_types::PrivatePkcs8KeyDer::from_pem_slice(key.to_pem().as_bytes()).unwrap().secret_pkcs8_der().to_vec()
}

#[tokio::test(start_paused = true)]
async fn bad_leaves_are_refused_each_with_its_reason() {
    type Change = Box<dyn FnOnce(&mut CertificateParams)>;
    let now = clock().now();
    let ca = TestCa::new(now);
    let dns = || SanType::DnsName("localhost".try_into().unwrap());
    let cases: Vec<(&str, &[&str], Change)> = vec![
        ("no_uri_san", &[], Box::new(move |p| p.subject_alt_names = vec![dns()])),
        ("no_uri_san", &[], Box::new(|_| ())),
        ("several_uri_sans", &[DB, WEB], Box::new(|_| ())),
        ("several_uri_sans", &[DB, DB], Box::new(|_| ())),
        ("several_uri_sans", &[DB, "https://example.org/"], Box::new(|_| ())),
        ("not_spiffe", &["https://td.one/ns/shop/sa/db"], Box::new(|_| ())),
        ("not_spiffe", &["spiffe://td.one/ns//sa/db"], Box::new(|_| ())),
        ("not_spiffe", &["spiffe://td.one/ns/../sa/db"], Box::new(|_| ())),
        ("not_spiffe", &["spiffe://td.one/ns/shop/sa/d%62"], Box::new(|_| ())),
        ("not_spiffe", &["spiffe://user@td.one/ns/shop/sa/db"], Box::new(|_| ())),
        ("not_spiffe", &["spiffe://td.one:8443/ns/shop/sa/db"], Box::new(|_| ())),
        ("not_spiffe", &["spiffe://td.one"], Box::new(|_| ())),
        ("unknown_trust_domain", &[FOREIGN], Box::new(|_| ())),
        ("unexpected_peer", &[WEB], Box::new(|_| ())),
        ("profile", &[DB], Box::new(|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained))),
        ("profile", &[DB], Box::new(|p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment])),
        ("profile", &[DB], Box::new(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign))),
        ("profile", &[DB], Box::new(|p| p.key_usages.push(KeyUsagePurpose::CrlSign))),
        ("profile", &[DB], Box::new(|p| p.key_usages.clear())),
        ("wrong_usage", &[DB], Box::new(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth])),
        ("wrong_usage", &[DB], Box::new(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning])),
        ("expired", &[DB], Box::new(move |p| p.not_after = (now - Duration::from_secs(1)).into())),
        ("not_yet_valid", &[DB], Box::new(move |p| p.not_before = (now + HOUR / 2).into())),
    ];
    for (number, (label, uris, change)) in cases.into_iter().enumerate() {
        let error = present(&ca, uris, change).await;
        assert_eq!(error.label(), label, "case {number} {uris:?}: {error:?}");
        assert_eq!(error.fault(), Fault::Peer, "case {number}");
    }
}

#[tokio::test(start_paused = true)]
async fn without_extended_key_usage_a_leaf_serves_both_sides() {
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let make = |name: &str| {
        let key = PrivateKey::generate();
        let leaf = ca.leaf(&public_key(&key), &[name], clock.now(), |p| p.extended_key_usages.clear());
        let bundles = Arc::new(Bundles::of(domain("td.one"), ca.bundle()));
        Credentials::new(Svid { id: id(name), chain: vec![leaf], key, bundles }, &Policy::default(), &clock).unwrap()
    };
    let (client, server) = handshake(&make(WEB), &make(DB), &expect(DB)).await;
    assert!(client.is_ok() && server.is_ok());
}

#[tokio::test(start_paused = true)]
async fn validity_follows_the_clock_given() {
    let test_clock = TestClock::new();
    let clock: Arc<dyn Clock> = test_clock.clone();
    let ca = TestCa::new(clock.now());
    let trusted = [("td.one", &ca)];
    let (web, db) = (ca.credentials(WEB, &trusted, &clock), ca.credentials(DB, &trusted, &clock));
    assert!(handshake(&web, &db, &expect(DB)).await.1.is_ok());
    test_clock.jump(2 * HOUR);
    let error = handshake(&web, &db, &expect(DB)).await.0.unwrap_err();
    assert!(matches!(error, Error::Rejected(Rejection::Expired { .. })), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn no_session_is_ever_resumed() {
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let trusted = [("td.one", &ca)];
    let server = ca.credentials(DB, &trusted, &clock);
    // A client that would like to: it keeps tickets and offers them.
    let svid = ca.svid(WEB, &trusted, clock.now());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.bundle().roots()[0].clone()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAll))
        .with_client_auth_cert(svid.chain, der_of(&svid.key).try_into().unwrap())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_early_data = true;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    for round in 0..3 {
        let (near, far) = duplex(1 << 16);
        let name = "db.shop".try_into().unwrap();
        let (client, accepted) = tokio::join!(connector.connect(name, near), server.accept(far));
        let (mut client, (mut accepted, _)) = (client.unwrap(), accepted.unwrap());
        // Tickets would come with the first data.
        accepted.write_all(b"x").await.unwrap();
        accepted.flush().await.unwrap();
        client.read_u8().await.unwrap();
        let session = client.get_ref().1;
        assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full), "round {round}");
        assert_eq!(session.tls13_tickets_received(), 0, "round {round}");
    }
}

#[derive(Debug)]
struct TrustAll;

impl rustls::client::danger::ServerCertVerifier for TrustAll {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Handshake of a stock rustls client, without a certificate, with the given key exchanges, versions and ALPN.
async fn stock_client(
    server: &Credentials,
    groups: Vec<&'static dyn rustls::crypto::SupportedKxGroup>,
    versions: &[&'static rustls::SupportedProtocolVersion],
    alpn: &[&[u8]],
) -> Error {
    let provider =
        rustls::crypto::CryptoProvider { kx_groups: groups, ..rustls::crypto::aws_lc_rs::default_provider() };
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAll))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let (near, far) = duplex(1 << 16);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connecting = async { drop(connector.connect("db.shop".try_into().unwrap(), near).await) };
    tokio::join!(connecting, server.accept(far)).1.unwrap_err()
}

#[tokio::test(start_paused = true)]
async fn clients_without_certificate_version_group_or_protocol_in_common() {
    use rustls::crypto::aws_lc_rs::kx_group::{X25519, X25519MLKEM768};
    use rustls::version::{TLS12, TLS13};
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let make = |policy| Credentials::new(ca.svid(DB, &[("td.one", &ca)], clock.now()), &policy, &clock).unwrap();
    let standard = make(Policy::default());
    let post_quantum = make(Policy::new(KeyExchange::PostQuantumOnly, true));
    let old = make(Policy::new(KeyExchange::default(), true));
    let h2: &[&[u8]] = &[b"h2"];

    let error = stock_client(&standard, vec![X25519], &[&TLS13], h2).await;
    assert!(matches!(error, Error::NoCertificate), "{error:?}");
    let error = stock_client(&standard, vec![X25519], &[&TLS12], h2).await;
    assert!(matches!(error, Error::Protocol(_)), "{error:?}");
    let error = stock_client(&standard, vec![X25519], &[&TLS13], &[b"http/1.1"]).await;
    assert!(matches!(error, Error::NoAlpn), "{error:?}");

    let error = stock_client(&post_quantum, vec![X25519], &[&TLS13], h2).await;
    assert!(matches!(error, Error::Protocol(_)), "{error:?}");
    let error = stock_client(&post_quantum, vec![X25519MLKEM768], &[&TLS13], h2).await;
    assert!(matches!(error, Error::NoCertificate), "{error:?}");
    let error = stock_client(&post_quantum, vec![X25519], &[&TLS12], h2).await;
    assert!(matches!(error, Error::Protocol(_)), "{error:?}");

    let error = stock_client(&old, vec![X25519], &[&TLS12], h2).await;
    assert!(matches!(error, Error::NoCertificate), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn handshakes_in_single_bytes_succeed_and_garbage_is_refused() {
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let trusted = [("td.one", &ca)];
    let (web, db) = (ca.credentials(WEB, &trusted, &clock), ca.credentials(DB, &trusted, &clock));
    let (near, far) = duplex(1 << 16);
    let expected = expect(DB);
    let (client, server) = tokio::join!(web.connect(Trickle(near), &expected), db.accept(Trickle(far)));
    assert!(client.is_ok() && server.is_ok());

    for garbage in
        [&[0x16, 3, 1, 0xff, 0xff, 1, 2, 3, 4, 5][..], b"GET / HTTP/1.1\r\n\r\n", &[0x16, 3, 1, 0, 4, 1, 0, 0, 0]]
    {
        let (mut near, far) = duplex(1 << 16);
        near.write_all(garbage).await.unwrap();
        near.shutdown().await.unwrap();
        let error = db.accept(far).await.unwrap_err();
        assert!(matches!(error, Error::Protocol(_) | Error::Io(_)), "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn material_that_peers_would_refuse_makes_no_credentials() {
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let other = TestCa::new(clock.now());
    let good = || ca.svid(DB, &[("td.one", &ca)], clock.now());
    let refused = |svid: Svid| Credentials::new(svid, &Policy::default(), &clock).unwrap_err();

    assert_eq!(refused(Svid { chain: vec![], ..good() }), Invalid::Empty);
    assert_eq!(refused(Svid { key: PrivateKey::generate(), ..good() }).label(), "wrong_key");
    assert_eq!(refused(Svid { key: PrivateKey::from_pkcs8(vec![1, 2, 3]), ..good() }).label(), "wrong_key");
    assert_eq!(refused(Svid { id: id(WEB), ..good() }).label(), "wrong_identity");
    let bundles = Arc::new(Bundles::of(domain("td.one"), other.bundle()));
    assert_eq!(refused(Svid { bundles, ..good() }).label(), "untrusted");
    assert_eq!(refused(Svid { bundles: Arc::default(), ..good() }).label(), "unknown_trust_domain");
    assert_eq!(refused(Svid { chain: vec![vec![0x30, 0x03, 1, 2].into()], ..good() }).label(), "malformed");
}

#[tokio::test(start_paused = true)]
async fn keys_are_not_printed() {
    let clock = clock();
    let ca = TestCa::new(clock.now());
    let svid = ca.svid(DB, &[("td.one", &ca)], clock.now());
    let secret: String = svid.key.to_pem().lines().nth(1).unwrap().to_owned();
    let bytes = format!("{:?}", der_of(&svid.key)[40..48].to_vec());
    let bytes = bytes.trim_matches(['[', ']']).to_owned();
    let said = format!("{svid:?}");
    let credentials = Credentials::new(svid, &Policy::default(), &clock).unwrap();
    let said = format!("{said} {credentials:?}");
    assert!(!said.contains(&secret) && !said.contains(&bytes), "{said}");
}

/// A connection that gives and takes one byte at a time.
struct Trickle<IO>(IO);

impl<IO: AsyncRead + Unpin> AsyncRead for Trickle<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut byte = [0];
        let mut one = ReadBuf::new(&mut byte);
        ready!(Pin::new(&mut self.0).poll_read(cx, &mut one))?;
        out.put_slice(one.filled());
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Trickle<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, &bytes[..bytes.len().min(1)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
