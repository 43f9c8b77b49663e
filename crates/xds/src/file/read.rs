//! One pass through a text, straight into the builder: nothing of an entry is kept once its resource is built.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::builder::Builder;
use super::{Error, plain};

/// Nodes of a YAML document; a workload has some 40. The file's size is the limit, this one only has to be above it.
const MAX_NODES: usize = 100_000_000;
const MAX_SCALARS: usize = 512 << 20;
const MAX_DEPTH: usize = 16;

/// Reads a text into a builder; what ends in `.json` is JSON.
pub(super) fn read(name: &str, text: &str, builder: &mut Builder) -> Result<(), Error> {
    if name.ends_with(".json") { json(name, text, builder) } else { yaml(name, text, builder) }
}

fn json(name: &str, text: &str, builder: &mut Builder) -> Result<(), Error> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let read = Mesh(builder).deserialize(&mut deserializer).and_then(|()| deserializer.end());
    read.map_err(|error| {
        let place = Some((error.line() as u64, error.column() as u64));
        Error::at(name, place, worded(error.to_string(), place))
    })
}

/// Both parsers end their messages with the place, which stands before it already; and an operator cannot set options of a
/// parser.
fn worded(message: String, place: Option<(u64, u64)>) -> String {
    let mut message = message.replace(", set DuplicateKeyPolicy in Options if acceptable", ": remove one of the two");
    let Some((line, column)) = place else { return message };
    for end in [format!(" at line {line}, column {column}"), format!(" at line {line} column {column}")] {
        if message.ends_with(&end) {
            message.truncate(message.len() - end.len());
        }
    }
    message
}

fn yaml(name: &str, text: &str, builder: &mut Builder) -> Result<(), Error> {
    if plain::read(text, Mesh(builder)).is_ok() {
        return Ok(());
    }
    builder.forget_file();
    general_yaml(name, text, builder)
}

fn general_yaml(name: &str, text: &str, builder: &mut Builder) -> Result<(), Error> {
    let budget = serde_saphyr::budget! {
        max_events: 2 * MAX_NODES,
        max_nodes: MAX_NODES,
        max_total_scalar_bytes: MAX_SCALARS,
        max_depth: MAX_DEPTH,
    };
    let options = serde_saphyr::options! { budget: budget, with_snippet: false };
    let read = serde_saphyr::with_deserializer_from_str_with_options(text, options, |de| Mesh(builder).deserialize(de));
    read.map_err(|error| {
        let place = error.location().map(|at| (at.line(), at.column()));
        Error::at(name, place, worded(error.without_snippet().to_string(), place))
    })
}

/// The whole text.
struct Mesh<'a>(&'a mut Builder);

impl<'de> DeserializeSeed<'de> for Mesh<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Mesh<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mesh: workloads, policies and services")
    }

    /// A file with nothing but comments.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        #[derive(Deserialize, PartialEq, Clone, Copy)]
        #[serde(field_identifier, rename_all = "camelCase")]
        enum Section {
            Workloads,
            Policies,
            Services,
        }
        let mut seen = Vec::new();
        while let Some(section) = map.next_key::<Section>()? {
            // The YAML parser refuses it itself, the JSON parser does not.
            if seen.contains(&section) {
                return Err(A::Error::custom("the same section stands here twice: join them"));
            }
            seen.push(section);
            let builder = &mut *self.0;
            match section {
                Section::Workloads => map.next_value_seed(List::new(builder, Builder::workload))?,
                Section::Policies => map.next_value_seed(List::new(builder, Builder::policy))?,
                Section::Services => map.next_value_seed(List::new(builder, Builder::service))?,
            }
        }
        Ok(())
    }
}

/// The entries of a section, each given to the builder.
struct List<'a, F, T> {
    builder: &'a mut Builder,
    add: F,
    entry: PhantomData<T>,
}

impl<'a, F, T> List<'a, F, T>
where
    F: Fn(&mut Builder, T) -> Result<(), String>,
{
    fn new(builder: &'a mut Builder, add: F) -> Self {
        Self { builder, add, entry: PhantomData }
    }
}

impl<'de, F, T> DeserializeSeed<'de> for List<'_, F, T>
where
    T: Deserialize<'de>,
    F: Fn(&mut Builder, T) -> Result<(), String>,
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F, T> Visitor<'de> for List<'_, F, T>
where
    T: Deserialize<'de>,
    F: Fn(&mut Builder, T) -> Result<(), String>,
{
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    /// A section with nothing in it.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut entries: A) -> Result<(), A::Error> {
        while let Some(()) = entries.next_element_seed(Entry(&mut self))? {}
        Ok(())
    }
}

/// One entry. It is given to the builder from within, where the parser still knows its place.
struct Entry<'a, 'b, F, T>(&'a mut List<'b, F, T>);

impl<'de, F, T> DeserializeSeed<'de> for Entry<'_, '_, F, T>
where
    T: Deserialize<'de>,
    F: Fn(&mut Builder, T) -> Result<(), String>,
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let entry = T::deserialize(deserializer)?;
        (self.0.add)(self.0.builder, entry).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use zspire_model::TrustDomain;

    use super::*;
    use crate::Resource;

    /// What the plain reader makes of a text, if anything, and what the general parser does.
    fn both(text: &str) -> (Option<Vec<Resource>>, Option<Vec<Resource>>) {
        let builder = || {
            let mut builder = Builder::new(TrustDomain::default());
            builder.begin_file("m.yaml");
            builder
        };
        let (mut one, mut other) = (builder(), builder());
        let plain = plain::read(text, Mesh(&mut one)).ok().map(|()| one.finish().resources);
        let general = general_yaml("m.yaml", text, &mut other).ok().map(|()| other.finish().resources);
        (plain, general)
    }

    const SAMPLE: &str = include_str!("../../tests/golden/ztunnel/local.yaml");

    const BLOCKS: &str = "\
# A comment.
workloads:
  - uid: c//Pod/a/w   # another
    name: \"w w\"
    namespace: 'a'
    workloadIps:
    - 10.0.0.1
    - \"fd00::1\"
    capacity: 7
    nativeTunnel: true
    waypoint:
      destination: n/10.1.0.1
      hboneMtlsPort: 15008
    services:
      a/h:
        80: 8080
      a/i: {80: 0, 81: 1}

policies:
- name: p
  namespace: a
  scope: Global
  action: Deny
  rules:
  - - - principals:
        - !Exact x
        - !Presence
        notPrincipals: [!Suffix yy, !Presence]
        destinationPorts: [80]
      - sourceIps: [10.0.0.0/8]
    - - {namespaces: [!Prefix z]}
";

    #[test]
    fn the_plain_reader_takes_what_meshes_are_written_in() {
        for text in [SAMPLE, BLOCKS, "workloads: []", "", "# nothing"] {
            let (plain, general) = both(text);
            assert!(plain.is_some(), "{text}");
            assert_eq!(plain, general);
        }
    }

    /// Many single changes of the samples: what the plain reader accepts, the general parser accepts too, as the same.
    #[test]
    fn what_the_plain_reader_accepts_means_the_same_to_the_general_parser() {
        let mut accepted = 0;
        for sample in [SAMPLE, BLOCKS] {
            for at in (0..sample.len()).step_by(5) {
                for with in [
                    "", " ", "\n", ":", ": ", "#", " #", "-", "- ", ",", "]", "}", "'", "\"", "!", "0", "~", "\n  ",
                    "&a ",
                ] {
                    let mutations = [
                        [&sample[..at], with, &sample[at + 1..]].concat(),
                        [&sample[..at], with, &sample[at..]].concat(),
                    ];
                    for text in mutations {
                        let plain = both_plain(&text);
                        if plain.is_some() {
                            accepted += 1;
                            assert_eq!(plain, both(&text).1, "{text}");
                        }
                    }
                }
            }
        }
        assert!(accepted > 1000, "{accepted}");
    }

    fn both_plain(text: &str) -> Option<Vec<Resource>> {
        let mut builder = Builder::new(TrustDomain::default());
        builder.begin_file("m.yaml");
        plain::read(text, Mesh(&mut builder)).ok().map(|()| builder.finish().resources)
    }
}
