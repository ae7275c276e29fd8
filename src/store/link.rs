//! The way to the database, and whether an answer can still be expected on it.
//!
//! A connection whose other end was cut off without a word (a fail-over, a pulled cable, a forgetful
//! firewall) looks like one with a slow statement. So one task asks the database again and
//! again, on a connection of its own, what its backends do. If it gets no answer there and none on a new
//! connection either, the link is down: everything that waits is answered at once, and new calls are
//! too, until the database answers again. If it does get an answer, work whose backend has been
//! idle all the while waits for something that was lost, and is given up.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::{PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    error::{self, away, slow},
    session::open,
};
use crate::domain::Error;

/// How often the database is asked while it answers.
const BEAT_INTERVAL: Duration = Duration::from_millis(1_500);

/// How long it may take to answer. Together with the interval and the time for a new connection this stays
/// below the 10 seconds after which every call has its answer.
const BEAT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a new connection may take that shows whether the database is there.
const OPEN_TIMEOUT: Duration = Duration::from_millis(2_500);

/// How often the database is tried while it is away.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// How often a statement is cancelled until it ends.
const CANCEL_INTERVAL: Duration = Duration::from_secs(1);

/// An answer on any connection within this time shows that the database is slow and not silent.
const HEARD_LATELY: Duration = Duration::from_secs(1);

/// How long a call waits for a database that is away, so that a restart of it goes by almost unnoticed.
const DOWN_PATIENCE: Duration = Duration::from_secs(1);

/// How long it may take to tell a backend to stop.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(3);

/// Backends that are told to stop once the link is up again. Those beyond this end by themselves, when the
/// database finds their connections dead.
const OWED_MAX: usize = 1_000;

/// Waits for `work`, but no longer than `limit`. Time in which this process itself did not get to run does not count: what came meanwhile
/// has not been read yet, and says nothing about the other end.
pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    const STEP: Duration = Duration::from_millis(50);
    let patience = async {
        for _ in 0..limit.as_millis().div_ceil(STEP.as_millis()) {
            sleep(STEP).await;
        }
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = patience => None,
    }
}

/// The other end of a connection. Process ids come again, and another server has its own; the start tells
/// them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Backend {
    pub(super) pid: i32,
    pub(super) started_at: time::OffsetDateTime,
}

/// What the last look at the database showed.
#[derive(Clone, Debug)]
enum Seen {
    /// It answers, and had these backends then; none when it would not say.
    Up { asked_at: Instant, backends: Option<Arc<HashMap<Backend, Activity>>> },
    /// It does not answer, or takes no writes.
    Down,
}

/// What a backend did when it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Activity {
    /// False when it waited for its client.
    is_busy: bool,
    /// When that began.
    since: Option<time::OffsetDateTime>,
}

/// What is asked of the task.
struct Signal {
    statement: &'static str,
    backend: Backend,
    done: oneshot::Sender<()>,
}

/// The state of the link, as everybody who waits for the database sees it.
#[derive(Debug)]
pub(super) struct Link {
    seen: watch::Sender<Seen>,
    /// Connections of an older generation than this are not used again.
    generation: AtomicU64,
    signals: mpsc::Sender<Signal>,
    /// When the database answered last.
    heard_at: Mutex<Instant>,
}

/// How watched work ended.
pub(super) enum Watched<O> {
    /// By itself, or because it was cancelled after its caller had gone.
    Ended { outcome: O, is_cancelled: bool },
    /// No answer can be expected any more.
    GivenUp(Error),
}

impl Link {
    /// Begins to watch the database that `connect` leads to, until the handle is dropped.
    pub(super) fn start(connect: PgConnectOptions) -> (Arc<Self>, AbortOnDropHandle<()>) {
        let (signals, received) = mpsc::channel(64);
        let seen = watch::Sender::new(Seen::Up { asked_at: Instant::now(), backends: None });
        let link = Arc::new(Self { seen, generation: AtomicU64::new(0), signals, heard_at: Mutex::new(Instant::now()) });
        let task = tokio::spawn(keep_asking(link.clone(), connect, received));
        (link, AbortOnDropHandle::new(task))
    }

    /// The generation that a connection which is opened now belongs to.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Lets no connection of this generation be used again.
    pub(super) fn distrust(&self, generation: u64) {
        // Whoever comes late with the same news must not throw away the connections that were opened since.
        let _ = self.generation.compare_exchange(generation, generation + 1, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Notes that the database has answered just now.
    pub(super) fn heard(&self) {
        *self.heard_at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn has_heard_lately(&self) -> bool {
        self.heard_at.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < HEARD_LATELY
    }

    /// False while the database does not answer or takes no writes.
    pub(super) fn is_up(&self) -> bool {
        matches!(*self.seen.borrow(), Seen::Up { .. })
    }

    /// Waits for `ready`, but not while the link is down. One that is down already may be up again in a moment.
    pub(super) async fn or_down<T>(&self, ready: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let mut seen = self.seen.subscribe();
        if within(DOWN_PATIENCE, seen.wait_for(|seen| matches!(seen, Seen::Up { .. }))).await.is_none() {
            return Err(away("the link is down"));
        }
        tokio::select! {
            biased;
            _ = seen.wait_for(|seen| matches!(seen, Seen::Down)) => Err(away("the link is down")),
            ready = ready => ready,
        }
    }

    /// Runs `work` on this backend until it ends, or until no answer can be expected: the link is down, the
    /// backend has nothing to do, or `limit` is over. Once `gone` is ready, the work is cancelled in the database.
    pub(super) async fn watch<O>(
        &self,
        backend: Backend,
        limit: Duration,
        work: impl Future<Output = O>,
        gone: impl Future<Output = ()>,
    ) -> Watched<O> {
        let started = Instant::now();
        let mut seen = self.seen.subscribe();
        // What the last look showed, if it showed that nothing is done for us.
        let mut idle_before = None;
        let mut cancel_at = None;
        tokio::pin!(work, gone);
        loop {
            tokio::select! {
                biased;
                outcome = &mut work => return Watched::Ended { outcome, is_cancelled: cancel_at.is_some() },
                changed = seen.changed() => {
                    let last = seen.borrow_and_update().clone();
                    match last {
                        _ if changed.is_err() => return Watched::GivenUp(away("nobody watches the link")),
                        Seen::Down => return Watched::GivenUp(away("the link is down")),
                        Seen::Up { asked_at, backends: Some(backends) } if asked_at > started => {
                            let activity = backends.get(&backend).copied();
                            let is_idle = activity.is_none_or(|activity| !activity.is_busy);
                            // Between two statements a backend is idle for a moment. One that has been so since the last look
                            // waits for a statement that it will never get, or its answer was lost.
                            if is_idle && idle_before == Some(activity) {
                                return Watched::GivenUp(away("an answer was lost"));
                            }
                            idle_before = is_idle.then_some(activity);
                        }
                        Seen::Up { .. } => idle_before = None,
                    }
                }
                () = sleep_until(started + limit) => return Watched::GivenUp(slow("no answer in time")),
                () = &mut gone, if cancel_at.is_none() => cancel_at = Some(Instant::now()),
                () = sleep_until(cancel_at.unwrap_or(started)), if cancel_at.is_some() => {
                    self.signal("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2", backend).await;
                    // One that came between two statements has stopped nothing.
                    cancel_at = Some(Instant::now() + CANCEL_INTERVAL);
                }
            }
        }
    }

    /// Ends a backend whose connection was given up, so that it holds no locks, and returns when it was told.
    pub(super) async fn terminate(&self, backend: Backend) {
        self.signal("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2", backend).await;
    }

    async fn signal(&self, statement: &'static str, backend: Backend) {
        let (done, told) = oneshot::channel();
        let signal = Signal { statement, backend, done };
        let telling = async {
            if self.signals.send(signal).await.is_ok() {
                let _ = told.await;
            }
        };
        let _ = timeout(SIGNAL_TIMEOUT, telling).await;
    }
}

async fn keep_asking(link: Arc<Link>, connect: PgConnectOptions, mut signals: mpsc::Receiver<Signal>) {
    let mut connection = None;
    let mut was_lost = false;
    // Signals that could not be sent while the link was down.
    let mut owed = Vec::new();
    let mut next_beat = Instant::now() + BEAT_INTERVAL;
    loop {
        tokio::select! {
            biased;
            () = sleep_until(next_beat) => {}
            signal = signals.recv() => {
                let Some(signal) = signal else { return };
                if link.is_up() {
                    was_lost |= !send(&mut connection, &connect, signal.statement, signal.backend).await;
                } else if owed.len() < OWED_MAX {
                    owed.push((signal.statement, signal.backend));
                }
                let _ = signal.done.send(());
                continue;
            }
        }
        let (generation, began) = (link.generation(), Instant::now());
        let is_old = connection.is_some();
        let mut asked = ask(&mut connection, &connect).await;
        if asked.is_err() && is_old {
            // Perhaps this connection alone was lost; a new one tells.
            asked = ask(&mut connection, &connect).await;
            was_lost = true;
        }
        if matches!(asked, Err(sqlx::Error::PoolTimedOut)) && link.has_heard_lately() {
            // Slow, but not silent: it has answered others meanwhile.
            asked = Ok(Seen::Up { asked_at: began, backends: None });
            was_lost = false;
        }
        if std::mem::take(&mut was_lost) {
            // Those of the same age are most likely lost, too.
            link.distrust(generation);
        }
        let pause = match asked {
            Ok(seen) => {
                if !link.is_up() {
                    tracing::info!("the database answers again");
                }
                link.seen.send_replace(seen);
                while let Some((statement, backend)) = owed.pop() {
                    if !send(&mut connection, &connect, statement, backend).await {
                        was_lost = true;
                        break;
                    }
                }
                if was_lost { Duration::ZERO } else { BEAT_INTERVAL }
            }
            Err(error) => {
                if link.is_up() {
                    tracing::warn!(cause = %error, "the database does not answer");
                }
                link.distrust(link.generation());
                link.seen.send_replace(Seen::Down);
                RETRY_INTERVAL
            }
        };
        next_beat = Instant::now() + pause;
    }
}

/// Looks at the database once.
///
/// # Errors
/// When there is no answer, or no writes are taken. A database that answers with a refusal (no connection left,
/// say) is there all the same.
async fn ask(connection: &mut Option<PgConnection>, connect: &PgConnectOptions) -> Result<Seen, sqlx::Error> {
    let asked_at = Instant::now();
    // Taken out, so that one which does not answer is closed.
    let mut asked = match connection.take() {
        Some(asked) => asked,
        None => match within(OPEN_TIMEOUT, open(connect)).await.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
            Ok((opened, _)) => opened,
            Err(refusal) if error::is_answer(&refusal) => return Ok(Seen::Up { asked_at, backends: None }),
            Err(error) => return Err(error),
        },
    };
    let question = sqlx::query_as::<_, (bool, i32, time::OffsetDateTime, bool, Option<time::OffsetDateTime>)>(
        "SELECT current_setting('transaction_read_only')::bool,
             pid, backend_start, COALESCE(state, 'active') NOT LIKE 'idle%', state_change
         FROM pg_stat_activity WHERE usename = current_user",
    );
    let rows = within(BEAT_TIMEOUT, question.fetch_all(&mut asked)).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
    let rows = match rows {
        Ok(rows) => rows,
        Err(refusal) if error::is_answer(&refusal) => return Ok(Seen::Up { asked_at, backends: None }),
        Err(error) => return Err(error),
    };
    // The asking backend itself is always among them.
    if rows.iter().any(|(is_read_only, ..)| *is_read_only) {
        return Err(sqlx::Error::Protocol("the database takes no writes".to_owned()));
    }
    *connection = Some(asked);
    let backends =
        rows.into_iter().map(|(_, pid, started_at, is_busy, since)| (Backend { pid, started_at }, Activity { is_busy, since }));
    Ok(Seen::Up { asked_at, backends: Some(Arc::new(backends.collect())) })
}

/// Sends a signal to a backend; false when the connection did not answer.
async fn send(
    connection: &mut Option<PgConnection>,
    connect: &PgConnectOptions,
    statement: &'static str,
    backend: Backend,
) -> bool {
    let sending = async {
        let mut sender = match connection.take() {
            Some(sender) => sender,
            None => open(connect).await?.0,
        };
        sqlx::query(statement).bind(backend.pid).bind(backend.started_at).execute(&mut sender).await?;
        *connection = Some(sender);
        Ok::<_, sqlx::Error>(())
    };
    matches!(within(BEAT_TIMEOUT, sending).await, Some(Ok(())))
}
