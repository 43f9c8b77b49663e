//! Asking for single resources.
//!
//! A key is what Istio's server understands: the UID of a workload, `namespace/hostname` of a service, or `network/address` of
//! either. Whoever asks for the same key waits for the same answer; answers are kept, since the server says when they change.

use std::collections::{HashMap, HashSet};

use tokio::sync::{mpsc, oneshot};
use zspire_model::Str;

/// Keys that are subscribed to at most. Which keys there are, applications decide by what they connect to.
const MAX_KEYS: usize = 65_536;
/// Keys without a resource that are given up at once when there are too many.
const GIVEN_UP: usize = 1_000;
/// Longest key, in bytes.
const MAX_KEY: usize = 1024;

/// Asks a running client for resources.
#[derive(Debug, Clone)]
pub struct Demand(mpsc::Sender<Ask>);

/// What became of a request for a resource. By then it has been applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The server knows it.
    Found,
    /// The server knows nothing by that key.
    Unknown,
}

/// Why there is no answer. It does not mean that there is no such resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The client does not run any more.
    #[error("discovery has ended")]
    Ended,
    /// No resource can have that key.
    #[error("not the key of a resource")]
    Key,
    /// Too many resources are in use already.
    #[error("more than {MAX_KEYS} resources are discovered on demand: let the node discover all of them")]
    TooMany,
}

type Reply = oneshot::Sender<Result<Answer, Error>>;

#[derive(Debug)]
pub(super) struct Ask {
    pub(super) key: Str,
    pub(super) reply: Reply,
}

impl Demand {
    pub(super) fn new(asks: mpsc::Sender<Ask>) -> Self {
        Self(asks)
    }

    /// Asks for a key and waits until the server has answered, however long it is away: bound the time that you wait.
    /// Dropping the future is fine at any moment.
    pub async fn get(&self, key: &str) -> Result<Answer, Error> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Ask { key: key.into(), reply }).await.map_err(|_| Error::Ended)?;
        answer.await.map_err(|_| Error::Ended)?
    }
}

/// Somebody who waits, and what to tell them.
pub(super) type Due = (Reply, Answer);

#[derive(Debug)]
enum Key {
    Waiting(Vec<Reply>),
    /// Found; the resource has this name.
    Found(Str),
    Unknown,
}

/// What the server is to be told about keys.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    pub(super) subscribe: Option<Str>,
    pub(super) unsubscribe: Vec<Str>,
}

/// The keys that were asked for. They stay subscribed, until those that lead nowhere become too many.
#[derive(Debug, Default)]
pub(super) struct Keys(HashMap<Str, Key>);

impl Keys {
    /// Answers, or waits for the answer; what the server must be told.
    pub(super) fn ask(&mut self, Ask { key, reply }: Ask) -> News {
        let answer = match self.0.get_mut(&key) {
            Some(Key::Waiting(waiting)) => {
                waiting.retain(|waiting| !waiting.is_closed());
                waiting.push(reply);
                return News::default();
            }
            Some(Key::Found(_)) => Ok(Answer::Found),
            Some(Key::Unknown) => Ok(Answer::Unknown),
            None if key.is_empty() || &*key == "*" || key.len() > MAX_KEY => Err(Error::Key),
            None => {
                let unsubscribe = self.make_room();
                if self.0.len() < MAX_KEYS {
                    self.0.insert(key.clone(), Key::Waiting(vec![reply]));
                    return News { subscribe: Some(key), unsubscribe };
                }
                Err(Error::TooMany)
            }
        };
        // Whoever asked may have gone.
        let _ = reply.send(answer);
        News::default()
    }

    /// Gives up keys that lead nowhere (applications connect to ever new addresses outside the mesh).
    fn make_room(&mut self) -> Vec<Str> {
        if self.0.len() < MAX_KEYS {
            return Vec::new();
        }
        let nowhere = self.0.iter().filter(|(_, key)| matches!(key, Key::Unknown)).map(|(name, _)| name.clone());
        let given_up: Vec<Str> = nowhere.take(GIVEN_UP).collect();
        for key in &given_up {
            self.0.remove(key);
        }
        given_up
    }

    /// All keys, for a new stream.
    pub(super) fn all(&self) -> impl Iterator<Item = &Str> {
        self.0.keys()
    }

    /// The server sent a resource that has this key among others.
    pub(super) fn found(&mut self, key: &str, name: &Str, due: &mut Vec<Due>) {
        if let Some(entry) = self.0.get_mut(key)
            && let Key::Waiting(waiting) = std::mem::replace(entry, Key::Found(name.clone()))
        {
            due.extend(waiting.into_iter().map(|waiting| (waiting, Answer::Found)));
        }
    }

    /// The server says that there is nothing by these names; they may be keys, or names of what was found by a key.
    pub(super) fn removed(&mut self, names: &[String], due: &mut Vec<Due>) {
        if self.0.is_empty() || names.is_empty() {
            return;
        }
        let gone: HashSet<&str> = names.iter().map(String::as_str).collect();
        for (key, entry) in &mut self.0 {
            let name = if let Key::Found(name) = &*entry { Some(&**name) } else { None };
            let gone = gone.contains(&**key) || name.is_some_and(|name| gone.contains(name));
            if gone && let Key::Waiting(waiting) = std::mem::replace(entry, Key::Unknown) {
                due.extend(waiting.into_iter().map(|waiting| (waiting, Answer::Unknown)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(keys: &mut Keys, key: String) -> (News, oneshot::Receiver<Result<Answer, Error>>) {
        let (reply, answer) = oneshot::channel();
        (keys.ask(Ask { key: key.into(), reply }), answer)
    }

    #[test]
    fn keys_that_lead_nowhere_make_room_and_others_do_not() {
        let mut keys = Keys::default();
        let mut answers: Vec<_> = (0..MAX_KEYS).map(|i| ask(&mut keys, format!("k{i}")).1).collect();
        let (news, mut refused) = ask(&mut keys, "more".into());
        assert_eq!(news, News::default());
        assert_eq!(refused.try_recv(), Ok(Err(Error::TooMany)));

        let mut due = Vec::new();
        keys.removed(&["k7".into()], &mut due);
        due.drain(..).for_each(|(reply, answer)| reply.send(Ok(answer)).unwrap());
        assert_eq!(answers[7].try_recv(), Ok(Ok(Answer::Unknown)));
        let (news, mut waiting) = ask(&mut keys, "more".into());
        assert_eq!((news.subscribe.as_deref(), news.unsubscribe), (Some("more"), vec!["k7".into()]));
        assert!(waiting.try_recv().is_err());
    }

    #[test]
    fn what_cannot_be_a_key_is_not_asked_for() {
        let mut keys = Keys::default();
        for key in [String::new(), "*".into(), "x".repeat(MAX_KEY + 1)] {
            let (news, mut answer) = ask(&mut keys, key);
            assert_eq!((news, answer.try_recv()), (News::default(), Ok(Err(Error::Key))));
        }
    }
}
