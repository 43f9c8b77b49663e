//! The JSON of `/identities`: each pod's identity, where it comes from, and what has happened to it.
//!
//! ```json
//! { "source": "spire-broker", "trustDomain": "example.org", "identities": [ {
//!     "of": "pod", "pod": { "name": "web-1", "namespace": "shop", "serviceAccount": "web", "uid": "…" },
//!     "source": "spire-broker", "agent": "spiffe://example.org/spire/agent/…",
//!     "expectedId": "spiffe://example.org/ns/shop/sa/web",
//!     "state": "Ready", "since": "2026-11-23T22:52:21Z",
//!     "asked": { "kind": "pod", "reference": "pod …", "selectors": [] }, "askedTimes": 1,
//!     "answer": [ { "id": "spiffe://example.org/ns/shop/sa/web", "hint": "" } ], "updates": 3,
//!     "certificate": { "id": "spiffe://…", "serialNumber": "…", "notBefore": "…", "notAfter": "…" },
//!     "bundles": [ { "trustDomain": "example.org", "roots": 1, "since": "…" } ],
//!     "lastError": { "code": "Unavailable", "why": "…", "at": "…", "lasts": false } } ] }
//! ```
//! `of` is `pod`; `proxy` for the proxy's own SVID, which it shows to the Broker API; `identity` for a certificate that no pod of
//! this proxy uses (a prefetch). `state` is `Pending`, `Ready`, `Revoked` or `Failed`, and `why` says why it is not `Ready`.
//! `answer` is missing before there was one, and empty when nothing matches the workload. `retryAt` is there while the source
//! waits to ask again. What is not known is left out; fields may be added, and keep their meaning. Public parts only.

use std::collections::{HashMap, HashSet};

use serde::Serialize;
use zspire_identity::story::{Asked, Offered, Trouble, Trusted};
use zspire_identity::{Entry, State};
use zspire_model::SpiffeId;

use crate::pods::PodView;
use crate::rfc3339_seconds;

/// What is shown.
#[derive(Debug, Default)]
pub struct Sources {
    /// Where the pods' identities come from.
    pub source: &'static str,
    pub trust_domain: String,
    /// The pods, with the identity that is expected of each, or why it has none.
    pub pods: Vec<(PodView, Result<SpiffeId, String>)>,
    pub entries: Vec<Entry>,
    /// The proxy's own.
    pub own: Vec<Entry>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    source: &'static str,
    trust_domain: String,
    identities: Vec<Identity>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Identity {
    of: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<Pod>,
    source: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_id: Option<String>,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    asked: Option<Question>,
    asked_times: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Vec<Svid>>,
    updates: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<Certificate>,
    bundles: Vec<Bundle>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<LastError>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_at: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pod {
    name: String,
    namespace: String,
    service_account: String,
    uid: String,
}

#[derive(Debug, Serialize)]
struct Question {
    kind: &'static str,
    reference: String,
    selectors: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Svid {
    id: String,
    hint: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    id: String,
    serial_number: String,
    not_before: String,
    not_after: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    trust_domain: String,
    roots: usize,
    since: String,
}

#[derive(Debug, Serialize)]
struct LastError {
    code: &'static str,
    why: String,
    at: String,
    lasts: bool,
}

/// The page as indented JSON.
pub fn render(sources: Sources) -> String {
    let page =
        Page { source: sources.source, trust_domain: sources.trust_domain.clone(), identities: identities(sources) };
    let mut text = serde_json::to_string_pretty(&page).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"));
    text.push('\n');
    text
}

fn identities(sources: Sources) -> Vec<Identity> {
    let Sources { source, pods, entries, own, .. } = sources;
    let (shown, mut used) = (Shown::new(&entries, &pods), vec![false; entries.len()]);
    let mut all: Vec<Identity> = Vec::with_capacity(pods.len() + own.len());
    for (pod, expected) in pods {
        let mut identity = match shown.of(&pod, expected.as_ref().ok()) {
            Some(n) => {
                used[n] = true;
                Identity::new("pod", &entries[n])
            }
            None => Identity::unasked(source, expected),
        };
        let PodView { uid, info, .. } = pod;
        let (name, namespace, service_account) = (info.name, info.namespace, info.service_account);
        identity.pod = Some(Pod { name, namespace, service_account, uid });
        all.push(identity);
    }
    let name = |identity: &Identity| identity.pod.as_ref().map(|pod| (pod.namespace.clone(), pod.name.clone()));
    all.sort_by_key(name);
    let unused = entries.iter().zip(used).filter(|(_, used)| !used).map(|(entry, _)| Identity::new("identity", entry));
    all.extend(unused);
    all.extend(own.iter().map(|entry| Identity::new("proxy", entry)));
    all
}

/// Which entry is whose: a pod has credentials of its own, or those that it shares with all workloads of its identity.
struct Shown<'a> {
    own: HashMap<&'a str, usize>,
    shared: HashMap<&'a SpiffeId, usize>,
}

impl<'a> Shown<'a> {
    fn new(entries: &'a [Entry], pods: &[(PodView, Result<SpiffeId, String>)]) -> Self {
        let uids: HashSet<&str> = pods.iter().map(|(pod, _)| pod.uid.as_str()).collect();
        let (mut own, mut shared) = (HashMap::new(), HashMap::new());
        for (n, entry) in entries.iter().enumerate() {
            match entry.workload.as_deref().filter(|workload| uids.contains(workload)) {
                Some(uid) => own.insert(uid, n),
                None => shared.insert(&entry.expected, n),
            };
        }
        Self { own, shared }
    }

    fn of(&self, pod: &PodView, expected: Option<&SpiffeId>) -> Option<usize> {
        let own = self.own.get(pod.uid.as_str());
        own.or_else(|| self.shared.get(expected?)).copied()
    }
}

impl Identity {
    fn new(of: &'static str, entry: &Entry) -> Self {
        let Entry { expected, state, chain, source, story, agent, .. } = entry;
        let certificate = chain.first().map(|leaf| Certificate {
            id: entry.id.to_string(),
            serial_number: leaf.serial.clone(),
            not_before: rfc3339_seconds(leaf.not_before),
            not_after: rfc3339_seconds(leaf.not_after),
        });
        Self {
            of,
            pod: None,
            source,
            agent: agent.as_ref().map(ToString::to_string),
            expected_id: Some(expected.to_string()),
            state: match state {
                State::Pending { .. } => "Pending",
                State::Ready(_) => "Ready",
                State::Revoked { .. } => "Revoked",
                State::Failed { .. } => "Failed",
            },
            why: state.why().map(ToString::to_string),
            since: Some(rfc3339_seconds(story.since)),
            asked: story.asked.as_ref().map(Question::new),
            asked_times: story.asked_times,
            answer: story.answer.as_ref().map(|answer| answer.iter().map(Svid::new).collect()),
            updates: story.updates,
            certificate,
            bundles: story.bundles.iter().map(Bundle::new).collect(),
            last_error: story.trouble.as_ref().map(LastError::new),
            retry_at: story.retry_at.map(rfc3339_seconds),
        }
    }

    /// A pod whose identity no source has been asked for.
    fn unasked(source: &'static str, expected: Result<SpiffeId, String>) -> Self {
        let why = match &expected {
            Ok(_) => "it has not been asked for: discovery does not know the workload yet".to_owned(),
            Err(why) => why.clone(),
        };
        Self {
            of: "pod",
            pod: None,
            source,
            agent: None,
            expected_id: expected.ok().map(|id| id.to_string()),
            state: "Pending",
            why: Some(why),
            since: None,
            asked: None,
            asked_times: 0,
            answer: None,
            updates: 0,
            certificate: None,
            bundles: Vec::new(),
            last_error: None,
            retry_at: None,
        }
    }
}

impl Question {
    fn new(asked: &Asked) -> Self {
        let Asked { kind, reference, selectors } = asked;
        Self { kind, reference: reference.to_string(), selectors: selectors.iter().map(ToString::to_string).collect() }
    }
}

impl Svid {
    fn new(offered: &Offered) -> Self {
        Self { id: offered.id.to_string(), hint: offered.hint.to_string() }
    }
}

impl Bundle {
    fn new(trusted: &Trusted) -> Self {
        let Trusted { domain, bundle, since } = trusted;
        Self { trust_domain: domain.to_string(), roots: bundle.roots().len(), since: rfc3339_seconds(*since) }
    }
}

impl LastError {
    fn new(trouble: &Trouble) -> Self {
        let Trouble { code, why, at, lasts } = trouble;
        Self { code, why: why.to_string(), at: rfc3339_seconds(*at), lasts: *lasts }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use serde_json::{Value, json};
    use zspire_identity::{Story, WorkloadKey};

    use super::*;
    use crate::pods::PodInfo;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn pod(uid: &str, name: &str) -> (PodView, Result<SpiffeId, String>) {
        let info = PodInfo { name: name.into(), namespace: "shop".into(), service_account: "web".into() };
        (PodView { uid: uid.into(), info, pending: None }, Ok("spiffe://td/ns/shop/sa/web".parse().unwrap()))
    }

    fn entry(workload: Option<&str>, story: Story) -> Entry {
        let key = WorkloadKey { id: "spiffe://td/ns/shop/sa/web".parse().unwrap(), workload: workload.map(Into::into) };
        Entry::new(key, State::Pending { why: "no entry matches".into() }, story, "spire-broker")
    }

    fn page(pods: Vec<(PodView, Result<SpiffeId, String>)>, entries: Vec<Entry>, own: Vec<Entry>) -> Value {
        let sources = Sources { source: "spire-broker", trust_domain: "td".into(), pods, entries, own };
        serde_json::from_str(&render(sources)).unwrap()
    }

    #[test]
    fn a_pod_with_everything_that_is_known_of_it() {
        let story = Story {
            since: at(0),
            asked: Some(Asked { kind: "pod", reference: "pod uid-1".into(), selectors: vec![] }),
            answer: Some(vec![]),
            bundles: vec![],
            trouble: Some(Trouble { code: "NoEntry", why: "no entry matches".into(), at: at(60), lasts: true }),
            retry_at: Some(at(90)),
            asked_times: 2,
            updates: 1,
        };
        let agent = Some("spiffe://td/spire/agent/x".parse().unwrap());
        let entry = Entry { agent, ..entry(Some("uid-1"), story) };
        let page = page(vec![pod("uid-1", "web-1")], vec![entry], vec![]);
        assert_eq!(
            page,
            json!({ "source": "spire-broker", "trustDomain": "td", "identities": [{
                "of": "pod",
                "pod": { "name": "web-1", "namespace": "shop", "serviceAccount": "web", "uid": "uid-1" },
                "source": "spire-broker",
                "agent": "spiffe://td/spire/agent/x",
                "expectedId": "spiffe://td/ns/shop/sa/web",
                "state": "Pending", "why": "no entry matches", "since": "1970-01-01T00:00:00Z",
                "asked": { "kind": "pod", "reference": "pod uid-1", "selectors": [] }, "askedTimes": 2,
                "answer": [], "updates": 1, "bundles": [],
                "lastError": { "code": "NoEntry", "why": "no entry matches", "at": "1970-01-01T00:01:00Z", "lasts": true },
                "retryAt": "1970-01-01T00:01:30Z",
            }] })
        );
    }

    #[test]
    fn each_pod_has_its_own_or_the_one_that_it_shares() {
        let of = |page: &Value| -> Vec<String> {
            let identities = page["identities"].as_array().unwrap().iter();
            let name = |it: &Value| format!("{} {} {}", it["of"], it["pod"]["uid"], it["askedTimes"]).replace('"', "");
            identities.map(name).collect()
        };
        let told = |workload, times| entry(workload, Story { asked_times: times, ..Story::new(at(0)) });
        let pods = || vec![pod("u-2", "web-2"), pod("u-1", "web-1")];
        let own = page(pods(), vec![told(Some("u-1"), 1), told(Some("u-2"), 2)], vec![told(None, 9)]);
        assert_eq!(of(&own), ["pod u-1 1", "pod u-2 2", "proxy null 9"]);
        let shared = page(pods(), vec![told(None, 3)], vec![]);
        assert_eq!(of(&shared), ["pod u-1 3", "pod u-2 3"]);
        let neighbour = page(pods(), vec![told(Some("u-2"), 2)], vec![]);
        assert_eq!(of(&neighbour), ["pod u-1 0", "pod u-2 2"], "another pod's is not shown as its own");
        let unasked = page(pods(), vec![], vec![]);
        assert_eq!(of(&unasked), ["pod u-1 0", "pod u-2 0"]);
        let nobody = page(vec![], vec![told(None, 4)], vec![]);
        assert_eq!(of(&nobody), ["identity null 4"]);
    }
}
