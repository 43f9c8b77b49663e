//! The SQLite file: its format, opening it, and reading the records of issued certificates.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};
use serde::Serialize;

use super::Error;
use crate::time_text::rfc3339_of_unix;

const FILE: &str = "state.db";
/// Version of the tables, in `user_version`.
const FORMAT: i64 = 1;
/// How long to wait for another process (a command beside the server) that writes.
const BUSY: Duration = Duration::from_secs(5);

const TABLES: &str = "
CREATE TABLE IF NOT EXISTS issued (
    id         INTEGER PRIMARY KEY,
    serial     TEXT    NOT NULL,
    identity   TEXT    NOT NULL,
    caller     TEXT    NOT NULL,
    not_before INTEGER NOT NULL,
    not_after  INTEGER NOT NULL,
    issued_at  INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS join_tokens (
    hash       BLOB    PRIMARY KEY,
    node       TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    used_at    INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (
    name       TEXT    PRIMARY KEY,
    value      TEXT    NOT NULL
) WITHOUT ROWID;
";

/// How much a commit is worth waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// It is on the disk when it returns.
    Durable,
    /// It survives this process, not a power cut.
    Fast,
}

/// One connection to the database.
#[derive(Debug)]
pub(crate) struct Database {
    connection: Connection,
    path: PathBuf,
}

impl Database {
    /// Opens the database in a state folder, and makes it if it is missing.
    pub(crate) fn open(folder: &Path, durability: Durability) -> Result<Self, Error> {
        let path = folder.join(FILE);
        let fail = |source| Error::database(&path, source);
        let connection = Connection::open(&path).map_err(fail)?;
        connection.busy_timeout(BUSY).map_err(fail)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(fail)?;
        let synchronous = if durability == Durability::Durable { "FULL" } else { "NORMAL" };
        connection.pragma_update(None, "synchronous", synchronous).map_err(fail)?;
        connection.pragma_update(None, "journal_size_limit", 64 << 20).map_err(fail)?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(fail)?;
        if found > FORMAT {
            return Err(Error::Newer { path, found });
        }
        if found < FORMAT {
            connection.execute_batch(TABLES).map_err(fail)?;
            connection.pragma_update(None, "user_version", FORMAT).map_err(fail)?;
        }
        Ok(Self { connection, path })
    }

    /// A durable connection for few, important writes.
    pub(crate) fn durable(folder: &Path) -> Result<Self, Error> {
        Self::open(folder, Durability::Durable)
    }

    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    pub(super) fn error(&self, source: rusqlite::Error) -> Error {
        Error::database(&self.path, source)
    }

    /// Something to remember under a name.
    pub(crate) fn remember(&mut self, name: &str, value: &str) -> Result<(), Error> {
        let sql = "INSERT INTO meta VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value";
        self.connection.execute(sql, params![name, value]).map(drop).map_err(|e| self.error(e))
    }

    /// What was remembered.
    pub(crate) fn recall(&self, name: &str) -> Result<Option<String>, Error> {
        let sql = "SELECT value FROM meta WHERE name = ?1";
        self.connection.query_row(sql, [name], |row| row.get(0)).optional().map_err(|e| self.error(e))
    }
}

/// A certificate that was issued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IssuedRecord {
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Whom it is for.
    pub identity: String,
    /// Who asked for it.
    pub caller: String,
    /// First moment of validity, RFC 3339.
    pub not_before: String,
    /// Last moment of validity, RFC 3339.
    pub not_after: String,
    /// When it was issued, RFC 3339.
    pub issued_at: String,
}

/// The last certificates issued, newest first; reads beside a running control plane and changes nothing.
pub fn issued(folder: &Path, limit: u32) -> Result<Vec<IssuedRecord>, Error> {
    let path = folder.join(FILE);
    let read = || {
        let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.busy_timeout(BUSY)?;
        let mut statement = connection.prepare(
            "SELECT serial, identity, caller, not_before, not_after, issued_at FROM issued ORDER BY id DESC LIMIT ?1",
        )?;
        let rows = statement.query_map([limit], |row| {
            let moment = |column| row.get(column).map(rfc3339_of_unix);
            Ok(IssuedRecord {
                serial: row.get(0)?,
                identity: row.get(1)?,
                caller: row.get(2)?,
                not_before: moment(3)?,
                not_after: moment(4)?,
                issued_at: moment(5)?,
            })
        })?;
        rows.collect::<Result<Vec<_>, _>>()
    };
    read().map_err(|source| Error::database(&path, source))
}
