//! Converts errors of the database to [`Error`]. What the database reported is kept as the source,
//! for the log only.

use deadpool::managed::PoolError;
use sqlx::{error::DatabaseError, migrate::MigrateError};

use super::session::Stop;
use crate::domain::Error;

const AWAY: &str = "The database cannot be reached at the moment. Send the request again later.";
const SLOW: &str = "The database took too long. Send the request again later.";
const BUSY: &str = "The service has too much to do at the moment. Send the request again later.";

/// Classifies a driver error by what the caller should do about it.
pub(super) fn from_sqlx(error: sqlx::Error) -> Error {
    let verdict = match &error {
        // All of these leave no usable connection. A server that goes down often shows as a
        // protocol error.
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

/// The database cannot be reached. The cause is for the log only.
pub(super) fn away(cause: &'static str) -> Error {
    Error::Unavailable { message: AWAY, source: Some(cause.into()) }
}

/// The database took too long. The cause is for the log only.
pub(super) fn slow(cause: &'static str) -> Error {
    Error::Timeout { message: SLOW, source: Some(cause.into()) }
}

/// `error`, when it came instead of the reply to COMMIT.
pub(super) fn of_unknown_outcome(error: Error) -> Error {
    let message = "The database did not confirm the change, so it may be made or not. Look before you make it again; an import or a deletion can be repeated safely.";
    match error {
        Error::Unavailable { source, .. } => Error::Unavailable { message, source },
        Error::Timeout { source, .. } => Error::Timeout { message, source },
        other => other,
    }
}

/// No slot became free in time.
pub(super) fn busy() -> Error {
    Error::Unavailable { message: BUSY, source: None }
}

/// Classifies an error of the pool.
pub(super) fn from_pool(error: PoolError<sqlx::Error>) -> Error {
    match error {
        PoolError::Backend(inner) => from_sqlx(inner),
        PoolError::Closed => away("the pool is closed"),
        PoolError::Timeout(_) => away("no connection in time"),
        PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => Error::internal("the pool is set up wrongly"),
    }
}

/// True when the database itself reported the error, which shows that it responds and accepts
/// connections.
pub(super) fn is_answer(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(_)) && !is_dead_connection(error)
}

/// True when the database reported that it accepts no writes.
pub(super) fn is_read_only(stop: &Stop) -> bool {
    matches!(stop, Stop::Database(sqlx::Error::Database(inner)) if inner.code().is_some_and(|code| code == "25006"))
}

/// True when the connection is lost and a new one may work: it was closed, or the server reported
/// that it is shutting down.
pub(super) fn is_dead_connection(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::PoolTimedOut => true,
        sqlx::Error::Database(inner) => inner.code().is_some_and(|code| code.starts_with("57P") || code.starts_with("08")),
        _ => false,
    }
}

/// True when the statement failed and the connection is ready for the next one. After any other
/// error the state of the connection is unknown.
pub(super) fn leaves_connection_usable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(inner) => !is_dead_connection(error) && inner.code().is_none_or(|code| code != "25006"),
        _ => false,
    }
}

/// True when the same transaction may succeed on another attempt: the connection was lost, the
/// database accepts no writes any more (another one may), or the transaction conflicted with
/// another (serialization failure, deadlock).
pub(super) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(inner) => {
            is_dead_connection(error) || inner.code().is_some_and(|code| matches!(code.as_ref(), "25006" | "40001" | "40P01"))
        }
        _ => is_dead_connection(error),
    }
}

/// Classifies an error of the migrator.
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

/// Classifies an error by its SQLSTATE (PostgreSQL's documentation, appendix A).
fn of_database(error: &dyn DatabaseError) -> Verdict {
    let code = error.code().unwrap_or_default();
    match code.as_ref() {
        // What Citus reports of a worker that cannot be reached. It gives no code of its own.
        "" | "XX000" if error.message().starts_with("failure on connection marked as essential") => Verdict::Away,
        // Shut down, crashed, starting up; read-only after a fail-over; a conflict that another
        // attempt may resolve.
        "57P01" | "57P02" | "57P03" | "57P05" | "25006" | "40001" | "40P01" => Verdict::Away,
        // Cancelled by statement_timeout or lock_timeout.
        "57014" | "55P03" => Verdict::Slow,
        // Connection exception, wrong credentials, no such database, out of disk, memory or
        // connections, I/O error.
        code if ["08", "28", "3D", "53", "58"].iter().any(|class| code.starts_with(class)) => Verdict::Away,
        _ => Verdict::Fault,
    }
}

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, fmt};

    use sqlx::error::ErrorKind;

    use super::*;

    /// An error of the database with this SQLSTATE and message.
    #[derive(Debug)]
    struct Reported(&'static str, &'static str);

    impl fmt::Display for Reported {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.1)
        }
    }

    impl std::error::Error for Reported {}

    impl DatabaseError for Reported {
        fn message(&self) -> &str {
            self.1
        }

        fn code(&self) -> Option<Cow<'_, str>> {
            Some(self.0.into())
        }

        fn as_error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
            self
        }

        fn as_error_mut(&mut self) -> &mut (dyn std::error::Error + Send + Sync + 'static) {
            self
        }

        fn into_error(self: Box<Self>) -> Box<dyn std::error::Error + Send + Sync + 'static> {
            self
        }

        fn kind(&self) -> ErrorKind {
            ErrorKind::Other
        }
    }

    fn reported(code: &'static str) -> sqlx::Error {
        sqlx::Error::Database(Box::new(Reported(code, "")))
    }

    /// What is to be done about an error: the kind of the caller's error, and of the functions
    /// above those that are true.
    fn treatment(error: sqlx::Error) -> (&'static str, Vec<&'static str>) {
        let predicates = [
            ("answer", is_answer as fn(&sqlx::Error) -> bool),
            ("dead", is_dead_connection),
            ("usable", leaves_connection_usable),
            ("transient", is_transient),
        ];
        let holds = predicates.iter().filter(|(_, holds)| holds(&error)).map(|(name, _)| *name).collect();
        let kind = match from_sqlx(error) {
            Error::Unavailable { message: AWAY, source: Some(_) } => "away",
            Error::Timeout { message: SLOW, source: Some(_) } => "slow",
            Error::Internal { .. } => "fault",
            _ => "?",
        };
        (kind, holds)
    }

    #[test]
    fn an_error_of_the_database_is_treated_by_its_code() {
        for (codes, kind, holds) in [
            (&["57P01", "57P02", "57P03", "57P05", "08006"][..], "away", &["dead", "transient"][..]),
            (&["25006"], "away", &["answer", "transient"]),
            (&["40001", "40P01"], "away", &["answer", "usable", "transient"]),
            (&["28P01", "3D000", "53300", "58030"], "away", &["answer", "usable"]),
            (&["57014", "55P03"], "slow", &["answer", "usable"]),
            (&["22000", "23503", "42P01"], "fault", &["answer", "usable"]),
        ] {
            for code in codes {
                assert_eq!(treatment(reported(code)), (kind, holds.to_vec()), "{code}");
            }
        }
        for code in ["", "XX000"] {
            let citus = Reported(code, "failure on connection marked as essential: worker:5432");
            assert_eq!(from_sqlx(sqlx::Error::Database(Box::new(citus))).to_string(), AWAY);
            assert_eq!(treatment(reported(code)).0, "fault");
        }
        assert!(is_read_only(&Stop::Database(reported("25006"))));
        assert!(!is_read_only(&Stop::Database(reported("25001"))));
        assert!(!is_read_only(&Stop::Refused(Error::Cancelled)));
    }

    #[test]
    fn an_error_of_the_connection_is_treated_by_its_kind() {
        let closed = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        for error in [
            sqlx::Error::Io(closed()),
            sqlx::Error::Tls("".into()),
            sqlx::Error::Protocol(String::new()),
            sqlx::Error::PoolTimedOut,
        ] {
            assert_eq!(treatment(error), ("away", vec!["dead", "transient"]));
        }
        assert_eq!(treatment(sqlx::Error::Decode("".into())), ("fault", vec![]));
        let migrating = |error| matches!(from_migrate(MigrateError::Execute(error)), Error::Unavailable { .. });
        assert!(migrating(sqlx::Error::Io(closed())) && !migrating(reported("42P07")));
    }
}
