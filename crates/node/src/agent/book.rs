//! Who is enrolled: the steps of enrolling and leaving, each pod's in order, different pods' side by side.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use zspire_sys::netns::Netns;
use zspire_sys::nft::Redirection;
use zspire_sys::pidfd::{self, Pidfd};

use super::folder::{Folder, Record, Until};
use super::rules;
use super::zds::{Hub, Pod, Standing};
use crate::descriptor::watched;

/// Longest name.
const MAX_NAME: usize = 253;
/// How long an enrolment waits to be served.
const SERVED: Duration = Duration::from_secs(10);
/// How long a pod that leaves waits for its connections, which the proxy cuts at its drain deadline.
const LEAVING: Duration = Duration::from_secs(120);
/// Between two looks at what nobody announces: whether connections have ended.
const LOOK: Duration = Duration::from_millis(20);
/// The same for a file that stands for a namespace.
const LOOK_AT_FILE: Duration = Duration::from_secs(1);

/// What is to be enrolled.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Enrolment {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// By default made of namespace and name.
    pub uid: Option<String>,
    /// The file that stands for its network namespace, if that was named.
    pub file: Option<PathBuf>,
}

/// A pod that is enrolled, as commands show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    #[serde(flatten)]
    pub record: Record,
    /// Why it is not served yet; none: it is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pending: Option<String>,
}

/// Who is meant.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Which {
    Uid(String),
    Pod { namespace: String, name: String },
}

/// The book.
#[derive(Debug)]
pub struct Book {
    folder: Folder,
    rules: Redirection,
    home: u64,
    hub: Arc<Hub>,
    entries: Mutex<BTreeMap<String, Entry>>,
}

#[derive(Debug, Clone)]
struct Entry {
    record: Record,
    netns: Netns,
    /// Who has it may change the pod. What it holds says how far the pod has come.
    turn: Arc<tokio::sync::Mutex<Stage>>,
    /// Ends the task that watches for the pod's end.
    watch: CancellationToken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    New,
    Entered,
    Left,
}

impl Book {
    /// An empty one.
    pub(super) fn new(folder: Folder, rules: Redirection, home: Netns) -> anyhow::Result<Self> {
        let home = home.inode().context("cannot look at the network namespace of this process")?;
        Ok(Self { folder, rules, home, hub: Arc::default(), entries: Mutex::default() })
    }

    /// Who tells node proxies.
    pub(super) fn hub(&self) -> Arc<Hub> {
        self.hub.clone()
    }

    /// Enrols a pod; it is served when this completes, or the error says what it waits for. Enrolling it again is no error.
    pub async fn enroll(
        self: &Arc<Self>,
        enrolment: Enrolment,
        netns: Netns,
        process: Option<Pidfd>,
    ) -> anyhow::Result<Enrolled> {
        let record = self.record(enrolment, &netns, process.as_ref())?;
        let entry = self.admit(record, netns).await?;
        let uid = entry.record.uid.clone();
        let mut stage = entry.turn.lock().await;
        ensure!(*stage != Stage::Left, "pod {} has left meanwhile: try again", entry.record.pod());
        let new = *stage == Stage::New;
        if let Err(error) = self.enter(&entry, new).await {
            if new {
                *stage = Stage::Left;
                self.lock().remove(&uid);
            }
            return Err(error);
        }
        *stage = Stage::Entered;
        if new {
            self.watch_for_the_end(&entry, process);
            tracing::info!(uid, pod = entry.record.pod(), netns = entry.record.inode, "pod is enrolled");
        }
        // Others may have their turn while the proxy answers.
        drop(stage);
        match self.hub.served(&uid, SERVED).await {
            Standing::Served => Ok(Enrolled { record: entry.record, pending: None }),
            Standing::Pending(why) => Ok(Enrolled { record: entry.record, pending: Some(why) }),
        }
    }

    fn record(&self, enrolment: Enrolment, netns: &Netns, process: Option<&Pidfd>) -> anyhow::Result<Record> {
        let Enrolment { name, namespace, service_account, uid, file } = enrolment;
        let uid = uid.unwrap_or_else(|| format!("{namespace}.{name}"));
        for (what, value) in
            [("name", &name), ("namespace", &namespace), ("service account", &service_account), ("uid", &uid)]
        {
            valid(what, value)?;
        }
        let inode = netns.inode().context("cannot look at the network namespace")?;
        ensure!(inode != self.home, "this is the network namespace of the node itself, which is no pod");
        let until = match (process, file) {
            (Some(process), _) => {
                let pid = process.number().context("cannot look at the process")?;
                let pid = pid.context("the process has ended, or is not to be seen from the node agent")?;
                let start_time = pidfd::start_time(pid).context("cannot look at the process")?;
                ensure!(!process.ended()?, "the process has ended");
                Until::Process { pid, start_time }
            }
            // A file that the agent does not see is not watched.
            (None, Some(file)) if is_namespace(&file, inode) => Until::File(file),
            (None, _) => Until::Unenrolled,
        };
        Ok(Record { uid, name, namespace, service_account, until, inode })
    }

    /// The pod's entry: a new one, or the one that it has.
    async fn admit(self: &Arc<Self>, record: Record, netns: Netns) -> anyhow::Result<Entry> {
        let stale = {
            let mut entries = self.lock();
            let known = entries.values().find(|entry| {
                entry.record.uid == record.uid
                    || entry.record.inode == record.inode
                    || entry.record.pod() == record.pod()
            });
            match known.cloned() {
                None => {
                    let entry = Entry { record, netns, turn: turn(Stage::New), watch: CancellationToken::new() };
                    entries.insert(entry.record.uid.clone(), entry.clone());
                    return Ok(entry);
                }
                Some(known) if same_pod(&known.record, &record) => return Ok(known),
                Some(known) => known,
            }
        };
        let Record { uid, inode, .. } = &stale.record;
        let pod = stale.record.pod();
        ensure!(
            *inode != record.inode,
            "this network namespace is enrolled already, as {pod} (uid {uid}): unenroll that first"
        );
        ensure!(
            pod == record.pod(),
            "the uid {uid} is that of {pod}, which is enrolled already: give another with --uid"
        );
        // A pod that was started again may be faster than the news of its end.
        if has_ended(&stale.record) {
            self.leave(uid).await?;
            return Box::pin(self.admit(record, netns)).await;
        }
        bail!(
            "{pod} (uid {uid}) is enrolled already with another network namespace or service account: unenroll it first"
        )
    }

    /// On disk, then rules, then told: whatever happens between, the pod's connections are refused and not passed.
    async fn enter(self: &Arc<Self>, entry: &Entry, new: bool) -> anyhow::Result<()> {
        let (book, entry) = (self.clone(), entry.clone());
        blocking(move || {
            if new {
                book.folder.keep(&entry.record, &entry.netns)?;
            }
            if let Err(error) = rules::apply(&entry.netns, &book.rules) {
                if new {
                    book.undo(&entry);
                }
                return Err(error);
            }
            if new {
                rules::end_older_connections(&entry.netns);
            }
            book.hub.put(Pod { record: entry.record.clone(), netns: entry.netns.clone() });
            Ok(())
        })
        .await
    }

    fn undo(&self, entry: &Entry) {
        let (removed, forgotten) = (rules::remove(&entry.netns), self.folder.forget(&entry.record.uid));
        if let Some(error) = removed.err().or(forgotten.err().map(Into::into)) {
            tracing::error!(
                uid = entry.record.uid,
                error = format!("{error:#}"),
                "an enrolment that failed is not undone"
            );
        }
    }

    /// Unenrols a pod: it is as it was before when this completes.
    pub async fn unenroll(self: &Arc<Self>, which: &Which) -> anyhow::Result<Record> {
        let record = {
            let entries = self.lock();
            let found = entries.values().find(|entry| match which {
                Which::Uid(uid) => entry.record.uid == *uid,
                Which::Pod { namespace, name } => entry.record.namespace == *namespace && entry.record.name == *name,
            });
            found.map(|entry| entry.record.clone())
        };
        let record = record.with_context(|| match which {
            Which::Uid(uid) => format!("no pod with the uid {uid} is enrolled here"),
            Which::Pod { namespace, name } => format!("no pod {namespace}/{name} is enrolled here"),
        })?;
        self.leave(&record.uid).await?;
        Ok(record)
    }

    /// Proxies first, then its connections, then the rules: other processes may be where one has ended.
    async fn leave(self: &Arc<Self>, uid: &str) -> anyhow::Result<()> {
        let Some(entry) = self.lock().get(uid).cloned() else { return Ok(()) };
        let mut stage = entry.turn.lock().await;
        if *stage != Stage::Entered {
            return Ok(());
        }
        self.hub.remove(uid);
        self.hub.left(uid).await;
        self.connections_have_ended(&entry).await?;
        let (book, left) = (self.clone(), entry.clone());
        blocking(move || {
            rules::remove(&left.netns)?;
            Ok(book.folder.forget(&left.record.uid)?)
        })
        .await?;
        *stage = Stage::Left;
        entry.watch.cancel();
        self.lock().remove(uid);
        tracing::info!(uid, pod = entry.record.pod(), "pod is no longer enrolled");
        Ok(())
    }

    /// The proxy still carries the pod's connections until its drain deadline. Without the rules, what the application says on
    /// one of them would go to its destination as it is.
    async fn connections_have_ended(&self, entry: &Entry) -> anyhow::Result<()> {
        let until = Instant::now() + LEAVING;
        loop {
            let netns = entry.netns.clone();
            let live = blocking(move || Ok(rules::live_connections(&netns)?)).await?;
            if live == 0 {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "{live} connections of {} have not ended in {LEAVING:?}; its rules stay, and its new connections are refused",
                entry.record.pod()
            );
            sleep(LOOK).await;
        }
    }

    /// Who is enrolled.
    pub fn enrolled(&self) -> Vec<Enrolled> {
        let records: Vec<Record> = self.lock().values().map(|entry| entry.record.clone()).collect();
        let view = |record: Record| match self.hub.standing(&record.uid) {
            Standing::Served => Enrolled { record, pending: None },
            Standing::Pending(why) => Enrolled { record, pending: Some(why) },
        };
        records.into_iter().map(view).collect()
    }

    /// Takes up again what an agent before this one has enrolled; pods that have ended since are dropped.
    pub(super) async fn restore(self: &Arc<Self>, stop: &CancellationToken) -> anyhow::Result<()> {
        let (records, unreadable) = self.folder.records()?;
        for error in unreadable {
            let error = format!("{:#}", anyhow::Error::new(error));
            tracing::error!(error, "a pod is not taken up again; its connections stay refused");
        }
        for record in records {
            if stop.is_cancelled() {
                return Ok(());
            }
            let (uid, pod) = (record.uid.clone(), record.pod());
            match self.take_up(record).await {
                Ok(true) => tracing::info!(uid, pod, "pod is taken up again"),
                Ok(false) => tracing::info!(uid, pod, "pod has ended meanwhile"),
                Err(error) => tracing::error!(uid, pod, error = format!("{error:#}"), "pod is not taken up again"),
            }
        }
        Ok(())
    }

    /// Whether the pod is still there.
    async fn take_up(self: &Arc<Self>, record: Record) -> anyhow::Result<bool> {
        let kept = self.folder.netns(&record.uid).ok().filter(|netns| netns.inode().ok() == Some(record.inode));
        let ended = has_ended(&record);
        if kept.is_none() && (ended || !self.hold_again(&record)?) {
            self.folder.forget(&record.uid)?;
            return Ok(false);
        }
        let netns = self.folder.netns(&record.uid).context("cannot open the network namespace that was kept")?;
        if ended {
            let (book, uid) = (self.clone(), record.uid.clone());
            let entry = Entry { record, netns, turn: turn(Stage::Entered), watch: CancellationToken::new() };
            self.lock().insert(uid.clone(), entry);
            // Proxies that connect are not told of it, and drain what they have of it.
            tokio::spawn(async move { book.leave_ended(&uid).await });
            return Ok(false);
        }
        let process = match record.until {
            Until::Process { pid, .. } => Some(Pidfd::open(pid).context("cannot hold the process")?),
            _ => None,
        };
        let entry = Entry { record, netns, turn: turn(Stage::Entered), watch: CancellationToken::new() };
        self.lock().insert(entry.record.uid.clone(), entry.clone());
        self.enter(&entry, false).await?;
        self.watch_for_the_end(&entry, process);
        Ok(true)
    }

    /// Where mounts have not survived, a process may still have the namespace.
    fn hold_again(&self, record: &Record) -> anyhow::Result<bool> {
        let Until::Process { pid, .. } = record.until else { return Ok(false) };
        let netns = Netns::of_process(pid).context("cannot open the process's network namespace")?;
        if netns.inode()? != record.inode {
            return Ok(false);
        }
        self.folder.forget(&record.uid)?;
        self.folder.keep(record, &netns)?;
        Ok(true)
    }

    fn watch_for_the_end(self: &Arc<Self>, entry: &Entry, process: Option<Pidfd>) {
        let (book, record, stop) = (self.clone(), entry.record.clone(), entry.watch.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => return,
                () = end(&record, process) => {}
            }
            tracing::info!(uid = record.uid, pod = record.pod(), "pod has ended");
            book.leave_ended(&record.uid).await;
        });
    }

    async fn leave_ended(self: &Arc<Self>, uid: &str) {
        if let Err(error) = self.leave(uid).await {
            tracing::error!(uid, error = format!("{error:#}"), "a pod that has ended stays enrolled");
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn turn(stage: Stage) -> Arc<tokio::sync::Mutex<Stage>> {
    Arc::new(tokio::sync::Mutex::new(stage))
}

/// A name as ZDS and the file system take it.
fn valid(what: &str, value: &str) -> anyhow::Result<()> {
    let fits = (1..=MAX_NAME).contains(&value.len())
        && value.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && !value.starts_with('.');
    ensure!(
        fits,
        "{what} {value:?}: expected 1 to {MAX_NAME} letters, digits, '-', '_' and '.', not beginning with '.'"
    );
    Ok(())
}

fn same_pod(known: &Record, record: &Record) -> bool {
    known.uid == record.uid
        && known.inode == record.inode
        && known.pod() == record.pod()
        && known.service_account == record.service_account
}

/// Whether what a pod was known by is no more.
fn has_ended(record: &Record) -> bool {
    match &record.until {
        Until::Unenrolled => false,
        Until::Process { pid, start_time } => {
            pidfd::start_time(*pid).ok() != Some(*start_time)
                || Pidfd::open(*pid).and_then(|process| process.ended()).unwrap_or(true)
        }
        Until::File(file) => !is_namespace(file, record.inode),
    }
}

fn is_namespace(file: &PathBuf, inode: u64) -> bool {
    // By number first: opening what else may be there is not asked for.
    std::fs::metadata(file).is_ok_and(|found| found.ino() == inode) && Netns::open(file).is_ok()
}

/// Completes when a pod has ended by itself.
async fn end(record: &Record, process: Option<Pidfd>) {
    match (&record.until, process) {
        (Until::Process { .. }, Some(process)) => {
            if let Ok(process) = watched(process) {
                let _ = process.readable().await;
                return;
            }
            std::future::pending().await
        }
        (Until::File(file), _) => {
            while is_namespace(file, record.inode) {
                sleep(LOOK_AT_FILE).await;
            }
        }
        _ => std::future::pending().await,
    }
}

/// Does something that blocks, away from the runtime's thread.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(f).await.context("a step of the node agent has panicked")?
}
