//! What a SPIRE agent is asked about for a pod of this node: the pod by its UID, or one of its processes.
//!
//! A pod's processes are those in its network namespace. The sandbox's own process is never one of them: it is there before
//! the application and has other attributes. Processes are held by descriptor and start time, since the agent looks at a number
//! once and never again. Looking through `/proc` takes the host's process namespace (`hostPID` in Kubernetes).

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::future::Future;
use std::os::unix::fs::MetadataExt as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::unix::AsyncFd;
use zspire_identity::WorkloadKey;
use zspire_identity::spire::{Locate, Process, Reference};
use zspire_model::Str;
use zspire_sys::pidfd::{self, Pidfd};

use super::{Namespace, PodInfo};
use crate::descriptor::watched;

/// How long a look through `/proc` is good for: pods that come together share one.
const FRESH: Duration = Duration::from_millis(250);
/// Names of sandbox processes.
const SANDBOXES: [&str; 2] = ["pause", "sandbox"];

/// What kind of reference an agent gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The pod, by the UID that the node agent has given it.
    Pod,
    /// A process of the pod.
    Process,
    /// Selectors made from what the node agent says of the pod; no agent attests them.
    UnattestedSelectors,
}

/// The pods that are served, by UID.
#[derive(Debug)]
pub struct References {
    kind: Kind,
    pods: Mutex<HashMap<Str, Pod>>,
    scan: Mutex<Option<Scan>>,
}

#[derive(Debug, Clone)]
struct Pod {
    info: PodInfo,
    /// Of its network namespace.
    inode: u64,
    key: WorkloadKey,
    /// Tells a pod from an earlier one with the same UID.
    generation: u64,
}

impl References {
    pub fn new(kind: Kind) -> Self {
        Self { kind, pods: Mutex::default(), scan: Mutex::default() }
    }

    /// A pod is there, whose identity is asked for by `key`. What is returned names it in [`remove`](Self::remove), and is the key
    /// of an earlier pod of this UID, which this one replaces.
    pub fn insert(
        &self,
        uid: &str,
        info: &PodInfo,
        namespace: &Namespace,
        key: &WorkloadKey,
    ) -> (u64, Option<WorkloadKey>) {
        let mut pods = lock(&self.pods);
        let generation = pods.get(uid).map_or(0, |pod| pod.generation + 1);
        let pod = Pod { info: info.clone(), inode: namespace.inode, key: key.clone(), generation };
        (generation, pods.insert(uid.into(), pod).map(|before| before.key))
    }

    /// A pod is gone. Whether it was still the one of its UID.
    pub fn remove(&self, uid: &str, generation: u64) -> bool {
        let mut pods = lock(&self.pods);
        let is_it = pods.get(uid).is_some_and(|pod| pod.generation == generation);
        if is_it {
            pods.remove(uid);
        }
        is_it
    }

    /// The oldest process first: it is the application, or has started it. If that one has another identity, the next.
    fn process(&self, pod: &Pod, useless: usize) -> Result<Reference, Str> {
        let mut scan = lock(&self.scan);
        let scan = match &mut *scan {
            Some(scan) if scan.at.elapsed() < FRESH => scan,
            old => old.insert(Scan::new()),
        };
        let none = || Str::from("no process of the pod runs in its network namespace yet");
        let candidates = scan.by_namespace.get(&pod.inode).ok_or_else(none)?;
        let first = useless % candidates.len().max(1);
        for candidate in candidates.iter().cycle().skip(first).take(candidates.len()) {
            // One that has ended since, or whose number has been given to another, is passed over.
            if let Some(process) = HeldProcess::open(*candidate, pod.inode) {
                return Ok(Reference::Process(Arc::new(process)));
            }
        }
        Err(none())
    }
}

impl Locate for References {
    fn locate(&self, key: &WorkloadKey, useless: usize) -> Result<Reference, Str> {
        let uid = key.workload.clone().ok_or("a SPIRE agent is asked about pods, and this is none")?;
        let pod = lock(&self.pods).get(&uid).cloned().ok_or("the pod is not served any more")?;
        match self.kind {
            Kind::Pod => Ok(Reference::Pod { uid }),
            Kind::Process => self.process(&pod, useless),
            Kind::UnattestedSelectors => {
                let selector = |value: String| (Str::from("k8s"), Str::from(value));
                let PodInfo { namespace, service_account, name } = &pod.info;
                Ok(Reference::Selectors(Arc::new([
                    selector(format!("ns:{namespace}")),
                    selector(format!("sa:{service_account}")),
                    selector(format!("pod-name:{name}")),
                ])))
            }
        }
    }
}

/// The processes that could be meant, by the inode of their network namespace, the oldest first.
#[derive(Debug)]
struct Scan {
    at: Instant,
    by_namespace: HashMap<u64, Vec<Candidate>>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    pid: u32,
    started: u64,
}

impl Scan {
    fn new() -> Self {
        let own = network_namespace("self");
        let mut by_namespace: HashMap<u64, Vec<Candidate>> = HashMap::new();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        for pid in numbers {
            // Processes come and go while they are looked at.
            let Some(inode) = network_namespace(&pid.to_string()).filter(|inode| Some(*inode) != own) else { continue };
            let Ok(started) = pidfd::start_time(pid) else { continue };
            if !is_sandbox(pid) {
                by_namespace.entry(inode).or_default().push(Candidate { pid, started });
            }
        }
        for candidates in by_namespace.values_mut() {
            candidates.sort_by_key(|candidate| (candidate.started, candidate.pid));
        }
        Self { at: Instant::now(), by_namespace }
    }
}

fn network_namespace(process: &str) -> Option<u64> {
    fs::metadata(format!("/proc/{process}/ns/net")).ok().map(|namespace| namespace.ino())
}

fn is_sandbox(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    SANDBOXES.contains(&name.trim_end())
}

/// A process, held so that its number cannot come to mean another one.
struct HeldProcess {
    pid: u32,
    started: u64,
    descriptor: Arc<AsyncFd<Pidfd>>,
}

impl HeldProcess {
    /// None if it is not, or not any more, the process that was found.
    fn open(found: Candidate, namespace: u64) -> Option<Self> {
        let Candidate { pid, started } = found;
        let descriptor = watched(Pidfd::open(pid).ok()?).ok()?;
        let process = Self { pid, started, descriptor: Arc::new(descriptor) };
        // Looked at after it is held: from here on the number means this process for as long as it has not ended.
        (process.is_alive() && network_namespace(&pid.to_string()) == Some(namespace)).then_some(process)
    }
}

impl Process for HeldProcess {
    fn pid(&self) -> i32 {
        i32::try_from(self.pid).expect("the kernel's numbers are smaller")
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let descriptor = self.descriptor.clone();
        Box::pin(async move {
            // Fails only when the runtime ends.
            drop(descriptor.readable().await);
        })
    }

    fn is_alive(&self) -> bool {
        let ended = self.descriptor.get_ref().ended().unwrap_or(true);
        !ended && pidfd::start_time(self.pid).is_ok_and(|started| started == self.started)
    }

    fn is_of_own_user(&self) -> bool {
        // In case of doubt it is.
        fs::metadata(format!("/proc/{}", self.pid)).map_or(true, |process| process.uid() == zspire_sys::process::user())
    }

    fn selectors(&self) -> Vec<Str> {
        effective_user(self.pid).map(|uid| format!("unix:uid:{uid}").into()).into_iter().collect()
    }
}

impl fmt::Debug for HeldProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldProcess").field("pid", &self.pid).field("started", &self.started).finish_non_exhaustive()
    }
}

/// The user that SPIRE's attestor `unix` finds.
pub fn effective_user(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};

    use zspire_model::SpiffeId;

    use super::*;

    fn info() -> PodInfo {
        PodInfo { name: "web-1".into(), namespace: "shop".into(), service_account: "web".into() }
    }

    fn namespace(inode: u64) -> Namespace {
        let any: OwnedFd = fs::File::open("/dev/null").unwrap().into();
        Namespace { descriptor: Arc::new(any), inode }
    }

    fn key() -> WorkloadKey {
        let id: SpiffeId = "spiffe://td/ns/shop/sa/web".parse().unwrap();
        WorkloadKey { id, workload: Some("uid-1".into()) }
    }

    #[test]
    fn pods_by_uid_and_selectors() {
        let references = References::new(Kind::Pod);
        assert!(references.locate(&key(), 0).is_err(), "nobody has added it");
        let (first, none) = references.insert("uid-1", &info(), &namespace(1), &key());
        assert_eq!(none, None);
        assert_eq!(references.locate(&key(), 0).unwrap().to_string(), "pod uid-1");
        let (second, replaced) = references.insert("uid-1", &info(), &namespace(2), &key());
        assert_eq!(replaced, Some(key()));
        assert!(!references.remove("uid-1", first), "the new one stays when the old one has drained");
        assert!(references.remove("uid-1", second));

        let references = References::new(Kind::UnattestedSelectors);
        references.insert("uid-1", &info(), &namespace(1), &key());
        let told = references.locate(&key(), 0).unwrap().to_string();
        assert_eq!(told, "selectors k8s:ns:shop k8s:sa:web k8s:pod-name:web-1");
    }

    #[tokio::test]
    async fn a_held_process_is_the_same_process_or_none() {
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let (pid, inode) = (child.id(), network_namespace("self").unwrap());
        let started = pidfd::start_time(pid).unwrap();
        assert!(HeldProcess::open(Candidate { pid, started: started + 1 }, inode).is_none(), "another process");
        assert!(HeldProcess::open(Candidate { pid, started }, inode + 1).is_none(), "in another namespace");
        let held = HeldProcess::open(Candidate { pid, started }, inode).unwrap();
        assert!(held.is_alive());
        let own = fs::metadata("/proc/self").unwrap().uid();
        assert_eq!(held.selectors(), [Str::from(format!("unix:uid:{own}"))]);
        let ended = held.ended();
        // A zombie has ended, whoever waits for it.
        child.kill().unwrap();
        tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap();
        assert!(!held.is_alive());
        child.wait().unwrap();
    }
}
