//! A CA of the operator's own, in a folder as istiod's secret `cacerts`.

use std::time::{Duration, SystemTime};

use zspire_control_plane::ControlPlane;
use zspire_identity::authority::Parts;
use zspire_identity::pem;
use zspire_identity::x509::fingerprint;

use crate::support::{Running, Setup, WEB, create, csr, openssl, write_cacerts};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn root(name: &str) -> Parts {
    let parts = Parts::generate(name, 100 * DAY, SystemTime::now()).unwrap();
    // A root has no chain, but the folder has the file.
    Parts { chain: "\n".into(), ..parts }
}

fn setup() -> Setup {
    let mut setup = Setup::new();
    setup.options.cacerts = Some(setup.path("cacerts").display().to_string());
    setup
}

fn hex(parts: &Parts) -> String {
    let der = pem::certificates(parts.certificate.as_bytes()).unwrap();
    fingerprint(&der[0]).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn an_intermediate_made_by_openssl() {
    let setup = setup();
    let folder = setup.path("cacerts");
    std::fs::create_dir(&folder).unwrap();
    let root = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /O=root \
                -keyout root-key.pem -out root-cert.pem -addext keyUsage=critical,keyCertSign";
    let request = "req -newkey rsa:2048 -nodes -subj /O=intermediate -keyout ca-key.pem -out ca.csr";
    let sign = "x509 -req -in ca.csr -CA root-cert.pem -CAkey root-key.pem -CAcreateserial -days 20 -out ca-cert.pem \
                -extfile ext";
    std::fs::write(folder.join("ext"), "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n").unwrap();
    for line in [root, request, sign] {
        let (fine, text) = openssl(&line.split_whitespace().collect::<Vec<_>>(), &folder);
        assert!(fine, "{text}");
    }
    std::fs::copy(folder.join("ca-cert.pem"), folder.join("cert-chain.pem")).unwrap();
    let running = setup.start().await;
    let node = running.node_channel("a").await;
    let chain = create(&node, csr(), 40 * 86_400, Some(WEB)).await.unwrap();
    assert_eq!(chain.len(), 3, "leaf, intermediate, root");
    assert!(chain.iter().all(|text| text.ends_with("-----END CERTIFICATE-----\n")));
    for (name, text) in ["leaf", "intermediate", "root"].iter().zip(&chain) {
        std::fs::write(folder.join(name), text).unwrap();
    }
    let (fine, text) = openssl(&["verify", "-CAfile", "root", "-untrusted", "intermediate", "leaf"], &folder);
    assert!(fine, "{text}");
    let ends = |name: &str| openssl(&["x509", "-in", name, "-noout", "-enddate"], &folder).1;
    assert_eq!(ends("leaf"), ends("intermediate"), "nothing outlives the CA");
}

#[tokio::test]
async fn a_partial_or_wrong_set_is_an_error() {
    let (one, other) = (root("one"), root("other"));
    for missing in ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"] {
        let setup = setup();
        write_cacerts(&setup.path("cacerts"), &one);
        std::fs::remove_file(setup.path("cacerts").join(missing)).unwrap();
        let error = ControlPlane::start(setup.config()).await.unwrap_err();
        assert!(error.is_configuration());
        assert!(error.to_string().contains(&format!("{missing} is missing: ")), "{error}");
    }
    let setup = setup();
    write_cacerts(&setup.path("cacerts"), &Parts { key: other.key, ..root("one") });
    let error = ControlPlane::start(setup.config()).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "the CA's private key cannot be used: it does not belong to the CA certificate");
}

#[tokio::test]
async fn roots_are_rotated_by_way_of_both() {
    let (old, new) = (root("old"), root("new"));
    let setup = setup();
    let folder = setup.path("cacerts");
    write_cacerts(&folder, &old);
    let running = setup.start().await;
    let node = running.node_channel("a").await;
    let (old_hex, new_hex) = (hex(&old), hex(&new));
    assert_eq!(running.status().await["ca"]["root"], old_hex.as_str());

    // At once: refused, since nobody who knows the old root would verify anything.
    write_cacerts(&folder, &new);
    wait_for_rejections(&running, 1).await;
    assert_eq!(running.status().await["ca"]["root"], old_hex.as_str());

    // Old signs, both are trusted.
    let both = format!("{}{}", old.roots, new.roots);
    write_cacerts(&folder, &Parts { roots: both.clone(), ..old });
    running.until("both roots", |status| status["ca"]["roots"] == 2).await;
    let chain = create(&node, csr(), 60, Some(WEB)).await.unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1].matches("BEGIN CERTIFICATE").count(), 2, "all roots are one element");

    // New signs; a node with a certificate of the old root is still known, and tokens name the new one.
    write_cacerts(&folder, &Parts { roots: both, ..new });
    running.until("the new root signs", |status| status["ca"]["root"] == new_hex.as_str()).await;
    assert!(create(&node, csr(), 60, Some(WEB)).await.is_ok());
    assert!(create(&running.node_channel("b").await, csr(), 60, None).await.is_ok());
}

async fn wait_for_rejections(running: &Running, count: i64) {
    let begin = std::time::Instant::now();
    let name = "zspire_control_plane_ca_reloads_total{result=\"rejected\"} ";
    loop {
        let page = running.metrics().await;
        let found = page.lines().find_map(|line| line.strip_prefix(name)).map(|text| text.parse::<i64>().unwrap());
        if found.is_some_and(|found| found >= count) {
            return;
        }
        assert!(begin.elapsed().as_secs() < 20, "nothing was rejected\n{page}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
