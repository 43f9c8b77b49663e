//! The SPIRE agent, asked as the proxy asks it.
//!
//! ```text
//!  sockets ─▶ own SVID ─▶ its trust domain, its time ─▶ a real question as broker or delegate ─▶ who has answered
//! ```

use std::fmt;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use futures::StreamExt as _;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use zspire_identity::spire::workload_api::{Own, WorkloadApi};
use zspire_identity::spire::{
    Agent, Config as Settings, Endpoint, Process, Reference, Refusal, Update, broker, delegated, subscriptions,
};
use zspire_identity::x509::CertificateView;
use zspire_identity::{Priority, Source as _, WorkloadKey};
use zspire_model::SpiffeId;

use super::{Finding, Outcome, PATIENCE};
use crate::config::{Config, IdentitySource, Mode};
use crate::pods::PodInfo;
use crate::pods::identity::Expected;
use crate::pods::references::effective_user;
use crate::remedies::{self, Registration, Step};
use crate::{identities, rfc3339_seconds, spire};

/// A pod that nobody has: an agent that may be asked says that it does not know it.
const NO_POD: &str = "00000000-0000-0000-0000-000000000000";

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    let settings = &config.spire;
    let sockets = [
        ("Workload API", "SPIFFE_ENDPOINT_SOCKET", &settings.workload_api),
        ("Broker API", "SPIFFE_BROKER_SOCKET", &settings.broker),
        ("admin socket", "SPIRE_ADMIN_ENDPOINT_SOCKET", &settings.admin),
    ];
    let used = sockets.into_iter().filter(|(check, ..)| is_used(check, config.identity));
    for (check, variable, endpoint) in used {
        if let Some(endpoint) = endpoint {
            all.push(socket(check, variable, endpoint).await);
        }
    }
    let broken = |all: &[Finding], check: &str| all.iter().any(|it| it.check == check && it.outcome == Outcome::Fail);

    let own = match &settings.workload_api {
        Some(endpoint) if !broken(&all, "Workload API") => Some(own(config, endpoint).await),
        Some(_) => {
            all.push(Finding::skip("own entry", "the Workload API cannot be asked"));
            None
        }
        // The Delegated Identity API looks at the entry by itself.
        None => None,
    };
    let mut own_id = None;
    if let Some((findings, id)) = own {
        all.extend(findings);
        own_id = id;
    }
    match config.identity {
        IdentitySource::SpireBroker if broken(&all, "Broker API") => {
            all.push(Finding::skip("authorized as a broker", "the socket cannot be used"));
        }
        IdentitySource::SpireBroker => all.extend(as_broker(config, own_id.as_ref()).await),
        IdentitySource::SpireDelegated if broken(&all, "admin socket") => {
            all.push(Finding::skip("authorized as a delegate", "the socket cannot be used"));
        }
        IdentitySource::SpireDelegated => all.push(as_delegate(config, own_id.as_ref()).await),
        _ => {}
    }
    if settings.by_process && config.identity != IdentitySource::WorkloadApi {
        all.push(processes());
    }
    all
}

fn is_used(check: &str, source: IdentitySource) -> bool {
    match check {
        "Broker API" => source == IdentitySource::SpireBroker,
        "admin socket" => source == IdentitySource::SpireDelegated,
        _ => true,
    }
}

/// Whether something listens there that this user may connect to.
async fn socket(check: &'static str, variable: &str, endpoint: &Endpoint) -> Finding {
    let connected = match endpoint {
        Endpoint::Unix(path) => timeout(PATIENCE, UnixStream::connect(path)).await.map(|it| it.map(drop)),
        Endpoint::Tcp(address) => timeout(PATIENCE, TcpStream::connect(address)).await.map(|it| it.map(drop)),
    };
    let about = match endpoint {
        Endpoint::Unix(path) => described(path),
        Endpoint::Tcp(_) => String::new(),
    };
    let error = match connected {
        Ok(Ok(())) => return Finding::ok(check, format!("{endpoint} takes connections{about}")),
        Ok(Err(error)) => error,
        Err(_) => io::Error::from(io::ErrorKind::TimedOut),
    };
    let failed = Finding::fail(check, format!("{endpoint}: {error}{about}"));
    match error.kind() {
        io::ErrorKind::NotFound => failed
            .next("Is the SPIRE agent running, with this socket in its configuration? In a container: is its folder mounted?")
            .next(format!("{variable} names the socket.")),
        io::ErrorKind::PermissionDenied => failed.next(match effective_user(std::process::id()) {
            Some(user) => format!("This is user {user}; the socket is for its owner and group. Run the proxy as one of them."),
            None => "The socket is for its owner and group. Run the proxy as one of them.".to_owned(),
        }),
        io::ErrorKind::ConnectionRefused => {
            failed.next("The socket is an old one: the SPIRE agent does not run. Start it; it replaces the socket.")
        }
        _ => failed.next(format!("{variable} names the socket.")),
    }
}

/// ` (owner 0, mode 0770)`, or what it is if not a socket.
fn described(path: &Path) -> String {
    match std::fs::metadata(path) {
        Ok(found) if !found.file_type().is_socket() => " (it is not a socket)".to_owned(),
        Ok(found) => format!(" (owner {}:{}, mode {:04o})", found.uid(), found.gid(), found.mode() & 0o7777),
        Err(_) => String::new(),
    }
}

/// What the agent gives to this process itself, and whether that can be used.
async fn own(config: &Config, endpoint: &Endpoint) -> (Vec<Finding>, Option<SpiffeId>) {
    const CHECK: &str = "own entry";
    let update = match ask(&WorkloadApi::new(endpoint.clone()), &Reference::Own).await {
        Ok(update) => update,
        Err(refusal) if refusal.why.contains("no identity issued") => return (vec![unregistered(config)], None),
        Err(refusal) => {
            let next = "The agent's log says why. An agent that has just started says so for some seconds.";
            return (vec![Finding::fail(CHECK, told(&refusal)).next(next)], None);
        }
    };
    let expected = expected_of_own(config);
    let offer = update.offers.iter().find(|offer| Some(&offer.id) == expected.as_ref()).or(update.offers.first());
    let Some(offer) = offer else { return (vec![unregistered(config)], None) };
    let mut all = vec![match (config.identity, &expected) {
        (IdentitySource::WorkloadApi, Some(expected)) if offer.id != *expected && !config.spire.accept_other_id => {
            Finding::fail(CHECK, format!("the agent offers {}, expected {expected}", offer.id))
                .next("Correct the SPIFFE ID of the entry, PROXY_WORKLOAD_INFO, TRUST_DOMAIN or SPIFFE_ID_TEMPLATE.")
        }
        _ => Finding::ok(CHECK, format!("this process is {}", offer.id)),
    }];
    all.push(trust_domain("trust domain of the agent", offer.id.trust_domain().as_str(), config));
    all.extend(
        offer.chain.first().and_then(|leaf| CertificateView::parse(leaf)).map(|leaf| clock(&leaf, SystemTime::now())),
    );
    (all, Some(offer.id.clone()))
}

fn expected_of_own(config: &Config) -> Option<SpiffeId> {
    let Mode::Dedicated(name) = &config.mode else { return spire::own_key(config).ok().map(|key| key.id) };
    let trust_domain = config.trust_domain.parse().ok()?;
    let (template, node) = (config.spire.template.clone(), config.node_name.clone());
    Expected { trust_domain, template, node }.of(&PodInfo::from(name)).ok()
}

fn unregistered(config: &Config) -> Finding {
    let found = Finding::fail("own entry", "the agent has no entry for this process (no identity issued)");
    let Some(id) = expected_of_own(config) else { return found.next("Register the proxy.") };
    let selectors = match (&*config.pod_namespace, &*config.service_account) {
        (namespace, account) if config.in_kubernetes && !namespace.is_empty() && !account.is_empty() => {
            vec![format!("k8s:ns:{namespace}"), format!("k8s:sa:{account}")]
        }
        _ => effective_user(std::process::id()).map(|user| format!("unix:uid:{user}")).into_iter().collect(),
    };
    let registration = Registration { parent: None, id: id.as_str(), selectors: &selectors };
    let found = found.step(Step::with_text("Register the proxy:", registration.command()));
    let found = registration.about_parent().into_iter().fold(found, |found, about| found.next(format!("{about}.")));
    found.next("If there is an entry: an agent takes up to ten seconds to know of it, and this user has to be the one that it names.")
}

fn trust_domain(check: &'static str, found: &str, config: &Config) -> Finding {
    if found == config.trust_domain {
        return Finding::ok(check, format!("{found}, as TRUST_DOMAIN says"));
    }
    Finding::fail(check, format!("{found}, and TRUST_DOMAIN={}", config.trust_domain)).next(format!(
        "Set TRUST_DOMAIN={found}, or ask an agent of {}: no SVID would be the expected one.",
        config.trust_domain
    ))
}

/// Whether the agent's certificate and this machine's clock agree.
fn clock(leaf: &CertificateView, now: SystemTime) -> Finding {
    const CHECK: &str = "clock";
    if let Ok(ahead) = leaf.not_before.duration_since(now).map(|ahead| ahead.as_secs()) {
        return Finding::fail(
            CHECK,
            format!("the SVID becomes valid in {ahead} s: this clock is behind the SPIRE server's"),
        )
        .next("Set the clocks (NTP) of this machine and the server's.");
    }
    if let Ok(late) = now.duration_since(leaf.not_after).map(|late| late.as_secs()) {
        return Finding::fail(CHECK, format!("the SVID expired {late} s ago, and the agent goes on serving it"))
            .next("Either the agent has lost its server (its log says so), or this clock is ahead: compare them.");
    }
    Finding::ok(CHECK, format!("the SVID is valid from {} to {}", at(leaf.not_before), at(leaf.not_after)))
}

fn at(time: SystemTime) -> String {
    rfc3339_seconds(time)
}

/// Asks the Broker API about a pod that is not there, or about this process.
async fn as_broker(config: &Config, own: Option<&SpiffeId>) -> Vec<Finding> {
    const CHECK: &str = "authorized as a broker";
    let (Some(endpoint), Some(own), Some(api)) = (&config.spire.broker, own, &config.spire.workload_api) else {
        return vec![Finding::skip(CHECK, "without an SVID of its own the proxy cannot ask")];
    };
    let stop = CancellationToken::new();
    let settings = Settings { policy: identities::policy(config), accept_other_id: true, ..Settings::default() };
    let (source, driver) = subscriptions::new(Arc::new(WorkloadApi::new(api.clone())), Arc::new(Own), settings);
    let _stop = stop.clone().drop_guard();
    tokio::spawn(driver.run(stop));
    let watch = source.watch(&WorkloadKey { id: own.clone(), workload: None }, Priority::OnDemand);
    if let Err(error) = watch.ready(Instant::now() + PATIENCE).await {
        return vec![Finding::fail(CHECK, format!("the proxy's own SVID: {error}"))];
    }
    let agent = broker::Broker::new(endpoint.clone(), watch, spire::expected_agent(config));
    let by_process = config.spire.by_process;
    let reference =
        if by_process { Reference::Process(Arc::new(Myself)) } else { Reference::Pod { uid: NO_POD.into() } };
    let answer = ask(&agent, &reference).await;
    let mut all = vec![broker_finding(CHECK, answer.err().as_ref(), own.as_str(), by_process)];
    if let Some(id) = agent.id() {
        all.push(Finding::ok("identity of the agent", id.to_string()));
    }
    all
}

fn broker_finding(check: &'static str, refusal: Option<&Refusal>, own: &str, by_process: bool) -> Finding {
    match refusal {
        None => Finding::ok(check, "the agent has answered a question about this process"),
        Some(refusal) if refusal.code == "NotFound" => {
            Finding::ok(check, "the agent says of a pod that does not exist that it does not exist")
        }
        Some(refusal) => Finding::fail(check, told(refusal)).step(remedy(refusal, own, by_process)),
    }
}

fn remedy(refusal: &Refusal, own: &str, by_process: bool) -> Step {
    let known = remedies::of_refusal(refusal.code, &refusal.why, own, by_process);
    known.unwrap_or_else(|| Step::new("The agent's log says why."))
}

/// Asks the Delegated Identity API about this process.
async fn as_delegate(config: &Config, own: Option<&SpiffeId>) -> Finding {
    const CHECK: &str = "authorized as a delegate";
    let Some(endpoint) = &config.spire.admin else {
        return Finding::skip(CHECK, "SPIRE_ADMIN_ENDPOINT_SOCKET is not set");
    };
    let (agent, bundles) = delegated::new(endpoint.clone());
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    tokio::spawn(bundles.run(stop));
    match ask(&agent, &Reference::Process(Arc::new(Myself))).await {
        Ok(_) => Finding::ok(CHECK, "the agent has answered a question about this process"),
        Err(refusal) => delegate_finding(CHECK, &refusal, config, own),
    }
}

fn delegate_finding(check: &'static str, refusal: &Refusal, config: &Config, own: Option<&SpiffeId>) -> Finding {
    if refusal.why.contains("no identity issued") {
        return Finding { check, ..unregistered(config) };
    }
    // It has looked at the process, so it takes questions from here.
    if refusal.code == "Unavailable" && refusal.why.contains("attestation failed") {
        return Finding::warn(
            check,
            format!("the agent takes questions, but does not see this process: {}", refusal.why),
        )
        .next("Agent and proxy have to be in the host's process namespace (hostPID: true).");
    }
    let id = own.cloned().or_else(|| expected_of_own(config)).map(|id| id.to_string());
    let own = id.as_deref().unwrap_or("SPIFFE ID of the proxy");
    Finding::fail(check, told(refusal)).step(remedy(refusal, own, true))
}

/// Whether the processes of pods can be seen from here.
fn processes() -> Finding {
    const CHECK: &str = "processes";
    // A thread of the kernel has this number, in the first process namespace alone.
    let kernel = std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim_end() == "kthreadd");
    if kernel {
        return Finding::ok(CHECK, "/proc is the host's");
    }
    Finding::warn(CHECK, "/proc seems not to be the host's: processes of pods may not be seen")
        .next("The proxy needs the host's process namespace (hostPID: true), or another kind of reference (SPIFFE_REFERENCE=pod).")
}

/// The first answer about a reference.
async fn ask(agent: &dyn Agent, about: &Reference) -> Result<Update, Refusal> {
    let late = |what: &str| Refusal {
        meaning: zspire_identity::spire::Meaning::Outage,
        code: "Timeout",
        why: format!("{what} within {} s", PATIENCE.as_secs()).into(),
    };
    let mut updates = timeout(PATIENCE, agent.subscribe(about)).await.map_err(|_| late("no stream"))??;
    match timeout(PATIENCE, updates.next()).await {
        Ok(Some(answer)) => answer,
        Ok(None) => Err(late("the stream has ended, no answer")),
        Err(_) => Err(late("no answer")),
    }
}

fn told(refusal: &Refusal) -> String {
    format!("{}: {}", refusal.code, refusal.why)
}

/// This process: it does not end while it asks about itself.
struct Myself;

impl Process for Myself {
    fn pid(&self) -> i32 {
        i32::try_from(std::process::id()).expect("the kernel's numbers are smaller")
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(std::future::pending())
    }

    fn is_alive(&self) -> bool {
        true
    }

    fn is_of_own_user(&self) -> bool {
        true
    }
}

impl fmt::Debug for Myself {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Myself")
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use zspire_identity::spire::Meaning;

    use super::*;
    use crate::config::options::Values;

    fn config() -> Config {
        let pairs = [
            ("IDENTITY_SOURCE", "spire-delegated"),
            ("SPIRE_ADMIN_ENDPOINT_SOCKET", "unix:///run/admin.sock"),
            ("TRUST_DOMAIN", "td"),
        ];
        Config::from_values(Values::from_pairs(pairs)).unwrap()
    }

    fn refusal(code: &'static str, why: &str) -> Refusal {
        Refusal { meaning: Meaning::Outage, code, why: why.into() }
    }

    fn text(finding: &Finding) -> String {
        finding
            .next
            .iter()
            .map(|step| format!("{} {}\n", step.what, step.text.as_deref().unwrap_or_default()))
            .collect()
    }

    #[test]
    fn what_a_delegate_is_told() {
        let own: SpiffeId = "spiffe://td/proxy".parse().unwrap();
        for (code, why, outcome, next) in [
            (
                "PermissionDenied",
                "caller not configured as an authorized delegate",
                Outcome::Fail,
                "[\"spiffe://td/proxy\"]",
            ),
            ("PermissionDenied", "no identity issued", Outcome::Fail, "-selector unix:uid:"),
            ("Unavailable", "workload attestation failed", Outcome::Warn, "hostPID"),
            ("Unimplemented", "unknown service", Outcome::Fail, "1.10.2"),
            ("Internal", "something", Outcome::Fail, "log"),
        ] {
            let finding = delegate_finding("x", &refusal(code, why), &config(), Some(&own));
            assert_eq!(finding.outcome, outcome, "{code} {why}");
            assert!(text(&finding).contains(next), "{code} {why}: {}", text(&finding));
        }
    }

    #[test]
    fn what_a_broker_is_told() {
        let finding = |answer: Option<Refusal>| broker_finding("x", answer.as_ref(), "spiffe://td/proxy", false);
        assert_eq!(finding(None).outcome, Outcome::Ok);
        assert_eq!(finding(Some(refusal("NotFound", "pod with UID … not found"))).outcome, Outcome::Ok);
        let refused = finding(Some(refusal("PermissionDenied", "reference type not allowed")));
        assert_eq!(refused.outcome, Outcome::Fail);
        assert!(text(&refused).contains("KubernetesObjectReference"), "{}", text(&refused));
    }

    #[test]
    fn clocks_that_disagree() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let leaf = CertificateView { pem: String::new(), serial: "1".into(), not_before: at(100), not_after: at(200) };
        assert_eq!(clock(&leaf, at(150)).outcome, Outcome::Ok);
        assert!(clock(&leaf, at(70)).what.contains("in 30 s: this clock is behind"));
        assert!(clock(&leaf, at(209)).what.contains("expired 9 s ago"));
    }

    #[tokio::test]
    async fn sockets_that_are_not_there_or_refuse() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let endpoint = Endpoint::Unix(path.clone());
        let look = || socket("x", "VARIABLE", &endpoint);
        let missing = look().await;
        assert_eq!(missing.outcome, Outcome::Fail);
        assert!(text(&missing).contains("mounted") && text(&missing).contains("VARIABLE"), "{missing:?}");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let there = look().await;
        assert_eq!(there.outcome, Outcome::Ok);
        assert!(there.what.contains("mode 0"), "{}", there.what);
        drop(listener);
        assert!(text(&look().await).contains("an old one"), "nobody listens any more");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert!(look().await.what.contains("not a socket"));
    }
}
