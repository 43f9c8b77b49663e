//! The one writer of the database while the control plane runs: a thread with a queue.
//!
//! Records gather for [`LINGER`] and go into one transaction; a join token is looked at, or spent, as soon as the thread is
//! free. The thread ends with [`Writer::finish`] or when [`Writer`] is dropped, after everything queued has been written.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rusqlite::params;
use tokio::sync::oneshot;
use zspire_model::{SpiffeId, Str};

use super::database::Durability;
use super::tokens::{self, Refusal, TokenHash};
use super::{Database, Error};
use crate::time_text::unix;

/// How long records wait for others.
pub(crate) const LINGER: Duration = Duration::from_millis(25);
/// Records in one transaction before it is not worth waiting for more.
const BATCH: usize = 2048;
/// Records that may wait when the disk is slow; more are lost, and counted.
const MAX_RECORDS: usize = 65_536;
/// Questions about tokens that may wait.
const MAX_COMMANDS: usize = 256;
/// Records kept; the oldest go first.
const MAX_ROWS: i64 = 1_000_000;
/// Records older than this go too: longer than any certificate lives.
const MAX_AGE: i64 = 400 * 24 * 3600;
/// Records written between two looks at what is to go.
const PRUNE_EVERY: usize = 20_000;
/// A full disk is said this often, not with every batch.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// A certificate just issued.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) serial: String,
    pub(crate) identity: SpiffeId,
    pub(crate) caller: Str,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    pub(crate) issued_at: SystemTime,
}

#[derive(Debug)]
enum Command {
    Check { hash: TokenHash, node: String, reply: Reply },
    Spend { hash: TokenHash, node: String, reply: Reply },
}

type Reply = oneshot::Sender<Result<Result<(), Refusal>, Error>>;

/// Numbers of the writer.
#[derive(Debug, Default)]
pub(crate) struct WriterStats {
    /// Records written.
    pub(crate) written: AtomicU64,
    /// Records lost: the queue was full or the database refused.
    pub(crate) lost: AtomicU64,
}

#[derive(Debug, Default)]
struct Queue {
    records: Vec<Record>,
    commands: VecDeque<Command>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    stats: Arc<WriterStats>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("nothing panics while holding it")
    }
}

/// The handle of the writer.
#[derive(Debug)]
pub(crate) struct Writer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// Opens the database and starts the thread.
    pub(crate) fn start(folder: &Path) -> Result<Self, Error> {
        let worker = Worker {
            records: Database::open(folder, Durability::Fast)?,
            tokens: Database::durable(folder)?,
            since_prune: PRUNE_EVERY,
            said: None,
        };
        let shared = Arc::new(Shared::default());
        let its = shared.clone();
        let thread = std::thread::Builder::new().name("state-writer".into()).spawn(move || worker.run(&its));
        let thread = thread.map_err(|source| Error::io(folder, source))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Queues a record. Never waits: with a full queue the record is lost and counted.
    pub(crate) fn record(&self, record: Record) {
        let mut queue = self.shared.queue();
        if queue.closed || queue.records.len() >= MAX_RECORDS {
            self.shared.stats.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.records.push(record);
        let waiting = queue.records.len();
        drop(queue);
        // In between, the thread is lingering and looks by itself.
        if waiting == 1 || waiting == BATCH {
            self.shared.wake.notify_one();
        }
    }

    /// Whether a token would buy a certificate for `node`.
    pub(crate) async fn check(&self, hash: TokenHash, node: &str) -> Result<Result<(), Refusal>, Unavailable> {
        self.ask(|reply| Command::Check { hash, node: node.to_owned(), reply }).await
    }

    /// Spends a token; on the disk when this returns.
    pub(crate) async fn spend(&self, hash: TokenHash, node: &str) -> Result<Result<(), Refusal>, Unavailable> {
        self.ask(|reply| Command::Spend { hash, node: node.to_owned(), reply }).await
    }

    async fn ask(&self, command: impl FnOnce(Reply) -> Command) -> Result<Result<(), Refusal>, Unavailable> {
        let (reply, answer) = oneshot::channel();
        {
            let mut queue = self.shared.queue();
            if queue.closed {
                return Err(Unavailable::Stopped);
            }
            if queue.commands.len() >= MAX_COMMANDS {
                return Err(Unavailable::Busy);
            }
            queue.commands.push_back(command(reply));
        }
        self.shared.wake.notify_one();
        match answer.await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(error)) => Err(Unavailable::Database(error)),
            Err(_) => Err(Unavailable::Stopped),
        }
    }

    /// Ends the thread after everything queued has been written. What comes later is lost.
    pub(crate) fn finish(&self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_one();
        let thread = self.thread.lock().expect("nothing panics while holding it").take();
        if let Some(thread) = thread {
            drop(thread.join());
        }
    }

    pub(crate) fn stats(&self) -> Arc<WriterStats> {
        self.shared.stats.clone()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Why the state of a token cannot be told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unavailable {
    #[error("too many join tokens are being checked")]
    Busy,
    #[error("the use of a join token cannot be recorded")]
    Database(#[source] Error),
    #[error("the control plane is stopping")]
    Stopped,
}

struct Worker {
    records: Database,
    tokens: Database,
    since_prune: usize,
    said: Option<Instant>,
}

impl Worker {
    fn run(mut self, shared: &Shared) {
        loop {
            let (records, commands, closed) = next(shared);
            for command in commands {
                self.answer(command);
            }
            self.write(&records, &shared.stats);
            if closed && records.is_empty() {
                return;
            }
        }
    }

    fn answer(&mut self, command: Command) {
        let now = unix(SystemTime::now());
        let (outcome, reply) = match command {
            Command::Check { hash, node, reply } => (tokens::check(self.tokens.connection(), hash, &node, now), reply),
            Command::Spend { hash, node, reply } => (tokens::spend(self.tokens.connection(), hash, &node, now), reply),
        };
        // Whoever asked may have gone; a spent token stays spent.
        drop(reply.send(outcome.map_err(|e| self.tokens.error(e))));
    }

    fn write(&mut self, records: &[Record], stats: &WriterStats) {
        if records.is_empty() {
            return;
        }
        match insert(&mut self.records, records) {
            Ok(()) => {
                stats.written.fetch_add(records.len() as u64, Ordering::Relaxed);
                self.since_prune += records.len();
            }
            Err(source) => {
                stats.lost.fetch_add(records.len() as u64, Ordering::Relaxed);
                self.say(&self.records.error(source), records.len());
            }
        }
        if self.since_prune >= PRUNE_EVERY {
            self.since_prune = 0;
            if let Err(source) = prune(&mut self.records) {
                self.say(&self.records.error(source), 0);
            }
        }
    }

    fn say(&mut self, error: &Error, lost: usize) {
        if self.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            self.said = Some(Instant::now());
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::error!(%error, cause, lost, "records of issued certificates are lost, issuing goes on");
        }
    }
}

/// Waits for work. Records alone wait for others to come along.
fn next(shared: &Shared) -> (Vec<Record>, VecDeque<Command>, bool) {
    let idle = |queue: &mut Queue| queue.records.is_empty() && queue.commands.is_empty() && !queue.closed;
    let lingering = |queue: &mut Queue| queue.records.len() < BATCH && queue.commands.is_empty() && !queue.closed;
    let queue = shared.wake.wait_while(shared.queue(), idle).expect("nothing panics while holding it");
    let (mut queue, _) =
        shared.wake.wait_timeout_while(queue, LINGER, lingering).expect("nothing panics while holding it");
    let records = std::mem::take(&mut queue.records);
    (records, std::mem::take(&mut queue.commands), queue.closed)
}

fn insert(database: &mut Database, records: &[Record]) -> rusqlite::Result<()> {
    let transaction = database.connection().transaction()?;
    {
        let mut statement = transaction.prepare_cached(
            "INSERT INTO issued (serial, identity, caller, not_before, not_after, issued_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?;
        for record in records {
            statement.execute(params![
                record.serial,
                record.identity.as_str(),
                &*record.caller,
                unix(record.not_before),
                unix(record.not_after),
                unix(record.issued_at),
            ])?;
        }
    }
    transaction.commit()
}

/// Keeps the table bounded. Rows are in order of time, so what goes is always at its beginning.
fn prune(database: &mut Database) -> rusqlite::Result<()> {
    let db = database.connection();
    db.execute("DELETE FROM issued WHERE id <= (SELECT max(id) FROM issued) - ?1", [MAX_ROWS])?;
    let oldest = unix(SystemTime::now()) - MAX_AGE;
    let sql = "DELETE FROM issued WHERE id IN
               (SELECT id FROM (SELECT id, issued_at FROM issued ORDER BY id LIMIT 50000) WHERE issued_at < ?1)";
    db.execute(sql, [oldest]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::{create_token, issued};
    use super::*;
    use crate::config::{Config, Options};

    fn config(folder: &Path) -> Config {
        let state = Some(folder.join("state").display().to_string());
        Config::build(Options { state, ..Options::default() }, |_| None).unwrap()
    }

    fn record(number: usize) -> Record {
        let now = SystemTime::now();
        Record {
            serial: format!("{number:x}"),
            identity: "spiffe://cluster.local/ns/a/sa/b".parse().unwrap(),
            caller: "node a".into(),
            not_before: now,
            not_after: now,
            issued_at: now,
        }
    }

    #[test]
    fn what_is_queued_is_written_before_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::start(folder.path()).unwrap();
        (0..5000).for_each(|number| writer.record(record(number)));
        let stats = writer.stats();
        drop(writer);
        assert_eq!(stats.written.load(Ordering::Relaxed), 5000);
        let last = issued(folder.path(), 2).unwrap();
        assert_eq!(last.iter().map(|r| r.serial.as_str()).collect::<Vec<_>>(), ["1387", "1386"]);
    }

    #[test]
    fn a_database_that_refuses_loses_records_and_counts_them() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::start(folder.path()).unwrap();
        let other = rusqlite::Connection::open(folder.path().join("state.db")).unwrap();
        other.execute_batch("DROP TABLE issued").unwrap();
        writer.record(record(1));
        let stats = writer.stats();
        drop(writer);
        assert_eq!(stats.lost.load(Ordering::Relaxed), 1);
        assert_eq!(stats.written.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn old_and_surplus_records_go() {
        let folder = tempfile::tempdir().unwrap();
        let mut database = Database::open(folder.path(), Durability::Fast).unwrap();
        let mut old = record(1);
        old.issued_at = SystemTime::UNIX_EPOCH;
        insert(&mut database, &[old, record(2)]).unwrap();
        let surplus = format!("UPDATE issued SET id = {} WHERE serial = '2'", MAX_ROWS);
        database.connection().execute_batch(&surplus).unwrap();
        insert(&mut database, &[record(3)]).unwrap();
        prune(&mut database).unwrap();
        let left: Vec<_> = issued(folder.path(), 9).unwrap().into_iter().map(|r| r.serial).collect();
        assert_eq!(left, ["3", "2"]);
    }

    #[tokio::test]
    async fn a_token_is_spent_once_by_its_node_only() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        // As the first start does.
        super::super::own_root(&config.state, &config.trust_domain, SystemTime::now()).unwrap();
        let text = create_token(&config, "node-a", Duration::from_secs(60)).unwrap();
        let hash = TokenHash::of(&text.parse().unwrap());
        let writer = Writer::start(&config.state).unwrap();
        assert_eq!(writer.check(hash, "node-b").await.unwrap(), Err(Refusal::OtherNode));
        assert_eq!(writer.spend(hash, "node-b").await.unwrap(), Err(Refusal::OtherNode));
        assert_eq!(writer.check(hash, "node-a").await.unwrap(), Ok(()));
        let (one, two) = tokio::join!(writer.spend(hash, "node-a"), writer.spend(hash, "node-a"));
        assert_eq!([one.unwrap(), two.unwrap()], [Ok(()), Err(Refusal::Used)]);
        assert_eq!(writer.check(hash, "node-a").await.unwrap(), Err(Refusal::Used));
    }

    #[tokio::test]
    async fn a_token_expires_and_an_unknown_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        // As the first start does.
        super::super::own_root(&config.state, &config.trust_domain, SystemTime::now()).unwrap();
        let text = create_token(&config, "node-a", Duration::ZERO).unwrap();
        let writer = Writer::start(&config.state).unwrap();
        let hash = TokenHash::of(&text.parse().unwrap());
        assert_eq!(writer.check(hash, "node-a").await.unwrap(), Err(Refusal::Expired));
        assert_eq!(writer.spend(hash, "node-a").await.unwrap(), Err(Refusal::Expired));
        let other = format!("zs1.{}.{}", "0".repeat(64), "x".repeat(43)).parse().unwrap();
        assert_eq!(writer.spend(TokenHash::of(&other), "node-a").await.unwrap(), Err(Refusal::Unknown));
    }

    #[test]
    fn names_that_no_node_can_have() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["", "a/b", "a b", "ä", "..", &"x".repeat(254)] {
            let error = create_token(&config(folder.path()), name, Duration::from_secs(60)).unwrap_err();
            assert!(matches!(error, Error::Node(_)), "{name:?}: {error}");
        }
    }
}
