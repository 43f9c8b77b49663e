//! One stream: requests and new sets come in, one response per type is under way at a time.

use std::sync::Arc;

use futures::Stream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};
use zspire_wire::discovery::{ControlPlane, DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use super::connections::Tracked;
use super::set::ResourceSet;
use super::subscription::Subscription;
use super::{Limits, Node, Server};
use crate::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// Types in one stream that are not known: each is answered once, with nothing.
const MAX_UNKNOWN_TYPES: u32 = 16;

pub(super) struct State {
    requests: Streaming<DeltaDiscoveryRequest>,
    resources: watch::Receiver<Arc<ResourceSet>>,
    node: Node,
    limits: Limits,
    identifier: Arc<str>,
    tracked: Tracked,
    types: [Type; 2],
    /// Responses that are not about a known type.
    other: Vec<DeltaDiscoveryResponse>,
    unknown_types: u32,
    nonce: u64,
}

struct Type {
    url: &'static str,
    subscription: Option<Subscription>,
    under_way: Option<UnderWay>,
}

/// A response that is not acknowledged yet.
struct UnderWay {
    nonce: String,
    version: String,
    deadline: Instant,
}

#[allow(clippy::large_enum_variant, reason = "it lives from one line to the next")]
enum Event {
    Request(Result<Option<DeltaDiscoveryRequest>, Status>),
    Resources(Result<(), watch::error::RecvError>),
    Late,
}

impl State {
    pub(super) fn new(
        server: &Server,
        requests: Streaming<DeltaDiscoveryRequest>,
        node: Node,
        tracked: Tracked,
    ) -> Self {
        let of = |url| Type { url, subscription: None, under_way: None };
        Self {
            requests,
            resources: server.resources.clone(),
            node,
            limits: server.limits.clone(),
            identifier: server.identifier.clone(),
            tracked,
            types: [of(ADDRESS_TYPE), of(AUTHORIZATION_TYPE)],
            other: Vec::new(),
            unknown_types: 0,
            nonce: 0,
        }
    }

    /// The responses of the stream, the first request being taken in already.
    pub(super) fn responses(
        self,
        first: DeltaDiscoveryRequest,
    ) -> impl Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static {
        futures::stream::unfold(Some((self, Some(first))), |state| async move {
            let (mut state, first) = state?;
            match state.next(first).await {
                Ok(Some(response)) => Some((Ok(response), Some((state, None)))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        })
    }

    /// The next response; none when the client has ended the stream.
    async fn next(&mut self, first: Option<DeltaDiscoveryRequest>) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        if let Some(first) = first {
            self.request(first)?;
        }
        loop {
            if let Some(response) = self.due() {
                return Ok(Some(response));
            }
            match self.event().await {
                Event::Request(Ok(Some(request))) => self.request(request)?,
                Event::Request(Ok(None)) => return Ok(None),
                Event::Request(Err(status)) => {
                    tracing::debug!(node = %self.node.id, %status, "discovery stream broke");
                    return Ok(None);
                }
                Event::Resources(Ok(())) => self.subscriptions().for_each(Subscription::set_changed),
                Event::Resources(Err(_)) => return Err(Status::unavailable("the server is stopping")),
                Event::Late => return Err(Status::deadline_exceeded("a response was not acknowledged")),
            }
        }
    }

    async fn event(&mut self) -> Event {
        let deadline = self.types.iter().filter_map(|it| it.under_way.as_ref()).map(|it| it.deadline).min();
        let late = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            request = self.requests.message() => Event::Request(request),
            changed = self.resources.changed() => Event::Resources(changed),
            () = late => Event::Late,
        }
    }

    fn subscriptions(&mut self) -> impl Iterator<Item = &mut Subscription> {
        self.types.iter_mut().filter_map(|it| it.subscription.as_mut())
    }

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let Some(at) = self.types.iter().position(|it| it.url == request.type_url) else {
            return self.unknown_type(request);
        };
        self.acknowledge(at, &request);
        let max = self.limits.max_subscriptions;
        let it = &mut self.types[at];
        match &mut it.subscription {
            Some(subscription) => {
                subscription.change(request.resource_names_subscribe, request.resource_names_unsubscribe, max)
            }
            None => {
                it.subscription = Some(Subscription::new(it.url, request, max)?);
                Ok(())
            }
        }
    }

    /// Acknowledgements of anything but the last response come late and mean nothing.
    fn acknowledge(&mut self, at: usize, request: &DeltaDiscoveryRequest) {
        let it = &mut self.types[at];
        let Some(under_way) = it.under_way.take_if(|it| it.nonce == request.response_nonce) else { return };
        let rejection =
            request.error_detail.as_ref().map(|status| status.message.chars().take(2000).collect::<String>());
        if let Some(message) = &rejection {
            tracing::warn!(node = %self.node.id, r#type = it.url, message, "a client rejected resources");
        }
        self.tracked.update(it.url, |status| {
            status.acknowledged = under_way.version;
            if rejection.is_some() {
                status.last_rejection = rejection;
            }
        });
    }

    /// Answered with nothing, as Istio's server does: a client that asks for more than there is can still start.
    fn unknown_type(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if !request.response_nonce.is_empty() {
            return Ok(());
        }
        self.unknown_types += 1;
        if self.unknown_types > MAX_UNKNOWN_TYPES {
            return Err(Status::invalid_argument("too many resource types that are not known"));
        }
        self.other.push(DeltaDiscoveryResponse { type_url: request.type_url, ..Default::default() });
        Ok(())
    }

    /// A response that can be sent now.
    fn due(&mut self) -> Option<DeltaDiscoveryResponse> {
        if let Some(response) = self.other.pop() {
            return Some(self.numbered(response, String::new()));
        }
        // Not marked as seen: that a set is new is an event, which may come after the set.
        let set = self.resources.borrow().clone();
        let node_name = self.node.node_name().map(str::to_owned);
        for at in 0..self.types.len() {
            let it = &mut self.types[at];
            let (None, Some(subscription)) = (&it.under_way, &mut it.subscription) else { continue };
            let Some(response) = subscription.answer(&set, node_name.as_deref()) else { continue };
            let response = self.numbered(response, set.version());
            let deadline = Instant::now() + self.limits.acknowledgement;
            let (nonce, version) = (response.nonce.clone(), set.version());
            self.types[at].under_way = Some(UnderWay { nonce, version, deadline });
            self.tracked.update(self.types[at].url, |status| status.sent = set.version());
            return Some(response);
        }
        None
    }

    fn numbered(&mut self, mut response: DeltaDiscoveryResponse, version: String) -> DeltaDiscoveryResponse {
        self.nonce += 1;
        response.nonce = self.nonce.to_string();
        response.system_version_info = version;
        response.control_plane = Some(ControlPlane { identifier: self.identifier.to_string() });
        response
    }
}
