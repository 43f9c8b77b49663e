//! The streams of a tunnel, by their numbers.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::reason::Reason;

/// Streams for which there is always room.
const KEPT: usize = 3;

/// One stream.
#[derive(Debug)]
pub struct Entry<T> {
    pub(super) id: u32,
    /// What may be sent; below zero after the peer has made its windows smaller.
    pub(super) send_window: i64,
    /// What the peer may send.
    pub(super) window: i64,
    /// What the application has taken and the peer does not know of.
    pub(super) taken: u32,
    /// The request was answered.
    pub(super) answered: bool,
    /// We have sent END_STREAM.
    pub(super) local_ended: bool,
    /// The peer has.
    pub(super) remote_ended: bool,
    pub(super) reset: Option<Reason>,
    /// It wants to send and waits for room: its place among those that do.
    pub(super) place: Option<u64>,
    /// It wants to send and has no window.
    pub(super) starved: bool,
    /// What its owner keeps.
    pub data: T,
}

impl<T> Entry<T> {
    /// The reason by which it was reset.
    pub fn reset(&self) -> Option<Reason> {
        self.reset
    }

    /// The request was answered.
    pub fn is_answered(&self) -> bool {
        self.answered
    }

    /// It wanted to send and could not.
    pub(crate) fn is_parked(&self) -> bool {
        self.place.is_some() || self.starved
    }

    /// We have ended our direction.
    pub fn local_ended(&self) -> bool {
        self.local_ended
    }

    /// The peer has ended its direction.
    pub fn remote_ended(&self) -> bool {
        self.remote_ended
    }

    /// For the peer it is gone.
    pub fn is_closed(&self) -> bool {
        self.reset.is_some() || (self.local_ended && self.remote_ended)
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Streams<T> {
    entries: HashMap<u32, Entry<T>, BuildHasherDefault<ById>>,
    /// Those that are not closed.
    pub(super) active: usize,
    /// Those that were closed, or refused at once, since this was looked at.
    pub(super) gone: u64,
}

impl<T> Default for Streams<T> {
    fn default() -> Self {
        Self { entries: HashMap::default(), active: 0, gone: 0 }
    }
}

impl<T> Streams<T> {
    pub(super) fn get(&self, id: u32) -> Option<&Entry<T>> {
        self.entries.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Entry<T>> {
        self.entries.get_mut(&id)
    }

    pub(super) fn insert(&mut self, id: u32, send_window: u32, window: u32, data: T) -> &mut Entry<T> {
        self.active += 1;
        self.entries
            .entry(id)
            .insert_entry(Entry {
                id,
                send_window: i64::from(send_window),
                window: i64::from(window),
                taken: 0,
                answered: false,
                local_ended: false,
                remote_ended: false,
                reset: None,
                place: None,
                starved: false,
                data,
            })
            .into_mut()
    }

    /// Changes one that is not closed; false if there is none.
    pub(super) fn change(&mut self, id: u32, change: impl FnOnce(&mut Entry<T>)) -> bool {
        match self.entries.get_mut(&id) {
            Some(entry) if !entry.is_closed() => {
                change(entry);
                if entry.is_closed() {
                    self.active -= 1;
                    self.gone += 1;
                }
                true
            }
            _ => false,
        }
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<Entry<T>> {
        let entry = self.entries.remove(&id)?;
        if !entry.is_closed() {
            self.active -= 1;
            self.gone += 1;
        }
        if self.entries.is_empty() && self.entries.capacity() > KEPT {
            // An idle tunnel keeps little of its busy times.
            self.entries.shrink_to(KEPT);
        }
        Some(entry)
    }

    pub(super) fn each(&mut self, f: impl FnMut(&mut Entry<T>)) {
        self.entries.values_mut().for_each(f);
    }

    /// Changes all that are not closed.
    pub(super) fn change_each(&mut self, change: impl Fn(&mut Entry<T>)) {
        for entry in self.entries.values_mut().filter(|entry| !entry.is_closed()) {
            change(entry);
            if entry.is_closed() {
                self.active -= 1;
                self.gone += 1;
            }
        }
    }
}

/// Spreads the numbers of streams. A peer chooses them, but only a few at once: that they might collide costs nothing.
#[derive(Debug, Default)]
struct ById(u64);

impl Hasher for ById {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a key is one number");
    }

    fn write_u32(&mut self, id: u32) {
        let spread = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = spread ^ (spread >> 32);
    }
}
