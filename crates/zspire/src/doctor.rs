//! `zspire doctor`: what keeps a proxy with these settings from its work, and what to do about each.
//!
//! The checks are `zspire_node::doctor`'s; here they are printed, and a proxy that runs is asked how it fares.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use serde::Deserialize;
use zspire_node::config::Config;
use zspire_node::doctor::{self, Finding, Outcome};
use zspire_node::remedies::Step;

use crate::exit;
use crate::identity::page::Page;
use crate::inspect::{self, fetch};

/// Options of the doctor. The settings are those of the proxy: run it in the same environment.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// Admin address of the proxy, if one runs
    #[arg(long, value_name = "HOST:PORT", env = "ZSPIRE_ADMIN")]
    admin: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = inspect::Output::Table)]
    output: inspect::Output,
}

/// Looks at everything and prints it.
pub(crate) fn run(args: &Args) -> ExitCode {
    let config = match Config::load() {
        Ok(config) => config,
        Err(error) => return exit::complain(error, exit::usage()),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::complain(format!("cannot start: {error}"), exit::finding()),
    };
    let mut findings = runtime.block_on(doctor::examine(&config));
    drop(runtime);
    let admin = args.admin.clone().unwrap_or_else(|| format!("localhost:{}", config.addresses.admin));
    let running = running(&admin, args.admin.is_some(), &config.trust_domain);
    // What the proxy knows of the mesh is what counts; without one there is the file.
    findings.retain(|finding| finding.check != doctor::MESH || !running.iter().any(|it| it.check == doctor::MESH));
    findings.extend(running);
    let _ = exit::print(&match args.output {
        inspect::Output::Json => json(&findings),
        inspect::Output::Table => text(&findings),
    });
    if failed(&findings) == 0 { exit::OK } else { exit::finding() }
}

/// What a proxy that runs says of itself. `named`: it was named, and so has to be there.
fn running(admin: &str, named: bool, trust_domain: &str) -> Vec<Finding> {
    const CHECK: &str = "running proxy";
    let page = match fetch::get(admin, "/identities") {
        Ok(text) => text,
        Err(error) if named => return vec![Finding::new(CHECK, Outcome::Fail, error)],
        Err(_) => {
            let what = format!("none answers at {admin}: what it would say is not looked at");
            return vec![Finding::new(CHECK, Outcome::Skip, what)];
        }
    };
    let mut all = match Page::parse(&page) {
        Ok(page) => vec![Finding::new(CHECK, Outcome::Ok, format!("answers at {admin}")), identities(&page)],
        Err(error) => return vec![Finding::new(CHECK, Outcome::Fail, error)],
    };
    all.extend(fetch::get(admin, "/config_dump").ok().and_then(|dump| mesh(&dump, trust_domain)));
    all
}

/// How many pods have what they need.
fn identities(page: &Page) -> Finding {
    const CHECK: &str = "identities";
    let pods: Vec<_> = page.identities.iter().filter(|it| it.pod.is_some()).collect();
    let missing: Vec<_> = pods.iter().filter(|it| !it.is_ready()).collect();
    let what = format!("{} of {} pods have an identity", pods.len() - missing.len(), pods.len());
    let Some(first) = missing.first() else { return Finding::new(CHECK, Outcome::Ok, what) };
    let next = format!("`zspire identity explain {}` says why.", first.short_name());
    Finding::new(CHECK, Outcome::Warn, what).next(next)
}

/// The trust domains of the workloads that it knows.
fn mesh(dump: &str, ours: &str) -> Option<Finding> {
    #[derive(Deserialize)]
    struct Dump {
        #[serde(default)]
        workloads: Vec<Workload>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Workload {
        #[serde(default)]
        trust_domain: String,
    }
    let dump: Dump = serde_json::from_str(dump).ok()?;
    let mut domains: BTreeMap<String, usize> = BTreeMap::new();
    for workload in dump.workloads {
        *domains.entry(workload.trust_domain).or_default() += 1;
    }
    Some(doctor::trust_domains_of(&domains, ours))
}

fn failed(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.outcome == Outcome::Fail).count()
}

fn json(findings: &[Finding]) -> String {
    let text = serde_json::json!({ "checks": findings, "failed": failed(findings) });
    format!("{text:#}\n")
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or_default();
    for Finding { check, outcome, what, next } in findings {
        let outcome = match outcome {
            Outcome::Ok => "ok",
            Outcome::Warn => "warn",
            Outcome::Fail => "FAIL",
            Outcome::Skip => "skip",
        };
        text.push_str(&format!("{outcome:<6}{check:<width$}  {what}\n"));
        for Step { what, text: lines } in next {
            text.push_str(&format!("      → {what}\n"));
            if let Some(lines) = lines {
                text.push('\n');
                lines.lines().for_each(|line| text.push_str(&format!("          {line}\n")));
                text.push('\n');
            }
        }
    }
    text.push_str(&match failed(findings) {
        0 => "\nNothing stands in the way.\n".to_owned(),
        1 => format!("\n1 of {} checks failed.\n", findings.len()),
        some => format!("\n{some} of {} checks failed.\n", findings.len()),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_told_with_what_to_do() {
        let fine = Finding::new("settings", Outcome::Ok, "IDENTITY_SOURCE=local");
        let mut broken = Finding::new("socket", Outcome::Fail, "nobody listens").next("Start the agent.");
        broken.next.push(Step { what: "Or:".into(), text: Some("a\nb".into()) });
        assert_eq!(
            text(&[fine.clone(), broken]),
            "ok    settings  IDENTITY_SOURCE=local\n\
             FAIL  socket    nobody listens\n      \
                   → Start the agent.\n      \
                   → Or:\n\n          \
                       a\n          \
                       b\n\n\
             \n1 of 2 checks failed.\n"
        );
        assert!(text(&[fine]).ends_with("\nNothing stands in the way.\n"));
    }

    #[test]
    fn pods_without_identity_are_pointed_at() {
        let page = |state| {
            let pod = serde_json::json!({ "of": "pod", "pod": { "namespace": "shop", "name": "web" }, "state": state });
            Page::parse(&serde_json::json!({ "identities": [pod, { "of": "proxy" }] }).to_string()).unwrap()
        };
        assert_eq!(identities(&page("Ready")).what, "1 of 1 pods have an identity");
        let missing = identities(&page("Pending"));
        assert_eq!(missing.outcome, Outcome::Warn);
        assert!(missing.next[0].what.contains("zspire identity explain shop/web"));
    }
}
