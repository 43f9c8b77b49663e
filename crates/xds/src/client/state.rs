//! The client's side of the protocol, without its streams: requests to open one with, and what a response means.

use std::sync::Arc;

use prost::bytes::Bytes;
use tonic::Code;
use zspire_model::Change;
use zspire_wire::discovery::{DeltaDiscoveryRequest, Node, Resource as WireResource};
use zspire_wire::rpc;

use super::demand::{Ask, Due, Keys, News};
use super::known::Known;
use crate::codec::{self, ADDRESS_TYPE, AUTHORIZATION_TYPE, Decoder, Resource};
use crate::resource::Kind;

/// Subscribed names in one request.
const NAMES_AT_ONCE: usize = 2_000;
/// Rejected resources that a rejection names.
const NAMED_FAILURES: usize = 20;

/// All that outlives a stream.
#[derive(Debug)]
pub(super) struct State {
    addresses: Known,
    policies: Known,
    keys: Keys,
    max_request: usize,
    synced: bool,
}

impl State {
    pub(super) fn new(on_demand: bool, max_request: usize) -> Self {
        Self {
            addresses: Known::new(ADDRESS_TYPE, !on_demand),
            policies: Known::new(AUTHORIZATION_TYPE, true),
            keys: Keys::default(),
            max_request,
            synced: false,
        }
    }

    /// The requests that a stream begins with.
    pub(super) fn open(&mut self, node: &Node) -> Vec<DeltaDiscoveryRequest> {
        let max = self.max_request;
        let first = |known: &mut Known| DeltaDiscoveryRequest {
            node: Some(node.clone()),
            type_url: known.type_url.into(),
            initial_resource_versions: known.begin_stream(max),
            ..Default::default()
        };
        let mut addresses = first(&mut self.addresses);
        if !self.addresses.wildcard {
            // How the protocol says "nothing yet": an empty subscription would mean everything.
            addresses.resource_names_subscribe = vec!["*".into()];
            addresses.resource_names_unsubscribe = vec!["*".into()];
        }
        let keys: Vec<String> = self.keys.all().map(ToString::to_string).collect();
        let mut requests = vec![addresses, first(&mut self.policies)];
        requests.extend(keys.chunks(NAMES_AT_ONCE).map(|keys| subscribe(keys.to_vec())));
        requests
    }

    /// Somebody asks for a resource: the request to send, unless the answer is known or under way.
    pub(super) fn ask(&mut self, ask: Ask) -> Option<DeltaDiscoveryRequest> {
        let News { subscribe: key, unsubscribe } = self.keys.ask(ask);
        Some(DeltaDiscoveryRequest {
            resource_names_unsubscribe: unsubscribe.iter().map(ToString::to_string).collect(),
            ..subscribe(vec![key?.to_string()])
        })
    }

    /// A response begins; none if nothing of its type was asked for.
    pub(super) fn begin(&mut self, type_url: &str, removed: &[String]) -> Option<Receiving<'_>> {
        let known = [&mut self.addresses, &mut self.policies].into_iter().find(|known| known.type_url == type_url)?;
        let mut answers = Vec::new();
        let changes = removed.iter().filter_map(|name| known.remove(name)).collect();
        if known.type_url == ADDRESS_TYPE {
            self.keys.removed(removed, &mut answers);
        }
        Some(Receiving { known, keys: &mut self.keys, changes, answers, failures: Failures::default() })
    }

    /// Whether all types have their first answer, and had not when this was asked before. What was rejected in an answer does
    /// not count against it: one bad resource must not keep a node from starting.
    pub(super) fn newly_synced(&mut self) -> bool {
        let synced = self.addresses.answered() && self.policies.answered();
        synced && !std::mem::replace(&mut self.synced, true)
    }
}

fn subscribe(names: Vec<String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.into(),
        resource_names_subscribe: names,
        ..DeltaDiscoveryRequest::default()
    }
}

/// A response that is being taken in, resource by resource.
pub(super) struct Receiving<'a> {
    known: &'a mut Known,
    keys: &'a mut Keys,
    changes: Vec<Change>,
    answers: Vec<Due>,
    failures: Failures,
}

/// What a response leads to, in this order.
pub(super) struct Received {
    pub(super) changes: Vec<Change>,
    pub(super) answers: Vec<Due>,
    pub(super) reply: DeltaDiscoveryRequest,
}

impl Receiving<'_> {
    pub(super) fn resource(&mut self, decoder: &mut Decoder, from: WireResource) {
        let WireResource { name, version, aliases, resource } = from;
        let (value_type, value) = resource.map(|it| (it.type_url, it.value)).unzip();
        let value = Bytes::from(value.unwrap_or_default());
        match decode(decoder, self.known.type_url, &name, value_type, value.clone()) {
            Ok(resource) => self.put(resource, &version, &aliases),
            Err(error) => self.failed(name, &value, &error),
        }
    }

    fn put(&mut self, resource: Resource, version: &str, aliases: &[String]) {
        let name = resource.name();
        if !self.known.wildcard {
            self.keys.found(&name, &name, &mut self.answers);
            for alias in aliases.iter().cloned().chain(addresses(&resource)) {
                self.keys.found(&alias, &name, &mut self.answers);
            }
        }
        self.changes.extend(self.known.put(name, resource.kind(), version));
        self.changes.push(resource.put());
    }

    /// What was known of it stays; a policy of which nothing was known denies, until it can be read, wherever it may apply.
    fn failed(&mut self, name: String, value: &Bytes, error: &codec::Error) {
        tracing::warn!(resource = %shortened(&name), %error, "rejected a resource");
        if !self.known.keep(&name) && self.known.type_url == AUTHORIZATION_TYPE {
            let policy = Decoder::unreadable_policy(&name, value, error);
            self.changes.extend(self.known.put(name.as_str().into(), Kind::Policy, ""));
            self.changes.push(Change::PutPolicy(Arc::new(policy)));
        }
        self.failures.add(&name, error);
    }

    pub(super) fn end(mut self, nonce: String) -> Received {
        self.known.end_of_answer(&mut self.changes);
        let reply = DeltaDiscoveryRequest {
            type_url: self.known.type_url.into(),
            response_nonce: nonce,
            error_detail: self.failures.detail(),
            ..Default::default()
        };
        Received { changes: self.changes, answers: self.answers, reply }
    }
}

fn decode(
    decoder: &mut Decoder,
    type_url: &str,
    name: &str,
    value_type: Option<String>,
    value: Bytes,
) -> Result<Resource, codec::Error> {
    let value_type = value_type.ok_or(codec::Error::Missing("the value of the resource"))?;
    if value_type != type_url {
        return Err(codec::Error::UnknownType(shortened(&value_type).to_owned()));
    }
    let resource = decoder.decode(type_url, value)?;
    let own = resource.name();
    // It is removed by the name that it is sent under: under another it could never be.
    if *own != *name {
        let why = format!("the resource calls itself {:?}", shortened(&own));
        return Err(codec::Error::Invalid { field: "name", why });
    }
    Ok(resource)
}

/// The other keys by which a resource may have been asked for.
fn addresses(resource: &Resource) -> Vec<String> {
    match resource {
        Resource::Workload(it) => it.addresses.iter().map(|address| format!("{}/{address}", it.network)).collect(),
        Resource::Service(it) => it.vips.iter().map(ToString::to_string).collect(),
        Resource::Policy(_) => Vec::new(),
    }
}

/// Rejects a response of a type that was not asked for.
pub(super) fn reject_type(type_url: String, nonce: String) -> DeltaDiscoveryRequest {
    let message = format!("unknown resource type {:?}", shortened(&type_url));
    tracing::warn!(message, "rejected a response");
    DeltaDiscoveryRequest {
        type_url,
        response_nonce: nonce,
        error_detail: Some(invalid(message)),
        ..Default::default()
    }
}

fn invalid(message: String) -> rpc::Status {
    rpc::Status { code: Code::InvalidArgument as i32, message, details: Vec::new() }
}

fn shortened(text: &str) -> &str {
    text.char_indices().nth(200).map_or(text, |(end, _)| &text[..end])
}

/// What could not be applied of a response: all of it is counted, some of it named.
#[derive(Default)]
struct Failures {
    count: usize,
    named: String,
}

impl Failures {
    fn add(&mut self, name: &str, error: &codec::Error) {
        if self.count < NAMED_FAILURES {
            let separator = if self.count > 0 { "; " } else { "" };
            self.named.push_str(&format!("{separator}{}: {}", shortened(name), shortened(&error.to_string())));
        }
        self.count += 1;
    }

    fn detail(self) -> Option<rpc::Status> {
        if self.count == 0 {
            return None;
        }
        let more = self.count.saturating_sub(NAMED_FAILURES);
        let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
        Some(invalid(format!("{} of the resources cannot be used: {}{rest}", self.count, self.named)))
    }
}
