//! Names of workloads that have no address, resolved: kept for a while, asked for once however many wait, bounded.
//!
//! ```text
//!            answered                  older than TTL                       again
//!  unknown ───────────▶ fresh answer ────────────────▶ stale answer ──asked for──▶ fresh, or stale until STALE
//!     │ failed
//!     └─────▶ failure, told for NEGATIVE without asking
//! ```
//! A resolver that fails does not take away an answer that it gave before. How a name is looked up is the creator's business.
//! Each lookup is a task of its own: it goes on when the connection that first asked has gone, since others wait for it.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};
use zspire_model::Str;

/// How long an answer is used without asking again: the system's resolver does not tell how long it is good for.
const TTL: Duration = Duration::from_secs(30);
/// How long a failure is.
const NEGATIVE: Duration = Duration::from_secs(5);
/// How long an old answer is used when there is no new one.
const STALE: Duration = Duration::from_secs(600);
/// Names that are kept. Applications can ask for any name.
const NAMES: usize = 4096;
/// Lookups at the same time, each of which may take a thread.
const LOOKUPS: usize = 64;
/// Addresses that are kept of one name.
const ADDRESSES: usize = 32;

/// Looks up a name.
pub type Lookup = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// The names that are known. Clones are the same.
#[derive(Clone)]
pub struct Resolver(Arc<Inner>);

struct Inner {
    lookup: Box<dyn Fn(Str) -> Lookup + Send + Sync>,
    names: Mutex<HashMap<Str, Name>>,
    lookups: Semaphore,
}

/// What is known of one name.
#[derive(Debug, Default)]
struct Name {
    answer: Option<(Instant, Arc<[IpAddr]>)>,
    failure: Option<(Instant, Failed)>,
    /// There while somebody asks; its sender goes when that is over.
    asking: Option<watch::Receiver<()>>,
}

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failed {
    /// What the resolver said.
    #[error("{0}")]
    Resolver(Str),
    /// It said nothing in time.
    #[error("no answer from the resolver in time")]
    TimedOut,
    /// Too many different names are being looked up.
    #[error("too many names are being looked up")]
    Busy,
}

impl Resolver {
    /// Names are looked up by `lookup`.
    pub fn new(lookup: impl Fn(Str) -> Lookup + Send + Sync + 'static) -> Self {
        let (names, lookups) = (Mutex::default(), Semaphore::new(LOOKUPS));
        Self(Arc::new(Inner { lookup: Box::new(lookup), names, lookups }))
    }

    /// Names are looked up as the system does it.
    pub fn system() -> Self {
        Self::new(|name| {
            Box::pin(async move {
                let found = tokio::net::lookup_host((&*name, 0)).await?;
                Ok(found.map(|address| address.ip().to_canonical()).collect())
            })
        })
    }

    /// The addresses of a name, at least one.
    pub async fn resolve(&self, name: &Str, deadline: Instant) -> Result<Arc<[IpAddr]>, Failed> {
        let mut asking = match self.known_or_asked(name)? {
            Known::Answer(answer) => return Ok(answer),
            Known::Asking(asking) => asking,
        };
        // It only ever ends: by the answer, or by a task that was dropped with its runtime.
        let in_time = timeout_at(deadline, asking.changed()).await.is_ok();
        let names = self.lock();
        let known = names.get(name);
        let answer = known.and_then(|known| known.answer_until(STALE));
        let failed = || match known.and_then(|known| known.failure.clone()) {
            Some((_, failed)) if in_time => failed,
            _ => Failed::TimedOut,
        };
        answer.ok_or_else(failed)
    }

    fn known_or_asked(&self, name: &Str) -> Result<Known, Failed> {
        let mut names = self.lock();
        if !names.contains_key(name) {
            make_room(&mut names)?;
        }
        let known = names.entry(name.clone()).or_default();
        if let Some(answer) = known.answer_until(TTL) {
            return Ok(Known::Answer(answer));
        }
        if let Some(asking) = &known.asking {
            return Ok(Known::Asking(asking.clone()));
        }
        if let Some((at, failed)) = &known.failure
            && at.elapsed() < NEGATIVE
        {
            return known.answer_until(STALE).map(Known::Answer).ok_or_else(|| failed.clone());
        }
        let (over, asking) = watch::channel(());
        known.asking = Some(asking.clone());
        let (resolver, name) = (self.clone(), name.clone());
        tokio::spawn(async move {
            resolver.ask(name).await;
            drop(over);
        });
        Ok(Known::Asking(asking))
    }

    async fn ask(&self, name: Str) {
        let found = match self.0.lookups.acquire().await {
            Ok(_turn) => (self.0.lookup)(name.clone()).await,
            Err(_) => Err(io::ErrorKind::Other.into()),
        };
        let mut names = self.lock();
        let known = names.entry(name).or_default();
        known.asking = None;
        let now = Instant::now();
        match found {
            Ok(addresses) if !addresses.is_empty() => {
                known.answer = Some((now, addresses.into_iter().take(ADDRESSES).collect()));
                known.failure = None;
            }
            Ok(_) => known.failure = Some((now, Failed::Resolver("the name has no address".into()))),
            Err(error) => known.failure = Some((now, Failed::Resolver(error.to_string().into()))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Str, Name>> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Known {
    Answer(Arc<[IpAddr]>),
    Asking(watch::Receiver<()>),
}

impl Name {
    fn answer_until(&self, age: Duration) -> Option<Arc<[IpAddr]>> {
        self.answer.as_ref().filter(|(at, _)| at.elapsed() < age).map(|(_, answer)| answer.clone())
    }

    fn last_used(&self) -> Option<Instant> {
        let answered = self.answer.as_ref().map(|(at, _)| *at);
        answered.max(self.failure.as_ref().map(|(at, _)| *at))
    }
}

/// Forgets the oldest name when there are too many. It looks at all of them, which is little beside the lookup that follows.
fn make_room(names: &mut HashMap<Str, Name>) -> Result<(), Failed> {
    if names.len() < NAMES {
        return Ok(());
    }
    let idle = names.iter().filter(|(_, known)| known.asking.is_none());
    let oldest = idle.min_by_key(|(_, known)| known.last_used()).map(|(name, _)| name.clone());
    names.remove(&oldest.ok_or(Failed::Busy)?);
    Ok(())
}

/// One of the addresses: of the family of `like` if there is one of it, else any; drawn, so that all of them are used.
pub(crate) fn pick(addresses: &[IpAddr], like: Option<IpAddr>, rng: &mut impl rand::Rng) -> Option<IpAddr> {
    let same = |address: &&IpAddr| like.is_none_or(|like| like.to_canonical().is_ipv4() == address.is_ipv4());
    let (all, count) = match addresses.iter().filter(same).count() {
        0 => (true, addresses.len()),
        count => (false, count),
    };
    let chosen = (count > 0).then(|| rng.random_range(0..count))?;
    addresses.iter().filter(|address| all || same(address)).nth(chosen).copied()
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("names", &self.lock().len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use rand::SeedableRng as _;
    use tokio::sync::Notify;

    use super::*;

    /// A resolver whose lookups are counted, answered by `answer` and held back by `gate`.
    struct Fake {
        resolver: Resolver,
        asked: Arc<AtomicUsize>,
        answers: Arc<Mutex<Result<Vec<IpAddr>, &'static str>>>,
        gate: Arc<Notify>,
    }

    impl Fake {
        fn new() -> Self {
            let asked = Arc::new(AtomicUsize::new(0));
            let answers = Arc::new(Mutex::new(Ok(vec!["10.0.0.1".parse().unwrap()])));
            let gate = Arc::new(Notify::new());
            let (count, answer, wait) = (asked.clone(), answers.clone(), gate.clone());
            let resolver = Resolver::new(move |_| {
                count.fetch_add(1, SeqCst);
                let (answer, wait) = (answer.clone(), wait.clone());
                Box::pin(async move {
                    wait.notified().await;
                    answer.lock().unwrap().clone().map_err(io::Error::other)
                })
            });
            Self { resolver, asked, answers, gate }
        }

        fn answers(&self, answer: Result<&str, &'static str>) {
            *self.answers.lock().unwrap() = answer.map(|ip| vec![ip.parse().unwrap()]);
        }

        async fn resolve(&self, name: &str) -> Result<String, Failed> {
            let found = self.resolver.resolve(&name.into(), Instant::now() + Duration::from_secs(3)).await;
            found.map(|addresses| addresses[0].to_string())
        }

        /// The same, and the lookup is let through.
        async fn answered(&self, name: &str) -> Result<String, Failed> {
            self.gate.notify_one();
            self.resolve(name).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_kept_and_failures_do_not_take_them_away() {
        let fake = Fake::new();
        assert_eq!(fake.answered("a").await.unwrap(), "10.0.0.1");
        fake.answers(Ok("10.0.0.2"));
        assert_eq!(fake.resolve("a").await.unwrap(), "10.0.0.1");
        tokio::time::advance(TTL).await;
        assert_eq!(fake.answered("a").await.unwrap(), "10.0.0.2");
        assert_eq!(fake.asked.load(SeqCst), 2);
        fake.answers(Err("server failure"));
        tokio::time::advance(TTL).await;
        assert_eq!(fake.answered("a").await.unwrap(), "10.0.0.2");
        // For a while it is not even asked.
        assert_eq!(fake.resolve("a").await.unwrap(), "10.0.0.2");
        assert_eq!(fake.asked.load(SeqCst), 3);
        // A resolver that says nothing is no better than one that fails.
        tokio::time::advance(TTL).await;
        assert_eq!(fake.resolve("a").await.unwrap(), "10.0.0.2");
        tokio::time::advance(STALE).await;
        assert_eq!(fake.answered("a").await, Err(Failed::Resolver("server failure".into())));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_kept_for_a_short_time() {
        let fake = Fake::new();
        fake.answers(Err("no such name"));
        for _ in 0..3 {
            assert_eq!(fake.answered("a").await, Err(Failed::Resolver("no such name".into())));
        }
        assert_eq!(fake.asked.load(SeqCst), 1);
        fake.answers(Ok("10.0.0.1"));
        tokio::time::advance(NEGATIVE).await;
        assert_eq!(fake.answered("a").await.unwrap(), "10.0.0.1");
    }

    #[tokio::test(start_paused = true)]
    async fn lookups_of_one_name_are_joined_and_survive_who_asked_first() {
        let fake = Fake::new();
        let first = tokio::time::timeout(Duration::from_millis(1), fake.resolve("a")).await;
        assert!(first.is_err());
        assert_eq!(fake.resolve("a").await, Err(Failed::TimedOut));
        let (one, other, ()) = tokio::join!(fake.resolve("a"), fake.resolve("a"), async { fake.gate.notify_one() });
        assert_eq!((one.unwrap(), other.unwrap()), ("10.0.0.1".into(), "10.0.0.1".into()));
        assert_eq!(fake.asked.load(SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn names_are_bounded_and_the_oldest_goes() {
        let fake = Fake::new();
        for number in 0..NAMES + 10 {
            fake.answered(&number.to_string()).await.unwrap();
            tokio::time::advance(Duration::from_nanos(1_000)).await;
        }
        assert_eq!(fake.resolver.lock().len(), NAMES);
        assert!(!fake.resolver.lock().contains_key("0") && fake.resolver.lock().contains_key("100"));
    }

    #[test]
    fn the_family_asked_for_is_preferred_and_all_addresses_are_used() {
        let all: Vec<IpAddr> = ["10.0.0.1", "fd00::1", "10.0.0.2"].map(|ip| ip.parse().unwrap()).into();
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        let mut drawn = |like: Option<&str>| {
            let like = like.map(|ip| ip.parse().unwrap());
            let drawn = (0..100).filter_map(|_| pick(&all, like, &mut rng)).map(|ip| ip.to_string());
            drawn.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(drawn(Some("10.9.9.9")), "10.0.0.1 10.0.0.2");
        assert_eq!(drawn(Some("fd00::9")), "fd00::1");
        assert_eq!(drawn(None), "10.0.0.1 10.0.0.2 fd00::1");
        assert_eq!(pick(&all[1..2], Some("10.9.9.9".parse().unwrap()), &mut rng).unwrap().to_string(), "fd00::1");
        assert_eq!(pick(&[], None, &mut rng), None);
    }
}
