//! `zspire identity`: where each pod's identity comes from, and why it has none.
//!
//! Reads `/identities` of a running proxy, or a saved page. Owns what is shown ([`table`], [`details`]) and what is advised
//! ([`explain`]); the page itself is [`page`]'s.

mod explain;
pub(crate) mod moment;
pub(crate) mod page;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};

use crate::exit;
use crate::inspect::{Origin, Output, tables};
use moment::{ago, until};
use page::{Identity, Page};

/// How often `watch` looks.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the identity of each pod in one line
    List {
        /// Show this namespace only
        #[arg(short, long, value_name = "NAMESPACE")]
        namespace: Option<String>,
        #[command(flatten)]
        from: Origin,
    },
    /// Show all that is known of one pod's identity
    Show(One),
    /// Print a line whenever an identity changes, until stopped
    Watch {
        /// `namespace/name`, a name or a uid; `proxy` for the proxy's own; all if left out
        pod: Option<String>,
        #[command(flatten)]
        from: Origin,
    },
    /// Say what was asked, what was answered, and what to do; exit code 1 if the pod has no identity
    Explain(One),
}

/// One pod.
#[derive(Debug, ClapArgs)]
pub(crate) struct One {
    /// `namespace/name`, a name or a uid; `proxy` for the proxy's own
    pod: String,
    #[command(flatten)]
    from: Origin,
}

fn read(from: &Origin) -> Result<Page, String> {
    Page::parse(&from.text("/identities")?)
}

/// Runs one of the commands.
pub(crate) fn run(command: Command) -> ExitCode {
    match command {
        Command::List { namespace, from } => match read(&from) {
            Ok(page) => {
                let which = page.of_namespace(namespace.as_deref());
                exit::print(&match from.output {
                    Output::Json => page.json(&which),
                    Output::Table => table(&page, &which, moment::now()),
                })
            }
            Err(error) => exit::complain(error, exit::cannot_reach()),
        },
        Command::Show(one) => about(&one, |page, which| {
            exit::print(&match one.from.output {
                Output::Json => format!("{:#}\n", page.json_of(which)),
                Output::Table => details(&page.identities[which], moment::now()),
            })
        }),
        Command::Explain(one) => about(&one, |page, which| {
            let identity = &page.identities[which];
            let own = page.identities.iter().find(|it| it.of == "proxy").filter(|_| identity.of != "proxy");
            let _ = exit::print(&match one.from.output {
                Output::Json => explained(identity, own),
                Output::Table => explain::text(identity, own, moment::now()),
            });
            if identity.is_ready() { exit::OK } else { exit::finding() }
        }),
        Command::Watch { pod, from } => watch(pod.as_deref(), &from),
    }
}

fn about(one: &One, show: impl FnOnce(&Page, usize) -> ExitCode) -> ExitCode {
    let page = match read(&one.from) {
        Ok(page) => page,
        Err(error) => return exit::complain(error, exit::cannot_reach()),
    };
    match page.find(&one.pod) {
        Ok(which) => show(&page, which),
        Err(unclear) => exit::complain(unclear, exit::usage()),
    }
}

/// The advice as JSON.
fn explained(identity: &Identity, own: Option<&Identity>) -> String {
    let advice = explain::advise(identity, own);
    let pod = identity.pod.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name));
    let text = serde_json::json!({
        "pod": pod, "state": identity.state, "expectedId": identity.expected_id, "reference":
            identity.asked.as_ref().map(|asked| &asked.reference), "why": identity.why, "advice": advice,
    });
    format!("{text:#}\n")
}

/// One line for each.
fn table(page: &Page, which: &[usize], now: i64) -> String {
    let row = |n: &usize| {
        let it = &page.identities[*n];
        let (namespace, name) = match &it.pod {
            Some(pod) => (pod.namespace.clone(), pod.name.clone()),
            None if it.of == "proxy" => ("-".into(), "(the proxy)".into()),
            None => ("-".into(), "-".into()),
        };
        let id = it.certificate.as_ref().map(|certificate| certificate.id.clone()).or_else(|| it.expected_id.clone());
        let expiry = it.certificate.as_ref().map(|it| until(&it.not_after, now).replace("expires in ", ""));
        vec![
            namespace,
            name,
            it.source.clone(),
            it.state.clone(),
            it.since.as_deref().map_or_else(|| "-".into(), |at| ago(at, now)),
            expiry.unwrap_or_else(|| "-".into()),
            id.unwrap_or_else(|| "-".into()),
            it.error().map_or_else(|| "-".into(), |error| error.code.clone()),
        ]
    };
    let header = ["NAMESPACE", "POD", "SOURCE", "STATE", "SINCE", "EXPIRES IN", "IDENTITY", "ERROR"];
    tables::render(&header, which.iter().map(row).collect())
}

/// All that is known of one.
fn details(it: &Identity, now: i64) -> String {
    let mut lines: Vec<(&str, String)> = vec![("Pod", it.name()), ("Source", it.source.clone())];
    let mut add = |label, value: Option<String>| lines.extend(value.map(|value| (label, value)));
    add("Agent", it.agent.clone());
    add("Expected", it.expected_id.clone());
    let since = it.since.as_deref().map_or_else(String::new, |at| format!(" since {at} ({})", ago(at, now)));
    add("State", Some(format!("{}{since}", it.state)));
    add("", it.why.clone().filter(|_| !it.is_ready()));
    let times = |asked: &page::Asked| format!("about {}, {}", asked.reference, explain::times(it.asked_times));
    add("Asked", it.asked.as_ref().map(times));
    add(
        "Selectors",
        it.asked.as_ref().filter(|asked| !asked.selectors.is_empty()).map(|asked| asked.selectors.join(" ")),
    );
    let answer = it.answer.as_ref().map(|answer| {
        let ids: Vec<String> = answer.iter().map(explain::described).collect();
        if ids.is_empty() { "no SVID".to_owned() } else { ids.join("\n") }
    });
    add("Answered", answer);
    add("Updates", Some(it.updates.to_string()));
    add(
        "Certificate",
        it.certificate.as_ref().map(|certificate| {
            let page::Certificate { id, serial_number, not_before, not_after } = certificate;
            format!("{id}\nserial {serial_number}\nvalid {not_before} to {not_after} ({})", until(not_after, now))
        }),
    );
    let bundle = |it: &page::Bundle| {
        let roots = if it.roots == 1 { "1 root".to_owned() } else { format!("{} roots", it.roots) };
        format!("{}: {roots}, unchanged for {}", it.trust_domain, ago(&it.since, now))
    };
    let bundles: Vec<String> = it.bundles.iter().map(bundle).collect();
    add("Trust", (!bundles.is_empty()).then(|| bundles.join("\n")));
    add(
        "Last error",
        it.last_error.as_ref().map(|error| {
            let over = if error.lasts { "" } else { ", over" };
            format!("{}, {} ({} ago{over})\n{}", error.code, error.at, ago(&error.at, now), error.why)
        }),
    );
    add("Asks again", it.retry_at.clone());
    let mut text = String::new();
    for (label, value) in lines {
        for (n, line) in value.lines().enumerate() {
            let label = if n == 0 { label } else { "" };
            text.push_str(&format!("{label:<13}{line}\n"));
        }
    }
    text
}

/// Prints what changes until stopped.
fn watch(pod: Option<&str>, from: &Origin) -> ExitCode {
    let mut before: Vec<Identity> = Vec::new();
    let (mut first, mut away) = (true, false);
    loop {
        match read(from) {
            Ok(page) => {
                let which = match pod.map(|pod| page.find(pod)).transpose() {
                    Ok(Some(one)) => vec![one],
                    Ok(None) => page.of_namespace(None),
                    Err(unclear) if first => return exit::complain(unclear, exit::usage()),
                    // It may come back.
                    Err(_) => Vec::new(),
                };
                (first, away) = (false, false);
                for line in changes(&before, &page, &which, from.output) {
                    let _ = exit::print(&line);
                }
                before = which.into_iter().map(|n| page.identities[n].clone()).collect();
            }
            Err(error) if first => return exit::complain(error, exit::cannot_reach()),
            Err(error) if !away => {
                away = true;
                let _ = exit::complain(error, exit::OK);
            }
            Err(_) => {}
        }
        if from.file.is_some() {
            return exit::OK;
        }
        std::thread::sleep(LOOK);
    }
}

/// A line for each that is new, different or gone.
fn changes(before: &[Identity], page: &Page, which: &[usize], output: Output) -> Vec<String> {
    let key = |it: &Identity| (it.of.clone(), it.pod.as_ref().map(|pod| pod.uid.clone()), it.expected_id.clone());
    let mut lines = Vec::new();
    for n in which {
        let now = &page.identities[*n];
        let old = before.iter().find(|old| key(old) == key(now));
        if old.is_some_and(|old| !differs(old, now)) {
            continue;
        }
        lines.push(match output {
            Output::Json => format!("{}\n", page.json_of(*n)),
            Output::Table => format!("{}  {}\n", now.short_name(), seen(now)),
        });
    }
    let gone = before.iter().filter(|old| !which.iter().any(|n| key(&page.identities[*n]) == key(old)));
    if output == Output::Table {
        lines.extend(gone.map(|old| format!("{}  gone\n", old.short_name())));
    }
    lines
}

/// Whether something has happened, other than that it is asked again and again.
fn differs(old: &Identity, new: &Identity) -> bool {
    let seen = |it: &Identity| (it.state.clone(), it.why.clone(), it.certificate.clone(), it.answer.clone());
    let error = |it: &Identity| it.error().map(|error| (error.code.clone(), error.why.clone()));
    seen(old) != seen(new) || error(old) != error(new)
}

fn seen(it: &Identity) -> String {
    let mut text = it.state.clone();
    if let Some(certificate) = &it.certificate {
        let page::Certificate { id, serial_number, not_after, .. } = certificate;
        text.push_str(&format!("  {id}  serial {serial_number}  until {not_after}"));
    } else if let Some(why) = &it.why {
        text.push_str(&format!("  {why}"));
    }
    if let Some(error) = it.error().filter(|error| it.why.as_deref() != Some(&error.why)) {
        text.push_str(&format!("  ({}: {})", error.code, error.why));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, more: Value) -> Value {
        let mut value = json!({
            "of": "pod", "pod": { "namespace": "shop", "name": format!("web-{uid}"), "serviceAccount": "web", "uid": uid },
            "source": "spire-broker", "expectedId": "spiffe://td/ns/shop/sa/web", "state": "Pending",
        });
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        value
    }

    fn ready(serial: &str) -> Value {
        let certificate = json!({
            "id": "spiffe://td/ns/shop/sa/web", "serialNumber": serial,
            "notBefore": "1970-01-01T00:00:00Z", "notAfter": "1970-01-01T01:00:00Z",
        });
        json!({ "state": "Ready", "certificate": certificate, "since": "1970-01-01T00:00:10Z" })
    }

    fn page(identities: &[Value]) -> Page {
        Page::parse(&json!({ "trustDomain": "td", "identities": identities }).to_string()).unwrap()
    }

    #[test]
    fn a_list_has_a_line_for_each() {
        let error = json!({ "lastError": { "code": "NoEntry", "lasts": true } });
        let page = page(&[pod("1", ready("7")), pod("2", error), json!({ "of": "proxy", "state": "Ready" })]);
        let text = table(&page, &[0, 1, 2], 70);
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let lines: Vec<String> = text.lines().map(words).collect();
        assert_eq!(
            lines,
            [
                "NAMESPACE POD SOURCE STATE SINCE EXPIRES IN IDENTITY ERROR",
                "shop web-1 spire-broker Ready 1m 58m 50s spiffe://td/ns/shop/sa/web -",
                "shop web-2 spire-broker Pending - - spiffe://td/ns/shop/sa/web NoEntry",
                "- (the proxy) Ready - - - -",
            ]
        );
    }

    #[test]
    fn watching_tells_what_has_changed_and_nothing_else() {
        let told = |before: &Page, now: &Page| {
            let which = now.of_namespace(None);
            changes(&before.identities, now, &which, Output::Table).concat()
        };
        let (first, renewed) = (page(&[pod("1", ready("7"))]), page(&[pod("1", ready("8"))]));
        assert!(told(&page(&[]), &first).starts_with("shop/web-1  Ready  spiffe://td/ns/shop/sa/web  serial 7"));
        assert_eq!(told(&first, &first), "");
        assert!(told(&first, &renewed).contains("serial 8"));
        let asked_again = page(&[pod("1", json!({ "askedTimes": 9, "retryAt": "1970-01-01T00:00:00Z" }))]);
        assert_eq!(told(&page(&[pod("1", json!({}))]), &asked_again), "", "a pause that goes on is no news");
        let taken = page(&[pod("1", json!({ "state": "Revoked", "why": "no entry" }))]);
        assert_eq!(told(&renewed, &taken), "shop/web-1  Revoked  no entry\n");
        assert_eq!(told(&renewed, &page(&[])), "shop/web-1  gone\n");
    }

    #[test]
    fn details_name_everything() {
        let more = json!({
            "agent": "spiffe://td/spire/agent/x", "asked": { "kind": "process", "reference": "process 7", "selectors": ["unix:uid:1"] },
            "askedTimes": 2, "answer": [{ "id": "spiffe://td/ns/shop/sa/web", "hint": "main" }], "updates": 4,
            "bundles": [{ "trustDomain": "td", "roots": 2, "since": "1970-01-01T00:00:00Z" }],
            "lastError": { "code": "Unavailable", "why": "away", "at": "1970-01-01T00:00:30Z", "lasts": false },
        });
        let mut value = pod("1", ready("7"));
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let text = details(&page(&[value]).identities[0], 60);
        for line in [
            "Pod          shop/web-1 (uid 1)\n",
            "State        Ready since 1970-01-01T00:00:10Z (50s)\n",
            "Asked        about process 7, 2 times\n",
            "Selectors    unix:uid:1\n",
            "Answered     spiffe://td/ns/shop/sa/web (hint \"main\")\n",
            "             serial 7\n",
            "Trust        td: 2 roots, unchanged for 1m\n",
            "Last error   Unavailable, 1970-01-01T00:00:30Z (30s ago, over)\n",
        ] {
            assert!(text.contains(line), "no {line:?} in\n{text}");
        }
    }
}
