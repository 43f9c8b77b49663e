//! Revocation lists: whom they keep out, in handshakes and afterwards, and what a bad file does not do.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{KeyUsagePurpose, SerialNumber};
use tempfile::TempDir;
use tokio::io::duplex;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use zspire_identity::revocation::{self, Unknown};
use zspire_identity::tls::{Error, Policy, Rejection};
use zspire_identity::{Bundles, Clock as _, Credentials, ExpectedPeers, Peer, PrivateKey, Revocation, Svid};

use crate::support::{HOUR, TestCa, TestClock, domain, id, public_key};

const WEB: &str = "spiffe://td.one/ns/shop/sa/web";
const DB: &str = "spiffe://td.one/ns/shop/sa/db";
/// Serial numbers of the certificates.
const WEB_SERIAL: u64 = 0x1001;
const DB_SERIAL: u64 = 0x80f2;

/// Two workloads of one CA, and a file of revocation lists.
struct Setup {
    folder: TempDir,
    clock: Arc<TestClock>,
    ca: TestCa,
    revocation: Revocation,
    stop: CancellationToken,
    follower: Option<revocation::Follower>,
    task: Option<JoinHandle<()>>,
}

impl Setup {
    fn new(unknown: Unknown, file: impl FnOnce(&TestCa, &TestClock) -> Vec<u8>) -> Self {
        let (folder, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
        let ca = TestCa::new(clock.now());
        let path = folder.path().join("crl.pem");
        fs::write(&path, file(&ca, &clock)).unwrap();
        let (revocation, follower) = revocation::follow(path, unknown, clock.clone());
        Self { folder, clock, ca, revocation, stop: CancellationToken::new(), follower: Some(follower), task: None }
    }

    /// Begins to follow the file.
    fn follow(&mut self) {
        let follower = self.follower.take().unwrap();
        self.task = Some(tokio::spawn(follower.run(self.stop.clone())));
    }

    fn replace(&self, content: impl AsRef<[u8]>) {
        let temporary = self.folder.path().join("new");
        fs::write(&temporary, content).unwrap();
        fs::rename(temporary, self.folder.path().join("crl.pem")).unwrap();
    }

    fn credentials(&self, name: &str, serial: u64) -> Credentials {
        self.credentials_of(&self.ca, name, serial, &[])
    }

    fn credentials_of(&self, ca: &TestCa, name: &str, serial: u64, above: &[&TestCa]) -> Credentials {
        let key = PrivateKey::generate();
        let leaf = ca.leaf(&public_key(&key), &[name], self.clock.now(), |params| {
            params.serial_number = Some(SerialNumber::from(serial));
        });
        let mut chain = vec![leaf];
        chain.extend(above.iter().map(|ca| ca.certificate()));
        let bundles = Arc::new(Bundles::of(domain("td.one"), self.ca.bundle()));
        let policy = Policy::default().with_revocation(self.revocation.clone());
        let clock: Arc<dyn zspire_identity::Clock> = self.clock.clone();
        Credentials::new(Svid { id: id(name), chain, key, bundles }, &policy, &clock).unwrap()
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What client and server make of each other.
async fn meet(client: &Credentials, server: &Credentials) -> (Result<Peer, Error>, Result<Peer, Error>) {
    let (near, far) = duplex(1 << 16);
    let expected = ExpectedPeers::one(server.id().clone());
    let (client, server) = tokio::join!(client.connect(near, &expected), server.accept(far));
    (client.map(|(_, peer)| peer), server.map(|(_, peer)| peer))
}

fn label(result: &Result<Peer, Error>) -> &'static str {
    result.as_ref().map_or_else(Error::label, |_| "accepted")
}

async fn outcome(setup: &Setup) -> (&'static str, &'static str) {
    let (web, db) = (setup.credentials(WEB, WEB_SERIAL), setup.credentials(DB, DB_SERIAL));
    let (client, server) = meet(&web, &db).await;
    (label(&client), label(&server))
}

fn list(ca: &TestCa, clock: &TestClock, serials: &[u64]) -> String {
    ca.crl(serials, clock.now(), clock.now() + 24 * HOUR).pem().unwrap()
}

#[tokio::test(start_paused = true)]
async fn whoever_is_listed_is_refused_in_both_directions() {
    let nobody = Setup::new(Unknown::Deny, |ca, clock| list(ca, clock, &[9]).into());
    assert_eq!(outcome(&nobody).await, ("accepted", "accepted"));
    let stats = nobody.revocation.stats().unwrap();
    assert_eq!((stats.loads, stats.failures, stats.lists, stats.revoked, stats.expired), (1, 0, 1, 1, 0));
    assert_eq!(nobody.revocation.problem(), None);
    let server = Setup::new(Unknown::Deny, |ca, clock| list(ca, clock, &[9, DB_SERIAL]).into());
    assert_eq!(outcome(&server).await, ("revoked", "alert"));
    let client = Setup::new(Unknown::Allow, |ca, clock| list(ca, clock, &[WEB_SERIAL]).into());
    assert_eq!(outcome(&client).await.1, "revoked");
    // DER, several.
    let der = Setup::new(Unknown::Deny, |ca, clock| {
        let other = TestCa::new(clock.now()).intermediate("other", &[KeyUsagePurpose::CrlSign], clock.now());
        let crl = |ca: &TestCa, serial| ca.crl(&[serial], clock.now(), clock.now() + HOUR).der().to_vec();
        [crl(&other, WEB_SERIAL), crl(ca, DB_SERIAL)].concat()
    });
    assert_eq!(outcome(&der).await.0, "revoked");
    assert_eq!(der.revocation.stats().unwrap().lists, 2);
}

#[tokio::test(start_paused = true)]
async fn unknown_status_is_what_the_operator_says() {
    let other =
        |clock: &TestClock| TestCa::new(clock.now()).intermediate("other", &[KeyUsagePurpose::CrlSign], clock.now());
    let deny = Setup::new(Unknown::Deny, |_, clock| list(&other(clock), clock, &[]).into());
    assert_eq!(outcome(&deny).await.0, "revocation_unknown");
    let (client, _) = meet(&deny.credentials(WEB, 1), &deny.credentials(DB, 2)).await;
    let error = std::error::Error::source(&client.unwrap_err()).unwrap().to_string();
    assert!(error.contains("there is no revocation list of its issuer (CRL_UNKNOWN_STATUS=allow"), "{error}");
    let allow = Setup::new(Unknown::Allow, |_, clock| list(&other(clock), clock, &[]).into());
    assert_eq!(outcome(&allow).await, ("accepted", "accepted"));
    // A file that cannot be read says nothing of anybody.
    let deny = Setup::new(Unknown::Deny, |_, _| b"?".to_vec());
    assert!(deny.revocation.refuses_everybody());
    assert_eq!(outcome(&deny).await.0, "revocation_unknown");
    let allow = Setup::new(Unknown::Allow, |_, _| b"?".to_vec());
    assert_eq!(outcome(&allow).await, ("accepted", "accepted"));
    assert!(allow.revocation.problem().unwrap().contains("no X509 CRL block"));
}

#[tokio::test(start_paused = true)]
async fn an_expired_list_still_revokes_and_vouches_for_nobody() {
    let file = |ca: &TestCa, clock: &TestClock, serials: &[u64]| {
        ca.crl(serials, clock.now(), clock.now() + HOUR).pem().unwrap().into_bytes()
    };
    for (unknown, unlisted) in [(Unknown::Deny, "revocation_unknown"), (Unknown::Allow, "accepted")] {
        let mut setup = Setup::new(unknown, |ca, clock| file(ca, clock, &[WEB_SERIAL]));
        setup.follow();
        let mut changes = setup.revocation.changes();
        assert_eq!(outcome(&setup).await.0, "accepted");
        setup.clock.jump(2 * HOUR);
        changes.changed().await.unwrap();
        assert_eq!(setup.revocation.stats().unwrap().expired, 1);
        let problem = setup.revocation.problem().unwrap();
        assert!(problem.starts_with("the revocation list of O=test expired at 2027-"), "{problem}");
        let (client, server) = meet(&setup.credentials(DB, DB_SERIAL), &setup.credentials(WEB, WEB_SERIAL)).await;
        assert_eq!(label(&client), "revoked");
        assert_ne!(label(&server), "accepted");
        let (client, _) = meet(&setup.credentials(DB, DB_SERIAL), &setup.credentials(DB, 3)).await;
        assert_eq!(label(&client), unlisted);
    }
}

// In real time: the paused clock would run away, past the certificates' end, while the kernel tells of the file.
#[tokio::test]
async fn live_peers_are_asked_about_again() {
    let mut setup = Setup::new(Unknown::Deny, |ca, clock| list(ca, clock, &[]).into());
    setup.follow();
    let (web, db) = (setup.credentials(WEB, WEB_SERIAL), setup.credentials(DB, DB_SERIAL));
    let (server, client) = meet(&web, &db).await;
    let (server, client) = (server.unwrap(), client.unwrap());
    web.still_valid(&server).unwrap();
    db.still_valid(&client).unwrap();

    let mut changes = setup.revocation.changes();
    setup.replace(list(&setup.ca, &setup.clock, &[DB_SERIAL]));
    changes.changed().await.unwrap();
    let Error::Rejected(Rejection::Revoked { id: who, serial }) = web.still_valid(&server).unwrap_err() else {
        panic!()
    };
    assert_eq!((who, serial.as_str()), (id(DB), "80f2"));
    db.still_valid(&client).unwrap();

    // The trust bundle is another, and then the certificate is too old.
    let elsewhere = TestCa::new(setup.clock.now());
    let clock: Arc<dyn zspire_identity::Clock> = setup.clock.clone();
    let changed = elsewhere.credentials(DB, &[("td.one", &elsewhere)], &clock);
    assert_eq!(changed.still_valid(&client).unwrap_err().label(), "untrusted");
    let moved = elsewhere.credentials(DB, &[("td.two", &elsewhere), ("td.one", &elsewhere)], &clock);
    assert!(moved.still_valid(&client).is_err());
    setup.clock.jump(2 * HOUR);
    assert_eq!(db.still_valid(&client).unwrap_err().label(), "expired");
    assert_eq!(db.still_valid(&Peer { evidence: Default::default(), ..client }).unwrap_err().label(), "no_certificate");
}

// In real time: the paused clock would run away, past the certificates' end, while the kernel tells of the file.
#[tokio::test]
async fn a_bad_file_leaves_the_lists_before_in_force() {
    let mut setup = Setup::new(Unknown::Deny, |ca, clock| list(ca, clock, &[DB_SERIAL]).into());
    setup.follow();
    assert_eq!(outcome(&setup).await.0, "revoked");
    let forger = TestCa::new(setup.clock.now());
    let good = list(&setup.ca, &setup.clock, &[]);
    let forged = list(&forger, &setup.clock, &[]);
    for (bad, why) in [
        (forged.as_str(), "the revocation list of O=test is not signed by the CA of that name"),
        (&good[..good.len() / 2], "not valid PEM"),
        ("", "no X509 CRL block"),
    ] {
        setup.replace(bad);
        let failures = setup.revocation.stats().unwrap().failures;
        while setup.revocation.stats().unwrap().failures == failures {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let problem = setup.revocation.problem().unwrap();
        assert!(problem.contains("the lists before stay in force") && problem.contains(why), "{problem}");
        assert_eq!(outcome(&setup).await.0, "revoked");
    }
    let mut changes = setup.revocation.changes();
    setup.replace(good);
    changes.changed().await.unwrap();
    assert_eq!(outcome(&setup).await, ("accepted", "accepted"));
    assert_eq!(setup.revocation.problem(), None);
}

/// Before its CA is known a forged list is taken, but counts for nobody.
#[tokio::test(start_paused = true)]
async fn a_forged_list_revokes_nobody() {
    let forged = |_: &TestCa, clock: &TestClock| list(&TestCa::new(clock.now()), clock, &[DB_SERIAL]).into_bytes();
    assert_eq!(outcome(&Setup::new(Unknown::Allow, forged)).await, ("accepted", "accepted"));
    assert_eq!(outcome(&Setup::new(Unknown::Deny, forged)).await.0, "revocation_unknown");
    // Beside it the CA's own counts.
    let both = Setup::new(Unknown::Deny, |ca, clock| (list(ca, clock, &[]) + &list(ca, clock, &[DB_SERIAL])).into());
    assert_eq!(outcome(&both).await.0, "revoked", "of several lists every one counts");
}

#[tokio::test(start_paused = true)]
async fn intermediates_have_lists_of_their_own() {
    let sign = [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    for (usages, of_root, of_intermediate, expected) in [
        (&sign[..], &[][..], &[][..], "accepted"),
        (&sign, &[], &[DB_SERIAL], "revoked"),
        (&sign, &[77], &[], "revoked"),
        (&sign[..1], &[], &[], "revocation_unknown"),
    ] {
        let mut setup = Setup::new(Unknown::Deny, |_, _| Vec::new());
        let below = setup.ca.intermediate("below", usages, setup.clock.now());
        let text = list(&setup.ca, &setup.clock, of_root) + &list(&below, &setup.clock, of_intermediate);
        setup.replace(text);
        setup.follow();
        setup.revocation.changes().changed().await.unwrap();
        let db = setup.credentials_of(&below, DB, DB_SERIAL, &[&below]);
        let (client, _) = meet(&setup.credentials(WEB, WEB_SERIAL), &db).await;
        assert_eq!(label(&client), expected, "{usages:?} {of_root:?} {of_intermediate:?}");
    }
}
