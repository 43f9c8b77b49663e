//! JWTs of a token issuer: whose they are, and what they buy.

use std::path::Path;

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use serde_json::{Value, json};
use tonic::Code;

use crate::support::{DB, Running, Setup, WEB, create, csr, openssl};

const ISSUER: &str = "https://issuer.example";

/// A token issuer.
struct Issuer {
    key: EncodingKey,
    id: &'static str,
}

impl Issuer {
    fn new(id: &'static str) -> Self {
        let key = zspire_identity::PrivateKey::generate().to_pem();
        Self { key: EncodingKey::from_ec_pem(key.as_bytes()).unwrap(), id }
    }

    /// Publishes its keys.
    fn write(&self, path: &Path) {
        let mut jwk = Jwk::from_encoding_key(&self.key, Algorithm::ES256).unwrap();
        jwk.common.key_id = Some(self.id.into());
        let temporary = path.with_extension("new");
        std::fs::write(&temporary, json!({"keys": [jwk]}).to_string()).unwrap();
        std::fs::rename(temporary, path).unwrap();
    }

    fn token(&self, change: impl FnOnce(&mut Value)) -> String {
        let mut claims = json!({
            "iss": ISSUER, "aud": ["istio-ca"], "exp": get_current_timestamp() + 600,
            "sub": "system:serviceaccount:istio-system:ztunnel",
            "kubernetes.io": {"namespace": "istio-system", "pod": {"name": "ztunnel-x"}, "node": {"name": "a"}},
        });
        change(&mut claims);
        let header = Header { kid: Some(self.id.into()), ..Header::new(Algorithm::ES256) };
        encode(&header, &claims, &self.key).unwrap()
    }
}

async fn start(issuer: &Issuer) -> Running {
    let mut setup = Setup::new();
    issuer.write(&setup.path("jwks.json"));
    setup.options.jwt_issuer = Some(ISSUER.into());
    setup.options.jwt_jwks = Some(setup.path("jwks.json").display().to_string());
    setup.start().await
}

async fn code(running: &Running, token: &str, identity: Option<&str>) -> Code {
    create(&running.with_token(token), csr(), 60, identity).await.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn a_node_proxy_gets_what_runs_on_its_node() {
    let issuer = Issuer::new("one");
    let running = start(&issuer).await;
    let node = issuer.token(|_| ());
    assert_eq!(code(&running, &node, Some(WEB)).await, Code::Ok);
    assert_eq!(code(&running, &node, Some(DB)).await, Code::Unauthenticated);
    let elsewhere = issuer.token(|claims| claims["kubernetes.io"]["node"]["name"] = json!("b"));
    assert_eq!(code(&running, &elsewhere, Some(WEB)).await, Code::Unauthenticated);
    let other = issuer.token(|claims| claims["sub"] = json!("system:serviceaccount:shop:web"));
    assert_eq!(code(&running, &other, Some(DB)).await, Code::Unauthenticated, "no account of a node proxy");
    assert_eq!(code(&running, &other, Some(WEB)).await, Code::Ok, "itself");
    assert_eq!(code(&running, &other, None).await, Code::Ok, "itself");
}

#[tokio::test]
async fn bad_tokens_are_all_refused_alike() {
    let issuer = Issuer::new("one");
    let running = start(&issuer).await;
    let stranger = Issuer::new("one");
    let none = {
        use base64::Engine as _;
        let part = |value: &Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
        let good = issuer.token(|_| ());
        format!("{}.{}.", part(&json!({"alg": "none"})), good.split('.').nth(1).unwrap())
    };
    let tokens = [
        ("issuer", issuer.token(|claims| claims["iss"] = json!("https://other"))),
        ("audience", issuer.token(|claims| claims["aud"] = json!(["vault"]))),
        ("expired", issuer.token(|claims| claims["exp"] = json!(get_current_timestamp() - 120))),
        ("not yet", issuer.token(|claims| claims["nbf"] = json!(get_current_timestamp() + 600))),
        ("subject", issuer.token(|claims| claims["sub"] = json!("alice"))),
        ("signature", stranger.token(|_| ())),
        ("unknown key", Issuer::new("two").token(|_| ())),
        ("none", none),
    ];
    for (what, token) in tokens {
        let status = create(&running.with_token(&token), csr(), 60, Some(WEB)).await.unwrap_err();
        let told = (status.code(), status.message());
        assert_eq!(told, (Code::Unauthenticated, "request authenticate failure"), "{what}");
    }
    assert_eq!(running.metric("citadel_server_authentication_failure_count").await, 8);
}

#[tokio::test]
async fn changed_keys_are_taken_over_and_broken_ones_are_not() {
    let (old, new) = (Issuer::new("old"), Issuer::new("new"));
    let running = start(&old).await;
    let path = running.setup.path("jwks.json");
    assert_eq!(code(&running, &new.token(|_| ()), Some(WEB)).await, Code::Unauthenticated);
    std::fs::write(&path, "broken").unwrap();
    assert_eq!(code(&running, &old.token(|_| ()), Some(WEB)).await, Code::Ok);
    new.write(&path);
    let begin = std::time::Instant::now();
    while code(&running, &new.token(|_| ()), Some(WEB)).await != Code::Ok {
        assert!(begin.elapsed().as_secs() < 20, "the new keys are not taken over");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(code(&running, &old.token(|_| ()), Some(WEB)).await, Code::Unauthenticated);
}

/// OpenSSL's own HTTPS server, in a folder of files.
struct HttpsServer(std::process::Child);

impl Drop for HttpsServer {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Serves `folder`, with a certificate for 127.0.0.1 in `tls.pem`; and on which port.
fn serve_https(folder: &Path) -> (HttpsServer, u16) {
    use std::io::{BufRead as _, BufReader};
    let make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x -keyout tls.key \
                -out tls.pem -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
    let (fine, text) = openssl(&make.split_whitespace().collect::<Vec<_>>(), folder);
    assert!(fine, "{text}");
    let mut child = std::process::Command::new("openssl")
        .args("s_server -accept 127.0.0.1:0 -cert tls.pem -key tls.key -WWW".split(' '))
        .current_dir(folder)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut accepting = lines.map(Result::unwrap).filter(|line| line.starts_with("ACCEPT "));
    let port = accepting.next().unwrap().rsplit(':').next().unwrap().parse().unwrap();
    // What it says of its connections must go somewhere.
    std::thread::spawn(move || accepting.for_each(drop));
    (HttpsServer(child), port)
}

#[tokio::test]
async fn keys_come_by_https_from_a_server_that_is_verified() {
    let issuer = Issuer::new("one");
    let mut setup = Setup::new();
    issuer.write(&setup.path("jwks.json"));
    let (_server, port) = serve_https(setup.folder.path());
    setup.options.jwt_issuer = Some(ISSUER.into());
    setup.options.jwt_jwks = Some(format!("https://127.0.0.1:{port}/jwks.json"));
    setup.options.jwt_jwks_root = Some(setup.path("tls.pem").display().to_string());
    let running = setup.start().await;
    assert_eq!(code(&running, &issuer.token(|_| ()), Some(WEB)).await, Code::Ok);

    // With other roots it starts all the same, and accepts no token.
    let mut setup = running.stop().await;
    setup.options.jwt_jwks_root = Some(setup.path("state/root-cert.pem").display().to_string());
    let running = setup.start().await;
    assert_eq!(code(&running, &issuer.token(|_| ()), Some(WEB)).await, Code::Unauthenticated);
    assert_eq!(running.status().await["jwt"]["keys"], 0);
}
