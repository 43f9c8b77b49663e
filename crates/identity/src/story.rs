//! What has happened to one workload's identity, for whoever asks why: what was asked, what was answered, what went wrong.
//!
//! Every source tells it in the same words. Public parts only, and bounded: a story is the present and the last of each kind, not
//! a log.

use std::time::SystemTime;

use zspire_model::{SpiffeId, Str, TrustDomain};

use crate::bundle::{Bundle, Bundles};

/// What there is to know about one workload's identity.
#[derive(Debug, Clone, PartialEq)]
pub struct Story {
    /// Since when its state is what it is. A renewal does not change it.
    pub since: SystemTime,
    /// What was asked for last; `None` before anything was.
    pub asked: Option<Asked>,
    /// The last answer; `None` before there was one. Empty: nothing matches the workload.
    pub answer: Option<Vec<Offered>>,
    /// The trust domains of the last answer.
    pub bundles: Vec<Trusted>,
    /// What went wrong last.
    pub trouble: Option<Trouble>,
    /// When the source asks again by itself, if it waits for that.
    pub retry_at: Option<SystemTime>,
    /// Times that the source has asked.
    pub asked_times: u64,
    /// Answers that came.
    pub updates: u64,
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// What kind it is: `pod`, `process`, `selectors`, `own`, `certificate`.
    pub kind: &'static str,
    /// The reference, as a person would say it.
    pub reference: Str,
    /// Selectors that whoever is meant is known to have.
    pub selectors: Vec<Str>,
}

/// One SVID of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// Whose it is.
    pub id: SpiffeId,
    /// What the registration says it is for.
    pub hint: Str,
}

/// A trust domain that the workload trusts.
#[derive(Debug, Clone, PartialEq)]
pub struct Trusted {
    /// Its name.
    pub domain: TrustDomain,
    /// Its roots.
    pub bundle: Bundle,
    /// Since when they have been these.
    pub since: SystemTime,
}

/// Something that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// gRPC's name of the code, or a name of ours.
    pub code: &'static str,
    /// The whole of it.
    pub why: Str,
    /// When.
    pub at: SystemTime,
    /// Nothing has gone right since.
    pub lasts: bool,
}

impl Story {
    /// Nothing has happened yet.
    pub fn new(now: SystemTime) -> Self {
        Self {
            since: now,
            asked: None,
            answer: None,
            bundles: Vec::new(),
            trouble: None,
            retry_at: None,
            asked_times: 0,
            updates: 0,
        }
    }

    pub(crate) fn ask(&mut self, asked: Asked) {
        self.asked = Some(asked);
        self.asked_times += 1;
        self.retry_at = None;
    }

    pub(crate) fn answered(&mut self, offered: Vec<Offered>, bundles: &Bundles, now: SystemTime) {
        if !offered.is_empty() || bundles.iter().next().is_some() {
            // An answer without anything says nothing of whom an SVID would trust.
            self.trust(bundles, now);
        }
        self.answer = Some(offered);
        self.updates += 1;
    }

    fn trust(&mut self, bundles: &Bundles, now: SystemTime) {
        self.bundles = bundles.iter().map(|(domain, bundle)| self.trusted(domain, bundle, now)).collect();
    }

    pub(crate) fn went_wrong(&mut self, code: &'static str, why: Str, at: SystemTime) {
        self.trouble = Some(Trouble { code, why, at, lasts: true });
    }

    pub(crate) fn went_right(&mut self) {
        self.retry_at = None;
        if let Some(trouble) = &mut self.trouble {
            trouble.lasts = false;
        }
    }

    /// What is wrong now.
    pub(crate) fn wrong(&self) -> Option<&Str> {
        self.trouble.as_ref().filter(|trouble| trouble.lasts).map(|trouble| &trouble.why)
    }

    fn trusted(&self, domain: &TrustDomain, bundle: &Bundle, now: SystemTime) -> Trusted {
        let known = self.bundles.iter().find(|known| known.domain == *domain && known.bundle == *bundle);
        known.cloned().unwrap_or_else(|| Trusted { domain: domain.clone(), bundle: bundle.clone(), since: now })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use rcgen::{CertificateParams, IsCa, KeyPair};

    use super::*;

    fn root() -> Bundle {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Bundle::new(vec![root.der().clone()]).unwrap()
    }

    #[test]
    fn a_bundle_is_as_old_as_its_roots_not_as_the_message() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let (ours, theirs): (TrustDomain, TrustDomain) = ("ours".parse().unwrap(), "theirs".parse().unwrap());
        let (one, other) = (root(), root());
        let mut story = Story::new(at(0));
        let since = |story: &Story| -> Vec<(String, u64)> {
            let seconds = |t: SystemTime| t.duration_since(UNIX_EPOCH).unwrap().as_secs();
            story.bundles.iter().map(|known| (known.domain.to_string(), seconds(known.since))).collect()
        };
        story.answered(vec![], &Bundles::of(ours.clone(), one.clone()), at(10));
        let both: Bundles = [(ours.clone(), one), (theirs.clone(), other)].into_iter().collect();
        story.answered(vec![], &both, at(20));
        assert_eq!(since(&story), [("ours".into(), 10), ("theirs".into(), 20)]);
        story.answered(vec![], &Bundles::of(ours, root()), at(30));
        assert_eq!(since(&story), [("ours".into(), 30)], "other roots, and the other domain is gone");
    }

    #[test]
    fn the_last_trouble_stays_told_when_it_is_over() {
        let mut story = Story::new(UNIX_EPOCH);
        story.went_wrong("Unavailable", "away".into(), UNIX_EPOCH);
        assert_eq!(story.wrong().map(|why| &**why), Some("away"));
        story.went_right();
        assert_eq!(story.wrong(), None);
        assert_eq!(story.trouble.unwrap().code, "Unavailable");
    }
}
