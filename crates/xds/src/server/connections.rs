//! Which streams are open, for operators.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::{Caller, Node};

/// One open stream.
#[derive(Debug, Clone)]
pub struct Connection {
    /// What the client calls itself.
    pub node_id: String,
    /// Who it is.
    pub caller: String,
    /// Since when.
    pub connected_at: SystemTime,
    /// By type URL.
    pub types: BTreeMap<&'static str, TypeStatus>,
}

/// How far a client has come with a type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TypeStatus {
    /// Version of the set that was sent last.
    pub sent: String,
    /// Version of the set that was acknowledged (or rejected) last.
    pub acknowledged: String,
    /// What the client could not use of a response, the last time that happened.
    pub last_rejection: Option<String>,
}

/// All open streams.
#[derive(Debug, Clone, Default)]
pub(super) struct Connections(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    open: BTreeMap<u64, Connection>,
}

/// One of them; it is gone when this is dropped.
#[derive(Debug)]
pub(super) struct Tracked {
    connections: Connections,
    id: u64,
}

impl Connections {
    pub(super) fn add(&self, node: &Node, caller: &Caller, max: usize) -> Option<Tracked> {
        let mut inner = self.lock();
        if inner.open.len() >= max {
            return None;
        }
        let id = inner.next;
        inner.next += 1;
        let connection = Connection {
            node_id: node.id.clone(),
            caller: caller.name.clone(),
            connected_at: SystemTime::now(),
            types: BTreeMap::new(),
        };
        inner.open.insert(id, connection);
        Some(Tracked { connections: self.clone(), id })
    }

    pub(super) fn list(&self) -> Vec<Connection> {
        self.lock().open.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracked {
    pub(super) fn update(&self, type_url: &'static str, update: impl FnOnce(&mut TypeStatus)) {
        if let Some(connection) = self.connections.lock().open.get_mut(&self.id) {
            update(connection.types.entry(type_url).or_default());
        }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.connections.lock().open.remove(&self.id);
    }
}
