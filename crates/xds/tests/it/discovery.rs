//! The client, against a server that a test plays by hand.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tonic::body::Body;
use tonic::{Code, Status};
use zspire_model::policy::{Action, Scope};
use zspire_xds::client::{self, Termination};
use zspire_xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};

use crate::fake::{Fake, malformed, response, wire};
use crate::support::{Running, config, policy, put_workload, service, soon};

fn first() -> Resource {
    put_workload("c//Pod/a/1", "10.0.0.1")
}

fn second() -> Resource {
    put_workload("c//Pod/a/2", "10.0.0.2")
}

#[tokio::test]
async fn the_first_answers_of_both_types_make_it_synced() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    let mut stream = fake.stream().await;
    let (addresses, policies) = stream.opening().await;
    for request in [&addresses, &policies] {
        let node = request.node.as_ref().unwrap();
        assert_eq!(node.id, "ztunnel~10.0.0.1~proxy.istio-system~istio-system.svc.cluster.local");
        assert!(node.metadata.as_ref().unwrap().fields.contains_key("NODE_NAME"));
        assert!(request.resource_names_subscribe.is_empty() && request.initial_resource_versions.is_empty());
    }
    let ack = stream
        .exchange(response(ADDRESS_TYPE, "1", vec![wire(&first(), "1"), wire(&service("h", "10.9.0.1"), "2")], &[]))
        .await;
    assert_eq!((ack.type_url.as_str(), ack.error_detail), (ADDRESS_TYPE, None));
    let world = client.until("it is applied", |world| world.resources.len() == 2).await;
    assert_eq!((world.synced, world.connected()), (0, true));
    // An empty answer is an answer.
    stream.exchange(response(AUTHORIZATION_TYPE, "2", vec![], &[])).await;
    let world = client.until("it is synced", |world| world.synced == 1).await;
    assert_eq!(world.names(), ["s a/h", "w c//Pod/a/1"]);
    assert_eq!(world.batches.len(), 1);
}

#[tokio::test]
async fn later_answers_change_what_they_name() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    let mut stream = fake.stream().await;
    stream.opening().await;
    stream
        .exchange(response(ADDRESS_TYPE, "1", vec![wire(&first(), "1"), wire(&service("h", "10.9.0.1"), "2")], &[]))
        .await;
    stream.exchange(response(AUTHORIZATION_TYPE, "2", vec![wire(&policy("p"), "")], &[])).await;
    stream.exchange(response(ADDRESS_TYPE, "3", vec![wire(&second(), "3")], &["a/h", "never-there"])).await;
    stream.exchange(response(AUTHORIZATION_TYPE, "4", vec![], &["a/p"])).await;
    let world = client.until("all is applied", |world| world.batches.len() == 4).await;
    assert_eq!(world.names(), ["w c//Pod/a/1", "w c//Pod/a/2"]);
    assert_eq!(world.batches[2], ["-s a/h", "+w c//Pod/a/2"]);
    assert_eq!(world.synced, 1);
    let messages = client.stats.snapshot();
    assert!(messages.connected && messages.first_answer.is_some() && messages.last_message.is_some());
    assert_eq!(messages.messages[ADDRESS_TYPE], 2);
    assert!(messages.message_bytes[ADDRESS_TYPE] > 50);
}

#[tokio::test]
async fn what_cannot_be_used_is_rejected_by_name_and_the_rest_is_applied() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    let mut stream = fake.stream().await;
    stream.opening().await;
    let mut misnamed = wire(&second(), "1");
    misnamed.name = "another".into();
    let resources = vec![malformed(ADDRESS_TYPE, "broken"), wire(&first(), "1"), misnamed];
    let nack = stream.exchange(response(ADDRESS_TYPE, "1", resources, &[])).await;
    let detail = nack.error_detail.unwrap();
    assert_eq!(detail.code, Code::InvalidArgument as i32);
    assert!(detail.message.contains("2 of the resources") && detail.message.contains("broken"), "{}", detail.message);
    assert!(detail.message.contains("calls itself \"c//Pod/a/2\""), "{}", detail.message);
    // A rejection does not keep the node from starting.
    stream.exchange(response(AUTHORIZATION_TYPE, "2", vec![], &[])).await;
    let world = client.until("it is synced", |world| world.synced == 1).await;
    assert_eq!(world.names(), ["w c//Pod/a/1"]);
    // What was good stays good while its update is not.
    let nack = stream.exchange(response(ADDRESS_TYPE, "3", vec![malformed(ADDRESS_TYPE, "c//Pod/a/1")], &[])).await;
    assert!(nack.error_detail.is_some());
    assert_eq!(client.world.borrow().names(), ["w c//Pod/a/1"]);
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_denies_until_it_can() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    let mut stream = fake.stream().await;
    stream.opening().await;
    stream.exchange(response(ADDRESS_TYPE, "1", vec![], &[])).await;
    let nack =
        stream.exchange(response(AUTHORIZATION_TYPE, "2", vec![malformed(AUTHORIZATION_TYPE, "a/p")], &[])).await;
    assert!(nack.error_detail.is_some());
    let world = client.until("it is synced", |world| world.synced == 1).await;
    let Resource::Policy(placeholder) = &world.resources["p a/p"] else { panic!() };
    assert!(placeholder.unsupported.is_some());
    stream.exchange(response(AUTHORIZATION_TYPE, "3", vec![wire(&policy("p"), "")], &[])).await;
    let world = client.until("it is read", |world| world.batches.len() == 2).await;
    assert_eq!(world.resources["p a/p"], policy("p"));
}

/// Where it applies is what it says before the place that cannot be read; where that is nothing it may be anywhere.
#[tokio::test]
async fn a_policy_that_cannot_be_read_denies_wherever_it_may_apply() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    let mut stream = fake.stream().await;
    stream.opening().await;
    stream.exchange(response(ADDRESS_TYPE, "1", vec![], &[])).await;
    let broken = |name: &str, value: &[u8]| {
        let mut broken = malformed(AUTHORIZATION_TYPE, name);
        broken.resource.as_mut().unwrap().value = value.to_vec();
        broken
    };
    let mut bodiless = malformed(AUTHORIZATION_TYPE, "a/bodiless");
    bodiless.resource = None;
    let scope_field = |scope: u8| vec![0x18, scope, 0xff];
    let resources = vec![
        broken("a/garbage", &[0xff; 8]),
        broken("a/namespace", &scope_field(1)),
        broken("a/selector", &scope_field(2)),
        broken("a/global", &scope_field(0)),
        broken("a/future", &scope_field(9)),
        broken("nameless", &[0xff]),
        bodiless,
    ];
    let nack = stream.exchange(response(AUTHORIZATION_TYPE, "2", resources, &[])).await;
    assert!(nack.error_detail.unwrap().message.contains("7 of the resources"));
    let world = client.until("it is synced", |world| world.synced == 1).await;
    let scopes: Vec<_> = world
        .resources
        .iter()
        .map(|(name, resource)| {
            let Resource::Policy(policy) = resource else { panic!("{name}") };
            assert!(policy.unsupported.is_some() && policy.action == Action::Deny && !policy.dry_run, "{name}");
            (name.as_str(), policy.scope)
        })
        .collect();
    assert_eq!(
        scopes,
        [
            ("p /nameless", Scope::Global),
            ("p a/bodiless", Scope::Global),
            ("p a/future", Scope::Global),
            ("p a/garbage", Scope::Global),
            ("p a/global", Scope::Global),
            ("p a/namespace", Scope::Namespace),
            ("p a/selector", Scope::WorkloadSelector),
        ]
    );
    // They can be removed, whatever they are called; and what was good stays good.
    stream.exchange(response(AUTHORIZATION_TYPE, "3", vec![wire(&policy("p"), "")], &["nameless", "a/garbage"])).await;
    stream.exchange(response(AUTHORIZATION_TYPE, "4", vec![malformed(AUTHORIZATION_TYPE, "a/p")], &[])).await;
    let world = client.until("they are removed", |world| world.batches.len() == 2).await;
    assert_eq!(world.resources.len(), 6);
    assert_eq!(world.resources["p a/p"], policy("p"));
}

#[tokio::test]
async fn a_type_that_was_not_asked_for_is_rejected() {
    let mut fake = Fake::new().await;
    let client = Running::of(fake.served.address);
    let mut stream = fake.stream().await;
    stream.opening().await;
    let nack = stream.exchange(response("type.example/other", "1", vec![], &[])).await;
    assert_eq!(nack.type_url, "type.example/other");
    assert!(nack.error_detail.unwrap().message.contains("unknown resource type"));
    assert_eq!(client.stats.snapshot().messages["unknown"], 1);
    // A resource of another type than its response, too.
    let nack = stream.exchange(response(ADDRESS_TYPE, "2", vec![wire(&policy("p"), "")], &[])).await;
    assert!(nack.error_detail.unwrap().message.contains("unknown resource type"));
}

/// A stream with what is known on it, and then its end.
async fn known(fake: &mut Fake, client: &mut Running) {
    let mut stream = fake.stream().await;
    stream.opening().await;
    stream.exchange(response(ADDRESS_TYPE, "1", vec![wire(&first(), "f1"), wire(&second(), "f2")], &[])).await;
    stream.exchange(response(AUTHORIZATION_TYPE, "2", vec![wire(&policy("p"), ""), wire(&policy("q"), "")], &[])).await;
    client.until("it is synced", |world| world.synced == 1).await;
    stream.fail(Status::unavailable("restarting")).await;
}

#[tokio::test]
async fn a_new_stream_says_what_is_known_and_hears_what_vanished() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    known(&mut fake, &mut client).await;
    let mut stream = fake.stream().await;
    let (addresses, policies) = stream.opening().await;
    let versions: Vec<_> = addresses.initial_resource_versions.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(versions, [("c//Pod/a/1", "f1"), ("c//Pod/a/2", "f2")]);
    assert_eq!(policies.initial_resource_versions.len(), 2);
    // As istiod answers: what is equal is left out, what is gone is named; policies have no versions and come again.
    stream.exchange(response(ADDRESS_TYPE, "1", vec![], &["c//Pod/a/2"])).await;
    stream.exchange(response(AUTHORIZATION_TYPE, "2", vec![wire(&policy("p"), "")], &[])).await;
    let world = client.until("it is applied", |world| world.batches.len() == 4).await;
    assert_eq!(world.names(), ["p a/p", "w c//Pod/a/1"]);
    assert_eq!(world.synced, 1);
    let lost = world.states.iter().find_map(|it| match it {
        client::Status::Connecting { attempt: 1, last_error } => last_error.clone(),
        _ => None,
    });
    let lost = lost.unwrap();
    assert!(lost.contains("restarting; check the address (XDS_ADDRESS), and that the server runs"), "{lost}");
    let stats = client.stats.snapshot();
    assert_eq!((stats.connection_terminations[&Termination::Error], stats.connected), (1, true));
}

/// It shows by sending again what the client said it has.
#[tokio::test]
async fn a_server_that_does_not_compare_sends_everything_and_what_it_does_not_send_is_gone() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    known(&mut fake, &mut client).await;
    let mut stream = fake.stream().await;
    stream.opening().await;
    stream.exchange(response(ADDRESS_TYPE, "1", vec![wire(&second(), "f2")], &[])).await;
    let world = client.until("it is applied", |world| world.batches.len() == 3).await;
    assert!(!world.resources.contains_key("w c//Pod/a/1"), "{:?}", world.names());
    assert!(world.resources.contains_key("w c//Pod/a/2"));
}

#[tokio::test]
async fn versions_that_do_not_fit_a_request_are_not_sent_and_all_is_discovered_anew() {
    let mut fake = Fake::new().await;
    let mut config = config();
    config.max_request = 40;
    let mut client = Running::new(config, crate::support::channel(fake.served.address));
    known(&mut fake, &mut client).await;
    let mut stream = fake.stream().await;
    let (addresses, _) = stream.opening().await;
    assert!(addresses.initial_resource_versions.is_empty());
    stream.exchange(response(ADDRESS_TYPE, "1", vec![wire(&second(), "f3")], &[])).await;
    let world = client.until("it is applied", |world| world.batches.len() == 3).await;
    assert_eq!(world.names(), ["p a/p", "p a/q", "w c//Pod/a/2"]);
}

#[tokio::test]
async fn a_stream_that_ends_after_each_answer_brings_what_it_says_and_no_more() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    let answers = [
        response(ADDRESS_TYPE, "1", vec![wire(&first(), "f1")], &[]),
        response(AUTHORIZATION_TYPE, "1", vec![wire(&policy("p"), "")], &[]),
        response(ADDRESS_TYPE, "2", vec![wire(&second(), "f2")], &[]),
    ];
    for answer in answers {
        let mut stream = fake.stream().await;
        stream.opening().await;
        stream.exchange(answer).await;
        stream.fail(Status::unavailable("and again")).await;
    }
    let world = client.until("it is applied", |world| world.resources.len() == 3).await;
    assert_eq!(world.names(), ["p a/p", "w c//Pod/a/1", "w c//Pod/a/2"]);
    // Only both types on one stream are known to be the mesh of one moment.
    assert_eq!(world.synced, 0);
    let mut stream = fake.stream().await;
    stream.opening().await;
    stream.exchange(response(ADDRESS_TYPE, "3", vec![], &[])).await;
    stream.exchange(response(AUTHORIZATION_TYPE, "3", vec![wire(&policy("p"), "")], &[])).await;
    let world = client.until("it is synced", |world| world.synced == 1).await;
    assert_eq!(world.resources.len(), 3);
}

/// The limit is 200 MiB, as that of ztunnel; here it is less.
#[tokio::test]
async fn an_answer_beyond_the_limit_is_told_and_what_is_known_stays() {
    let mut fake = Fake::new().await;
    let mut config = config();
    assert_eq!(config.max_message, 200 << 20);
    config.max_message = 64 << 10;
    let mut client = Running::new(config, crate::support::channel(fake.served.address));
    known(&mut fake, &mut client).await;
    let mut stream = fake.stream().await;
    stream.opening().await;
    let many = (0..1000)
        .map(|n| wire(&put_workload(&format!("c//Pod/a/many-{n}"), &format!("10.1.{}.{}", n / 250, n % 250)), "1"));
    stream.send(response(ADDRESS_TYPE, "1", many.collect(), &[])).await;
    let told = |world: &crate::support::World| {
        world.states.iter().any(|it| matches!(it, client::Status::Connecting { last_error: Some(why), .. } if why.contains("message length too large")))
    };
    let world = client.until("it is told", told).await;
    assert_eq!(world.names(), ["p a/p", "p a/q", "w c//Pod/a/1", "w c//Pod/a/2"]);
}

#[tokio::test]
async fn it_ends_with_its_shutdown() {
    let mut fake = Fake::new().await;
    let mut client = Running::of(fake.served.address);
    let mut stream = fake.stream().await;
    stream.opening().await;
    client.shutdown.cancel();
    soon("its end", &mut client.task).await.unwrap();
}

/// A connection that always fails, with the times at which it was tried.
#[derive(Clone, Default)]
struct Unreachable(Arc<Mutex<Vec<Instant>>>);

impl tower::Service<tonic::codegen::http::Request<Body>> for Unreachable {
    type Response = tonic::codegen::http::Response<Body>;
    type Error = Status;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Status>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: tonic::codegen::http::Request<Body>) -> Self::Future {
        self.0.lock().unwrap().push(Instant::now());
        std::future::ready(Err(Status::unavailable("nobody there")))
    }
}

#[tokio::test(start_paused = true)]
async fn it_tries_again_with_growing_random_waits() {
    let unreachable = Unreachable::default();
    let mut config = config();
    config.backoff_max = Duration::from_secs(15);
    let mut client = Running::new(config, unreachable.clone());
    let until = |world: &crate::support::World| world.states.len() >= 200;
    tokio::time::timeout(Duration::from_secs(24 * 3600), client.world.wait_for(until)).await.unwrap().unwrap();
    let times = unreachable.0.lock().unwrap().clone();
    let waits: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (attempt, wait) in waits.iter().enumerate() {
        let most = Duration::from_millis(10 << attempt.min(20)).min(Duration::from_secs(15));
        // Timers round up to a millisecond.
        assert!(*wait <= most + Duration::from_millis(1), "{wait:?} before attempt {attempt}");
    }
    let long = &waits[20..];
    assert!(long.iter().any(|wait| *wait > Duration::from_secs(8)), "{long:?}");
    assert!(long.iter().any(|wait| *wait < Duration::from_secs(5)), "{long:?}");
    let Some(client::Status::Connecting { attempt, last_error }) = client.world.borrow().states.get(3).cloned() else {
        panic!()
    };
    let expected = "nobody there; check the address (XDS_ADDRESS), and that the server runs";
    assert_eq!((attempt, last_error.as_deref()), (3, Some(expected)));
}
