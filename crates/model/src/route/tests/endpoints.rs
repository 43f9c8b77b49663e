//! Which endpoint of a service is reached, where, and as whom.

use super::*;

fn balanced(preferences: &[Scope], mode: Mode) -> Service {
    service("svc", "10.1.0.1").with(|it| {
        it.load_balancer = LoadBalancer { preferences: preferences.to_vec(), mode, health: HealthPolicy::OnlyHealthy };
    })
}

fn in_zone(it: Workload, region: &str, zone: &str) -> Workload {
    it.with(|it| {
        it.locality = Arc::new(Locality { region: region.into(), zone: zone.into(), subzone: "".into() });
    })
}

#[test]
fn what_a_service_prefers() {
    let client = in_zone(client(), "eu", "a");
    let near = in_zone(pod("near", "10.0.1.1").of("svc"), "eu", "a");
    let region = in_zone(pod("region", "10.0.1.2").of("svc"), "eu", "b");
    let far = in_zone(pod("far", "10.0.1.3").of("svc"), "us", "a");
    let scopes = [Scope::Region, Scope::Zone];
    let chosen = |mode, endpoints: &[&Workload]| {
        let mesh =
            endpoints.iter().fold(Mesh::default().and(balanced(&scopes, mode)), |mesh, it| mesh.and((*it).clone()));
        let mut rng = SmallRng::seed_from_u64(3);
        let mut names: Vec<_> = (0..100)
            .map(|_| match go_with(&mesh, &client, "10.1.0.1:80", &Settings::default(), &mut rng).decision {
                Ok(upstream) => upstream.workload.unwrap().name.to_string(),
                Err(reject) => reject.to_string(),
            })
            .collect();
        names.sort();
        names.dedup();
        join(names, " ")
    };
    let nobody = "no healthy upstream: service ns/svc.test has no endpoint for port 80";
    assert_eq!(chosen(Mode::Standard, &[&near, &region, &far]), "far near region");
    assert_eq!(chosen(Mode::Strict, &[&near, &region, &far]), "near");
    assert_eq!(chosen(Mode::Strict, &[&region, &far]), nobody);
    assert_eq!(chosen(Mode::Failover, &[&near, &region, &far]), "near");
    assert_eq!(chosen(Mode::Failover, &[&region, &far]), "region");
    assert_eq!(chosen(Mode::Failover, &[&far]), "far", "the same zone of another region is not the same zone");
    assert_eq!(chosen(Mode::Failover, &[]), nobody);
    let sick = near.clone().with(|it| it.status = Health::Unhealthy);
    assert_eq!(chosen(Mode::Failover, &[&sick, &region, &far]), "region");
    let another_port = near.with(|it| it.services = Arc::default()).of("other");
    assert_eq!(chosen(Mode::Strict, &[&another_port]), nobody);
}

#[test]
fn the_drawn_endpoint_says_what_it_shares() {
    let client = in_zone(client(), "eu", "a");
    let mesh = Mesh::default().and(balanced(&[Scope::Region, Scope::Zone], Mode::Failover)).and(in_zone(
        pod("region", "10.0.1.2").of("svc"),
        "eu",
        "b",
    ));
    check_from(
        &client,
        &mesh,
        "10.1.0.1:80",
        &expect![[r#"
        to 10.0.1.2:15008
        CONNECT 10.0.1.2:8080 expecting spiffe://cluster.local/ns/ns/sa/region
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/region was drawn by weight; it shares 1 of 2 preferred scopes
        - it takes HBONE"#]],
    );
}

#[test]
fn health_and_capacity() {
    let sick = |name: &str, i| pod(name, &format!("10.0.1.{i}")).of("svc").with(|it| it.status = Health::Unhealthy);
    let mesh = Mesh::default().and(sick("a", 1)).and(service("svc", "10.1.0.1"));
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        rejected: no healthy upstream: service ns/svc.test has no endpoint for port 80
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
    let all = service("svc", "10.1.0.1").with(|it| it.load_balancer.health = HealthPolicy::AllowAll);
    assert_eq!(chosen(&mesh.clone().and(pod("b", "10.0.1.2").of("svc")), "10.1.0.1:80"), "b");
    assert_eq!(chosen(&mesh.clone().and(pod("b", "10.0.1.2").of("svc")).and(all), "10.1.0.1:80"), "a b");
    let idle = pod("b", "10.0.1.2").of("svc").with(|it| it.capacity = 0);
    check(
        "10.1.0.1:80",
        &mesh.and(idle),
        &expect![[r#"
        rejected: no healthy upstream: service ns/svc.test has no endpoint for port 80
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
    // Health is about being chosen: who asks for the workload itself gets it.
    assert!(go(&Mesh::default().and(sick("a", 1)), &client(), "10.0.1.1:80").decision.is_ok());
}

#[test]
fn a_service_that_chooses_no_endpoint() {
    let through = balanced(&[], Mode::Passthrough);
    check(
        "10.1.0.1:80",
        &small().and(through.clone()),
        &expect![[r#"
        to 10.1.0.1:80
        TCP
        - the destination is service ns/svc.test, by its virtual address
        - the service chooses no endpoint: the connection goes to the address asked for"#]],
    );
    let same = through.clone().with(|it| it.vips = vec![at("", "10.0.0.2")]);
    check(
        "10.0.0.2:80",
        &small().and(same),
        &expect![[r#"
        to 10.0.0.2:15008
        CONNECT 10.0.0.2:80 expecting spiffe://cluster.local/ns/ns/sa/server
        - the destination is service ns/svc.test, by its virtual address
        - the service chooses no endpoint: the connection goes to the address asked for
        - it takes HBONE"#]],
    );
    check(
        "svc.test:80",
        &small().and(through),
        &expect![[r#"
        rejected: no service or workload has the hostname svc.test
        - the destination is service ns/svc.test, by its hostname"#]],
    );
}

#[test]
fn the_port_of_the_endpoint() {
    let named = service("svc", "10.1.0.1").with(|it| it.ports = vec![port(80, None), port(81, Some(8081))]);
    let own = pod("own", "10.0.1.1").of_ports("svc", &[(80, 9090), (81, 9091)]);
    let plain = pod("plain-port", "10.0.1.2").of("svc");
    let mesh = Mesh::default().and(named).and(own).and(plain.clone());
    check(
        "10.1.0.1:80",
        &mesh,
        &expect![[r#"
        to 10.0.1.1:15008
        CONNECT 10.0.1.1:9090 expecting spiffe://cluster.local/ns/ns/sa/own
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/own was drawn by weight
        - it takes HBONE"#]],
    );
    assert_eq!(chosen(&mesh, "10.1.0.1:80"), "own", "the other one does not say where port 80 is");
    assert_eq!(chosen(&mesh, "10.1.0.1:81"), "own plain-port");
    // A port that only the endpoint knows is none of the service.
    let hidden =
        Mesh::default().and(service("svc", "10.1.0.1")).and(pod("own", "10.0.1.1").of_ports("svc", &[(99, 9)]));
    check(
        "10.1.0.1:99",
        &hidden,
        &expect![[r#"
        rejected: service ns/svc.test has no port 99
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
}

#[test]
fn the_address_of_the_endpoint() {
    let dual = |name: &str| pod(name, "10.0.1.1").of("svc").with(|it| it.addresses.push("fd00::1".parse().unwrap()));
    let with = |families| {
        Mesh::default().and(dual("dual")).and(service("svc", "10.1.0.1").with(|it| {
            it.vips.push(at("", "fd01::1"));
            it.ip_families = families;
        }))
    };
    let target = |families, to: &str| match go(&with(families), &client(), to).decision {
        Ok(upstream) => upstream.connect.to_string(),
        Err(reject) => reject.to_string(),
    };
    assert_eq!(target(IpFamilies::Automatic, "10.1.0.1:80"), "10.0.1.1:15008");
    assert_eq!(target(IpFamilies::Automatic, "[fd01::1]:80"), "[fd00::1]:15008");
    assert_eq!(target(IpFamilies::Dual, "[fd01::1]:80"), "[fd00::1]:15008");
    assert_eq!(target(IpFamilies::Ipv4, "[fd01::1]:80"), "10.0.1.1:15008");
    assert_eq!(target(IpFamilies::Ipv6, "10.1.0.1:80"), "[fd00::1]:15008");
    let only_v4 = Mesh::default()
        .and(pod("v4", "10.0.1.1").of("svc"))
        .and(service("svc", "10.1.0.1").with(|it| it.ip_families = IpFamilies::Ipv6));
    check(
        "10.1.0.1:80",
        &only_v4,
        &expect![[r#"
        rejected: no healthy upstream: service ns/svc.test has no endpoint for port 80
        - the destination is service ns/svc.test, by its virtual address"#]],
    );
}

#[test]
fn who_is_expected_at_the_end_of_a_tunnel() {
    let with = |names: &[&str]| {
        small().and(service("svc", "10.1.0.1").with(|it| {
            it.subject_alt_names = names.iter().map(|name| (*name).into()).collect();
        }))
    };
    let expected = |mesh: &Mesh| match go(mesh, &client(), "10.1.0.1:80").decision.unwrap().path {
        Path::Hbone(tunnel) => join(&tunnel.expected, " "),
        other => panic!("{other:?}"),
    };
    let own = "spiffe://cluster.local/ns/ns/sa/server";
    assert_eq!(expected(&with(&[])), own);
    assert_eq!(expected(&with(&[own, "spiffe://other/x"])), format!("{own} spiffe://other/x"));
    assert_eq!(expected(&with(&["www.example.com", "spiffe://", "https://a/b"])), own, "no SPIFFE ids");
    let nameless = pod("server", "10.0.0.2").of("svc").with(|it| it.service_account = "".into());
    check(
        "10.1.0.1:80",
        &with(&[]).and(nameless.clone()),
        &expect![[r#"
        rejected: workload c1//Pod/ns/server has no identity, so that nobody could prove to be it
        - the destination is service ns/svc.test, by its virtual address
        - endpoint c1//Pod/ns/server was drawn by weight"#]],
    );
    assert_eq!(expected(&with(&["spiffe://other/x"]).and(nameless)), "spiffe://other/x");
}

#[test]
fn a_resolved_hostname_takes_the_place_of_the_name() {
    let named = entry("named", "10.0.0.4").with(|it| {
        it.hostname = "named.example".into();
        it.addresses.clear();
        it.protocol = Protocol::Hbone;
        it.service_account = "named".into();
    });
    let mesh = small().and(named.of("ext")).and(service("ext", "10.1.0.7"));
    let route = go(&mesh, &client(), "10.1.0.7:80");
    let resolved = route.decision.unwrap().resolved("203.0.113.5".parse().unwrap());
    assert_eq!(resolved.connect.to_string(), "203.0.113.5:15008");
    let Path::Hbone(tunnel) = resolved.path else { panic!("{:?}", resolved.path) };
    assert_eq!(tunnel.authority.to_string(), "203.0.113.5:8080");
}

#[test]
fn endpoints_that_have_failed_are_not_chosen_again() {
    let mesh = small().and(pod("second", "10.0.0.3").of("svc")).and(pod("third", "10.0.0.4").of("svc"));
    let all: Vec<Str> = ["c1//Pod/ns/second", "c1//Pod/ns/server", "c1//Pod/ns/third"].map(Into::into).into();
    let chosen = |excluded: &[Str]| {
        let (snapshot, client, settings) = (mesh.snapshot(), client(), Settings::default());
        let mut rng = SmallRng::seed_from_u64(5);
        let request = RouteRequest {
            source: &client,
            source_address: "10.0.0.1".parse().unwrap(),
            destination: destination("10.1.0.1:80"),
            excluded,
            settings: &settings,
        };
        let mut names: Vec<_> = (0..100)
            .map(|_| {
                let route = route(&snapshot, &request, &mut rng);
                assert_eq!(route.choices, 3);
                match route.decision {
                    Ok(upstream) => upstream.workload.unwrap().uid.to_string(),
                    Err(reject) => reject.to_string(),
                }
            })
            .collect();
        names.sort();
        names.dedup();
        join(names, " ")
    };
    assert_eq!(chosen(&[]), join(&all, " "));
    assert_eq!(chosen(&all[..1]), join(&all[1..], " "));
    assert_eq!(chosen(&all[..2]), *all[2]);
    assert_eq!(chosen(&all), "no healthy upstream: service ns/svc.test has no endpoint for port 80");
}

/// A random source that counts how often it is asked.
struct Counted(SmallRng, usize);

impl RngCore for Counted {
    fn next_u32(&mut self) -> u32 {
        self.1 += 1;
        self.0.next_u32()
    }

    fn next_u64(&mut self) -> u64 {
        self.1 += 1;
        self.0.next_u64()
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        self.1 += 1;
        self.0.fill_bytes(bytes);
    }
}

/// How often endpoints are looked at, and the random source is asked, for a thousand choices.
fn looks(endpoints: usize, mode: Mode, failed: usize) -> (usize, usize) {
    let name = |number: usize| format!("pod-{number}");
    let at = |number: usize| format!("10.{}.{}.{}", 64 + number / 65_536, number / 256 % 256, number % 256);
    let all = (0..endpoints).map(|number| {
        in_zone(pod(&name(number), &at(number)).of("svc"), "eu", "a").with(|it| it.capacity = 1 + number as u32 % 3)
    });
    let mesh = all.fold(Mesh::default().and(balanced(&[Scope::Region, Scope::Zone], mode)), Mesh::and);
    let snapshot = mesh.snapshot();
    let client = in_zone(client(), "eu", "a");
    let failed: Vec<Str> = (0..failed).map(|number| format!("c1//Pod/ns/{}", name(number)).into()).collect();
    let looked = std::cell::Cell::new(0);
    let mut rng = Counted(SmallRng::seed_from_u64(7), 0);
    for _ in 0..1000 {
        let choice = snapshot.endpoints(&key("svc")).unwrap().choose(&client, &mut rng, |workload| {
            looked.set(looked.get() + 1);
            !failed.contains(&workload.uid)
        });
        assert!(choice.is_some());
    }
    (looked.get(), rng.1)
}

#[test]
fn a_choice_looks_at_as_many_of_ten_thousand_endpoints_as_of_ten() {
    for mode in [Mode::Standard, Mode::Failover, Mode::Strict] {
        let few = looks(10, mode, 0);
        let many = looks(10_000, mode, 0);
        assert_eq!((few.0, many.0), (1000, 1000), "each choice looks at the one that it takes");
        // Drawing rejects at most every second time, however many there are.
        assert!(few.1 < 6000 && many.1 < 6000, "{few:?} {many:?}");
        // One that has failed is drawn now and then, and drawn again.
        let (looked, _) = looks(10_000, mode, 2);
        assert!(looked < 1010, "{looked}");
    }
}
