//! What the demo tells: one JSON document for programs, lines for people.

use std::io::IsTerminal as _;

use serde::Serialize;
use serde_json::Value;

use super::capture::Seen;

/// Everything that happened.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether every step came about.
    pub(super) ok: bool,
    /// `namespaces`, or `loopback` where those are forbidden.
    pub(super) mode: &'static str,
    /// Where identities came from.
    pub(super) identity: super::Identity,
    /// Why it is not `namespaces`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) why_loopback: Option<String>,
    pub(super) steps: Vec<Step>,
    pub(super) pods: Vec<Pod>,
    pub(super) paths: Vec<Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) capture: Option<Seen>,
    pub(super) verdicts: Vec<Verdict>,
}

#[derive(Debug, Serialize)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) ok: bool,
    pub(super) detail: String,
    pub(super) seconds: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Pod {
    pub(super) name: &'static str,
    pub(super) node: String,
    pub(super) address: String,
    pub(super) spiffe_id: String,
    pub(super) certificate: Value,
}

/// The way that one request took, as both proxies logged it.
#[derive(Debug, Serialize)]
pub(super) struct Path {
    pub(super) from: &'static str,
    pub(super) to: String,
    pub(super) steps: Vec<String>,
    pub(super) outbound: Value,
    pub(super) inbound: Value,
}

#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    pub(super) from: &'static str,
    pub(super) to: String,
    pub(super) allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) policy: Option<&'static str>,
    pub(super) why: String,
}

/// Prints for people while things happen; not at all when a program listens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Voice {
    quiet: bool,
    color: bool,
}

impl Voice {
    /// `quiet` when the JSON document is all that is wanted.
    pub(super) fn new(quiet: bool) -> Self {
        Self { quiet, color: std::io::stdout().is_terminal() }
    }

    /// The outcome of a step.
    pub(super) fn step(self, step: &Step) {
        let mark = match step.ok {
            true => self.paint("32", "ok"),
            false => self.paint("31", "FAILED"),
        };
        let mut lines = step.detail.lines();
        self.line(&format!("{mark}  {}: {}", step.name, lines.next().unwrap_or_default()));
        for line in lines {
            self.line(&format!("      {line}"));
        }
    }

    /// A line by itself.
    pub(super) fn line(self, text: &str) {
        if !self.quiet {
            crate::exit::print(&format!("{text}\n"));
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
