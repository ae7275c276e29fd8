//! Connections, the modes of work on them, and how a piece of work begins and ends. `database` runs
//! it.
//!
//! sqlx's own pool and `begin` are not used: when a future is dropped, both leave work to the next
//! user of the connection.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use deadpool::managed::{Manager, Metrics as PoolMetrics, Pool, RecycleError, RecycleResult};
use futures_util::{FutureExt, future::BoxFuture};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row, postgres::PgConnectOptions};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::{
    error::{self, from_sqlx},
    hosts::Hosts,
    link::{Backend, Link, within},
    sockets,
};
use crate::{domain::Error, telemetry::metrics};

/// A connection that was used this recently is taken to be alive. A ping each time would double the
/// cost of a small statement.
const FRESH: Duration = Duration::from_secs(1);

/// How long an idle connection may take to reply to a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// How much longer than a statement a piece of work may take. The database ends a statement by
/// itself; this limit is for what it does not end, such as a COMMIT that waits for a replica.
const WORK_MARGIN: Duration = Duration::from_secs(5);

/// Settings of the planner for each session. Statistics lag behind: a workspace that was just
/// imported seems to have one row, and a table that was just filled seems empty, so a scan or a
/// sort of the whole table seems cheap.
const PLANNER: [(&str, &str); 4] = [
    ("enable_seqscan", "off"),
    ("enable_sort", "off"),
    // Each of these statements has one sensible plan, so planning it for each call gains nothing.
    ("plan_cache_mode", "force_generic_plan"),
    // The planner assigns a disabled plan such a high cost that compiling the statement would seem
    // to pay.
    ("jit", "off"),
];

/// What [`Mode::Scan`] sets instead: the planner chooses freely, and plans with the actual values.
const SCAN: [(&str, &str); 3] = [("enable_seqscan", "on"), ("enable_sort", "on"), ("plan_cache_mode", "force_custom_plan")];

/// These release the locks of a server that is gone: the database ends a session whose link is
/// dead.
const KEEPALIVE: [(&str, &str); 5] = [
    ("idle_in_transaction_session_timeout", "10s"),
    ("tcp_keepalives_idle", "5"),
    ("tcp_keepalives_interval", "2"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "10s"),
];

/// Forgets the prepared statements of the backend's last user. sqlx names them, also those that it
/// does not keep, and two users give the same names. Some poolers translate the names, but not all.
const FORGET: &str = "DEALLOCATE ALL; ";

/// How connections and transactions begin.
#[derive(Debug)]
pub(super) struct Setup {
    /// True if a pooler assigns a backend of its own to each transaction. Settings then last for
    /// one transaction, and every piece of work is one.
    is_pooled: bool,
    /// False for a replica.
    needs_writes: bool,
    open: String,
    begin_read: Option<String>,
    begin_scan: String,
    begin_write: String,
}

impl Setup {
    /// For statements that the database ends after `statement_timeout`.
    pub(super) fn new(statement_timeout: Duration, is_pooled: bool) -> Self {
        let statement_timeout = statement_timeout.as_millis().to_string();
        let common = PLANNER.into_iter().chain([("statement_timeout", statement_timeout.as_str()), KEEPALIVE[0]]);
        let scan = set("SET LOCAL", SCAN);
        if is_pooled {
            let (common, identity) = (set("SET LOCAL", common), identity(true));
            return Self {
                is_pooled,
                needs_writes: true,
                begin_read: Some(format!("BEGIN READ ONLY; {FORGET}{common}{identity}")),
                begin_scan: format!("BEGIN READ ONLY; {FORGET}{common}{scan}{identity}"),
                begin_write: format!("BEGIN; {FORGET}{common}{identity}"),
                open: identity,
            };
        }
        Self {
            is_pooled,
            needs_writes: true,
            open: set("SET", common.chain(KEEPALIVE.into_iter().skip(1))) + &identity(false),
            begin_read: None,
            begin_scan: format!("BEGIN READ ONLY; {scan}"),
            begin_write: "BEGIN".to_owned(),
        }
    }

    /// The same for a database that accepts no writes.
    pub(super) fn for_replica(self) -> Self {
        Self { needs_writes: false, ..self }
    }

    /// False for a replica.
    pub(super) fn needs_writes(&self) -> bool {
        self.needs_writes
    }

    /// `options`, with what this setup needs of the driver.
    pub(super) fn driver_options(&self, options: PgConnectOptions) -> PgConnectOptions {
        // The text of a statement belongs into no log. And asking whether it would be logged, as
        // sqlx does, confuses filters that belong to one layer (`telemetry`). Poolers know no
        // `extra_float_digits`, and there are no floats.
        let options = options.application_name("dnc").disable_statement_logging().extra_float_digits(None);
        if self.is_pooled { options.statement_cache_capacity(0) } else { options }
    }

    /// Opens a connection and identifies its backend.
    ///
    /// # Errors
    /// Also when the database accepts no writes and must: a replica that lags behind must not
    /// answer a check.
    pub(super) async fn open(&self, options: &PgConnectOptions) -> Result<(PgConnection, Backend), sqlx::Error> {
        let mut connection = PgConnection::connect_with(options).await?;
        sockets::give_up_dead_peers(options.get_port());
        let backend = self.run(&mut connection, &self.open).await?.ok_or(sqlx::Error::RowNotFound)?;
        Ok((connection, backend))
    }

    /// The text that begins a transaction for work of this mode; `None` if it needs none.
    fn begin(&self, mode: Mode) -> Option<&str> {
        match mode {
            Mode::Read => self.begin_read.as_deref(),
            Mode::Scan => Some(&self.begin_scan),
            Mode::Write => Some(&self.begin_write),
        }
    }

    /// Runs one of the texts, and returns the backend if it asks for it.
    async fn run(&self, connection: &mut PgConnection, text: &str) -> Result<Option<Backend>, sqlx::Error> {
        let rows = sqlx::raw_sql(AssertSqlSafe(text)).fetch_all(connection).await?;
        let Some(row) = rows.last() else { return Ok(None) };
        if self.needs_writes && row.try_get(3)? {
            return Err(sqlx::Error::Protocol("the database takes no writes".to_owned()));
        }
        let transaction = if self.is_pooled { row.try_get(2)? } else { None };
        Ok(Some(Backend { pid: row.try_get(0)?, started_at: row.try_get(1)?, transaction }))
    }
}

/// Statements that make these settings. `command` is `SET` or `SET LOCAL`.
fn set<'a>(command: &str, settings: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    settings.into_iter().map(|(name, value)| format!("{command} {name} = '{value}'; ")).collect()
}

/// A statement that identifies the backend, reports whether it accepts no writes, and makes it wait
/// at COMMIT until the data are durable. A reply promises that, whatever the server's default is.
fn identity(is_local: bool) -> String {
    format!(
        "SELECT pid, backend_start, xact_start, pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool,
             CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', {is_local}) END
         FROM pg_stat_get_activity(pg_backend_pid())"
    )
}

/// A connection and its backend.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) connection: PgConnection,
    /// `None` if each transaction has another one.
    pub(super) backend: Option<Backend>,
    pub(super) generation: u64,
    pub(super) used_at: Instant,
    /// False while work runs on it, and permanently if that work did not end in a known state.
    pub(super) is_idle: bool,
}

/// Opens sessions for the pool, and tests those that are reused.
#[derive(Debug)]
pub(super) struct Sessions {
    pub(super) hosts: Hosts,
    pub(super) link: Arc<Link>,
}

impl Manager for Sessions {
    type Type = Session;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Session, sqlx::Error> {
        // Read before opening: a connection that is opened while the link is found silent may be
        // silent, too.
        let generation = self.link.generation();
        let (connection, backend) = self.hosts.open().await?;
        // That of a pooler is known only while a transaction runs.
        let backend = backend.transaction.is_none().then_some(backend);
        Ok(Session { connection, backend, generation, used_at: Instant::now(), is_idle: true })
    }

    async fn recycle(&self, session: &mut Session, _: &PoolMetrics) -> RecycleResult<sqlx::Error> {
        if !session.is_idle {
            return Err(RecycleError::message("left in an unknown state"));
        }
        if session.generation != self.link.generation() {
            return Err(RecycleError::message("opened before the link was found broken"));
        }
        if session.used_at.elapsed() < FRESH {
            return Ok(());
        }
        session.is_idle = false;
        match within(PING_TIMEOUT, session.connection.ping()).await {
            Some(Ok(())) => {
                session.is_idle = true;
                Ok(())
            }
            Some(Err(closed)) => Err(RecycleError::Backend(closed)),
            None => {
                // The others are most likely silent, too, and a ping of each would take as many
                // seconds.
                self.link.retire(session.generation);
                Err(RecycleError::message("silent"))
            }
        }
    }
}

/// How a piece of work uses the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// One or more statements that change nothing. They are cancelled in the database when their
    /// caller is gone.
    Read,
    /// Reads of a whole list, or of few entries that the key does not find. The planner chooses the
    /// plan by its statistics; the settings for that end with the transaction. Cancelled as
    /// [`Mode::Read`] is.
    Scan,
    /// One transaction. It is completed whether or not its caller still waits.
    Write,
}

impl From<Mode> for metrics::Work {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Read => Self::Read,
            Mode::Scan => Self::Scan,
            Mode::Write => Self::Write,
        }
    }
}

/// Why a piece of work failed.
pub(super) enum Stop {
    /// The database or the link failed.
    Database(sqlx::Error),
    /// The work itself reported an error; its transaction is rolled back.
    Refused(Error),
}

impl From<sqlx::Error> for Stop {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Whether a failed transaction may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Another attempt would fail in the same way, or must not be made.
    Pointless,
    /// Nothing is stored, and another attempt may succeed.
    Safe,
    /// The reply to COMMIT was lost: everything is stored, or nothing.
    OutcomeUnknown,
}

/// The limits of repeated attempts: growing pauses, and a time after which there are no more.
#[derive(Debug)]
pub(super) struct Retry {
    give_up_at: Instant,
    pause: Duration,
    is_idempotent: bool,
}

impl Retry {
    const FIRST_PAUSE: Duration = Duration::from_millis(50);
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);
    /// No attempt begins later than this after the first, so that the caller has an answer in time.
    const LIMIT: Duration = Duration::from_secs(5);

    /// Starts the limit now.
    pub(super) fn begin() -> Self {
        Self { give_up_at: Instant::now() + Self::LIMIT, pause: Self::FIRST_PAUSE, is_idempotent: false }
    }

    /// Allows no second attempt.
    pub(super) fn never() -> Self {
        Self { give_up_at: Instant::now(), ..Self::begin() }
    }

    /// Allows another attempt also when it is unknown whether the last one was committed.
    pub(super) fn idempotent(self) -> Self {
        Self { is_idempotent: true, ..self }
    }

    pub(super) fn allows(&self, repeat: Repeat) -> bool {
        match repeat {
            Repeat::Safe => true,
            Repeat::OutcomeUnknown => self.is_idempotent,
            Repeat::Pointless => false,
        }
    }

    /// Waits before another attempt. False when there must not be one.
    pub(super) async fn pause(&mut self) -> bool {
        if Instant::now() + self.pause > self.give_up_at {
            return false;
        }
        sleep(self.pause).await;
        self.pause = (3 * self.pause).min(Self::LONGEST_PAUSE);
        true
    }
}

/// The failure of a piece of work.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) repeat: Repeat,
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

/// The future of a piece of work. It is owned by the task that runs it, so it borrows nothing but
/// the connection.
pub(super) type Working<'c, T> = BoxFuture<'c, Result<T, Stop>>;

/// A running piece of work. When this is dropped, work that has a connection continues, and work
/// that waits for one does not begin.
#[derive(Debug)]
pub(super) struct Running<T> {
    pub(super) answer: oneshot::Receiver<Result<T, Failed>>,
    pub(super) task: JoinHandle<()>,
}

impl<T> Running<T> {
    /// Drops the claim to the result, and waits until the work has ended.
    pub(super) async fn abandon(self) {
        drop(self.answer);
        let _ = self.task.await;
    }
}

impl<T> Future for Running<T> {
    type Output = Result<T, Failed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let lost = |_| Err(Failed { error: Error::internal("work on a connection panicked"), repeat: Repeat::Pointless });
        self.answer.poll_unpin(cx).map(|answer| answer.unwrap_or_else(lost))
    }
}

/// The error of a piece of work, and whether its connection can be reused.
pub(super) struct WorkError {
    pub(super) stop: Stop,
    pub(super) is_connection_usable: bool,
}

impl WorkError {
    fn of(stop: Stop, is_rolled_back: bool) -> Self {
        let is_connection_usable = is_rolled_back
            && match &stop {
                Stop::Database(error) => error::leaves_connection_usable(error),
                Stop::Refused(_) => true,
            };
        Self { stop, is_connection_usable }
    }

    pub(super) fn into_failed(self, is_committing: bool) -> Failed {
        match self.stop {
            Stop::Refused(error) => Failed { error, repeat: Repeat::Pointless },
            Stop::Database(error) => {
                let (is_transient, is_dead) = (error::is_transient(&error), error::is_dead_connection(&error));
                let error = from_sqlx(error);
                match (is_transient, is_committing) {
                    // A conflict that is reported at COMMIT is a definite reply.
                    (true, true) if is_dead => Failed { error: error::of_unknown_outcome(error), repeat: Repeat::OutcomeUnknown },
                    (true, _) => Failed { error, repeat: Repeat::Safe },
                    (false, _) => Failed { error, repeat: Repeat::Pointless },
                }
            }
        }
    }
}

/// Runs the work to its end, in a transaction if the setup needs one. `backend` gets the backend
/// that works for it, unless it has it.
pub(super) async fn work_on<T, W>(
    connection: &mut PgConnection,
    setup: &Setup,
    mode: Mode,
    work: W,
    backend: &OnceLock<Backend>,
    is_committing: &AtomicBool,
) -> Result<T, WorkError>
where
    W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
{
    let Some(begin) = setup.begin(mode) else {
        return work(connection).await.map_err(|stop| WorkError::of(stop, true));
    };
    let lost = |error| WorkError { stop: Stop::Database(error), is_connection_usable: false };
    if let Some(its_backend) = setup.run(connection, begin).await.map_err(lost)? {
        let _ = backend.set(its_backend);
    }
    match work(&mut *connection).await {
        Ok(done) => {
            is_committing.store(true, Ordering::Relaxed);
            sqlx::raw_sql("COMMIT").execute(connection).await.map_err(lost)?;
            Ok(done)
        }
        Err(stop) => {
            let is_rolled_back = sqlx::raw_sql("ROLLBACK").execute(connection).await.is_ok();
            Err(WorkError::of(stop, is_rolled_back))
        }
    }
}

/// Creates a pool of at most `connections_max` sessions.
pub(super) fn pool(sessions: Sessions, connections_max: usize) -> Result<Pool<Sessions>, Error> {
    Pool::builder(sessions).max_size(connections_max).build().map_err(Error::internal)
}

/// The time limit of a piece of work, for a server that ends each statement after
/// `statement_timeout`.
pub(super) fn work_timeout(statement_timeout: Duration) -> Duration {
    statement_timeout + WORK_MARGIN
}

/// Closes the pool and its idle sessions. Takes at most [`PING_TIMEOUT`].
pub(super) async fn close(pool: &Pool<Sessions>) {
    pool.close();
    let idle = pool.retain(|_, _| false).removed;
    let closing: Vec<_> = idle.into_iter().map(|session| session.connection.close().boxed()).collect();
    let _ = timeout(PING_TIMEOUT, futures_util::future::join_all(closing)).await;
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// The values that remain set after `text`.
    fn settings<'t>(command: &str, text: &'t str) -> HashMap<&'t str, &'t str> {
        let setting = |statement: &'t str| statement.trim().strip_prefix(command)?.trim().split_once(" = ");
        text.split(';').filter_map(setting).collect()
    }

    #[test]
    fn settings_are_made_for_a_session_or_for_each_transaction_of_a_pooler() {
        let of_session = Setup::new(Duration::from_secs(7), false);
        let made = settings("SET", &of_session.open);
        assert_eq!((made["enable_seqscan"], made["statement_timeout"], made["tcp_user_timeout"]), ("'off'", "'7000'", "'10s'"));
        assert!(of_session.begin(Mode::Read).is_none());
        for (mode, scans) in [(Mode::Scan, Some(&"'on'")), (Mode::Write, None)] {
            assert_eq!(settings("SET LOCAL", of_session.begin(mode).expect("a transaction")).get("enable_seqscan"), scans);
        }
        let pooled = Setup::new(Duration::from_secs(7), true);
        assert!(settings("SET", &pooled.open).is_empty(), "the session is another client's next");
        for (mode, begin, scans) in
            [(Mode::Read, "BEGIN READ ONLY", "'off'"), (Mode::Scan, "BEGIN READ ONLY", "'on'"), (Mode::Write, "BEGIN", "'off'")]
        {
            let text = pooled.begin(mode).expect("a transaction");
            assert!(text.starts_with(&format!("{begin}; {FORGET}SET LOCAL ")) && text.ends_with(&identity(true)), "{text}");
            let made = settings("SET LOCAL", text);
            assert_eq!((made["enable_seqscan"], made["statement_timeout"]), (scans, "'7000'"), "{mode:?}");
            assert_eq!(made["idle_in_transaction_session_timeout"], "'10s'", "{mode:?}");
        }
    }

    #[test]
    fn a_connection_is_reused_only_if_it_was_rolled_back_and_its_error_allows_it() {
        let refused = || Stop::Refused(Error::Cancelled);
        assert!(WorkError::of(refused(), true).is_connection_usable);
        assert!(!WorkError::of(refused(), false).is_connection_usable);
        assert!(!WorkError::of(Stop::Database(sqlx::Error::WorkerCrashed), true).is_connection_usable);
    }

    #[test]
    fn the_database_has_time_to_end_a_statement_itself() {
        assert!(work_timeout(Duration::from_secs(60)) > Duration::from_secs(60));
    }

    #[tokio::test]
    async fn attempts_are_repeated_after_growing_pauses_until_a_limit() {
        let mut retry = Retry::begin();
        assert!(retry.pause().await && retry.pause().await);
        assert_eq!(retry.pause, 9 * Retry::FIRST_PAUSE);
        // The pause would end too late.
        retry.give_up_at = Instant::now() + retry.pause / 2;
        assert!(!retry.pause().await);
        assert!(!Retry::never().pause().await);
    }
}
