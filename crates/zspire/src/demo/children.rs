//! The processes of the demo: started, watched, ended. None outlives the demo, however it ends.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use zspire_sys::process::die_with_parent;

/// How long a process has to end in good order.
const GRACE: Duration = Duration::from_secs(8);

/// Processes and where they write.
#[derive(Debug)]
pub(super) struct Children {
    running: Vec<(String, Child)>,
    logs: PathBuf,
}

impl Children {
    /// None yet; what they write goes to files in this folder.
    pub(super) fn new(logs: PathBuf) -> Self {
        Self { running: Vec::new(), logs }
    }

    /// Starts a process.
    pub(super) fn start(&mut self, name: &str, mut command: Command) -> anyhow::Result<u32> {
        let log = File::create(self.log(name)).context("cannot write logs")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = die_with_parent(&mut command).spawn().with_context(|| format!("cannot start {name}"))?;
        let id = child.id();
        self.running.push((name.to_owned(), child));
        Ok(id)
    }

    /// The file that a process writes to.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// Fails if a process has ended that should not have.
    pub(super) fn all_run(&mut self) -> anyhow::Result<()> {
        for (name, child) in &mut self.running {
            if let Some(status) = child.try_wait()? {
                anyhow::bail!(
                    "{name} has ended ({status}); it said:\n{}",
                    tail(&self.logs.join(format!("{name}.log")))
                );
            }
        }
        Ok(())
    }

    /// Ends all of them, the last started first; says which did not end in good order.
    pub(super) fn stop_all(&mut self) -> anyhow::Result<usize> {
        let count = self.running.len();
        for (_, child) in &mut self.running {
            zspire_sys::process::terminate(child);
        }
        let mut unclean = Vec::new();
        while let Some((name, mut child)) = self.running.pop() {
            if let Err(error) = finish(&name, &mut child) {
                unclean.push(format!("{error:#}"));
            }
        }
        anyhow::ensure!(unclean.is_empty(), "{}", unclean.join("; "));
        Ok(count)
    }
}

fn finish(name: &str, child: &mut Child) -> anyhow::Result<()> {
    zspire_sys::process::terminate(child);
    let until = Instant::now() + GRACE;
    loop {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("{name} did not end when it was asked to, and was killed");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            // They may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The last lines of a file.
pub(super) fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
