//! Why a pod has the identity that it has, or none: what was asked, what was answered, what to do.
//!
//! A function of the page alone, so that what is advised is a table in the tests.

use zspire_node::remedies::{self, Registration, Step};

use super::moment::{ago, until};
use super::page::{Identity, LastError, Svid};

/// The whole story. `own` is the proxy's own SVID, `now` in seconds since 1970.
pub(super) fn text(identity: &Identity, own: Option<&Identity>, now: i64) -> String {
    let mut text = headline(identity, now);
    text.push_str("\n\nAsked\n");
    for line in asked(identity, own) {
        text.push_str(&format!("  {line}\n"));
    }
    text.push_str("\nAnswered\n");
    for line in answered(identity, now) {
        text.push_str(&format!("  {line}\n"));
    }
    text.push_str("\nWhat to do\n");
    for Step { what, text: lines } in advise(identity, own) {
        text.push_str(&format!("  {what}\n"));
        if let Some(lines) = lines {
            text.push('\n');
            lines.lines().for_each(|line| text.push_str(&format!("      {line}\n")));
            text.push('\n');
        }
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn headline(identity: &Identity, now: i64) -> String {
    let (name, since) = (identity.short_name(), identity.since.as_deref().map(|at| ago(at, now)));
    let since = since.map_or_else(String::new, |since| format!(" for {since}"));
    match &identity.certificate {
        Some(certificate) => format!("{name} is {}{since}.", certificate.id),
        None => format!("{name} has no identity: {}{since}.", identity.state),
    }
}

fn asked(identity: &Identity, own: Option<&Identity>) -> Vec<String> {
    let mut lines = Vec::new();
    match &identity.asked {
        Some(asked) => {
            let times = times(identity.asked_times);
            lines.push(format!("{} was asked {times}, about {}.", identity.source, asked.reference));
            if !asked.selectors.is_empty() {
                lines.push(format!("Selectors: {}.", asked.selectors.join(", ")));
            }
        }
        None => lines.push(format!("{} was not asked yet.", identity.source)),
    }
    lines.extend(identity.agent.as_ref().map(|agent| format!("The agent that answers there is {agent}.")));
    let own = own.and_then(|own| own.certificate.as_ref());
    lines.extend(own.map(|own| format!("The proxy showed itself as {}.", own.id)));
    if let Some(expected) = &identity.expected_id {
        lines.push(format!("Expected: {expected}."));
    }
    lines
}

pub(super) fn times(count: u64) -> String {
    if count == 1 { "once".into() } else { format!("{count} times") }
}

fn answered(identity: &Identity, now: i64) -> Vec<String> {
    let mut lines = Vec::new();
    match identity.answer.as_deref() {
        None if identity.error().is_none() => lines.push("Nothing yet.".to_owned()),
        None => {}
        Some([]) => lines.push("Nothing matches the workload: an answer without SVIDs.".to_owned()),
        Some(offered) => {
            lines.push("SVIDs:".to_owned());
            lines.extend(offered.iter().map(|svid| format!("  {}", described(svid))));
        }
    }
    if let Some(certificate) = &identity.certificate {
        lines.push(format!("In use: serial {}, {}.", certificate.serial_number, until(&certificate.not_after, now)));
    }
    if let Some(LastError { code, why, at, lasts }) = &identity.last_error {
        let over = if *lasts { "" } else { ", over since" };
        lines.push(format!("{code}, {} ago{over}: {why}", ago(at, now)));
    }
    if let Some(at) = &identity.retry_at {
        lines.push(match until(at, now) {
            passed if passed.starts_with("expired") => "It is asked again now.".to_owned(),
            left => format!("It is asked again {}.", left.trim_start_matches("expires ")),
        });
    }
    lines
}

pub(super) fn described(svid: &Svid) -> String {
    match &*svid.hint {
        "" => svid.id.clone(),
        hint => format!("{} (hint {hint:?})", svid.id),
    }
}

/// What to do, in order.
pub(super) fn advise(identity: &Identity, own: Option<&Identity>) -> Vec<Step> {
    let Some(error) = identity.error() else {
        return match (identity.is_ready(), &identity.why) {
            (true, _) => vec![Step::new("Nothing: it is renewed by itself.")],
            (false, Some(why)) => vec![Step::new(format!("Wait: {why}."))],
            (false, None) => vec![Step::new("Wait for the first answer.")],
        };
    };
    let mut all = about(identity, error, own);
    if identity.is_ready() {
        all.insert(0, Step::new("Nothing at once: the last SVID is in use until it expires. But:"));
    }
    all
}

fn about(identity: &Identity, error: &LastError, own: Option<&Identity>) -> Vec<Step> {
    let by_process = identity.asked.as_ref().is_some_and(|asked| asked.kind == "process");
    let proxy = own.and_then(|own| own.certificate.as_ref()).map(|certificate| certificate.id.as_str());
    match error.code.as_str() {
        "NoEntry" => register(identity),
        "Unusable" => unusable(identity, proxy),
        "NotLocated" => not_located(),
        "NotFound" => vec![
            Step::new("The agent does not know the pod. For some seconds after a pod has begun that is usual: wait."),
            Step::new("If it stays: the pod must be on the agent's node, with the UID that the agent was asked about."),
        ],
        _ if error.why.contains("no identity issued") => {
            let mut all = vec![Step::new("The agent knows nothing of the proxy itself: register the proxy.")];
            all.extend(own.map(register).unwrap_or_default());
            all.push(Step::new("`zspire doctor` prints the command, with the selectors of the proxy's process."));
            all
        }
        code => match remedies::of_refusal(code, &error.why, proxy.unwrap_or("PROXY"), by_process) {
            Some(step) if step.text.is_some() && proxy.is_none() => {
                vec![step, Step::new("PROXY is the proxy's own SPIFFE ID: `zspire doctor` says which.")]
            }
            Some(step) => vec![step],
            None => vec![
                Step::new("Look at the agent or the CA: is it there, is its socket mounted, may this user use it?"),
                Step::new("`zspire doctor`, run where the proxy runs and with its settings, looks at each of them."),
            ],
        },
    }
}

fn register(identity: &Identity) -> Vec<Step> {
    let selectors = selectors(identity);
    let registration = Registration {
        parent: identity.agent.as_deref(),
        id: identity.expected_id.as_deref().unwrap_or("SPIFFE_ID"),
        selectors: &selectors,
    };
    let mut all = vec![Step::with_text("Register it:", registration.command())];
    all.extend(registration.about_parent().map(|about| Step::new(format!("{about}."))));
    all.push(Step::new(
        "An agent takes up to ten seconds to know of a new entry; then it is served without a restart.",
    ));
    if identity.asked.as_ref().is_some_and(|asked| asked.kind == "pod") {
        all.push(Step::new("If there is an entry: by pod, `k8s:container-*` and `unix:*` never match."));
    }
    all
}

/// Selectors that the workload has, as far as they are known.
fn selectors(identity: &Identity) -> Vec<String> {
    let known = identity.asked.as_ref().map(|asked| asked.selectors.clone()).unwrap_or_default();
    match &identity.pod {
        _ if !known.is_empty() => known,
        Some(pod) => vec![format!("k8s:ns:{}", pod.namespace), format!("k8s:sa:{}", pod.service_account)],
        None => vec!["unix:uid:UID".to_owned()],
    }
}

fn not_located() -> Vec<Step> {
    vec![
        Step::new(
            "No process of the pod is seen. It is looked for again by itself; a pod whose process has not begun has none.",
        ),
        Step::new("If it runs: the proxy has to see the host's processes (`hostPID: true` in Kubernetes)."),
    ]
}

fn unusable(identity: &Identity, proxy: Option<&str>) -> Vec<Step> {
    let offered = identity.answer.as_deref().unwrap_or_default();
    let Some(expected) = &identity.expected_id else { return vec![Step::new("See the error above.")] };
    let matching: Vec<&Svid> = offered.iter().filter(|svid| svid.id == *expected).collect();
    let domain = |id: &str| id.strip_prefix("spiffe://").and_then(|rest| rest.split('/').next()).map(str::to_owned);
    match matching[..] {
        [] if offered.iter().any(|svid| Some(&*svid.id) == proxy) => vec![
            Step::new(
                "To the agent the process is the proxy: it runs as the proxy's user. Run the application as another user,",
            ),
            Step::new("or register it by what tells them apart (`k8s:…`) and the proxy by more than its user."),
        ],
        [] if offered.iter().all(|svid| domain(&svid.id) != domain(expected)) => {
            let of = offered.first().and_then(|svid| domain(&svid.id)).unwrap_or_default();
            vec![Step::new(format!(
                "The agent is of another trust domain: set TRUST_DOMAIN={of} for the proxy, or ask another agent."
            ))]
        }
        [] => vec![
            Step::new(format!(
                "Give the registration entry the SPIFFE ID {expected} (`spire-server entry update -entryID …`)."
            )),
            Step::new(
                "Or make the proxy expect such IDs, all of them: SPIFFE_ID_TEMPLATE. For this one: SPIFFE_ACCEPT_OTHER_ID=true.",
            ),
        ],
        [_] => vec![Step::new(
            "The certificate or its key does not pass the checks: see the error above. If it is not valid yet, or not any more, \
             compare this machine's clock with the SPIRE server's.",
        )],
        _ => {
            let hints: Vec<&str> =
                matching.iter().map(|svid| svid.hint.as_str()).filter(|hint| !hint.is_empty()).collect();
            let hint = hints.first().copied().unwrap_or("HINT");
            let mut all =
                vec![Step::new(format!("Several entries give it this ID. Say which is meant: SPIFFE_HINT={hint}"))];
            if hints.len() < matching.len() {
                all.push(Step::new("Entries get a hint by `spire-server entry update -hint`."));
            }
            all
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::page::{Asked, Certificate, Pod};

    const EXPECTED: &str = "spiffe://td/ns/shop/sa/web";
    const NOW: i64 = 1_000;

    fn at(seconds: i64) -> String {
        let format = &time::format_description::well_known::Rfc3339;
        time::OffsetDateTime::from_unix_timestamp(seconds).unwrap().format(format).unwrap()
    }

    fn waiting(code: &str, why: &str) -> Identity {
        Identity {
            of: "pod".into(),
            pod: Some(Pod {
                name: "web-1".into(),
                namespace: "shop".into(),
                service_account: "web".into(),
                uid: "u1".into(),
            }),
            source: "spire-broker".into(),
            expected_id: Some(EXPECTED.into()),
            state: "Pending".into(),
            since: Some(at(NOW - 130)),
            asked: Some(Asked { kind: "pod".into(), reference: "pod u1".into(), selectors: vec![] }),
            asked_times: 3,
            last_error: Some(LastError { code: code.into(), why: why.into(), at: at(NOW - 12), lasts: true }),
            ..Identity::default()
        }
    }

    fn own() -> Identity {
        let certificate = Certificate { id: "spiffe://td/ztunnel".into(), ..Certificate::default() };
        Identity { of: "proxy".into(), state: "Ready".into(), certificate: Some(certificate), ..Identity::default() }
    }

    fn offered(ids: &[(&str, &str)]) -> Option<Vec<Svid>> {
        Some(ids.iter().map(|(id, hint)| Svid { id: (*id).into(), hint: (*hint).into() }).collect())
    }

    fn advised(identity: &Identity) -> String {
        let all = advise(identity, Some(&own()));
        all.into_iter().map(|step| format!("{} {}\n", step.what, step.text.unwrap_or_default())).collect()
    }

    #[test]
    fn in_order_what_was_asked_what_was_answered_and_what_to_do() {
        let identity = Identity {
            agent: Some("spiffe://td/spire/agent/x".into()),
            answer: offered(&[]),
            retry_at: Some(at(NOW + 4)),
            ..waiting("NoEntry", "no entry matches this workload (pod u1)")
        };
        assert_eq!(
            text(&identity, Some(&own()), NOW),
            "shop/web-1 has no identity: Pending for 2m 10s.\n\n\
             Asked\n  \
               spire-broker was asked 3 times, about pod u1.\n  \
               The agent that answers there is spiffe://td/spire/agent/x.\n  \
               The proxy showed itself as spiffe://td/ztunnel.\n  \
               Expected: spiffe://td/ns/shop/sa/web.\n\n\
             Answered\n  \
               Nothing matches the workload: an answer without SVIDs.\n  \
               NoEntry, 12s ago: no entry matches this workload (pod u1)\n  \
               It is asked again in 4s.\n\n\
             What to do\n  \
               Register it:\n\n      \
                 spire-server entry create \\\n        \
                   -parentID spiffe://td/spire/agent/x \\\n        \
                   -spiffeID spiffe://td/ns/shop/sa/web \\\n        \
                   -selector k8s:ns:shop \\\n        \
                   -selector k8s:sa:web\n\n  \
               An agent takes up to ten seconds to know of a new entry; then it is served without a restart.\n  \
               If there is an entry: by pod, `k8s:container-*` and `unix:*` never match.\n"
        );
    }

    #[test]
    fn each_answer_has_its_advice() {
        let refused = waiting("PermissionDenied", "caller not configured as an authorized delegate");
        let steps = advise(&refused, None);
        assert!(
            steps[0].text.as_ref().unwrap().contains("[\"PROXY\"]") && steps[1].what.contains("PROXY is"),
            "{steps:?}"
        );
        for (code, why, advice) in [
            ("NoEntry", "no entry matches", "-parentID PARENT"),
            ("NotLocated", "no process of the pod", "hostPID"),
            ("NotFound", "pod with UID u1 not found on agent node", "for some seconds"),
            (
                "PermissionDenied",
                "caller not configured as an authorized delegate",
                "authorized_delegates = [\"spiffe://td/ztunnel\"]",
            ),
            ("PermissionDenied", "no identity issued", "register the proxy"),
            ("Unavailable", "cannot connect to unix:///a: No such file", "zspire doctor"),
        ] {
            let advised = advised(&waiting(code, why)).to_lowercase();
            assert!(advised.contains(&advice.to_lowercase()), "{code} {why}: {advised}");
        }
    }

    #[test]
    fn what_is_offered_decides_what_is_wrong_with_it() {
        for (offers, advice) in [
            (offered(&[("spiffe://td/ztunnel", "")]), "runs as the proxy's user"),
            (
                offered(&[("spiffe://td/web", "")]),
                "Give the registration entry the SPIFFE ID spiffe://td/ns/shop/sa/web",
            ),
            (offered(&[("spiffe://other/ns/shop/sa/web", "")]), "set TRUST_DOMAIN=other"),
            (offered(&[(EXPECTED, "a"), (EXPECTED, "b")]), "SPIFFE_HINT=a"),
            (offered(&[(EXPECTED, ""), (EXPECTED, "")]), "entry update -hint"),
            (offered(&[(EXPECTED, "")]), "clock"),
        ] {
            let identity = Identity { answer: offers, ..waiting("Unusable", "…") };
            assert!(advised(&identity).contains(advice), "{advice}: {}", advised(&identity));
        }
    }

    #[test]
    fn a_process_is_registered_by_its_own_selectors() {
        let asked =
            Asked { kind: "process".into(), reference: "process 7".into(), selectors: vec!["unix:uid:1001".into()] };
        let identity = Identity { asked: Some(asked), ..waiting("NoEntry", "no entry matches") };
        let advised = advised(&identity);
        assert!(advised.contains("-selector unix:uid:1001") && !advised.contains("k8s"), "{advised}");
    }

    #[test]
    fn what_works_needs_nothing_and_an_outage_is_told_beside_it() {
        let ready = Identity { state: "Ready".into(), last_error: None, ..waiting("", "") };
        assert!(advised(&ready).starts_with("Nothing: it is renewed"));
        let outage = Identity { state: "Ready".into(), ..waiting("Unavailable", "connection refused") };
        assert!(advised(&outage).starts_with("Nothing at once") && advised(&outage).contains("doctor"));
        let mut over = outage;
        over.last_error.as_mut().unwrap().lasts = false;
        assert!(advised(&over).starts_with("Nothing: it is renewed"), "an error that is over is no reason to act");
    }
}
