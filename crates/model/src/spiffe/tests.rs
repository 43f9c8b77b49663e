//! Tables and properties of SPIFFE ids.

use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::*;

fn check(uri: &str, expected: Expect) {
    let got = match uri.parse::<SpiffeId>() {
        Ok(id) => format!(
            "{} + {:?} {}",
            id.trust_domain(),
            id.path(),
            match id.istio_view() {
                Some(view) => format!("ns={} sa={}", view.namespace, view.service_account),
                None => "-".to_owned(),
            }
        ),
        Err(error) => format!("error: {error}"),
    };
    expected.assert_eq(&got);
}

#[test]
fn valid() {
    check("spiffe://cluster.local/ns/a/sa/b", expect![[r#"cluster.local + "/ns/a/sa/b" ns=a sa=b"#]]);
    check("spiffe://td", expect![[r#"td + "" -"#]]);
    check("spiffe://my_td-1.io/Any/pa_th/v1.2", expect![[r#"my_td-1.io + "/Any/pa_th/v1.2" -"#]]);
    check("spiffe://td/ns/a/sa/b/c", expect![[r#"td + "/ns/a/sa/b/c" -"#]]);
    check("spiffe://td/ns/a/sa", expect![[r#"td + "/ns/a/sa" -"#]]);
    check("spiffe://td/NS/a/sa/b", expect![[r#"td + "/NS/a/sa/b" -"#]]);
    check("spiffe://td/...", expect![[r#"td + "/..." -"#]]);
}

#[test]
fn invalid() {
    check("", expect!["error: a SPIFFE id begins with spiffe://"]);
    check("https://td/a", expect!["error: a SPIFFE id begins with spiffe://"]);
    check("SPIFFE://td/a", expect!["error: a SPIFFE id begins with spiffe://"]);
    check("spiffe:///ns/a/sa/b", expect!["error: the trust domain is empty"]);
    check("spiffe://TD/a", expect!["error: 'T' cannot stand in a trust domain (a-z, 0-9, '.', '-' and '_' can)"]);
    check("spiffe://td:80/a", expect!["error: ':' cannot stand in a trust domain (a-z, 0-9, '.', '-' and '_' can)"]);
    check("spiffe://u@td/a", expect!["error: '@' cannot stand in a trust domain (a-z, 0-9, '.', '-' and '_' can)"]);
    check("spiffe://td?q", expect!["error: '?' cannot stand in a trust domain (a-z, 0-9, '.', '-' and '_' can)"]);
    check("spiffe://td/", expect!["error: a path segment is empty"]);
    check("spiffe://td/a/", expect!["error: a path segment is empty"]);
    check("spiffe://td//a", expect!["error: a path segment is empty"]);
    check("spiffe://td/a/../b", expect![[r#"error: a path segment is "..""#]]);
    check("spiffe://td/./b", expect![[r#"error: a path segment is ".""#]]);
    check(
        "spiffe://td/a?b",
        expect!["error: '?' cannot stand in a path segment (a-z, A-Z, 0-9, '.', '-' and '_' can)"],
    );
    check(
        "spiffe://td/a#b",
        expect!["error: '#' cannot stand in a path segment (a-z, A-Z, 0-9, '.', '-' and '_' can)"],
    );
    check(
        "spiffe://td/%41",
        expect!["error: '%' cannot stand in a path segment (a-z, A-Z, 0-9, '.', '-' and '_' can)"],
    );
    check(
        "spiffe://td/a\0b",
        expect![[r#"error: '\0' cannot stand in a path segment (a-z, A-Z, 0-9, '.', '-' and '_' can)"#]],
    );
}

#[test]
fn lengths() {
    let id = |domain: usize, path: usize| format!("spiffe://{}/{}", "d".repeat(domain), "p".repeat(path));
    assert!(id(255, 1).parse::<SpiffeId>().is_ok());
    assert_eq!(id(256, 1).parse::<SpiffeId>(), Err(Error::TrustDomainLength(256)));
    assert!(id(2, 2048 - 12).parse::<SpiffeId>().is_ok());
    assert_eq!(id(2, 2049 - 12).parse::<SpiffeId>(), Err(Error::Length(2049)));
}

#[test]
fn istio_parts_are_single_segments() {
    let td = TrustDomain::default();
    assert_eq!(SpiffeId::istio(&td, "a", "b").unwrap().as_str(), "spiffe://cluster.local/ns/a/sa/b");
    assert_eq!(SpiffeId::istio(&td, "a/sa/x", "b"), Err(Error::PathCharacter('/')));
    assert_eq!(SpiffeId::istio(&td, "a", ""), Err(Error::EmptySegment));
    assert_eq!(SpiffeId::istio(&td, "..", "b"), Err(Error::DotSegment("..".into())));
    assert_eq!(SpiffeId::new(&td, "no-slash"), Err(Error::PathCharacter('n')));
}

proptest! {
    #[test]
    fn parsing_never_panics_and_prints_back(uri in "(spiffe://)?[a-zA-Z0-9./_%?#@: -]{0,40}") {
        if let Ok(id) = uri.parse::<SpiffeId>() {
            prop_assert_eq!(id.to_string(), uri);
            prop_assert_eq!(SpiffeId::new(id.trust_domain(), id.path()).unwrap(), id);
        }
    }
}
