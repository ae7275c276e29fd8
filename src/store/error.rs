//! The one place where an error of the database becomes one of ours. What the database said stays behind as the source, for the log.

use sqlx::{error::DatabaseError, migrate::MigrateError};

use crate::domain::Error;

const AWAY: &str = "The database cannot be reached at the moment. Send the request again later.";
const SLOW: &str = "The database took too long. Send the request again later.";

/// Sorts a driver error by what the caller should do about it.
pub(super) fn from_sqlx(error: sqlx::Error) -> Error {
    let verdict = match &error {
        // All of these leave no connection to work with. A protocol error is what a dying server's last words look like.
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => Verdict::Away,
        sqlx::Error::Database(inner) => of_database(inner.as_ref()),
        _ => Verdict::Fault,
    };
    match verdict {
        Verdict::Away => Error::Unavailable { message: AWAY, source: Some(error.into()) },
        Verdict::Slow => Error::Timeout { message: SLOW, source: Some(error.into()) },
        Verdict::Fault => Error::internal(error),
    }
}

/// True when the connection is gone and another one may be alive: its end was closed, or its last words were that the server went down.
pub(super) fn is_dead_connection(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) => true,
        sqlx::Error::Database(inner) => inner.code().is_some_and(|code| code.starts_with("57P")),
        _ => false,
    }
}

/// Sorts an error of the migrator.
pub(super) fn from_migrate(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(inner) => from_sqlx(inner),
        other => Error::internal(other),
    }
}

enum Verdict {
    Away,
    Slow,
    Fault,
}

/// By SQLSTATE (PostgreSQL's documentation, appendix A).
fn of_database(error: &dyn DatabaseError) -> Verdict {
    let code = error.code().unwrap_or_default();
    match code.as_ref() {
        // Shut down, crashed, starting up; read-only after a fail-over; a conflict that a repeat gets past.
        "57P01" | "57P02" | "57P03" | "57P05" | "25006" | "40001" | "40P01" => Verdict::Away,
        // Cancelled by statement_timeout, or lock_timeout.
        "57014" | "55P03" => Verdict::Slow,
        // Connection exception, wrong credentials, no such database, out of disk, memory or connections, I/O error.
        code if ["08", "28", "3D", "53", "58"].iter().any(|class| code.starts_with(class)) => Verdict::Away,
        _ => Verdict::Fault,
    }
}
