//! Connections, and what one may be left as: idle and outside of a transaction, or closed.
//!
//! A call may be given up at every `await`, and a future that is dropped in the middle of a statement
//! leaves its connection in a state nobody knows. So work on a connection runs in a task of its own
//! ([`Store::run`]), which its caller awaits but does not own. The task ends in one of two ways: the
//! database has answered everything that was sent, or the connection is thrown away. `link` decides
//! when an answer is not to be expected any more.
//!
//! Not sqlx's own pool and `begin`: both leave work to whoever comes next when a future is dropped.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use deadpool::managed::{Manager, Metrics, Object, Pool, RecycleError, RecycleResult};
use futures_util::{FutureExt, future::BoxFuture};
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tracing::Instrument;

use super::{
    Store,
    error::{self, from_sqlx},
    link::{Backend, Link, Watched, within},
    shares::{Share, Slot},
    sockets,
};
use crate::domain::{Error, WorkspaceId};

/// A connection that was used this recently is alive. Asking each time would double the cost of a
/// small statement.
const FRESH: Duration = Duration::from_secs(1);

/// How long a connection that rested may take to show that it is alive.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// How much longer than a statement a whole piece of work may take. The database ends a statement by
/// itself; this is for what it does not end, such as a COMMIT that waits for a replica.
const WORK_MARGIN: Duration = Duration::from_secs(5);

/// How long a statement goes on whose caller has gone. Most end by themselves in this time, and to cancel one costs a connection.
const CANCEL_AFTER: Duration = Duration::from_millis(200);

/// Begins a transaction in which the planner is free, and plans with the values at hand: takes back what `super::PLANNER`
/// sets for the session, but for `jit`.
const BEGIN_SCAN: &str = "BEGIN READ ONLY; SET LOCAL enable_seqscan = on; SET LOCAL enable_sort = on;
    SET LOCAL plan_cache_mode = force_custom_plan";

/// A connection with what is known of its other end.
#[derive(Debug)]
pub(super) struct Session {
    connection: PgConnection,
    backend: Backend,
    generation: u64,
    used_at: Instant,
    /// False while work runs on it, and for ever if that work did not end in a known state.
    is_idle: bool,
}

/// Opens a connection and asks what is at its other end.
///
/// # Errors
/// Also when the database does not take writes: a copy that lags behind must not answer a check.
pub(super) async fn open(options: &PgConnectOptions) -> Result<(PgConnection, Backend), sqlx::Error> {
    let mut connection = PgConnection::connect_with(options).await?;
    sockets::give_up_dead_peers(options.get_port());
    // An answer promises that the data is durable, whatever the server's own default is.
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

/// Makes sessions for the pool, and looks at those that come back.
#[derive(Debug)]
pub(super) struct Sessions {
    pub(super) connect: PgConnectOptions,
    pub(super) link: Arc<Link>,
}

impl Manager for Sessions {
    type Type = Session;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Session, sqlx::Error> {
        // Read first: a connection that is opened while the link is found silent may be of the silent kind.
        let generation = self.link.generation();
        let (connection, backend) = open(&self.connect).await?;
        Ok(Session { connection, backend, generation, used_at: Instant::now(), is_idle: true })
    }

    async fn recycle(&self, session: &mut Session, _: &Metrics) -> RecycleResult<sqlx::Error> {
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
                // The others are most likely silent, too, and asking each of them would take as many seconds.
                self.link.distrust(session.generation);
                Err(RecycleError::message("silent"))
            }
        }
    }
}

/// What a piece of work does to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// One or more statements that change nothing. Cancelled in the database when their caller goes away.
    Read,
    /// Reads that look at a whole list, or at few entries of it that the key does not find. The planner chooses the way by its
    /// statistics; in a transaction, at whose end the choice ends. Cancelled as [`Mode::Read`].
    Scan,
    /// One transaction. It is finished whether or not its caller still waits.
    Write,
}

/// Why a piece of work stops.
pub(super) enum Stop {
    /// The database, or the way to it, failed.
    Database(sqlx::Error),
    /// The work itself refuses; its transaction is rolled back.
    Refused(Error),
}

impl From<sqlx::Error> for Stop {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Whether a transaction that failed may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// A repeat would fail in the same way, or must not be tried.
    Pointless,
    /// Nothing of it is stored, and a repeat may pass.
    Safe,
    /// The answer to its COMMIT was lost: all of it is stored, or nothing.
    OutcomeUnknown,
}

/// The patience of one piece of work that is sent again: longer and longer pauses, and an end.
#[derive(Debug)]
pub(super) struct Retry {
    give_up_at: Instant,
    pause: Duration,
    is_idempotent: bool,
}

impl Retry {
    const FIRST_PAUSE: Duration = Duration::from_millis(50);
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);
    /// No try begins later than this after the first, so that the caller has an answer in time.
    const LIMIT: Duration = Duration::from_secs(5);

    /// Counts from now.
    pub(super) fn begin() -> Self {
        Self { give_up_at: Instant::now() + Self::LIMIT, pause: Self::FIRST_PAUSE, is_idempotent: false }
    }

    /// No patience.
    pub(super) fn never() -> Self {
        Self { give_up_at: Instant::now(), ..Self::begin() }
    }

    /// For work that may be sent again also when nobody knows whether it was done.
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

    /// Waits before another try; false when there should be none.
    pub(super) async fn pause(&mut self) -> bool {
        if Instant::now() + self.pause > self.give_up_at {
            return false;
        }
        sleep(self.pause).await;
        self.pause = (3 * self.pause).min(Self::LONGEST_PAUSE);
        true
    }
}

/// A piece of work that failed.
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

/// What a piece of work makes of its connection. Owned by the task that runs it, so it borrows nothing but the
/// connection.
pub(super) type Working<'c, T> = BoxFuture<'c, Result<T, Stop>>;

/// A piece of work on its way. It goes on when this is dropped.
pub(super) struct Running<T>(oneshot::Receiver<Result<T, Failed>>);

impl<T> Future for Running<T> {
    type Output = Result<T, Failed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let lost = |_| Err(Failed { error: Error::internal("work on a connection panicked"), repeat: Repeat::Pointless });
        self.0.poll_unpin(cx).map(|answer| answer.unwrap_or_else(lost))
    }
}

impl Store {
    /// Reads: `work` gets a connection and runs outside of a transaction.
    pub(super) fn read<T, W>(&self, share: Share, work: W) -> impl Future<Output = Result<T, Error>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        let running = self.run(Mode::Read, share, work);
        async move { Ok(running.await?) }
    }

    /// Scans: `work` gets a connection whose statements are planned by the statistics ([`Mode::Scan`]).
    pub(super) fn scan<T, W>(&self, workspace: WorkspaceId, work: W) -> impl Future<Output = Result<T, Error>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        let running = self.run(Mode::Scan, Share::Scan(workspace), work);
        async move { Ok(running.await?) }
    }

    /// Writes: `work` runs in a transaction, which is committed if it succeeds.
    pub(super) fn write<T, W>(&self, share: Share, work: W) -> Running<T>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        self.run(Mode::Write, share, work)
    }

    /// Writes as [`Store::write`] does, and tries again while `retry` allows it. `make` makes the work of each try.
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
        tokio::spawn(async move { store.attend(mode, share, work, reply).await }.in_current_span());
        Running(answer)
    }

    async fn attend<T, W>(self, mode: Mode, share: Share, work: W, mut reply: oneshot::Sender<Result<T, Failed>>)
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        // Until here nothing has begun, so nothing is lost if the caller has gone.
        let ready = tokio::select! {
            biased;
            () = reply.closed() => return,
            ready = self.ready(share) => ready,
        };
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
        let running = work_on(&mut session.connection, mode, work, &is_committing);
        let gone = async {
            match mode {
                Mode::Read | Mode::Scan => {
                    reply.closed().await;
                    sleep(CANCEL_AFTER).await;
                }
                Mode::Write => std::future::pending().await,
            }
        };
        let watched = self.link.watch(backend, self.work_timeout, running, gone).await;
        match watched {
            Watched::Ended { outcome, is_cancelled } => {
                let is_known = match &outcome {
                    Ok(_) | Err(Broken { is_connection_usable: true, .. }) => !is_cancelled,
                    Err(_) => false,
                };
                let answer = |outcome: Result<T, Broken>| {
                    outcome.map_err(|broken| broken.into_failed(is_committing.load(Ordering::Relaxed)))
                };
                if is_known {
                    self.link.heard();
                    session.is_idle = true;
                    session.used_at = Instant::now();
                    // Back before the answer, so that the caller's next statement finds it.
                    drop(session);
                    drop(slot);
                    let _ = reply.send(answer(outcome));
                } else {
                    if outcome.as_ref().is_err_and(|broken| error::is_read_only(&broken.stop)) {
                        // So are the other connections: the database that takes writes is another one now.
                        self.link.distrust(session.generation);
                    }
                    drop(Object::take(session));
                    let _ = reply.send(answer(outcome));
                    // Only this side of the connection may be closed; the statement must not run on beside the next one.
                    self.link.terminate(backend).await;
                    drop(slot);
                }
            }
            Watched::GivenUp(error) => {
                let repeat = if is_committing.load(Ordering::Relaxed) { Repeat::OutcomeUnknown } else { Repeat::Safe };
                // The socket is closed here. The caller need not wait until the database has noticed, but the slot must.
                drop(Object::take(session));
                let _ = reply.send(Err(Failed { error, repeat }));
                self.link.terminate(backend).await;
                drop(slot);
            }
        }
    }

    /// Waits for a slot of this share and for a connection.
    async fn ready(&self, share: Share) -> Result<(Slot, Object<Sessions>), Error> {
        self.link
            .or_down(async {
                let slot = self.shares.acquire(share).await?;
                let session =
                    within(self.connect_timeout, self.pool.get()).await.ok_or_else(|| error::away("no connection in time"))?;
                Ok((slot, session.map_err(error::from_pool)?))
            })
            .await
    }
}

/// A piece of work that ended in an error.
struct Broken {
    stop: Stop,
    is_connection_usable: bool,
}

impl Broken {
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
                let repeat = match (error::is_passing(&error), is_committing) {
                    // A conflict that is found at COMMIT is an answer, too.
                    (true, true) if error::is_dead_connection(&error) => Repeat::OutcomeUnknown,
                    (true, _) => Repeat::Safe,
                    (false, _) => Repeat::Pointless,
                };
                Failed { error: from_sqlx(error), repeat }
            }
        }
    }
}

/// Runs the work to its end, with the statements of its transaction around it.
async fn work_on<T, W>(connection: &mut PgConnection, mode: Mode, work: W, is_committing: &AtomicBool) -> Result<T, Broken>
where
    W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
{
    let begin = match mode {
        Mode::Read => return work(connection).await.map_err(|stop| Broken::of(stop, true)),
        Mode::Scan => BEGIN_SCAN,
        Mode::Write => "BEGIN",
    };
    let lost = |error| Broken { stop: Stop::Database(error), is_connection_usable: false };
    sqlx::raw_sql(begin).execute(&mut *connection).await.map_err(lost)?;
    match work(&mut *connection).await {
        Ok(done) => {
            is_committing.store(true, Ordering::Relaxed);
            sqlx::raw_sql("COMMIT").execute(connection).await.map_err(lost)?;
            Ok(done)
        }
        Err(stop) => {
            let is_rolled_back = match &stop {
                Stop::Database(error) if !error::leaves_connection_usable(error) => false,
                _ => sqlx::raw_sql("ROLLBACK").execute(connection).await.is_ok(),
            };
            Err(Broken::of(stop, is_rolled_back))
        }
    }
}

/// A pool of at most `connections_max` sessions.
pub(super) fn pool(sessions: Sessions, connections_max: usize) -> Result<Pool<Sessions>, Error> {
    Pool::builder(sessions).max_size(connections_max).build().map_err(Error::internal)
}

/// How long a piece of work may take in all, for a server that ends each statement after `statement_timeout`.
pub(super) fn work_timeout(statement_timeout: Duration) -> Duration {
    statement_timeout + WORK_MARGIN
}

/// Says goodbye to the sessions that rest, for as long as a well-behaved database needs.
pub(super) async fn close(pool: &Pool<Sessions>) {
    pool.close();
    let resting = pool.retain(|_, _| false).removed;
    let goodbyes: Vec<_> = resting.into_iter().map(|session| session.connection.close().boxed()).collect();
    let _ = timeout(PING_TIMEOUT, futures_util::future::join_all(goodbyes)).await;
}
