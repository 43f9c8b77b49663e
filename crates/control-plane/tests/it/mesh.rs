//! The mesh files: good at the start, changed well, changed badly.

use tonic::Code;
use zspire_control_plane::{ControlPlane, validate};

use crate::support::{DB, MESH, Running, Setup, WEB, create, csr, workload};

/// `db` moves to node a.
fn moved() -> String {
    MESH.replace("node: b", "node: a")
}

#[tokio::test]
async fn good_bad_good() {
    let running = Running::start().await;
    let file = running.setup.path("mesh.d/mesh.yaml");
    let node = running.node_channel("a").await;
    assert_eq!(create(&node, csr(), 60, Some(DB)).await.unwrap_err().code(), Code::Unauthenticated);

    std::fs::write(&file, moved()).unwrap();
    running.until("reloaded", |status| status["mesh"]["nodes"] == 1).await;
    assert!(create(&node, csr(), 60, Some(DB)).await.is_ok());

    std::fs::write(&file, moved().replace("serviceAccount: web", "serviceAccuont: web")).unwrap();
    let status = running.until("rejected", |status| !status["mesh"]["rejected"].is_null()).await;
    let error = status["mesh"]["rejected"]["error"].as_str().unwrap();
    assert!(error.contains("mesh.yaml:3:"), "no line in {error}");
    assert!(error.contains("serviceAccuont"), "no field in {error}");
    assert_eq!(status["mesh"]["workloads"], 3, "the last good one");
    assert_eq!(running.metric("zspire_control_plane_mesh_rejected").await, 1);
    assert_eq!(running.metric("zspire_control_plane_mesh_reloads_total{result=\"rejected\"}").await, 1);
    assert!(create(&node, csr(), 60, Some(DB)).await.is_ok());

    std::fs::write(&file, MESH).unwrap();
    running.until("good again", |status| status["mesh"]["rejected"].is_null() && status["mesh"]["nodes"] == 2).await;
    assert_eq!(create(&node, csr(), 60, Some(DB)).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(running.metric("zspire_control_plane_mesh_rejected").await, 0);
    assert_eq!(running.metric("zspire_control_plane_mesh_reloads_total{result=\"accepted\"}").await, 2);
}

/// The certificate is still good, and buys no other once the mesh has no such workload.
#[tokio::test]
async fn a_workload_that_left_the_mesh_cannot_renew_its_certificate() {
    let running = Running::start().await;
    let node = running.node_channel("a").await;
    let web = running.with_certificate(workload(&node, WEB).await);
    for asked in [None, Some(WEB)] {
        assert!(create(&web, csr(), 60, asked).await.is_ok());
    }
    let without = MESH.lines().filter(|line| !line.contains("c/web")).collect::<Vec<_>>().join("\n");
    std::fs::write(running.setup.path("mesh.d/mesh.yaml"), without).unwrap();
    running.until("reloaded", |status| status["mesh"]["workloads"] == 2).await;
    for asked in [None, Some(WEB)] {
        assert_eq!(create(&web, csr(), 60, asked).await.unwrap_err().code(), Code::Unauthenticated);
    }
    assert!(create(&node, csr(), 60, None).await.is_ok(), "the node is still one");
}

/// It is used, and said.
#[tokio::test]
async fn what_refers_to_nothing_is_a_finding() {
    let running = Running::start().await;
    let text = MESH.replace("node: b}", "node: b, authorizationPolicies: [shop/none]}");
    std::fs::write(running.setup.path("mesh.d/mesh.yaml"), text).unwrap();
    let status = running.until("found", |status| status["mesh"]["findings"] != serde_json::json!([])).await;
    let finding = status["mesh"]["findings"][0].as_str().unwrap();
    assert!(finding.contains("mesh.yaml:4: authorizationPolicies: there is no policy shop/none"), "{finding}");
    assert!(status["mesh"]["rejected"].is_null());
}

/// Somebody opens the file for writing and takes his time: nothing is taken from the mesh meanwhile.
#[tokio::test]
async fn an_emptied_file_changes_nothing() {
    let running = Running::start().await;
    std::fs::write(running.setup.path("mesh.d/mesh.yaml"), "").unwrap();
    let status = running.until("rejected", |status| !status["mesh"]["rejected"].is_null()).await;
    assert_eq!(status["mesh"]["workloads"], 3, "the last good one");
    let error = status["mesh"]["rejected"]["error"].as_str().unwrap();
    assert!(error.contains("mesh.yaml: it is empty and had content before: restore it"), "{error}");
    std::fs::write(running.setup.path("mesh.d/mesh.yaml"), "workloads: []").unwrap();
    running.until("empty on purpose", |status| status["mesh"]["workloads"] == 0).await;
}

#[tokio::test]
async fn a_bad_mesh_at_the_start_is_an_error_of_the_operators() {
    for content in ["workloads: 5", "workloads:\n- {name: x}\n", &format!("{MESH}{MESH}")] {
        let setup = Setup::new();
        std::fs::write(setup.path("mesh.d/mesh.yaml"), content).unwrap();
        let error = ControlPlane::start(setup.config()).await.unwrap_err();
        assert!(error.is_configuration());
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("mesh.yaml"), "{source}");
    }
    let setup = Setup::new();
    std::fs::remove_dir_all(setup.path("mesh.d")).unwrap();
    assert!(ControlPlane::start(setup.config()).await.unwrap_err().is_configuration());
}

#[test]
fn validate_takes_all_files_as_one_mesh() {
    let setup = Setup::new();
    let (folder, file) = (setup.path("mesh.d"), setup.path("more.yaml"));
    std::fs::write(
        &file,
        "services:\n- {name: db, namespace: shop, hostname: db.shop, vips: [/10.1.0.2], ports: {1: 2}}\n",
    )
    .unwrap();
    let validated = validate(&[folder.clone(), file.clone()]).unwrap();
    let summary = validated.summary;
    assert_eq!((summary.workloads, summary.services, summary.policies), (3, 2, 0));
    assert!(validated.findings.is_empty());
    std::fs::write(&file, MESH).unwrap();
    let error = validate(&[folder, file]).unwrap_err().to_string();
    assert!(error.contains("more.yaml"), "{error}");
}
