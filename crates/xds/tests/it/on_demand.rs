//! Discovery by name.

use zspire_xds::client::{Answer, DemandError};
use zspire_xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

use crate::fake::{Fake, FakeStream, response, wire};
use crate::support::{Running, channel, config, endpoint, put_workload, service, soon};
use tonic::Status;

async fn started(fake: &mut Fake) -> (Running, FakeStream) {
    let mut config = config();
    config.on_demand = true;
    let mut client = Running::new(config, channel(fake.served.address));
    let mut stream = fake.stream().await;
    let (addresses, policies) = stream.opening().await;
    assert_eq!(addresses.resource_names_subscribe, ["*"]);
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
    assert!(policies.resource_names_subscribe.is_empty());
    stream.exchange(response(ADDRESS_TYPE, "1", vec![], &[])).await;
    stream.exchange(response(AUTHORIZATION_TYPE, "2", vec![], &[])).await;
    client.until("it is synced", |world| world.synced == 1).await;
    (client, stream)
}

#[tokio::test]
async fn everybody_who_asks_for_a_key_gets_the_one_answer() {
    let mut fake = Fake::new().await;
    let (client, mut stream) = started(&mut fake).await;
    let demand = client.demand.clone().unwrap();
    let ask = |key: &'static str| {
        let demand = demand.clone();
        tokio::spawn(async move { demand.get(key).await })
    };
    let (one, two) = (ask("/10.9.0.1"), ask("/10.9.0.1"));
    assert_eq!(stream.request().await.resource_names_subscribe, ["/10.9.0.1"]);
    let found = vec![wire(&service("h", "10.9.0.1"), "1"), wire(&endpoint("w", "10.0.0.1", "h"), "2")];
    stream.exchange(response(ADDRESS_TYPE, "3", found, &[])).await;
    assert_eq!(soon("an answer", one).await.unwrap(), Ok(Answer::Found));
    assert_eq!(soon("an answer", two).await.unwrap(), Ok(Answer::Found));
    // By then it is applied, and nobody has to ask again.
    assert_eq!(client.world.borrow().names(), ["s a/h", "w w"]);
    assert_eq!(soon("an answer", demand.get("/10.9.0.1")).await, Ok(Answer::Found));

    let nothing = ask("/10.9.0.2");
    assert_eq!(stream.request().await.resource_names_subscribe, ["/10.9.0.2"]);
    stream.exchange(response(ADDRESS_TYPE, "4", vec![], &["/10.9.0.2"])).await;
    assert_eq!(soon("an answer", nothing).await.unwrap(), Ok(Answer::Unknown));
    // What appears later is found; what was found and is removed is not any more.
    stream.exchange(response(ADDRESS_TYPE, "5", vec![wire(&service("i", "10.9.0.2"), "1")], &["a/h"])).await;
    assert_eq!(soon("an answer", demand.get("/10.9.0.2")).await, Ok(Answer::Found));
    assert_eq!(soon("an answer", demand.get("/10.9.0.1")).await, Ok(Answer::Unknown));
    assert_eq!(soon("an answer", demand.get("*")).await, Err(DemandError::Key));
}

#[tokio::test]
async fn a_new_stream_asks_again() {
    let mut fake = Fake::new().await;
    let (client, mut stream) = started(&mut fake).await;
    let demand = client.demand.clone().unwrap();
    let asking = tokio::spawn(async move { demand.get("w").await });
    assert_eq!(stream.request().await.resource_names_subscribe, ["w"]);
    stream.fail(Status::unavailable("restarting")).await;
    let mut stream = fake.stream().await;
    stream.opening().await;
    assert_eq!(stream.request().await.resource_names_subscribe, ["w"]);
    // That an answer does not name what is known does not mean that it is gone.
    stream.exchange(response(ADDRESS_TYPE, "1", vec![wire(&put_workload("w", "10.0.0.1"), "1")], &[])).await;
    assert_eq!(soon("an answer", asking).await.unwrap(), Ok(Answer::Found));
}

#[tokio::test]
async fn whoever_waits_hears_of_the_end() {
    let mut fake = Fake::new().await;
    let (client, mut stream) = started(&mut fake).await;
    let demand = client.demand.clone().unwrap();
    let asking = tokio::spawn(async move { demand.get("w").await });
    stream.request().await;
    client.shutdown.cancel();
    assert_eq!(soon("the end", asking).await.unwrap(), Err(DemandError::Ended));
}
