//! Files that change under the watcher.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use zspire_xds::file::{Error, Mesh, Watcher};

use crate::support::soon;

fn text(uid: &str) -> String {
    format!("workloads: [{{uid: {uid}}}]")
}

fn names(mesh: Result<Mesh, Error>) -> Vec<String> {
    mesh.unwrap().resources.iter().map(|it| it.name().to_string()).collect()
}

async fn changed(watcher: &mut Watcher) -> Result<Mesh, Error> {
    soon("a change", watcher.changed()).await
}

#[tokio::test]
async fn whatever_replaces_a_file_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mesh.yaml");
    fs::write(&path, text("a")).unwrap();
    let mut watcher = Watcher::new(&path);
    // Written in place, with as many bytes, at once.
    fs::write(&path, text("b")).unwrap();
    assert_eq!(names(changed(&mut watcher).await), ["b"]);
    // Renamed over it.
    fs::write(folder.path().join("new"), text("c")).unwrap();
    fs::rename(folder.path().join("new"), &path).unwrap();
    assert_eq!(names(changed(&mut watcher).await), ["c"]);
    // Broken, said once, and good again.
    fs::write(&path, "workloads: [").unwrap();
    assert!(changed(&mut watcher).await.is_err());
    fs::remove_file(&path).unwrap();
    assert!(changed(&mut watcher).await.unwrap_err().to_string().contains("cannot be read"));
    fs::write(&path, text("d")).unwrap();
    assert_eq!(names(changed(&mut watcher).await), ["d"]);
}

/// As the kubelet does it: the files are links into `..data`, which is a link to a folder and is replaced as a whole.
#[tokio::test]
async fn a_config_map_is_swapped() {
    let folder = tempfile::tempdir().unwrap();
    let fill = |version: &str, uid: &str| {
        fs::create_dir(folder.path().join(version)).unwrap();
        fs::write(folder.path().join(version).join("mesh.yaml"), text(uid)).unwrap();
    };
    let point = |version: &str| {
        symlink(version, folder.path().join("..data_tmp")).unwrap();
        fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
    };
    fill("..1", "a");
    point("..1");
    symlink(Path::new("..data").join("mesh.yaml"), folder.path().join("mesh.yaml")).unwrap();
    let mut watcher = Watcher::new(folder.path());
    fill("..2", "b");
    point("..2");
    assert_eq!(names(changed(&mut watcher).await), ["b"]);
    fs::write(folder.path().join("more.yaml"), text("c")).unwrap();
    assert_eq!(names(changed(&mut watcher).await), ["b", "c"]);
}

/// A folder that nobody touches is read never again.
#[tokio::test(start_paused = true)]
async fn no_change_is_no_news() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("mesh.yaml"), text("a")).unwrap();
    let mut watcher = Watcher::new(folder.path());
    let waiting = tokio::time::timeout(std::time::Duration::from_secs(5), watcher.changed());
    assert!(waiting.await.is_err());
}

/// Whoever truncates and writes, and is slow about it, does not take the mesh away for a moment; whoever means it says so.
#[tokio::test]
async fn an_emptied_file_is_refused_and_an_empty_mesh_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mesh.yaml");
    fs::write(&path, text("a")).unwrap();
    let mut watcher = Watcher::new(folder.path());
    for nothing in ["", " \n", "# workloads: [{uid: a}]\n"] {
        fs::write(&path, nothing).unwrap();
        let error = changed(&mut watcher).await.unwrap_err().to_string();
        assert!(error.contains("mesh.yaml: it is empty and had content before"), "{error}");
    }
    fs::write(&path, text("b")).unwrap();
    assert_eq!(names(changed(&mut watcher).await), ["b"]);
    fs::write(&path, "workloads: []").unwrap();
    assert_eq!(names(changed(&mut watcher).await), [""; 0]);
    fs::write(folder.path().join("more.yaml"), text("c")).unwrap();
    assert_eq!(names(changed(&mut watcher).await), ["c"]);
    fs::remove_file(folder.path().join("more.yaml")).unwrap();
    assert_eq!(names(changed(&mut watcher).await), [""; 0]);
    // As if the folder were not mounted any more.
    fs::remove_file(&path).unwrap();
    let error = changed(&mut watcher).await.unwrap_err().to_string();
    assert!(error.contains("it is empty and had content before"), "{error}");
}
