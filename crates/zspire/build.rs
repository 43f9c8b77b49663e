//! Tells the program which revision it was built from.

use std::process::Command;

fn main() {
    // Where there is no repository, in an image's build, whoever builds it says which revision it is.
    println!("cargo:rerun-if-env-changed=ZSPIRE_REVISION");
    let given = std::env::var("ZSPIRE_REVISION").ok().filter(|revision| !revision.is_empty());
    let revision = given.or_else(|| git(&["rev-parse", "HEAD"])).unwrap_or_else(|| "unknown".to_owned());
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let rustc = Command::new(rustc)
        .arg("--version")
        .output()
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .and_then(|text| text.split_whitespace().nth(1).map(str::to_owned))
        .unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=ZSPIRE_REVISION={revision}");
    println!("cargo:rustc-env=ZSPIRE_RUSTC={rustc}");
    println!("cargo:rustc-env=ZSPIRE_PROFILE={}", std::env::var("PROFILE").unwrap_or_default());
    println!("cargo:rerun-if-changed=build.rs");
    // `HEAD` names a branch and stays the same; its log grows with every commit. A working tree of its own has one of its own.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo:rerun-if-changed={log}");
    }
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
