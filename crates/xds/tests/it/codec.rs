//! Every value of the model survives the wire; what is not valid does not get in; what is not understood denies.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use prost::Message as _;
use zspire_model::policy::{Action, Scope as PolicyScope};
use zspire_model::service::{HealthPolicy, IpFamilies, Mode, Scope, Visibility, WeightedWaypoint};
use zspire_model::workload::{ApplicationProtocol, Health, NetworkMode, WorkloadType};
use zspire_model::*;
use zspire_wire::{security, workload as wire};
use zspire_xds::Resource;
use zspire_xds::codec::{self, decode_address, decode_policy, decode_service, decode_workload, encode};

fn text() -> impl Strategy<Value = Str> {
    prop_oneof!["", "[a-z][a-z0-9.-]{0,8}", "\\PC{0,12}"].prop_map(Into::into)
}

fn label() -> impl Strategy<Value = Str> {
    "[a-z][a-z0-9-]{0,8}".prop_map(Into::into)
}

fn address() -> impl Strategy<Value = IpAddr> {
    any::<IpAddr>().prop_map(|address| address.to_canonical())
}

fn net() -> impl Strategy<Value = IpNet> {
    (address(), 0..=128u8).prop_map(|(address, length)| {
        let max = if address.is_ipv4() { 32 } else { 128 };
        let net = IpNet::new(address, length.min(max)).unwrap();
        // An IPv4 range in IPv6 clothes does not exist in the model.
        if net.trunc().addr().to_canonical() == net.trunc().addr() { net } else { IpNet::from(address) }
    })
}

fn network_address() -> impl Strategy<Value = NetworkAddress> {
    (text(), address()).prop_map(|(network, address)| NetworkAddress { network, address })
}

fn hostname() -> impl Strategy<Value = NamespacedHostname> {
    (label(), label()).prop_map(|(namespace, hostname)| NamespacedHostname { namespace, hostname })
}

fn gateway() -> impl Strategy<Value = Gateway> {
    let destination = prop_oneof![
        hostname().prop_map(GatewayDestination::Hostname),
        network_address().prop_map(GatewayDestination::Address),
    ];
    (destination, 1..=u16::MAX).prop_map(|(destination, hbone_port)| Gateway { destination, hbone_port })
}

fn extension() -> impl Strategy<Value = Extension> {
    (text(), text(), vec(any::<u8>(), 0..4)).prop_map(|(name, type_url, value)| Extension {
        name,
        type_url,
        value: value.into(),
    })
}

fn ports() -> impl Strategy<Value = Vec<Port>> {
    let protocol = prop_oneof![
        Just(AppProtocol::Unknown),
        Just(AppProtocol::Http11),
        Just(AppProtocol::Http2),
        Just(AppProtocol::Grpc),
        Just(AppProtocol::Tcp),
        Just(AppProtocol::Tls),
    ];
    proptest::collection::btree_map(1..=u16::MAX, (option::of(1..=u16::MAX), protocol), 0..3).prop_map(|ports| {
        ports.into_iter().map(|(number, (target, protocol))| Port { number, target, protocol }).collect()
    })
}

fn tunnel() -> impl Strategy<Value = ApplicationTunnel> {
    let protocol = prop_oneof![Just(ApplicationProtocol::None), Just(ApplicationProtocol::Proxy)];
    (protocol, option::of(1..=u16::MAX)).prop_map(|(protocol, port)| ApplicationTunnel { protocol, port })
}

fn workload() -> impl Strategy<Value = Workload> {
    let names = (label(), text(), label(), label(), prop_oneof![Just(Str::default()), label()]);
    let places = (text(), text(), text(), (text(), text(), text()), text(), text(), text());
    let enums = (
        prop_oneof![Just(Protocol::Tcp), Just(Protocol::Hbone)],
        prop_oneof![Just(NetworkMode::Standard), Just(NetworkMode::HostNetwork)],
        prop_oneof![Just(Health::Healthy), Just(Health::Unhealthy)],
        prop_oneof![
            Just(WorkloadType::Deployment),
            Just(WorkloadType::CronJob),
            Just(WorkloadType::Pod),
            Just(WorkloadType::Job)
        ],
    );
    let links = (
        option::of(gateway()),
        option::of(gateway()),
        option::of(tunnel()),
        proptest::collection::btree_map(hostname(), ports(), 0..3),
        vec((label(), text()), 0..3),
        vec(extension(), 0..2),
    );
    let rest = (proptest::collection::hash_set(address(), 0..3), any::<u32>(), any::<bool>());
    (names, places, enums, links, rest).prop_map(|(names, places, enums, links, rest)| Workload {
        id_template: None,
        id: Default::default(),
        uid: names.0,
        name: names.1,
        namespace: names.2,
        trust_domain: TrustDomain::new(names.3).unwrap(),
        service_account: names.4,
        network: places.0,
        hostname: places.1,
        node: places.2,
        locality: Arc::new(Locality { region: places.3.0, zone: places.3.1, subzone: places.3.2 }),
        cluster_id: places.4,
        canonical_name: places.5.clone(),
        canonical_revision: places.5,
        workload_name: places.6,
        protocol: enums.0,
        network_mode: enums.1,
        status: enums.2,
        workload_type: enums.3,
        waypoint: links.0.map(Arc::new),
        network_gateway: links.1.map(Arc::new),
        application_tunnel: links.2,
        services: links.3.into_iter().map(|(service, ports)| Membership { service, ports: ports.into() }).collect(),
        authorization_policies: links
            .4
            .into_iter()
            .map(|(namespace, name)| NamespacedName { namespace, name })
            .collect(),
        extensions: links.5.into(),
        addresses: rest.0.into_iter().collect(),
        capacity: rest.1,
        native_tunnel: rest.2,
    })
}

fn load_balancer() -> impl Strategy<Value = LoadBalancer> {
    let scope = prop_oneof![
        Just(Scope::Region),
        Just(Scope::Zone),
        Just(Scope::Subzone),
        Just(Scope::Node),
        Just(Scope::Cluster),
        Just(Scope::Network)
    ];
    let mode = prop_oneof![Just(Mode::Standard), Just(Mode::Strict), Just(Mode::Failover), Just(Mode::Passthrough)];
    let health = prop_oneof![Just(HealthPolicy::OnlyHealthy), Just(HealthPolicy::AllowAll)];
    (vec(scope, 0..4), mode, health).prop_map(|(preferences, mode, health)| LoadBalancer { preferences, mode, health })
}

fn service() -> impl Strategy<Value = Service> {
    let names = (text(), label(), label(), vec(text(), 0..2));
    let vips = (vec(network_address(), 0..3), vec((text(), net()), 0..3), ports());
    let waypoints = (option::of(gateway()), vec((gateway(), any::<u32>()), 0..2));
    let enums = (
        prop_oneof![
            Just(IpFamilies::Automatic),
            Just(IpFamilies::Ipv4),
            Just(IpFamilies::Ipv6),
            Just(IpFamilies::Dual)
        ],
        prop_oneof![Just(Visibility::Public), Just(Visibility::Namespace)],
        load_balancer(),
    );
    (names, vips, waypoints, enums, any::<bool>(), any::<bool>(), vec(extension(), 0..2)).prop_map(
        |(names, vips, waypoints, enums, canonical, ingress_use_waypoint, extensions)| Service {
            name: names.0,
            namespace: names.1,
            hostname: names.2,
            subject_alt_names: names.3,
            vips: vips.0,
            cidr_vips: vips.1.into_iter().map(|(network, net)| NetworkCidr { network, net: net.trunc() }).collect(),
            ports: vips.2,
            waypoint: waypoints.0,
            weighted_waypoints: waypoints
                .1
                .into_iter()
                .map(|(waypoint, weight)| WeightedWaypoint { waypoint, weight })
                .collect(),
            ip_families: enums.0,
            visibility: enums.1,
            load_balancer: enums.2,
            canonical,
            ingress_use_waypoint,
            extensions,
        },
    )
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        text().prop_map(StringMatch::Exact),
        text().prop_map(StringMatch::Prefix),
        text().prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence),
    ]
}

fn conditions() -> impl Strategy<Value = Match> {
    let texts = || vec(string_match(), 0..2);
    let accounts = || {
        vec((text(), text()), 0..2).prop_map(|pairs| {
            let account = |(namespace, service_account)| ServiceAccountMatch { namespace, service_account };
            pairs.into_iter().map(account).collect::<Vec<_>>()
        })
    };
    let nets = || vec(net(), 0..2);
    let ports = || vec(any::<u16>(), 0..2);
    (
        (texts(), texts(), texts(), texts()),
        (accounts(), accounts()),
        (nets(), nets(), nets(), nets()),
        (ports(), ports()),
        vec(extension(), 0..2),
    )
        .prop_map(|(texts, accounts, nets, ports, extensions)| Match {
            namespaces: texts.0,
            not_namespaces: texts.1,
            principals: texts.2,
            not_principals: texts.3,
            service_accounts: accounts.0,
            not_service_accounts: accounts.1,
            source_ips: nets.0,
            not_source_ips: nets.1,
            destination_ips: nets.2,
            not_destination_ips: nets.3,
            destination_ports: ports.0,
            not_destination_ports: ports.1,
            extensions,
        })
}

fn policy() -> impl Strategy<Value = Policy> {
    let scope =
        prop_oneof![Just(PolicyScope::Global), Just(PolicyScope::Namespace), Just(PolicyScope::WorkloadSelector)];
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    let groups = vec(vec(vec(conditions(), 0..2), 0..2), 0..3);
    (label(), label(), scope, action, groups, any::<bool>(), vec(extension(), 0..2)).prop_map(
        |(namespace, name, scope, action, groups, dry_run, extensions)| Policy {
            namespace,
            name,
            scope,
            action,
            groups,
            dry_run,
            extensions,
            unsupported: None,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn workloads_survive(workload in workload()) {
        prop_assert_eq!(&decode_workload(&codec::encode_workload(&workload)).unwrap(), &workload);
        let resource = Resource::Workload(Arc::new(workload));
        prop_assert_eq!(decode_address(&encode(&resource)).unwrap(), resource);
    }

    #[test]
    fn services_survive(service in service()) {
        prop_assert_eq!(&decode_service(&codec::encode_service(&service)).unwrap(), &service);
        let resource = Resource::Service(Arc::new(service));
        prop_assert_eq!(decode_address(&encode(&resource)).unwrap(), resource);
    }

    #[test]
    fn policies_survive(policy in policy()) {
        prop_assert_eq!(decode_policy(&codec::encode_policy(&policy)).unwrap(), policy);
    }

    #[test]
    fn no_bytes_panic(bytes in vec(any::<u8>(), 0..200)) {
        let _ = (decode_address(&bytes), decode_policy(&bytes), decode_workload(&bytes), decode_service(&bytes));
    }

    /// Nearer to what is valid than arbitrary bytes are.
    #[test]
    fn no_changed_byte_panics(policy in policy(), workload in workload(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        for mut bytes in [codec::encode_policy(&policy), encode(&Resource::Workload(Arc::new(workload)))] {
            let at = at.index(bytes.len());
            bytes[at] = to;
            let _ = (decode_address(&bytes), decode_policy(&bytes));
        }
    }
}

fn plain_workload() -> wire::Workload {
    wire::Workload { uid: "w".into(), namespace: "a".into(), ..Default::default() }
}

#[test]
fn what_is_not_valid_in_a_workload_is_refused_with_the_field() {
    type Edit = fn(&mut wire::Workload);
    let cases: [(&str, Edit); 11] = [
        ("uid is missing", |it| it.uid.clear()),
        ("addresses: an address has 4 or 16 bytes, not 3", |it| it.addresses = vec![vec![1, 2, 3].into()]),
        ("tunnel_protocol: LEGACY_ISTIO_MTLS is not supported", |it| it.tunnel_protocol = 2),
        ("tunnel_protocol: unknown value 3", |it| it.tunnel_protocol = 3),
        ("status: unknown value 9", |it| it.status = 9),
        ("network_mode: unknown value 9", |it| it.network_mode = 9),
        ("workload_type: unknown value 9", |it| it.workload_type = 9),
        ("waypoint: neither a hostname nor an address", |it| it.waypoint = Some(Default::default())),
        ("services: \"web\" is not namespace/hostname", |it| {
            it.services.insert("web".into(), Default::default());
        }),
        ("authorization_policies: \"p\" is not namespace/name", |it| it.authorization_policies = vec!["p".into()]),
        ("service_account: '/' cannot stand in a path segment (a-z, A-Z, 0-9, '.', '-' and '_' can)", |it| {
            it.service_account = "a/sa/b".into();
        }),
    ];
    for (error, edit) in cases {
        let mut workload = plain_workload();
        edit(&mut workload);
        assert_eq!(decode_workload(&workload.encode_to_vec()).unwrap_err().to_string(), error);
    }
    assert!(decode_workload(&plain_workload().encode_to_vec()).is_ok());
    assert_eq!(decode_address(&[]).unwrap_err(), codec::Error::Empty);
}

#[test]
fn what_is_not_valid_in_a_service_is_refused() {
    let plain = wire::Service { namespace: "a".into(), hostname: "h".into(), ..Default::default() };
    assert!(decode_service(&plain.encode_to_vec()).is_ok());
    let address = |length| wire::NetworkAddress { address: vec![10, 0, 0, 1].into(), length, ..Default::default() };
    let cases = [
        wire::Service { hostname: String::new(), ..plain.clone() },
        wire::Service { namespace: "a/b".into(), ..plain.clone() },
        wire::Service { addresses: vec![address(Some(33))], ..plain.clone() },
        wire::Service { ports: vec![wire::Port { service_port: 70_000, ..Default::default() }], ..plain.clone() },
        wire::Service { ports: vec![wire::Port::default()], ..plain.clone() },
        wire::Service { ip_families: 7, ..plain.clone() },
        wire::Service { weighted_waypoints: vec![wire::WeightedWaypoint::default()], ..plain },
    ];
    for case in cases {
        assert!(decode_service(&case.encode_to_vec()).is_err(), "{case:?}");
    }
}

/// An unknown protocol on a port does not matter; of several ports with one number the last counts.
#[test]
fn ports_are_read_as_ztunnel_reads_them() {
    let port = |target_port, app_protocol| wire::Port { service_port: 80, target_port, app_protocol };
    let service = wire::Service {
        namespace: "a".into(),
        hostname: "h".into(),
        ports: vec![port(1, 0), port(2, 99)],
        ..Default::default()
    };
    let service = decode_service(&service.encode_to_vec()).unwrap();
    assert_eq!(service.ports, [Port { number: 80, target: Some(2), protocol: AppProtocol::Unknown }]);
}

#[test]
fn an_ipv4_address_in_ipv6_clothes_is_an_ipv4_address() {
    let mapped = std::net::Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets().to_vec();
    let mut workload = plain_workload();
    workload.addresses = vec![mapped.clone().into(), vec![10, 0, 0, 1].into()];
    let workload = decode_workload(&workload.encode_to_vec()).unwrap();
    assert_eq!(workload.addresses.as_slice(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    let conditions = security::Match {
        source_ips: vec![security::Address { address: mapped.into(), length: 104 }],
        ..Default::default()
    };
    assert_eq!(decoded(with(conditions)).groups[0][0][0].source_ips, ["10.0.0.1/8".parse().unwrap()]);
}

fn with(conditions: security::Match) -> security::Authorization {
    security::Authorization {
        namespace: "a".into(),
        name: "p".into(),
        groups: vec![security::Group { rules: vec![security::Rules { matches: vec![conditions] }] }],
        ..Default::default()
    }
}

fn decoded(policy: security::Authorization) -> Policy {
    decode_policy(&policy.encode_to_vec()).unwrap()
}

#[test]
fn a_policy_that_is_not_understood_is_kept_and_denies() {
    let address = |bytes: &[u8], length| vec![security::Address { address: bytes.to_vec().into(), length }];
    let cases = [
        ("unknown scope 7", security::Authorization { scope: 7, ..with(Default::default()) }),
        ("unknown action 7", security::Authorization { action: 7, ..with(Default::default()) }),
        (
            "unknown kind of string match",
            with(security::Match { principals: vec![Default::default()], ..Default::default() }),
        ),
        ("70000 is not a port", with(security::Match { destination_ports: vec![70_000], ..Default::default() })),
        (
            "source_ips: an address has 4 or 16 bytes, not 2",
            with(security::Match { source_ips: address(&[1, 2], 8), ..Default::default() }),
        ),
        (
            "not_source_ips: the prefix length does not fit the address",
            with(security::Match { not_source_ips: address(&[1, 2, 3, 4], 33), ..Default::default() }),
        ),
    ];
    for (why, policy) in cases {
        let policy = decoded(policy);
        assert_eq!(policy.unsupported.as_deref(), Some(why));
        denies_everything(policy);
    }
    assert_eq!(decoded(with(Default::default())).unsupported, None);
}

/// Protobuf skips what it does not know; a policy must not lose a condition that way.
#[test]
fn a_field_that_is_not_known_makes_a_policy_deny() {
    let bytes = with(security::Match { destination_ports: vec![80], ..Default::default() }).encode_to_vec();
    assert_eq!(decode_policy(&bytes).unwrap().unsupported, None);
    // Field 99, a number, at the top.
    let top = [bytes.as_slice(), &[0x98, 0x06, 0x01]].concat();
    assert_eq!(decode_policy(&top).unwrap().unsupported.as_deref(), Some("unknown field 99 in a policy"));
    // The same in a match: group { rule { match { field 14: 1 } } }.
    let inner = [bytes.as_slice(), &[0x2a, 6, 0x0a, 4, 0x12, 2, 0x70, 1]].concat();
    let policy = decode_policy(&inner).unwrap();
    assert_eq!(policy.unsupported.as_deref(), Some("unknown field 14 in a match"));
    denies_everything(policy);
}

#[test]
fn a_policy_without_a_name_is_refused() {
    let policy = security::Authorization { name: String::new(), ..with(Default::default()) };
    assert_eq!(decode_policy(&policy.encode_to_vec()).unwrap_err(), codec::Error::Missing("name"));
}

/// Here, and at whoever gets it from here.
fn denies_everything(policy: Policy) {
    let passed_on = decode_policy(&codec::encode_policy(&policy)).unwrap();
    for policy in [policy, passed_on] {
        let workload = Workload { uid: "w".into(), namespace: "a".into(), ..Workload::default() };
        let (mut store, _) = Store::new();
        store.apply([Change::PutPolicy(Arc::new(policy))]);
        let connection = authorize::Connection {
            destination: &workload,
            destination_address: "10.0.0.1:80".parse().unwrap(),
            peer: None,
            peer_address: "10.0.0.2".parse().unwrap(),
        };
        assert!(!authorize::authorize(store.snapshot(), &connection).is_allowed());
    }
}
