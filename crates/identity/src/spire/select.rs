//! Which of the SVIDs that an agent offers is the workload's.
//!
//! The order of an agent's answer means nothing (SPIRE sorts by the ID of the entry), so that "the first" is never taken.

use zspire_model::{SpiffeId, Str};

use super::Offer;

/// What an SVID has to be.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    /// Distinguishes several with the same SPIFFE ID.
    pub(super) hint: Option<Str>,
    /// Take an SVID with another ID, if it is the only one.
    pub(super) accept_other_id: bool,
    /// The proxy's own ID, which is never another one to take.
    pub(super) own: Option<SpiffeId>,
}

/// Why none of them is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotFound {
    #[error(
        "the agent offers {offered}, expected {expected}: correct the SPIFFE ID of the registration entry, or \
         SPIFFE_ID_TEMPLATE"
    )]
    OtherId { expected: SpiffeId, offered: String },
    #[error("the agent offers several SVIDs that could be meant: {offered}; tell them apart by hint (SPIFFE_HINT)")]
    Ambiguous { offered: String },
}

/// The one that is meant.
pub(super) fn select<'a>(offers: &'a [Offer], expected: &SpiffeId, wanted: &Wanted) -> Result<&'a Offer, NotFound> {
    let of_id: Vec<&Offer> = offers.iter().filter(|offer| offer.id == *expected).collect();
    let others = || offers.iter().filter(|offer| wanted.accept_other_id && wanted.own.as_ref() != Some(&offer.id));
    let candidates = if of_id.is_empty() { others().collect() } else { of_id };
    if candidates.is_empty() {
        return Err(NotFound::OtherId { expected: expected.clone(), offered: list(offers) });
    }
    let hinted = |offer: &&&Offer| wanted.hint.as_ref().is_none_or(|hint| *hint == offer.hint);
    match candidates.iter().filter(hinted).collect::<Vec<_>>()[..] {
        [one] => Ok(one),
        // A hint that nobody has does not decide.
        [] if candidates.len() == 1 => Ok(candidates[0]),
        _ => Err(NotFound::Ambiguous { offered: list(candidates) }),
    }
}

/// The IDs offered, with their hints.
pub(super) fn list<'a>(offers: impl IntoIterator<Item = &'a Offer>) -> String {
    let one = |offer: &Offer| match &*offer.hint {
        "" => offer.id.to_string(),
        hint => format!("{} (hint {hint:?})", offer.id),
    };
    offers.into_iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn offers(all: &[(&str, &str)]) -> Vec<Offer> {
        let offer = |(id, hint): &(&str, &str)| Offer {
            id: format!("spiffe://td/{id}").parse().unwrap(),
            chain: vec![],
            key: Arc::default(),
            hint: (*hint).into(),
        };
        all.iter().map(offer).collect()
    }

    fn check(all: &[(&str, &str)], hint: Option<&str>, accept_other_id: bool) -> String {
        let own = "spiffe://td/proxy".parse().ok();
        let wanted = Wanted { hint: hint.map(Into::into), accept_other_id, own };
        match select(&offers(all), &"spiffe://td/web".parse().unwrap(), &wanted) {
            Ok(offer) => format!("{}#{}", offer.id.path(), offer.hint),
            Err(NotFound::OtherId { offered, .. }) => format!("other: {offered}"),
            Err(NotFound::Ambiguous { offered }) => format!("ambiguous: {offered}"),
        }
    }

    #[test]
    fn the_expected_id_then_the_hint() {
        assert_eq!(check(&[("db", ""), ("web", "")], None, false), "/web#");
        assert_eq!(check(&[("db", "")], None, false), "other: spiffe://td/db");
        assert_eq!(check(&[("db", "")], None, true), "/db#");
        assert_eq!(check(&[("proxy", "")], None, true), "other: spiffe://td/proxy");
        assert_eq!(check(&[("proxy", ""), ("db", "")], None, true), "/db#");
        assert_eq!(check(&[("db", ""), ("api", "")], None, true), "ambiguous: spiffe://td/db, spiffe://td/api");
        assert_eq!(check(&[("db", "x"), ("api", "y")], Some("y"), true), "/api#y");
        assert_eq!(check(&[("web", "a"), ("web", "b")], Some("b"), false), "/web#b");
        let both = "ambiguous: spiffe://td/web (hint \"a\"), spiffe://td/web (hint \"b\")";
        assert_eq!(check(&[("web", "a"), ("web", "b")], None, false), both);
        assert_eq!(check(&[("web", "a"), ("web", "b")], Some("c"), false), both);
        assert_eq!(check(&[("web", "a")], Some("c"), false), "/web#a", "one that is expected needs no hint");
    }
}
