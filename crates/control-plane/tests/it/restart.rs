//! What survives a process that is killed, and a disk that is full.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use zspire_control_plane::{Config, ControlPlane, create_token, issued};
use zspire_identity::grpc::{self, Channel, Roots};
use zspire_identity::join::{self, Node};

use crate::support::{Running, Setup, WEB, create, csr};

const FOLDER: &str = "ZSPIRE_TEST_FOLDER";

/// Not a test: what [`start_child`] runs in a process of its own.
#[tokio::test]
#[ignore = "run by the tests of this module in a process of its own"]
async fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let folder = std::path::PathBuf::from(folder);
    let control_plane = ControlPlane::start(config(&folder)).await.unwrap();
    let address = control_plane.address().unwrap().to_string();
    std::fs::write(folder.join("address.new"), address).unwrap();
    std::fs::rename(folder.join("address.new"), folder.join("address")).unwrap();
    control_plane.run(tokio_util::sync::CancellationToken::new()).await.unwrap();
}

fn config(folder: &std::path::Path) -> Config {
    let mut setup = Setup::new().options;
    setup.state = Some(folder.join("state").display().to_string());
    setup.mesh = Some(folder.join("mesh.d").display().to_string());
    Config::build(setup, |_| None).unwrap()
}

/// A control plane in another process, and where it serves.
struct Other {
    child: Child,
    address: String,
}

impl Drop for Other {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

async fn start_child(setup: &Setup) -> Other {
    let file = setup.path("address");
    drop(std::fs::remove_file(&file));
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["restart::child", "--exact", "--ignored"])
        .env(FOLDER, setup.folder.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut other = Other { child, address: String::new() };
    let begin = Instant::now();
    while other.address.is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(20), "the other process does not start");
        tokio::time::sleep(Duration::from_millis(10)).await;
        other.address = std::fs::read_to_string(&file).unwrap_or_default();
    }
    other
}

#[tokio::test]
async fn killed_and_started_again_it_is_the_same() {
    let setup = Setup::new();
    let state = setup.config().state;
    let other = start_child(&setup).await;
    let token = create_token(&setup.config(), "a", Duration::from_secs(60)).unwrap().parse().unwrap();
    let unused = create_token(&setup.config(), "b", Duration::from_secs(60)).unwrap().parse().unwrap();
    let channel_config = |other: &Other| {
        grpc::Config::new(format!("https://{}", other.address), Roots::File(state.join("root-cert.pem")))
    };
    let join_config = |other: &Other, node: &str| join::Config {
        ca: channel_config(other),
        node: node.into(),
        state_dir: setup.path(&format!("node-{node}")),
    };
    let node = Node::join(join_config(&other, "a"), &token).await.unwrap();
    let root = std::fs::read(state.join("root-cert.pem")).unwrap();
    let begin = Instant::now();
    while issued(&state, 9).unwrap().len() != 1 {
        assert!(begin.elapsed() < Duration::from_secs(5), "the record is not written");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(other);

    let other = start_child(&setup).await;
    assert_eq!(std::fs::read(state.join("root-cert.pem")).unwrap(), root);
    assert_eq!(issued(&state, 9).unwrap().len(), 1);
    let channel = Channel::new(grpc::Config { client: Some(node.identity()), ..channel_config(&other) }).unwrap();
    assert!(create(&channel, csr(), 60, Some(WEB)).await.is_ok(), "the node's certificate is still good");
    let error = Node::join(join_config(&other, "a"), &token).await.unwrap_err().to_string();
    assert!(error.contains("has been used already"), "{error}");
    Node::join(join_config(&other, "b"), &unused).await.unwrap();
}

/// A database that refuses every write of one kind, as a full disk does.
fn spoil(setup: &Setup, table: &str) {
    let path = setup.config().state.join("state.db");
    let database = rusqlite::Connection::open(path).unwrap();
    let refuse = format!(
        "CREATE TRIGGER no_insert BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'full'); END;
         CREATE TRIGGER no_update BEFORE UPDATE ON {table} BEGIN SELECT RAISE(ABORT, 'full'); END;"
    );
    database.execute_batch(&refuse).unwrap();
}

#[tokio::test]
async fn issuing_goes_on_when_records_cannot_be_written() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    spoil(&running.setup, "issued");
    for _ in 0..3 {
        create(&node, csr(), 60, Some(WEB)).await.unwrap();
    }
    let status = running.until("counted", |status| status["ca"]["recordsLost"].as_u64() >= Some(3)).await;
    assert!(status["ca"]["issued"].as_u64() >= Some(4));
}

#[tokio::test]
async fn nobody_joins_when_the_use_of_a_token_cannot_be_written() {
    let running = Running::start().await;
    let token = running.token("a");
    spoil(&running.setup, "join_tokens");
    let error = Node::join(running.join_config("a"), &token).await.unwrap_err();
    assert!(!error.is_final(), "it is worth another attempt");
    let error = error.to_string();
    assert!(error.contains("cannot record the use of the join token, try again later (Unavailable)"), "{error}");
    assert_eq!(running.metric("citadel_server_success_cert_issuance_count").await, 0);
}

async fn refused(setup: &Setup) -> String {
    let error = ControlPlane::start(setup.config()).await.unwrap_err();
    assert!(error.is_configuration());
    error.to_string()
}

/// A new root that nobody trusts would be worse than no control plane.
#[tokio::test]
async fn a_lost_key_does_not_become_a_new_root() {
    let setup = Running::start().await.stop().await;
    let state = setup.config().state;
    let copy = std::fs::read(state.join("ca.pem")).unwrap();
    std::fs::remove_file(state.join("ca.pem")).unwrap();
    for remains in ["root-cert.pem", "state.db"] {
        let error = refused(&setup).await;
        assert!(error.contains("ca.pem is missing") && error.contains("restore the file from your copy"), "{error}");
        assert!(!state.join("ca.pem").exists(), "{remains}");
        if remains == "root-cert.pem" {
            std::fs::remove_file(state.join(remains)).unwrap();
        }
    }
    zspire_identity::files::write_private(&state.join("ca.pem"), &copy).unwrap();
    setup.start().await.stop().await;
}

#[tokio::test]
async fn a_key_that_others_may_read_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let setup = Running::start().await.stop().await;
    let key = setup.config().state.join("ca.pem");
    for mode in [0o640, 0o604, 0o644] {
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();
        let error = refused(&setup).await;
        assert!(error.contains(&format!("(mode {mode:04o}): run `chmod 600 {}`", key.display())), "{error}");
    }
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    setup.start().await.stop().await;
}
