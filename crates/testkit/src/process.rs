//! A process under test: its log is a file, and it ends with its value.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;
use zspire_sys::process::{die_with_parent, terminate};

use crate::wait::until;

/// A process under test.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command; what it writes goes to a new file `<name>.log`, or is added to the one of an earlier start.
    #[track_caller]
    pub fn start(name: &str, folder: &Path, mut command: Command) -> Self {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("logs can be written");
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a descriptor")).stderr(file);
        let child =
            die_with_parent(&mut command).spawn().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        Self { name: name.into(), child, log }
    }

    /// Starts a command whose standard output is a pipe that nobody reads.
    #[track_caller]
    pub fn start_unread(name: &str, folder: &Path, mut command: Command) -> Self {
        let log = folder.join(format!("{name}.log"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child =
            die_with_parent(&mut command).spawn().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        Self { name: name.into(), child, log }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The process that it has started, where it only starts another one.
    #[track_caller]
    pub fn child(&self) -> u32 {
        let id = self.id();
        until(&format!("{} to start its process", self.name), || {
            let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
            let children = children.map_err(|error| error.to_string())?;
            children.trim().parse().map_err(|_| format!("{children:?}"))
        })
    }

    /// Everything that it has written.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end in good order.
    pub fn terminate(&mut self) {
        terminate(&mut self.child);
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        let Self { name, child, .. } = self;
        until(&format!("{name} to end"), || match child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err("it runs".to_owned()),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it has written a line that a test looks for; the last such line.
    #[track_caller]
    pub fn line(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        until(&format!("a line in the log of {}: {what}", self.name), || {
            let log = self.log();
            let mut lines = log.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| is_it(line)).ok_or("there is none")
        })
    }

    /// Memory that it has of its own, kilobytes.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("the process runs");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("proc(5)");
        line.trim().trim_end_matches(" kB").parse().expect("proc(5)")
    }

    /// CPU time that it has used, in clock ticks (hundredths of a second).
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).expect("the process runs");
        // After the name, which may hold anything, in parentheses: fields 14 and 15 are the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("proc(5)")).sum()
    }
}

/// Kills a process without waiting for it: until somebody does, it is a zombie.
#[track_caller]
pub fn kill(id: u32) {
    signal(id, Signal::SIGKILL);
}

/// Asks a process that is not ours to wait for to end in good order.
#[track_caller]
pub fn ask_to_end(id: u32) {
    signal(id, Signal::SIGTERM);
}

/// Stops a process where it is; when this returns, none of its threads does anything more.
#[track_caller]
pub fn pause(id: u32) {
    signal(id, Signal::SIGSTOP);
    until("a process to stand still", || {
        let threads = std::fs::read_dir(format!("/proc/{id}/task")).map_err(|error| error.to_string())?;
        let moving = threads.flatten().filter_map(|thread| {
            let status = std::fs::read_to_string(thread.path().join("stat")).ok()?;
            (!status.rsplit_once(") ")?.1.starts_with('T')).then_some(status)
        });
        moving.map(Err).next().unwrap_or(Ok(()))
    });
}

/// Lets it go on.
#[track_caller]
pub fn resume(id: u32) {
    signal(id, Signal::SIGCONT);
}

#[track_caller]
fn signal(id: u32, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(id.cast_signed()), signal).expect("the process is there");
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
