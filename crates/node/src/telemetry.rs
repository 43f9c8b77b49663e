//! Logging: ztunnel's line formats, levels that change while running, a writer that never blocks.
//!
//! Lines go through a bounded queue to one writer thread; when standard output stalls, lines are dropped
//! and counted, and no data-plane worker waits. It does not know who logs what.

mod writer;

use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::Context as _;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::config::LogFormat;
use writer::Queue;
pub use writer::Rest;

/// A log filter that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a log level: use error, warn, info, debug, trace, off, or target=level,…")]
pub struct BadLevel(String);

/// Changes levels, and tells what was dropped.
#[derive(Clone)]
pub struct Logging {
    filter: reload::Handle<EnvFilter, Registry>,
    initial: Arc<str>,
    queue: Queue,
}

impl std::fmt::Debug for Logging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logging").field("level", &self.current()).finish_non_exhaustive()
    }
}

/// Starts logging to standard output. Lines that still wait are written when the guard is dropped.
pub fn start(filter: &str, format: LogFormat) -> anyhow::Result<(Logging, Rest)> {
    let (queue, rest) = writer::start(std::io::stdout()).context("cannot start the thread that writes the log")?;
    let (filter_layer, handle) = reload::Layer::new(parse(filter)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(queue.clone()).event_format(Lines { format });
    // A second start in one process (embedding, tests) keeps the first one's subscriber.
    let _ = tracing_subscriber::registry().with(filter_layer).with(lines).try_init();
    Ok((Logging { filter: handle, initial: filter.into(), queue }, rest))
}

fn parse(filter: &str) -> Result<EnvFilter, BadLevel> {
    EnvFilter::builder().parse(filter).map_err(|_| BadLevel(filter.to_owned()))
}

impl Logging {
    /// The filter in force.
    pub fn current(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Back to what the proxy started with, then `level` on top of it if there is one.
    pub fn reset(&self, level: &str) -> Result<(), BadLevel> {
        self.replace(&self.initial, level)
    }

    /// `level` on top of what is in force.
    pub fn set(&self, level: &str) -> Result<(), BadLevel> {
        self.replace(&self.current(), level)
    }

    fn replace(&self, base: &str, level: &str) -> Result<(), BadLevel> {
        // A later directive for the same target replaces an earlier one.
        let filter = if level.is_empty() {
            parse(base)?
        } else {
            let valid = level.split(',').all(|d| {
                let level = d.rsplit('=').next().unwrap_or_default();
                // An empty one would be taken for `error`.
                !level.is_empty() && level.parse::<tracing::level_filters::LevelFilter>().is_ok()
            });
            if !valid {
                return Err(BadLevel(level.to_owned()));
            }
            parse(&format!("{base},{level}"))?
        };
        let _ = self.filter.reload(filter);
        Ok(())
    }

    /// Lines lost because standard output was slower than the log.
    pub fn dropped_lines(&self) -> u64 {
        self.queue.dropped()
    }
}

struct Lines {
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> std::fmt::Result {
        let meta = event.metadata();
        let target = meta.target().strip_prefix("zspire_").unwrap_or(meta.target());
        let level = meta.level().as_str().to_ascii_lowercase();
        let time = crate::rfc3339_micros(std::time::SystemTime::now());
        match self.format {
            LogFormat::Plain => {
                let mut fields = Plain::default();
                event.record(&mut fields);
                write!(out, "{time}\t{level}\t{target}\t{}", fields.message)?;
                if !fields.rest.is_empty() {
                    write!(out, "\t{}", fields.rest)?;
                }
                writeln!(out)
            }
            LogFormat::Json => {
                let mut fields = Json::default();
                event.record(&mut fields);
                let mut line = Map::new();
                line.insert("level".into(), level.into());
                line.insert("time".into(), time.into());
                line.insert("scope".into(), target.into());
                line.insert("message".into(), fields.message.into());
                line.extend(fields.rest);
                writeln!(out, "{}", Value::Object(line))
            }
        }
    }
}

/// `key=value` pairs: strings quoted, everything else as it is.
struct Plain {
    message: String,
    rest: String,
}

impl Default for Plain {
    fn default() -> Self {
        // An access line fits without growing.
        Self { message: String::with_capacity(64), rest: String::with_capacity(1024) }
    }
}

impl Plain {
    fn put(&mut self, field: &Field, value: std::fmt::Arguments<'_>) {
        let to = if field.name() == "message" { &mut self.message } else { &mut self.rest };
        if field.name() != "message" {
            if !to.is_empty() {
                to.push(' ');
            }
            to.push_str(field.name());
            to.push('=');
        }
        // What a peer sent must not begin a line of its own.
        let start = to.len();
        let _ = to.write_fmt(value);
        if to[start..].contains(['\n', '\r']) {
            let safe = to[start..].replace('\n', "\\n").replace('\r', "\\r");
            to.truncate(start);
            to.push_str(&safe);
        }
    }
}

impl Visit for Plain {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.put(field, format_args!("{value}"));
        } else {
            self.put(field, format_args!("{value:?}"));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, format_args!("{:?}", chain(value)));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.put(field, format_args!("{value:?}"));
    }
}

#[derive(Default)]
struct Json {
    message: String,
    rest: Map<String, Value>,
}

impl Json {
    fn put(&mut self, field: &Field, value: Value) {
        self.rest.insert(field.name().to_owned(), value);
    }
}

impl Visit for Json {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, chain(value).into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.put(field, text.into());
        }
    }
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
