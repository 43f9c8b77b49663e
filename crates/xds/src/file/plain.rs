//! A fast reader for the plain part of YAML that large meshes are written in.
//!
//! A general YAML parser takes several seconds for 100,000 workloads. What programs write uses little of YAML: block and one-line
//! flow collections, plain and quoted scalars without escapes, simple tags, comments. This reads just that, straight into serde, in
//! a tenth of the time, and gives up on whatever else it meets ([`Unusual`]), be it valid or a mistake: the general parser then
//! reads the text from the beginning, and its word counts. So there is nothing to report from here, only one thing to take
//! care of: what is accepted here must mean the same there.

use std::fmt;

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor};

/// Not for this reader; why does not matter.
#[derive(Debug)]
pub(super) struct Unusual;

impl fmt::Display for Unusual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not plain")
    }
}

impl std::error::Error for Unusual {}

impl serde::de::Error for Unusual {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

type Result<T> = std::result::Result<T, Unusual>;

/// Reads a whole text.
pub(super) fn read<'de, T: DeserializeSeed<'de>>(text: &'de str, seed: T) -> Result<T::Value> {
    if !text.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\n')) {
        return Err(Unusual);
    }
    let mut reader = Reader { text, at: 0, line: 0 };
    reader.next_content();
    if reader.rest().starts_with("---") {
        return Err(Unusual);
    }
    let place = if reader.is_at_end() { Place::Nothing } else { Place::Block };
    let value = seed.deserialize(Node { reader: &mut reader, place })?;
    if reader.is_at_end() { Ok(value) } else { Err(Unusual) }
}

struct Reader<'de> {
    text: &'de str,
    at: usize,
    /// Where the line begins.
    line: usize,
}

/// Where a node stands, which decides what it may be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// At the beginning of a line or of an entry of a list: anything.
    Block,
    /// After its key: a scalar or a flow collection.
    Inline,
    /// In a flow collection.
    Flow,
    /// There is none.
    Nothing,
}

#[derive(PartialEq, Eq)]
enum Shape {
    List,
    Map,
    FlowList,
    FlowMap,
    Tag,
    Scalar,
    Nothing,
}

impl<'de> Reader<'de> {
    fn rest(&self) -> &'de str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn is_at_end(&self) -> bool {
        self.at == self.text.len()
    }

    fn column(&self) -> usize {
        self.at - self.line
    }

    fn skip_spaces(&mut self) {
        while self.peek() == Some(b' ') {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    /// To the next line that is neither empty nor a comment, from the beginning of one.
    fn next_content(&mut self) {
        loop {
            self.line = self.at;
            self.skip_spaces();
            match self.peek() {
                Some(b'#') => self.at += self.rest().find('\n').unwrap_or(self.rest().len()),
                Some(b'\n') => {}
                _ => return,
            }
            self.take(b'\n');
        }
    }

    /// Nothing but a comment may follow in this line.
    fn end_line(&mut self) -> Result<()> {
        let before = self.at;
        self.skip_spaces();
        match self.peek() {
            None => return Ok(()),
            Some(b'\n') => {}
            Some(b'#') if self.at > before => self.at += self.rest().find('\n').unwrap_or(self.rest().len()),
            Some(_) => return Err(Unusual),
        }
        self.take(b'\n');
        self.next_content();
        Ok(())
    }

    fn is_entry(&self) -> bool {
        self.rest().starts_with("- ")
    }

    fn shape(&mut self, place: Place) -> Result<Shape> {
        if place == Place::Nothing {
            return Ok(Shape::Nothing);
        }
        if place == Place::Block && self.is_entry() {
            return Ok(Shape::List);
        }
        Ok(match self.peek() {
            Some(b'[') => Shape::FlowList,
            Some(b'{') => Shape::FlowMap,
            Some(b'!') => Shape::Tag,
            Some(_) if place == Place::Block => {
                let start = self.at;
                self.scalar(false)?;
                let is_key = self.is_after_key();
                self.at = start;
                if is_key { Shape::Map } else { Shape::Scalar }
            }
            Some(_) => Shape::Scalar,
            None => return Err(Unusual),
        })
    }

    /// A colon that ends a key.
    fn is_after_key(&self) -> bool {
        let rest = self.rest().as_bytes();
        rest.first() == Some(&b':') && matches!(rest.get(1), Some(b' ' | b'\n') | None)
    }

    /// A scalar, and whether it is plain.
    fn scalar(&mut self, flow: bool) -> Result<(&'de str, bool)> {
        match self.peek() {
            Some(quote @ (b'"' | b'\'')) => Ok((self.quoted(quote)?, false)),
            Some(b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'_') => Ok((self.plain(flow)?, true)),
            _ => Err(Unusual),
        }
    }

    fn quoted(&mut self, quote: u8) -> Result<&'de str> {
        self.at += 1;
        let start = self.at;
        loop {
            match self.peek() {
                Some(byte) if byte == quote => break,
                Some(b'\\' | b'\n') | None => return Err(Unusual),
                Some(_) => self.at += 1,
            }
        }
        let text = &self.text[start..self.at];
        self.at += 1;
        // Two single quotes are one.
        if self.peek() == Some(quote) { Err(Unusual) } else { Ok(text) }
    }

    fn plain(&mut self, flow: bool) -> Result<&'de str> {
        let bytes = self.text.as_bytes();
        let start = self.at;
        loop {
            match (bytes.get(self.at), bytes.get(self.at + 1)) {
                (Some(b'\n') | None, _) | (Some(b':'), Some(b' ' | b'\n') | None) => break,
                (Some(b' '), Some(b'#')) => break,
                (Some(b':'), Some(b',' | b'[' | b']' | b'{' | b'}')) if flow => return Err(Unusual),
                (Some(b',' | b']' | b'}'), _) if flow => break,
                (Some(b'[' | b'{'), _) if flow => return Err(Unusual),
                (Some(_), _) => self.at += 1,
            }
        }
        let text = self.text[start..self.at].trim_end_matches(' ');
        self.at = start + text.len();
        Ok(text)
    }
}

/// A plain scalar as text: none of those that are (or in some version of YAML were) something else than text.
fn is_text(plain: &str) -> bool {
    if plain.starts_with(|first: char| first.is_ascii_digit()) {
        return plain.contains('/') || plain.parse::<std::net::IpAddr>().is_ok();
    }
    const WORDS: [&str; 12] = ["true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf", "infinity"];
    !WORDS.iter().any(|word| plain.eq_ignore_ascii_case(word))
}

struct Node<'a, 'de> {
    reader: &'a mut Reader<'de>,
    place: Place,
}

impl<'a, 'de> Node<'a, 'de> {
    /// What stands in a line outside of flow collections is alone there.
    fn end(&mut self) -> Result<()> {
        if self.place == Place::Flow { Ok(()) } else { self.reader.end_line() }
    }

    fn scalar(mut self) -> Result<(&'de str, bool)> {
        if self.reader.shape(self.place)? != Shape::Scalar {
            return Err(Unusual);
        }
        let scalar = self.reader.scalar(self.place == Place::Flow)?;
        self.end()?;
        Ok(scalar)
    }

    fn text(self) -> Result<&'de str> {
        match self.scalar()? {
            (text, plain) if !plain || is_text(text) => Ok(text),
            _ => Err(Unusual),
        }
    }

    /// A number in its shortest form.
    fn number(self) -> Result<u64> {
        let (text, plain) = self.scalar()?;
        let number: u64 = text.parse().map_err(|_| Unusual)?;
        if plain && (text == "0" || !text.starts_with('0')) { Ok(number) } else { Err(Unusual) }
    }

    fn collection<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value> {
        let column = self.reader.column();
        match self.reader.shape(self.place)? {
            Shape::List => visitor.visit_seq(BlockList { reader: self.reader, column }),
            Shape::Map => visitor.visit_map(BlockMap { reader: self.reader, column }),
            Shape::FlowList => {
                self.reader.at += 1;
                let value = visitor.visit_seq(Flow { reader: &mut *self.reader, first: true, end: b']' })?;
                self.end()?;
                Ok(value)
            }
            Shape::FlowMap => {
                self.reader.at += 1;
                let value = visitor.visit_map(Flow { reader: &mut *self.reader, first: true, end: b'}' })?;
                self.end()?;
                Ok(value)
            }
            Shape::Nothing => visitor.visit_unit(),
            Shape::Tag | Shape::Scalar => Err(Unusual),
        }
    }
}

/// Entries that begin with a dash in one column.
struct BlockList<'a, 'de> {
    reader: &'a mut Reader<'de>,
    column: usize,
}

impl<'de> SeqAccess<'de> for BlockList<'_, 'de> {
    type Error = Unusual;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>> {
        // What stands deeper is no end but something else, and is met by whoever reads on.
        if self.reader.is_at_end() || self.reader.column() != self.column || !self.reader.is_entry() {
            return Ok(None);
        }
        self.reader.at += 2;
        self.reader.skip_spaces();
        seed.deserialize(Node { reader: &mut *self.reader, place: Place::Block }).map(Some)
    }
}

/// Keys in one column.
struct BlockMap<'a, 'de> {
    reader: &'a mut Reader<'de>,
    column: usize,
}

impl<'de> MapAccess<'de> for BlockMap<'_, 'de> {
    type Error = Unusual;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>> {
        if self.reader.is_at_end() || self.reader.column() < self.column {
            return Ok(None);
        }
        if self.reader.column() > self.column || self.reader.is_entry() {
            return Err(Unusual);
        }
        let (text, plain) = self.reader.scalar(false)?;
        if !self.reader.is_after_key() {
            return Err(Unusual);
        }
        self.reader.at += 1;
        seed.deserialize(Key { text, plain }).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value> {
        self.reader.skip_spaces();
        let place = match self.reader.peek() {
            Some(b'\n' | b'#') | None => {
                // The column of the key itself is one that a list may stand in.
                self.reader.at -= usize::from(self.reader.peek() == Some(b'#'));
                self.reader.end_line()?;
                let (column, entry) = (self.reader.column(), self.reader.is_entry());
                let there = column > self.column || (column == self.column && entry);
                if there && !self.reader.is_at_end() { Place::Block } else { Place::Nothing }
            }
            Some(_) => Place::Inline,
        };
        seed.deserialize(Node { reader: &mut *self.reader, place })
    }
}

/// `[…]` or `{…}` in one line.
struct Flow<'a, 'de> {
    reader: &'a mut Reader<'de>,
    first: bool,
    end: u8,
}

impl Flow<'_, '_> {
    /// To the next entry; none if this is the end.
    fn next(&mut self) -> Result<bool> {
        self.reader.skip_spaces();
        if std::mem::replace(&mut self.first, false) {
            return Ok(!self.reader.take(self.end));
        }
        if self.reader.take(self.end) {
            return Ok(false);
        }
        if !self.reader.take(b',') {
            return Err(Unusual);
        }
        self.reader.skip_spaces();
        Ok(true)
    }
}

impl<'de> SeqAccess<'de> for Flow<'_, 'de> {
    type Error = Unusual;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>> {
        if !self.next()? {
            return Ok(None);
        }
        seed.deserialize(Node { reader: &mut *self.reader, place: Place::Flow }).map(Some)
    }
}

impl<'de> MapAccess<'de> for Flow<'_, 'de> {
    type Error = Unusual;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>> {
        if !self.next()? {
            return Ok(None);
        }
        let (text, plain) = self.reader.scalar(true)?;
        if !self.reader.rest().starts_with(": ") {
            return Err(Unusual);
        }
        self.reader.at += 2;
        seed.deserialize(Key { text, plain }).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value> {
        self.reader.skip_spaces();
        seed.deserialize(Node { reader: &mut *self.reader, place: Place::Flow })
    }
}

/// A key of a map.
struct Key<'de> {
    text: &'de str,
    plain: bool,
}

impl<'de> Deserializer<'de> for Key<'de> {
    type Error = Unusual;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.plain && !is_text(self.text) { Err(Unusual) } else { visitor.visit_borrowed_str(self.text) }
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        let shortest = self.text == "0" || !self.text.starts_with('0');
        let number: u64 = self.text.parse().map_err(|_| Unusual)?;
        if self.plain && shortest { visitor.visit_u64(number) } else { Err(Unusual) }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> Deserializer<'de> for Node<'_, 'de> {
    type Error = Unusual;

    /// Only collections are asked for like this.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.collection(visitor)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.scalar()? {
            ("true", true) => visitor.visit_bool(true),
            ("false", true) => visitor.visit_bool(false),
            _ => Err(Unusual),
        }
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        visitor.visit_u64(self.number()?)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        visitor.visit_u64(self.number()?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        visitor.visit_borrowed_str(self.text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        visitor.visit_borrowed_str(self.text()?)
    }

    /// What looks like null is left to the general parser.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.place == Place::Nothing { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        if self.reader.shape(self.place)? != Shape::Tag {
            return visitor.visit_enum(BorrowedStrDeserializer::new(self.text()?));
        }
        self.reader.at += 1;
        let rest = self.reader.rest();
        let length = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        self.reader.at += length;
        if length == 0 || !matches!(self.reader.peek(), Some(b' ' | b',' | b']' | b'}' | b'\n') | None) {
            return Err(Unusual);
        }
        self.reader.skip_spaces();
        // After the tag there is no room for a block collection.
        if self.place == Place::Block {
            self.place = Place::Inline;
        }
        visitor.visit_enum(Tagged { name: &rest[..length], node: self })
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.place == Place::Nothing { Err(Unusual) } else { self.collection(visitor) }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        self.deserialize_seq(visitor)
    }

    /// What is ignored is not looked at here.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value> {
        Err(Unusual)
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u64 u128 f32 f64 char bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct
        identifier
    }
}

/// `!Name text`.
struct Tagged<'a, 'de> {
    name: &'de str,
    node: Node<'a, 'de>,
}

impl<'a, 'de> EnumAccess<'de> for Tagged<'a, 'de> {
    type Error = Unusual;
    type Variant = Node<'a, 'de>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Node<'a, 'de>)> {
        Ok((seed.deserialize(BorrowedStrDeserializer::<Unusual>::new(self.name))?, self.node))
    }
}

impl<'de> VariantAccess<'de> for Node<'_, 'de> {
    type Error = Unusual;

    fn unit_variant(mut self) -> Result<()> {
        self.end()
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value> {
        Err(Unusual)
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value> {
        Err(Unusual)
    }
}
