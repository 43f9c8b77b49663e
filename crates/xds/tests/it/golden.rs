//! Responses that a real istiod sent, and the file that a real ztunnel read.

use prost::Message as _;
use zspire_model::policy::{Action, Scope};
use zspire_model::service::{Mode, Scope as Locality};
use zspire_model::workload::NetworkMode;
use zspire_model::{AppProtocol, Protocol, StringMatch};
use zspire_wire::discovery::DeltaDiscoveryResponse;
use zspire_xds::codec::{Decoder, encode};
use zspire_xds::{Kind, Resource};

pub(crate) fn recordings() -> Vec<(String, DeltaDiscoveryResponse)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/istiod");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: std::path::PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        (name, DeltaDiscoveryResponse::decode(&*std::fs::read(&path).unwrap()).unwrap())
    };
    paths.into_iter().map(read).collect()
}

fn resources(recording: &str) -> Vec<Resource> {
    let (_, response) = recordings().into_iter().find(|(name, _)| name == recording).unwrap();
    let mut decoder = Decoder::default();
    let decode = |it: zspire_wire::discovery::Resource| {
        let value = it.resource.unwrap();
        decoder.decode(&value.type_url, value.value.into()).unwrap()
    };
    response.resources.into_iter().map(decode).collect()
}

fn named(resources: &[Resource], name: &str) -> Resource {
    resources.iter().find(|it| &*it.name() == name).cloned().unwrap_or_else(|| panic!("{name} is not there"))
}

#[test]
fn every_recorded_resource_decodes_under_its_name_and_survives_encoding() {
    let mut count = 0;
    let mut decoder = Decoder::default();
    for (recording, response) in recordings() {
        for it in response.resources {
            let value = it.resource.unwrap();
            let resource = decoder.decode(&response.type_url, value.value.into()).unwrap();
            assert_eq!(&*resource.name(), it.name, "{recording}");
            assert_eq!(resource.type_url(), value.type_url, "{recording}");
            if let Resource::Policy(policy) = &resource {
                assert_eq!(policy.unsupported, None, "{recording} {}", it.name);
            }
            let again = decoder.decode(resource.type_url(), encode(&resource).into()).unwrap();
            assert_eq!(again, resource, "{recording}");
            count += 1;
        }
    }
    assert!(count > 50, "{count} resources");
}

/// Istio's servers hash what they send, and so does the server here: where the bytes have one form only, versions are equal.
#[test]
fn versions_are_those_of_istio() {
    let mut equal = 0;
    for (_, response) in recordings() {
        for it in response.resources.into_iter().filter(|it| !it.version.is_empty()) {
            let value = it.resource.unwrap().value;
            let resource = zspire_xds::codec::decode_address(&value).unwrap();
            let set = zspire_xds::server::ResourceSet::new(vec![resource.clone()]);
            let entry = set.get(resource.kind(), &resource.name()).unwrap();
            if entry.value == value {
                assert_eq!(entry.version_text(), it.version, "{}", it.name);
                equal += 1;
            }
        }
    }
    assert!(equal > 20, "{equal} versions");
}

#[test]
fn a_pod_says_what_istio_said() {
    let Resource::Workload(web) = named(&resources("rich-01-Address"), "Kubernetes//Pod/shop/web-1") else { panic!() };
    assert_eq!(web.identity().unwrap().as_str(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(web.addresses.as_slice(), ["10.0.1.10".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(web.protocol, Protocol::Hbone);
    assert_eq!(web.services.len(), 2);
    assert_eq!(web.services[1].ports[0].target, Some(8080));
    assert_eq!(web.authorization_policies[0].to_string(), "shop/l7-allow");
    assert_eq!(&*web.locality.zone, "zone-1");
    assert_eq!(web.capacity, 1);
    let Resource::Workload(host) = named(&resources("rich-01-Address"), "Kubernetes//Pod/shop/host-1") else {
        panic!()
    };
    assert_eq!(host.network_mode, NetworkMode::HostNetwork);
    assert_eq!(host.protocol, Protocol::Tcp);
}

#[test]
fn services_say_what_istio_said() {
    let rich = resources("rich-01-Address");
    let Resource::Service(local) = named(&rich, "shop/local.shop.svc.cluster.local") else { panic!() };
    assert_eq!(local.load_balancer.mode, Mode::Strict);
    assert_eq!(local.load_balancer.preferences.last(), Some(&Locality::Node));
    let cidr = rich.iter().find_map(|it| match it {
        Resource::Service(it) if &*it.hostname == "cidr.example" => Some(it.clone()),
        _ => None,
    });
    let cidr = cidr.unwrap();
    assert_eq!(cidr.cidr_vips[0].to_string(), "/198.51.100.0/24");
    assert!(cidr.vips.is_empty());
    assert_eq!(cidr.load_balancer.mode, Mode::Passthrough);
    assert!(cidr.ports.iter().all(|port| port.protocol <= AppProtocol::Tls));
}

#[test]
fn policies_say_what_istio_said() {
    let policies = resources("stream-05-Authorization");
    let Resource::Policy(allow) = named(&policies, "shop/db-allow-web") else { panic!() };
    assert_eq!((allow.scope, allow.action), (Scope::WorkloadSelector, Action::Allow));
    let [group] = allow.groups.as_slice() else { panic!("{allow:?}") };
    assert_eq!(group[0][0].destination_ports, [5432]);
    assert_eq!(group[1][0].principals, [StringMatch::Exact("cluster.local/ns/shop/sa/web".into())]);
    let Resource::Policy(deny) = named(&policies, "shop/ns-deny") else { panic!() };
    assert_eq!((deny.scope, deny.action), (Scope::Namespace, Action::Deny));
    assert_eq!(deny.groups[0][0][0].not_namespaces[1], StringMatch::Prefix("mon-".into()));
    assert_eq!(deny.groups[0][0][0].source_ips, ["10.0.0.0/8".parse().unwrap()]);
    let Resource::Policy(l7) = named(&policies, "shop/l7-allow") else { panic!() };
    assert!(l7.groups.is_empty());
}

#[test]
fn the_file_of_a_real_ztunnel_is_read() {
    let text = include_str!("../golden/ztunnel/local.yaml");
    let mesh = zspire_xds::file::parse(text, "local.yaml").unwrap();
    let of = |kind| mesh.iter().filter(|it| it.kind() == kind).count();
    assert_eq!((of(Kind::Workload), of(Kind::Policy), of(Kind::Service)), (3, 2, 1));
    let Resource::Workload(server) = named(&mesh, "cluster1//v1/Pod/default/server") else { panic!() };
    assert_eq!(server.services[0].service.to_string(), "default/server.default.svc.cluster.local");
    assert_eq!(server.services[0].ports[0].target, Some(8080));
    assert_eq!(&*server.locality.region, "region-1");
    // ztunnel makes the trust domain of this one empty; an identity without one is none.
    let Resource::Workload(plain) = named(&mesh, "cluster1//v1/Pod/default/server-tcp") else { panic!() };
    assert_eq!(plain.trust_domain.as_str(), "cluster.local");
    let Resource::Policy(allow) = named(&mesh, "default/allow-client") else { panic!() };
    assert_eq!(allow.groups.len(), 1);
    assert_eq!(allow.groups[0].len(), 2);
    assert_eq!(allow.groups[0][0][0].principals, [StringMatch::Exact("cluster.local/ns/default/sa/client".into())]);
    assert_eq!(allow.groups[0][1][0].destination_ports, [8080, 5201]);
}
