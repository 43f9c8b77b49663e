//! Every field of the discovery protocol, and what becomes of it; held against what a real istiod sent.
//!
//! The fields are those of the `.proto` files, by reflection: a field that is added there, or sent without being there, fails here.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MessageDescriptor, ReflectMessage as _, Value};
use zspire_wire::type_url::{ADDRESS, AUTHORIZATION};
use zspire_xds::codec::{Decoder, encode};

use crate::golden::recordings;

/// What is done with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    /// It decides which way a connection goes, or whether it goes.
    Traffic,
    /// It is told in metrics, logs, headers, DNS answers or the admin pages.
    Telling,
    /// It is kept and shown, and changes nothing, for this reason.
    Unused(&'static str),
}
use Use::{Telling, Traffic, Unused};

/// Messages of which all fields have one use.
const WHOLE: &[(&str, Use)] = &[
    ("istio.workload.Address", Traffic),
    ("istio.workload.LoadBalancing", Traffic),
    ("istio.workload.Locality", Traffic),
    ("istio.workload.PortList", Traffic),
    ("istio.workload.ApplicationTunnel", Traffic),
    ("istio.workload.GatewayAddress", Traffic),
    ("istio.workload.WeightedWaypoint", Traffic),
    ("istio.workload.NetworkAddress", Traffic),
    ("istio.workload.NamespacedHostname", Traffic),
    ("istio.workload.Extension", Unused("no extension of workloads or services is defined for node proxies")),
    ("google.protobuf.UInt32Value", Traffic),
    ("google.protobuf.Any", Unused("of an extension")),
    ("google.protobuf.Empty", Traffic),
    ("istio.security.Authorization", Traffic),
    // A policy with one is not understood, and denies.
    ("istio.security.Extension", Traffic),
    ("istio.security.Group", Traffic),
    ("istio.security.Rules", Traffic),
    ("istio.security.Match", Traffic),
    ("istio.security.Address", Traffic),
    ("istio.security.ServiceAccountMatch", Traffic),
    ("istio.security.StringMatch", Traffic),
];

/// The other messages, field by field.
const FIELDS: &[(&str, &[(&str, Use)])] = &[
    (
        "istio.workload.Workload",
        &[
            ("name", Traffic), // Pods that are handed over are found by it.
            ("namespace", Traffic),
            ("addresses", Traffic),
            ("network", Traffic),
            ("tunnel_protocol", Traffic),
            ("trust_domain", Traffic),
            ("service_account", Traffic),
            ("waypoint", Traffic),
            ("node", Traffic),
            ("canonical_name", Telling),
            ("canonical_revision", Telling),
            ("workload_type", Telling),
            ("workload_name", Telling),
            (
                "native_tunnel",
                Unused("how a workload is reached is said by tunnel_protocol, whoever ends the tunnel there"),
            ),
            ("authorization_policies", Traffic),
            ("status", Traffic),
            ("cluster_id", Traffic),
            ("network_gateway", Traffic),
            ("uid", Traffic),
            ("hostname", Traffic),
            ("services", Traffic),
            ("application_tunnel", Traffic),
            ("locality", Traffic),
            ("network_mode", Traffic),
            ("extensions", Unused("none is defined for node proxies")),
            ("capacity", Traffic),
        ],
    ),
    (
        "istio.workload.Service",
        &[
            ("name", Telling),
            ("namespace", Traffic),
            ("hostname", Traffic),
            ("addresses", Traffic),
            ("ports", Traffic),
            ("subject_alt_names", Traffic),
            ("waypoint", Traffic),
            ("load_balancing", Traffic),
            ("ip_families", Traffic),
            ("extensions", Unused("none is defined for node proxies")),
            ("canonical", Traffic),
            (
                "ingress_use_waypoint",
                Unused("it is about gateways at the mesh's edge; a node proxy goes through the waypoint anyway"),
            ),
            ("weighted_waypoints", Traffic),
            ("visibility", Traffic),
        ],
    ),
    ("istio.workload.Port", &[("service_port", Traffic), ("target_port", Traffic), ("app_protocol", Telling)]),
];

fn pool() -> DescriptorPool {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../wire/proto");
    let files = protox::compile(["istio/workload.proto", "istio/authorization.proto"], [root]).unwrap();
    DescriptorPool::from_file_descriptor_set(files).unwrap()
}

fn descriptor(pool: &DescriptorPool, type_url: &str) -> MessageDescriptor {
    pool.get_message_by_name(type_url.strip_prefix("type.googleapis.com/").unwrap()).unwrap()
}

/// The use of each field, by message and name.
fn uses(pool: &DescriptorPool) -> BTreeMap<(String, String), Use> {
    let whole = WHOLE.iter().flat_map(|&(message, of_all)| {
        let message = pool.get_message_by_name(message).unwrap_or_else(|| panic!("there is no {message}"));
        message
            .fields()
            .map(|field| ((message.full_name().to_owned(), field.name().to_owned()), of_all))
            .collect::<Vec<_>>()
    });
    let single = FIELDS.iter().flat_map(|&(message, fields)| {
        fields.iter().map(move |&(field, of_it)| ((message.to_owned(), field.to_owned()), of_it))
    });
    whole.chain(single).collect()
}

/// A message, and those in it.
fn reachable(from: MessageDescriptor, found: &mut BTreeSet<(String, String)>) {
    for field in from.fields() {
        // The entries of a map are no message of their own.
        let new = from.is_map_entry() || found.insert((from.full_name().to_owned(), field.name().to_owned()));
        if let (true, Kind::Message(inner)) = (new, field.kind()) {
            reachable(inner, found);
        }
    }
}

#[test]
fn every_field_of_the_protocol_has_a_use_or_a_reason_to_have_none() {
    let pool = pool();
    let mut fields = BTreeSet::new();
    for root in [ADDRESS, AUTHORIZATION] {
        reachable(descriptor(&pool, root), &mut fields);
    }
    let uses = uses(&pool);
    let listed: BTreeSet<_> = uses.keys().cloned().collect();
    assert_eq!(fields.difference(&listed).collect::<Vec<_>>(), Vec::<&(String, String)>::new(), "not listed");
    assert_eq!(listed.difference(&fields).collect::<Vec<_>>(), Vec::<&(String, String)>::new(), "there are none such");
    assert!(fields.len() > 80, "{}", fields.len());
}

/// What is in a message and in those in it: fields that are set, and numbers that the `.proto` files do not have.
#[derive(Default)]
struct Seen {
    fields: BTreeSet<(String, String)>,
    unknown: Vec<String>,
}

impl Seen {
    fn look(&mut self, message: &DynamicMessage) {
        let name = message.descriptor().full_name().to_owned();
        self.unknown.extend(message.unknown_fields().map(|field| format!("{name} {}", field.number())));
        for (field, value) in message.fields() {
            self.fields.insert((name.clone(), field.name().to_owned()));
            self.look_at(value);
        }
    }

    fn look_at(&mut self, value: &Value) {
        match value {
            Value::Message(inner) => self.look(inner),
            Value::List(list) => list.iter().for_each(|it| self.look_at(it)),
            Value::Map(map) => map.values().for_each(|it| self.look_at(it)),
            _ => {}
        }
    }
}

/// A line for each value in a message, with the way to it: to compare, and to read where two differ.
fn lines(message: &DynamicMessage) -> Vec<String> {
    fn of(way: String, value: &Value, lines: &mut Vec<String>) {
        match value {
            Value::Message(inner) => {
                lines.push(format!("{way} is there"));
                inner.fields().for_each(|(field, value)| of(format!("{way}.{}", field.name()), value, lines));
            }
            Value::List(list) => {
                for (place, it) in list.iter().enumerate() {
                    let place = number(it).unwrap_or(format!("[{place}]"));
                    of(format!("{way}{place}"), it, lines);
                }
            }
            Value::Map(map) => map.iter().for_each(|(key, it)| of(format!("{way}[{key:?}]"), it, lines)),
            single => lines.push(format!("{way} = {single:?}")),
        }
    }
    /// Ports are told apart by their number, and kept in its order.
    fn number(value: &Value) -> Option<String> {
        let number = value.as_message()?.get_field_by_name("service_port")?;
        Some(format!(" of port {}", number.as_u32()?))
    }
    let mut lines = Vec::new();
    of(message.descriptor().name().to_owned(), &Value::Message(message.clone()), &mut lines);
    // Maps have no order.
    lines.sort();
    lines
}

/// Every recorded resource: where it was recorded, its name, its type and its bytes.
fn recorded() -> impl Iterator<Item = (String, String, Vec<u8>)> {
    recordings().into_iter().flat_map(|(recording, response)| {
        response.resources.into_iter().map(move |it| {
            let value = it.resource.unwrap();
            (format!("{recording} {}", it.name), value.type_url, value.value.to_vec())
        })
    })
}

#[test]
fn every_recorded_resource_is_encoded_again_to_the_same_message() {
    let (pool, mut decoder, mut seen) = (pool(), Decoder::default(), Seen::default());
    for (what, type_url, value) in recorded() {
        let read = |bytes: &[u8]| DynamicMessage::decode(descriptor(&pool, &type_url), bytes).unwrap();
        let original = read(&value);
        seen.look(&original);
        let resource = decoder.decode(&type_url, value.clone().into()).unwrap();
        assert_eq!(lines(&read(&encode(&resource))), lines(&original), "{what}");
    }
    assert_eq!(seen.unknown, Vec::<String>::new(), "istiod sends what is not known here");
    let uses = uses(&pool);
    let unused: Vec<_> = seen.fields.iter().filter(|field| matches!(uses[*field], Unused(_))).collect();
    assert_eq!(unused, Vec::<&(String, String)>::new(), "recorded, and of no use");
    assert!(seen.fields.len() > 40, "{}", seen.fields.len());
}

/// The fields that are set in a message and in those in it, as ways to them: each step is a field and, in a list or map, a place.
fn ways(message: &DynamicMessage) -> Vec<Vec<Step>> {
    let mut all = Vec::new();
    for (field, value) in message.fields() {
        let here = Step { field: field.number(), place: None };
        all.push(vec![here.clone()]);
        let inner: Vec<(Option<usize>, &Value)> = match value {
            Value::List(list) => list.iter().enumerate().map(|(place, it)| (Some(place), it)).collect(),
            single => vec![(None, single)],
        };
        for (place, value) in inner {
            let Value::Message(inner) = value else { continue };
            let step = Step { place, ..here.clone() };
            all.extend(ways(inner).into_iter().map(|way| [vec![step.clone()], way].concat()));
        }
    }
    all
}

#[derive(Debug, Clone)]
struct Step {
    field: u32,
    place: Option<usize>,
}

/// Changes the field at the end of the way, or takes it out if it is more than one value; says what it is called.
fn change(message: &mut DynamicMessage, way: &[Step]) -> String {
    let [step, rest @ ..] = way else { panic!("a way leads somewhere") };
    let field = message.descriptor().get_field(step.field).unwrap();
    if rest.is_empty() {
        match other(&message.get_field(&field)) {
            Some(other) => message.set_field(&field, other),
            None => message.clear_field(&field),
        }
        return field.full_name().to_owned();
    }
    let inner = match (message.get_field_mut(&field), step.place) {
        (Value::List(list), Some(place)) => &mut list[place],
        (single, _) => single,
    };
    let Value::Message(inner) = inner else { panic!("{} holds messages", field.full_name()) };
    change(inner, rest)
}

/// Another value of the same kind.
fn other(value: &Value) -> Option<Value> {
    Some(match value {
        Value::Bool(it) => Value::Bool(!it),
        Value::U32(it) => Value::U32(it + 1),
        Value::EnumNumber(it) => Value::EnumNumber(it + 1),
        Value::String(it) => Value::String(format!("{it}x")),
        Value::Bytes(it) => Value::Bytes(it.iter().map(|byte| byte ^ 1).collect::<Vec<_>>().into()),
        _ => return None,
    })
}

#[test]
fn every_recorded_field_is_read() {
    let pool = pool();
    for (what, type_url, value) in recorded() {
        let decode = |value: Vec<u8>| Decoder::default().decode(&type_url, value.into());
        let original = decode(value.clone()).unwrap();
        let message = DynamicMessage::decode(descriptor(&pool, &type_url), &*value).unwrap();
        for way in ways(&message) {
            let mut changed = message.clone();
            let field = change(&mut changed, &way);
            assert_ne!(decode(changed.encode_to_vec()).as_ref(), Ok(&original), "{what}: nothing changes with {field}");
        }
    }
}
