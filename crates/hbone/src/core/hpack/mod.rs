//! Header blocks (HPACK, RFC 7541): everything that peers may write is read; what we write is static or literal.
//!
//! The decoder keeps the dynamic table of one direction of a connection and nothing else. It bounds what a block may unfold to:
//! a field costs what HTTP/2 says that it costs, and a block that goes beyond the limit of the caller is not read to its end.

mod huffman;
mod table;

pub(crate) use table::FIELD;
use table::Table;

/// The size of the dynamic table that we allow, which is also what HTTP/2 begins with (RFC 9113 §6.5.2).
const TABLE: usize = 4096;

/// Said before the first field of a block: the writer keeps no table (RFC 7541 §6.3).
pub(crate) const NO_TABLE: u8 = 0x20;

/// Why a block cannot be read. Either way the connection has to end: what follows refers to what was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// It is no header block.
    #[error("the header block is not HPACK")]
    Malformed,
    /// It unfolds to more than was allowed.
    #[error("the header block unfolds to too much")]
    TooLarge,
}

/// Reads the header blocks of one direction of a connection, in their order.
#[derive(Debug)]
pub struct Decoder {
    table: Table,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { table: Table::new(TABLE), name: Vec::new(), value: Vec::new() }
    }
}

impl Decoder {
    /// Reads a block and hands over each field. They cost `limit` at most, in bytes as HTTP/2 counts them.
    pub fn decode(
        &mut self,
        mut block: &[u8],
        limit: usize,
        field: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), Unreadable> {
        let mut left = limit;
        let mut first = true;
        while let Some(&kind) = block.first() {
            let (name, value) = match kind {
                // Indexed (§6.1).
                0x80.. => {
                    let index = integer(&mut block, 7)?;
                    self.table.get(index).ok_or(Unreadable::Malformed)?
                }
                // A change of the table's size (§6.3), at the beginning of a block only (§4.2).
                0x20..0x40 => {
                    let size = integer(&mut block, 5)?;
                    if size > TABLE || !first {
                        return Err(Unreadable::Malformed);
                    }
                    self.table.limit(size);
                    continue;
                }
                // Literal (§6.2): remembered, or not.
                _ => {
                    self.literal(&mut block, if kind >= 0x40 { 6 } else { 4 })?;
                    if kind >= 0x40 {
                        self.table.insert(&self.name, &self.value);
                    }
                    (&*self.name, &*self.value)
                }
            };
            first = false;
            left = left.checked_sub(name.len() + value.len() + FIELD).ok_or(Unreadable::TooLarge)?;
            field(name, value);
        }
        self.tidy();
        Ok(())
    }

    /// Reads a literal field into `name` and `value`.
    fn literal(&mut self, block: &mut &[u8], prefix: u32) -> Result<(), Unreadable> {
        self.name.clear();
        self.value.clear();
        match integer(block, prefix)? {
            0 => string(block, &mut self.name)?,
            index => {
                let (name, _) = self.table.get(index).ok_or(Unreadable::Malformed)?;
                self.name.extend_from_slice(name);
            }
        }
        string(block, &mut self.value)
    }

    /// What was needed for one long field is not kept.
    fn tidy(&mut self) {
        for buffer in [&mut self.name, &mut self.value] {
            buffer.clear();
            buffer.shrink_to(64);
        }
    }
}

/// An integer whose first byte has `prefix` bits of it (§5.1).
fn integer(block: &mut &[u8], prefix: u32) -> Result<usize, Unreadable> {
    let (&first, mut rest) = block.split_first().ok_or(Unreadable::Malformed)?;
    let mask = (1usize << prefix) - 1;
    let mut value = usize::from(first) & mask;
    if value == mask {
        // Four more bytes hold more than any length or index of ours.
        for shift in [0, 7, 14, 21] {
            let (&byte, after) = rest.split_first().ok_or(Unreadable::Malformed)?;
            rest = after;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                *block = rest;
                return Ok(value);
            }
        }
        return Err(Unreadable::Malformed);
    }
    *block = rest;
    Ok(value)
}

/// A string, compressed or not (§5.2).
fn string(block: &mut &[u8], out: &mut Vec<u8>) -> Result<(), Unreadable> {
    let compressed = block.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(block, 7)?;
    let (bytes, rest) = block.split_at_checked(length).ok_or(Unreadable::Malformed)?;
    *block = rest;
    if compressed {
        huffman::decode(bytes, out).ok_or(Unreadable::Malformed)
    } else {
        out.extend_from_slice(bytes);
        Ok(())
    }
}

/// Names that the static table has, for what we write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    /// The index of a field with that name.
    Known(u8),
    Literal(&'static str),
}

impl Name {
    pub(crate) const AUTHORITY: Self = Self::Known(1);
    pub(crate) const METHOD: Self = Self::Known(2);
    pub(crate) const STATUS: Self = Self::Known(8);
}

/// Writes a field that neither side remembers.
pub(crate) fn literal(name: Name, value: &[u8], out: &mut impl Extend<u8>) {
    match name {
        Name::Known(index) => put_integer(0, 4, usize::from(index), out),
        Name::Literal(name) => {
            out.extend([0]);
            put_string(name.as_bytes(), out);
        }
    }
    put_string(value, out);
}

/// Writes a field of the static table.
pub(crate) fn indexed(index: u8, out: &mut impl Extend<u8>) {
    put_integer(0x80, 7, usize::from(index), out);
}

fn put_string(bytes: &[u8], out: &mut impl Extend<u8>) {
    put_integer(0, 7, bytes.len(), out);
    out.extend(bytes.iter().copied());
}

fn put_integer(pattern: u8, prefix: u32, value: usize, out: &mut impl Extend<u8>) {
    let mask = (1usize << prefix) - 1;
    if value < mask {
        return out.extend([pattern | value as u8]);
    }
    out.extend([pattern | mask as u8]);
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.extend([rest as u8 | 0x80]);
        rest >>= 7;
    }
    out.extend([rest as u8]);
}

#[cfg(test)]
mod tests;
