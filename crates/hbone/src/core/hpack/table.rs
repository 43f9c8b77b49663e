//! The static and the dynamic table of HPACK (RFC 7541 §2.3, Appendix A).

use std::collections::VecDeque;

/// What a field costs in a table and in a header list, on top of its bytes (RFC 7541 §4.1, RFC 9113 §6.5.2).
pub(crate) const FIELD: usize = 32;

/// Fields whose names and values everybody knows.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// Both tables, as one peer's encoder sees them.
#[derive(Debug)]
pub(super) struct Table {
    /// The newest field comes first.
    dynamic: VecDeque<Field>,
    size: usize,
    limit: usize,
}

/// A field, in one piece of memory.
#[derive(Debug)]
struct Field {
    bytes: Box<[u8]>,
    name: usize,
}

impl Table {
    pub(super) fn new(limit: usize) -> Self {
        Self { dynamic: VecDeque::new(), size: 0, limit }
    }

    /// The field with an index, which begins at 1.
    pub(super) fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let index = index.checked_sub(1)?;
        if let Some((name, value)) = STATIC.get(index) {
            return Some((name.as_bytes(), value.as_bytes()));
        }
        let field = self.dynamic.get(index - STATIC.len())?;
        Some(field.bytes.split_at(field.name))
    }

    /// The peer uses this much of the table from now on.
    pub(super) fn limit(&mut self, limit: usize) {
        self.limit = limit;
        self.evict(0);
    }

    pub(super) fn insert(&mut self, name: &[u8], value: &[u8]) {
        let size = name.len() + value.len() + FIELD;
        self.evict(size);
        // One that is too large empties the table, and that is all (RFC 7541 §4.4).
        if size <= self.limit {
            self.size += size;
            self.dynamic.push_front(Field { bytes: [name, value].concat().into(), name: name.len() });
        }
    }

    /// Makes room.
    fn evict(&mut self, size: usize) {
        while self.size + size > self.limit
            && let Some(field) = self.dynamic.pop_back()
        {
            self.size -= field.bytes.len() + FIELD;
        }
    }
}
