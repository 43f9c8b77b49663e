use zspire_identity::PrivateKey;
use zspire_identity::x509::CertificateView;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn id() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

fn ca(lifetime: Duration, now: SystemTime) -> Ca {
    let parts = Parts::generate("cluster.local", lifetime, now).unwrap();
    Ca::new(Issuing::new(&parts, now).unwrap(), Ttl::default())
}

fn csr() -> String {
    PrivateKey::generate().request(None).unwrap()
}

/// Lifetime of a certificate that was asked for with `seconds`.
fn lifetime(ca: &Ca, seconds: i64, now: SystemTime) -> Duration {
    let answer = ca.issue(&csr(), &id(), seconds, now).unwrap();
    let view = CertificateView::parse(&answer.leaf.der).unwrap();
    assert_eq!(crate::time_text::unix(view.not_after), crate::time_text::unix(answer.leaf.not_after));
    answer.leaf.not_after.duration_since(now).unwrap()
}

#[test]
fn lifetimes_are_istiods() {
    let now = SystemTime::now();
    let ca = ca(365 * DAY, now);
    assert_eq!(lifetime(&ca, 0, now), DAY);
    assert_eq!(lifetime(&ca, -5, now), DAY);
    assert_eq!(lifetime(&ca, i64::MIN, now), DAY);
    assert_eq!(lifetime(&ca, 600, now), Duration::from_secs(600));
    assert_eq!(lifetime(&ca, 90 * 86_400, now), 90 * DAY);
    for (seconds, asked) in [(90 * 86_400 + 1, "2160h0m1s"), (i64::MAX, "2562047788015215h30m7s")] {
        let error = ca.issue(&csr(), &id(), seconds, now).unwrap_err();
        let status = error.status();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        let expected =
            format!("CSR signing error (requested TTL {asked} is greater than the max allowed TTL 2160h0m0s)");
        assert_eq!(status.message(), expected);
        assert_eq!(error.label(), "TTL_ERROR");
    }
}

#[test]
fn nothing_outlives_the_ca_and_an_expired_one_issues_nothing() {
    let now = SystemTime::now();
    let ca = ca(DAY / 2, now);
    assert!(lifetime(&ca, 86_400, now) <= DAY / 2);
    let error = ca.issue(&csr(), &id(), 60, now + DAY).unwrap_err();
    assert_eq!((error.label(), error.status().code()), ("CA_NOT_READY", tonic::Code::Internal));
}

#[test]
fn broken_requests_are_the_callers_fault() {
    let now = SystemTime::now();
    let ca = ca(DAY, now);
    for text in [
        "",
        "garbage",
        &"x".repeat(20_000),
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    ] {
        let error = ca.issue(text, &id(), 60, now).unwrap_err();
        assert_eq!((error.label(), error.status().code()), ("CSR_ERROR", tonic::Code::InvalidArgument));
    }
    let status = ca.issue("garbage", &id(), 60, now).unwrap_err().status();
    assert_eq!(status.message(), "CSR signing error (certificate signing request is not properly encoded)");
}

#[test]
fn tokens_name_the_root_that_signs() {
    let now = SystemTime::now();
    let old = Parts::generate("old", DAY, now).unwrap();
    let mut parts = Parts::generate("new", DAY, now).unwrap();
    let alone = Issuing::new(&parts, now).unwrap().root();
    parts.roots = format!("{}{}", old.roots, parts.roots);
    let both = Issuing::new(&parts, now).unwrap();
    assert_eq!(both.root(), alone);
    assert_eq!(both.authority.roots().roots().len(), 2);
    assert_eq!(from_hex(&to_hex(&alone)), Some(alone));
    assert_eq!(from_hex("zz"), None);
}
