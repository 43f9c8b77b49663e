//! What comes back from a CA, good and bad, the first time and at renewal. Time is paused throughout.

use std::sync::Arc;
use std::time::Duration;

use rcgen::ExtendedKeyUsagePurpose;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use zspire_identity::authority::Csr;
use zspire_identity::per_identity::{self, PerIdentity};
use zspire_identity::{Clock, Priority, PrivateKey, Source as _, State, WorkloadKey, istio_ca, pem};

use crate::support::{Call, FakeCa, HOUR, TestCa, TestClock, id, public_key};

const WEB: &str = "spiffe://td.one/ns/shop/sa/web";

/// What can be wrong with a CA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Slow,
    Down,
    Denied,
    Garbage,
    Empty,
    LeafOnly,
    WrongKey,
    WrongName,
    OtherDomain,
    TwoNames,
    WrongUsage,
    CaAsLeaf,
    Expired,
    Future,
    WrongRoot,
}

/// Every fault with the reason it is counted under.
const FAULTS: [(Fault, &str); 15] = [
    (Fault::Slow, "timeout"),
    (Fault::Down, "unavailable"),
    (Fault::Denied, "denied"),
    (Fault::Garbage, "malformed"),
    (Fault::Empty, "malformed"),
    (Fault::LeafOnly, "malformed"),
    (Fault::WrongKey, "wrong_key"),
    (Fault::WrongName, "wrong_identity"),
    (Fault::OtherDomain, "unknown_trust_domain"),
    (Fault::TwoNames, "several_uri_sans"),
    (Fault::WrongUsage, "wrong_usage"),
    (Fault::CaAsLeaf, "profile"),
    (Fault::Expired, "expired"),
    (Fault::Future, "not_yet_valid"),
    (Fault::WrongRoot, "untrusted"),
];

async fn answer(ca: Arc<TestCa>, clock: Arc<TestClock>, fault: Fault, call: Call) -> Result<Vec<String>, Status> {
    let now = clock.now();
    let key = Csr::from_pem(&call.csr).unwrap().key;
    let name = call.identity.unwrap_or_else(|| WEB.to_owned());
    let names: &[&str] = match fault {
        Fault::Slow => std::future::pending().await,
        Fault::Down => return Err(Status::unavailable("shutting down")),
        Fault::Denied => return Err(Status::unauthenticated("request impersonation authentication failure")),
        Fault::Garbage => return Ok(vec!["gar".into(), "bage".into()]),
        Fault::Empty => return Ok(vec![]),
        Fault::WrongName => &["spiffe://td.one/ns/shop/sa/other"],
        Fault::OtherDomain => &["spiffe://td.two/ns/shop/sa/web"],
        Fault::TwoNames => &[&name, "spiffe://td.one/ns/shop/sa/other"],
        _ => &[&name],
    };
    let key = if fault == Fault::WrongKey { public_key(&PrivateKey::generate()) } else { key };
    let leaf = ca.leaf(&key, names, now, |params| match fault {
        Fault::WrongUsage => params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
        Fault::CaAsLeaf => params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained),
        Fault::Expired => params.not_after = (now - Duration::from_secs(1)).into(),
        Fault::Future => params.not_before = (now + HOUR / 2).into(),
        _ => {}
    });
    let leaf = pem::certificate(&leaf);
    Ok(match fault {
        Fault::LeafOnly => vec![leaf],
        Fault::WrongRoot => vec![leaf, TestCa::new(now).root_pem()],
        _ => vec![leaf, ca.root_pem()],
    })
}

/// A source whose CA has a fault as `script` says for each call.
fn start(script: impl Fn(&Call) -> Fault + Send + Sync + 'static) -> (PerIdentity, FakeCa, Arc<TestClock>) {
    let clock = TestClock::new();
    let ca = Arc::new(TestCa::new(clock.now()));
    let fake = {
        let clock = clock.clone();
        FakeCa::new(move |call| {
            let fault = script(&call);
            answer(ca.clone(), clock.clone(), fault, call)
        })
    };
    let schedule = per_identity::Config { clock: clock.clone(), seed: Some(7), ..per_identity::Config::default() };
    let (source, driver) = istio_ca::source(fake.channel(), istio_ca::Config::default(), schedule);
    tokio::spawn(driver.run(CancellationToken::new()));
    (source, fake, clock)
}

fn key(name: &str) -> WorkloadKey {
    WorkloadKey { id: id(name), workload: None }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

#[tokio::test(start_paused = true)]
async fn a_good_answer_becomes_credentials() {
    let (source, fake, _) = start(|_| Fault::None);
    let watch = source.watch(&key(WEB), Priority::WarmUp);
    assert!(matches!(watch.state(), State::Pending { .. }));
    let credentials = watch.ready(soon()).await.unwrap();
    assert_eq!(credentials.id(), &id(WEB));
    let calls = fake.calls();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0].identity.as_deref(), Some(WEB));
    assert_eq!(calls[0].ttl, 24 * 3600);
    let entries = source.entries();
    assert_eq!((entries.len(), entries[0].chain.len(), entries[0].roots.len()), (1, 1, 1));
    assert_eq!((entries[0].state.label(), entries[0].source), ("ready", "istio-ca"));
    assert!(entries[0].chain[0].serial.bytes().all(|b| b.is_ascii_digit()), "decimal, for istioctl");
    assert_eq!(source.stats().issued, 1);
}

#[tokio::test(start_paused = true)]
async fn the_request_is_p256_with_empty_subject_and_a_critical_name() {
    use x509_parser::prelude::*;
    let (source, fake, _) = start(|_| Fault::None);
    source.watch(&key(WEB), Priority::OnDemand).ready(soon()).await.unwrap();
    let text = fake.calls()[0].csr.clone();
    let (_, block) = parse_x509_pem(text.as_bytes()).unwrap();
    let (_, request) = X509CertificationRequest::from_der(&block.contents).unwrap();
    let info = &request.certification_request_info;
    assert_eq!(info.subject.iter().count(), 0);
    assert!(matches!(info.subject_pki.parsed(), Ok(public_key::PublicKey::EC(point)) if point.key_size() == 256));
    let attribute = info.attributes().iter().find_map(|a| match a.parsed_attribute() {
        ParsedCriAttribute::ExtensionRequest(requested) => Some(requested.extensions.clone()),
        _ => None,
    });
    let extensions = attribute.expect("the request asks for extensions");
    assert_eq!(extensions.len(), 1);
    assert!(extensions[0].critical);
    let ParsedExtension::SubjectAlternativeName(san) = extensions[0].parsed_extension() else { panic!("not a SAN") };
    assert!(matches!(san.general_names[..], [GeneralName::URI(uri)] if uri == WEB));
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_the_first_request_is_reported_and_overcome() {
    for (fault, reason) in FAULTS {
        let (source, fake, _) = start(move |call| if call.number == 0 { fault } else { Fault::None });
        let watch = source.watch(&key(WEB), Priority::WarmUp);
        let error = watch.ready(soon()).await.unwrap_err();
        assert!(!error.timed_out, "{fault:?}: {error}");
        assert!(matches!(watch.state(), State::Failed { .. }), "{fault:?}");
        assert_eq!(source.stats().failures.get(reason), Some(&1), "{fault:?}: {error} {:?}", source.stats());
        watch.ready(soon()).await.unwrap_or_else(|e| panic!("{fault:?}: {e}"));
        assert_eq!(fake.calls().len(), 2, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_renewal_keeps_the_old_certificate_and_is_overcome() {
    for (fault, reason) in FAULTS {
        let (source, _, _) = start(move |call| if call.number == 1 { fault } else { Fault::None });
        let mut watch = source.watch(&key(WEB), Priority::WarmUp);
        let first = watch.ready(soon()).await.unwrap();
        watch.state();
        let next = loop {
            match watch.changed().await.unwrap() {
                State::Ready(next) if next.fingerprint() != first.fingerprint() => break next,
                State::Ready(_) | State::Pending { .. } => {}
                other => panic!("{fault:?}: {other:?}"),
            }
        };
        assert!(next.not_after() > first.not_after(), "{fault:?}");
        assert_eq!(source.stats().failures.get(reason), Some(&1), "{fault:?}: {:?}", source.stats());
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_ca_the_last_certificate_is_used_until_it_expires() {
    let (source, _, clock) = start(|call| if call.number == 0 { Fault::None } else { Fault::Down });
    let mut watch = source.watch(&key(WEB), Priority::WarmUp);
    let first = watch.ready(soon()).await.unwrap();
    let why = loop {
        match watch.changed().await.unwrap() {
            State::Failed { why, .. } => break why,
            State::Ready(kept) => assert_eq!(kept.fingerprint(), first.fingerprint()),
            other => panic!("{other:?}"),
        }
    };
    assert!(clock.now() >= first.not_after(), "dropped before its time");
    assert!(clock.now() < first.not_after() + Duration::from_secs(2), "kept beyond its time");
    assert!(why.contains("expired") && why.contains("shutting down"), "{why}");
    assert!(watch.ready(soon()).await.is_err());
    assert!(source.stats().expiry.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_ahead_is_noticed_within_ten_seconds() {
    let (source, fake, clock) = start(|call| if call.number == 0 { Fault::None } else { Fault::Slow });
    let mut watch = source.watch(&key(WEB), Priority::WarmUp);
    watch.ready(soon()).await.unwrap();
    watch.state();
    clock.jump(24 * HOUR);
    let before = Instant::now();
    // It is dropped and asked for again at once, so that only one of the two states may be seen.
    while matches!(watch.changed().await.unwrap(), State::Ready(_)) {}
    assert!(before.elapsed() <= Duration::from_secs(11), "after {:?}", before.elapsed());
    let asked_again = async {
        while fake.calls().len() < 2 {
            // Paused time: this costs none, and lets the timeout pass if nothing ever comes.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(1), asked_again).await.expect("asked for at once");
}

#[tokio::test(start_paused = true)]
async fn dedicated_mode_names_no_identity() {
    let clock = TestClock::new();
    let ca = Arc::new(TestCa::new(clock.now()));
    let fake = {
        let clock = clock.clone();
        FakeCa::new(move |call| answer(ca.clone(), clock.clone(), Fault::None, call))
    };
    let schedule = per_identity::Config { clock: clock.clone(), ..per_identity::Config::default() };
    let config = istio_ca::Config { impersonate: false, ttl: HOUR };
    let (source, driver) = istio_ca::source(fake.channel(), config, schedule);
    tokio::spawn(driver.run(CancellationToken::new()));
    source.watch(&key(WEB), Priority::OnDemand).ready(soon()).await.unwrap();
    assert_eq!((fake.calls()[0].identity.as_ref(), fake.calls()[0].ttl), (None, 3600));
}
