//! Connections and the work on them. After work, a connection is idle and outside of a transaction,
//! or it is closed.
//!
//! A call may be cancelled at every `await`, and a future that is dropped in the middle of a
//! statement leaves its connection in an unknown state. So work on a connection runs in a task of
//! its own ([`Store::run`]), which the caller awaits but does not own. The task ends in one of two
//! ways: the database has replied to everything that was sent, or the connection is closed. `link`
//! decides when a reply is no longer expected.
//!
//! sqlx's own pool and `begin` are not used: when a future is dropped, both leave work to the next
//! user of the connection.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use deadpool::managed::{Manager, Metrics as PoolMetrics, Object, Pool, RecycleError, RecycleResult};
use futures_util::{FutureExt, future::BoxFuture};
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tracing::Instrument;

use super::{
    Store,
    error::{self, from_sqlx},
    hosts::Hosts,
    link::{Backend, Link, Watched, within},
    shares::{Share, Slot},
    sockets,
};
use crate::{
    domain::{Error, WorkspaceId},
    telemetry::metrics,
};

/// A connection that was used this recently is taken to be alive. A ping each time would double the
/// cost of a small statement.
const FRESH: Duration = Duration::from_secs(1);

/// How long an idle connection may take to reply to a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// How much longer than a statement a piece of work may take. The database ends a statement by
/// itself; this limit is for what it does not end, such as a COMMIT that waits for a replica.
const WORK_MARGIN: Duration = Duration::from_secs(5);

/// How long a statement continues after its caller is gone. Most end by themselves in this time,
/// and cancelling one costs a connection.
const CANCEL_AFTER: Duration = Duration::from_millis(200);

/// Begins a transaction in which the planner chooses freely and plans with the actual values. It
/// reverts the settings of `super::PLANNER`, except for `jit`.
const BEGIN_SCAN: &str = "BEGIN READ ONLY; SET LOCAL enable_seqscan = on; SET LOCAL enable_sort = on;
    SET LOCAL plan_cache_mode = force_custom_plan";

/// A connection and its backend.
#[derive(Debug)]
pub(super) struct Session {
    connection: PgConnection,
    backend: Backend,
    generation: u64,
    used_at: Instant,
    /// False while work runs on it, and permanently if that work did not end in a known state.
    is_idle: bool,
}

/// Opens a connection and identifies its backend.
///
/// # Errors
/// Also when the database accepts no writes: a replica that lags behind must not answer a check.
pub(super) async fn open(options: &PgConnectOptions) -> Result<(PgConnection, Backend), sqlx::Error> {
    let mut connection = PgConnection::connect_with(options).await?;
    sockets::give_up_dead_peers(options.get_port());
    // A reply promises durable data, whatever the server's default is.
    let (pid, started_at, is_read_only, _): (i32, time::OffsetDateTime, bool, Option<String>) = sqlx::query_as(
        "SELECT pid, backend_start, current_setting('transaction_read_only')::bool,
             CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END
         FROM pg_stat_activity WHERE pid = pg_backend_pid()",
    )
    .persistent(false)
    .fetch_one(&mut connection)
    .await?;
    if is_read_only {
        return Err(sqlx::Error::Protocol("the database takes no writes".to_owned()));
    }
    Ok((connection, Backend { pid, started_at }))
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

    fn allows(&self, repeat: Repeat) -> bool {
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
    answer: oneshot::Receiver<Result<T, Failed>>,
    task: JoinHandle<()>,
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

impl Store {
    /// Runs `work` outside of a transaction.
    pub(super) fn read<T, W>(&self, share: Share, work: W) -> impl Future<Output = Result<T, Error>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        let running = self.run(Mode::Read, share, work);
        async move { Ok(running.await?) }
    }

    /// Runs `work` in a transaction whose statements are planned by the statistics
    /// ([`Mode::Scan`]).
    pub(super) fn scan<T, W>(&self, workspace: WorkspaceId, work: W) -> impl Future<Output = Result<T, Error>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        let running = self.run(Mode::Scan, Share::Scan(workspace), work);
        async move { Ok(running.await?) }
    }

    /// Runs `work` in a transaction, which is committed if the work succeeds.
    pub(super) fn write<T, W>(&self, share: Share, work: W) -> Running<T>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        self.run(Mode::Write, share, work)
    }

    /// As [`Store::write`], with further attempts while `retry` allows them. `make` creates the
    /// work of each attempt.
    pub(super) async fn write_again<T, W>(&self, share: Share, mut retry: Retry, mut make: impl FnMut() -> W) -> Result<T, Failed>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        loop {
            match self.write(share, make()).await {
                Err(failed) if retry.allows(failed.repeat) && retry.pause().await => {}
                ended => return ended,
            }
        }
    }

    /// Runs `work` in this mode, in a task of its own.
    pub(super) fn run<T, W>(&self, mode: Mode, share: Share, work: W) -> Running<T>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let store = self.clone();
        let task = tokio::spawn(async move { store.run_in_task(mode, share, work, reply).await }.in_current_span());
        Running { answer, task }
    }

    async fn run_in_task<T, W>(self, mode: Mode, share: Share, work: W, mut reply: oneshot::Sender<Result<T, Failed>>)
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        let asked_at = std::time::Instant::now();
        // Nothing has begun yet, so nothing is lost if the caller is gone.
        let ready = tokio::select! {
            biased;
            () = reply.closed() => return,
            ready = self.acquire(share) => ready,
        };
        metrics::waited_for_database(asked_at);
        let (slot, mut session) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                let _ = reply.send(Err(Failed { error, repeat: Repeat::Safe }));
                return;
            }
        };
        session.is_idle = false;
        let backend = session.backend;
        let is_committing = AtomicBool::new(false);
        let span = tracing::debug_span!("statement", ?mode);
        let running = work_on(&mut session.connection, mode, work, &is_committing).instrument(span);
        let gone = async {
            match mode {
                Mode::Read | Mode::Scan => {
                    reply.closed().await;
                    sleep(CANCEL_AFTER).await;
                }
                Mode::Write => std::future::pending().await,
            }
        };
        let began_at = std::time::Instant::now();
        let watched = self.link.watch(backend, self.work_timeout, running, gone).await;
        metrics::worked_on_database(mode.into(), began_at);
        match watched {
            Watched::Ended { outcome, is_cancelled } => {
                let is_known = match &outcome {
                    Ok(_) | Err(WorkError { is_connection_usable: true, .. }) => !is_cancelled,
                    Err(_) => false,
                };
                let answer = |outcome: Result<T, WorkError>| {
                    outcome.map_err(|error| error.into_failed(is_committing.load(Ordering::Relaxed)))
                };
                if is_known {
                    self.link.record_reply();
                    session.is_idle = true;
                    session.used_at = Instant::now();
                    // Returned before the reply, so that the caller's next statement finds the
                    // connection.
                    drop(session);
                    drop(slot);
                    let _ = reply.send(answer(outcome));
                } else {
                    if outcome.as_ref().is_err_and(|error| error::is_read_only(&error.stop)) {
                        // The other connections are read-only, too: another database accepts writes
                        // now.
                        self.link.retire(session.generation);
                    }
                    drop(Object::take(session));
                    let _ = reply.send(answer(outcome));
                    // The connection may be closed on this side only. The slot is held until the
                    // statement is terminated, so that it does not run beside the next one.
                    self.link.terminate(backend).await;
                    drop(slot);
                }
            }
            Watched::GivenUp(error) => {
                let failed = match is_committing.load(Ordering::Relaxed) {
                    true => Failed { error: error::of_unknown_outcome(error), repeat: Repeat::OutcomeUnknown },
                    false => Failed { error, repeat: Repeat::Safe },
                };
                // The socket is closed here. The caller need not wait until the database has
                // noticed, but the slot must.
                drop(Object::take(session));
                let _ = reply.send(Err(failed));
                self.link.terminate(backend).await;
                drop(slot);
            }
        }
    }

    /// Waits for a slot of this share, then for a connection.
    async fn acquire(&self, share: Share) -> Result<(Slot, Object<Sessions>), Error> {
        self.link
            .unless_down(async {
                let slot = self.shares.acquire(share).await?;
                let session =
                    within(self.connect_timeout, self.pool.get()).await.ok_or_else(|| error::away("no connection in time"))?;
                Ok((slot, session.map_err(error::from_pool)?))
            })
            .await
    }
}

/// The error of a piece of work, and whether its connection can be reused.
struct WorkError {
    stop: Stop,
    is_connection_usable: bool,
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

    fn into_failed(self, is_committing: bool) -> Failed {
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

/// Runs the work to its end, in a transaction unless the mode is [`Mode::Read`].
async fn work_on<T, W>(connection: &mut PgConnection, mode: Mode, work: W, is_committing: &AtomicBool) -> Result<T, WorkError>
where
    W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
{
    let begin = match mode {
        Mode::Read => return work(connection).await.map_err(|stop| WorkError::of(stop, true)),
        Mode::Scan => BEGIN_SCAN,
        Mode::Write => "BEGIN",
    };
    let lost = |error| WorkError { stop: Stop::Database(error), is_connection_usable: false };
    sqlx::raw_sql(begin).execute(&mut *connection).await.map_err(lost)?;
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
    use super::*;

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
