//! The state of the link to the database, and whether a reply can still be expected on it.
//!
//! A connection whose peer disappeared silently (a fail-over, a pulled cable, a firewall that
//! dropped its state) looks like one with a slow statement. So one task polls the database, on a
//! connection of its own, for the activity of its backends. If it gets no reply there and none on a
//! new connection either, the link is down: everything that waits fails at once, and so do new
//! calls, until the database replies again. If it gets a reply, work whose backend has been idle
//! since the previous poll waits for something that was lost, and is given up.

use std::{
    collections::HashMap,
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use sqlx::{AssertSqlSafe, PgConnection, Row};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    error::{self, away, slow},
    hosts::Hosts,
};
use crate::domain::Error;

/// The pause between two polls while the database responds.
const POLL_INTERVAL: Duration = Duration::from_millis(1_500);

/// The time limit of a poll while the database responds. Together with the interval it stays below
/// the 10 seconds within which every call is answered.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// The time limit of a poll while the link is down. An attempt whose bytes were lost delays the
/// next one, and everything must work within 5 seconds of a database that does.
const RETRY_TIMEOUT: Duration = Duration::from_millis(2_500);

/// How long the connection of the last poll may take to reply before a new one is tried beside it.
const REPLY_TIMEOUT: Duration = Duration::from_secs(1);

/// The time limit for sending a signal. Polls wait meanwhile.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause between two polls while the link is down.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// The pause between two attempts to cancel a statement.
const CANCEL_INTERVAL: Duration = Duration::from_secs(1);

/// A reply on any connection within this time shows that the database is slow and not silent.
const RECENT_REPLY: Duration = Duration::from_secs(1);

/// How long a call waits for a link that is down, so that a short restart of the database is hardly
/// noticed.
const DOWN_WAIT_MAX: Duration = Duration::from_secs(1);

/// The time limit for signalling a backend.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(3);

/// The largest number of signals kept until the link is up again. Further backends end by
/// themselves when the database finds their connections dead.
const PENDING_SIGNALS_MAX: usize = 1_000;

/// Waits for `work` for at most `limit`. Time in which this process did not run does not count:
/// data that arrived meanwhile is not read yet, so its absence says nothing about the peer.
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

/// PostgreSQL's process behind a connection. Process ids are reused, also by another server; the
/// start time distinguishes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backend {
    pub(super) pid: i32,
    pub(super) started_at: time::OffsetDateTime,
    /// When its transaction began, if a pooler may let it work for others after that.
    pub(super) transaction: Option<time::OffsetDateTime>,
}

impl Backend {
    /// Its activity, if it still works for the same session or transaction.
    fn activity(&self, activities: &Activities) -> Option<Activity> {
        let activity = activities.get(&(self.pid, self.started_at)).copied()?;
        (self.transaction.is_none() || self.transaction == activity.transaction).then_some(activity)
    }
}

/// The result of the last poll.
#[derive(Clone, Debug)]
enum State {
    /// The database responds. `backends` is their activity at that time; `None` when the database
    /// did not report it.
    Up { polled_at: Instant, backends: Option<Arc<Activities>> },
    /// The database does not respond, or accepts no writes.
    Down,
}

/// The activity of each backend, by its process id and start time.
type Activities = HashMap<(i32, time::OffsetDateTime), Activity>;

/// The activity of a backend when it was polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Activity {
    /// When its transaction began.
    transaction: Option<time::OffsetDateTime>,
    /// False when it was waiting for its client.
    is_busy: bool,
    /// When this state began.
    since: Option<time::OffsetDateTime>,
}

/// A request to the polling task: call `function` for `backend`.
struct Signal {
    function: &'static str,
    backend: Backend,
    done: oneshot::Sender<()>,
}

/// The state of the link, shared by everything that waits for the database.
#[derive(Debug)]
pub(super) struct Link {
    state: watch::Sender<State>,
    /// Keeps the generation of connections. Those of an older one are not reused.
    hosts: Hosts,
    signals: mpsc::Sender<Signal>,
    /// When the database last replied.
    replied_at: Mutex<Instant>,
}

/// How watched work ended.
pub(super) enum Watched<O> {
    /// The work ended by itself, or because it was cancelled after its caller was gone.
    Ended { outcome: O, is_cancelled: bool },
    /// No reply can be expected any more.
    GivenUp(Error),
}

impl Link {
    /// Starts the task that polls the database of `hosts`. It runs until the handle is dropped.
    pub(super) fn start(hosts: Hosts) -> (Arc<Self>, AbortOnDropHandle<()>) {
        let (signals, received) = mpsc::channel(64);
        let state = watch::Sender::new(State::Up { polled_at: Instant::now(), backends: None });
        let link = Arc::new(Self { state, hosts: hosts.clone(), signals, replied_at: Mutex::new(Instant::now()) });
        let task = tokio::spawn(keep_polling(link.clone(), hosts, received));
        (link, AbortOnDropHandle::new(task))
    }

    /// The generation of a connection that is opened now.
    pub(super) fn generation(&self) -> u64 {
        self.hosts.generation()
    }

    /// Prevents all connections of this generation from being reused.
    pub(super) fn retire(&self, generation: u64) {
        self.hosts.retire(generation);
    }

    /// Records that the database replied just now.
    pub(super) fn record_reply(&self) {
        *self.replied_at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn has_recent_reply(&self) -> bool {
        self.replied_at.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < RECENT_REPLY
    }

    /// False while the database does not respond or accepts no writes.
    pub(super) fn is_up(&self) -> bool {
        matches!(*self.state.borrow(), State::Up { .. })
    }

    /// Waits for `ready`, and fails when the link is down. A link that is down at first has a
    /// moment to come up.
    pub(super) async fn unless_down<T>(&self, ready: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let mut state = self.state.subscribe();
        if within(DOWN_WAIT_MAX, state.wait_for(|state| matches!(state, State::Up { .. }))).await.is_none() {
            return Err(away("the link is down"));
        }
        tokio::select! {
            biased;
            _ = state.wait_for(|state| matches!(state, State::Down)) => Err(away("the link is down")),
            ready = ready => ready,
        }
    }

    /// Runs `work` on this backend until it ends, or until no reply can be expected: the link is
    /// down, the backend stays idle, or `limit` has passed. Once `gone` completes, the work is
    /// cancelled in the database. `backend` may become known while the work runs.
    pub(super) async fn watch<O>(
        &self,
        backend: &OnceLock<Backend>,
        limit: Duration,
        work: impl Future<Output = O>,
        gone: impl Future<Output = ()>,
    ) -> Watched<O> {
        let started = Instant::now();
        let mut state = self.state.subscribe();
        // The activity at the last poll, if the backend was idle.
        let mut idle_before = None;
        let mut cancel_at = None;
        tokio::pin!(work, gone);
        loop {
            tokio::select! {
                biased;
                outcome = &mut work => return Watched::Ended { outcome, is_cancelled: cancel_at.is_some() },
                // It does not fail, since `self` has the other end.
                Ok(()) = state.changed() => {
                    let last = state.borrow_and_update().clone();
                    match (last, backend.get()) {
                        (State::Down, _) => return Watched::GivenUp(away("the link is down")),
                        (State::Up { polled_at, backends: Some(backends) }, Some(backend)) if polled_at > started => {
                            let activity = backend.activity(&backends);
                            let is_idle = activity.is_none_or(|activity| !activity.is_busy);
                            // A backend is idle for a moment between two statements. One that has
                            // been idle since the previous poll waits for a statement that was
                            // lost, or its reply was lost.
                            if idle_before == Some(activity) {
                                return Watched::GivenUp(away("an answer was lost"));
                            }
                            idle_before = is_idle.then_some(activity);
                        }
                        (State::Up { .. }, _) => idle_before = None,
                    }
                }
                () = sleep_until(started + limit) => return Watched::GivenUp(slow("no answer in time")),
                () = &mut gone, if cancel_at.is_none() => cancel_at = Some(Instant::now()),
                () = sleep_until(cancel_at.unwrap_or(started)), if cancel_at.is_some() => {
                    self.signal("pg_cancel_backend", backend).await;
                    // A signal that arrives between two statements cancels nothing.
                    cancel_at = Some(Instant::now() + CANCEL_INTERVAL);
                }
            }
        }
    }

    /// Terminates a backend whose connection was given up, so that it holds no locks. Returns when
    /// the signal was sent, or after [`SIGNAL_TIMEOUT`].
    pub(super) async fn terminate(&self, backend: &OnceLock<Backend>) {
        self.signal("pg_terminate_backend", backend).await;
    }

    async fn signal(&self, function: &'static str, backend: &OnceLock<Backend>) {
        let Some(&backend) = backend.get() else { return };
        let (done, sent) = oneshot::channel();
        let signal = Signal { function, backend, done };
        let sending = async {
            if self.signals.send(signal).await.is_ok() {
                let _ = sent.await;
            }
        };
        let _ = timeout(SIGNAL_TIMEOUT, sending).await;
    }
}

async fn keep_polling(link: Arc<Link>, hosts: Hosts, mut signals: mpsc::Receiver<Signal>) {
    let mut connection = None;
    let mut was_lost = false;
    // Signals that were requested while the link was down.
    let mut pending = Vec::new();
    let mut next_poll = Instant::now() + POLL_INTERVAL;
    loop {
        tokio::select! {
            biased;
            () = sleep_until(next_poll) => {}
            signal = signals.recv() => {
                let Some(signal) = signal else { return };
                if link.is_up() {
                    if !send(&mut connection, &hosts, signal.function, signal.backend).await {
                        was_lost = true;
                    }
                } else if pending.len() < PENDING_SIGNALS_MAX {
                    pending.push((signal.function, signal.backend));
                }
                let _ = signal.done.send(());
                continue;
            }
        }
        let (generation, began) = (link.generation(), Instant::now());
        let limit = if link.is_up() { POLL_TIMEOUT } else { RETRY_TIMEOUT };
        let polling = within(limit, poll(&mut connection, &hosts)).await;
        let (mut polled, is_old_lost) = polling.unwrap_or((Err(sqlx::Error::PoolTimedOut), true));
        was_lost |= is_old_lost;
        if matches!(polled, Err(sqlx::Error::PoolTimedOut)) && link.has_recent_reply() {
            // Slow but not silent: other connections had replies meanwhile.
            polled = Ok(State::Up { polled_at: began, backends: None });
            was_lost = false;
        }
        if std::mem::take(&mut was_lost) {
            // Connections of the same generation are most likely lost, too.
            link.retire(generation);
        }
        let pause = match polled {
            Ok(state) => {
                if !link.is_up() {
                    tracing::info!("the database answers again");
                }
                link.state.send_replace(state);
                while let Some((function, backend)) = pending.pop() {
                    if !send(&mut connection, &hosts, function, backend).await {
                        was_lost = true;
                        break;
                    }
                }
                if was_lost { Duration::ZERO } else { POLL_INTERVAL }
            }
            Err(error) => {
                if link.is_up() {
                    tracing::warn!(cause = %error, "the database does not answer");
                }
                link.retire(link.generation());
                link.state.send_replace(State::Down);
                RETRY_INTERVAL
            }
        };
        next_poll = Instant::now() + pause;
    }
}

/// Polls the database on the connection of the last poll, and on a new one if that one fails or
/// does not reply soon. The reply of either is enough. Also returns whether the old one was lost.
///
/// # Errors
/// When there is no connection, or the database accepts no writes. A database that replies with an
/// error (such as too many connections) counts as up.
async fn poll(connection: &mut Option<PgConnection>, hosts: &Hosts) -> (Result<State, sqlx::Error>, bool) {
    let polled_at = Instant::now();
    let on_new = async { activities(hosts.open().await?.0, hosts).await };
    // Taken out, so that a connection without a reply is closed.
    let (reply, is_old_lost) = match connection.take() {
        None => (on_new.await, false),
        Some(old) => {
            let mut on_old = pin!(activities(old, hosts));
            match timeout(REPLY_TIMEOUT, &mut on_old).await {
                Ok(Err(error)) if !error::is_answer(&error) => (on_new.await, true),
                Ok(reply) => (reply, false),
                Err(_) => tokio::select! {
                    biased;
                    Ok(reply) = on_old => (Ok(reply), false),
                    reply = on_new => (reply, true),
                },
            }
        }
    };
    let state = match reply {
        Ok((backends, open)) => {
            *connection = Some(open);
            Ok(State::Up { polled_at, backends: Some(Arc::new(backends)) })
        }
        Err(refusal) if error::is_answer(&refusal) => Ok(State::Up { polled_at, backends: None }),
        Err(error) => Err(error),
    };
    (state, is_old_lost)
}

/// Asks for the activity of all backends of this user. Returns the connection with the reply.
async fn activities(mut connection: PgConnection, hosts: &Hosts) -> Result<(Activities, PgConnection), sqlx::Error> {
    // As text: a pooler that assigns a backend to each statement knows no prepared ones.
    let statement = sqlx::raw_sql(
        "SELECT pid, backend_start, xact_start, COALESCE(state, 'active') NOT LIKE 'idle%', state_change,
             pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool
         FROM pg_stat_activity WHERE usename = current_user",
    );
    let rows = statement.fetch_all(&mut connection).await?;
    let mut activities = Activities::with_capacity(rows.len());
    for row in rows {
        if hosts.setup().needs_writes() && row.try_get(5)? {
            return Err(sqlx::Error::Protocol("the database takes no writes".to_owned()));
        }
        let activity = Activity { transaction: row.try_get(2)?, is_busy: row.try_get(3)?, since: row.try_get(4)? };
        activities.insert((row.try_get(0)?, row.try_get(1)?), activity);
    }
    Ok((activities, connection))
}

/// Calls a function that signals a backend, unless it works for another transaction by now. False
/// when the database did not reply.
async fn send(connection: &mut Option<PgConnection>, hosts: &Hosts, function: &'static str, backend: Backend) -> bool {
    let sending = async {
        let mut sender = match connection.take() {
            Some(sender) => sender,
            None => hosts.open().await?.0,
        };
        sqlx::raw_sql(AssertSqlSafe(signal_text(function, backend))).execute(&mut sender).await?;
        *connection = Some(sender);
        Ok::<_, sqlx::Error>(())
    };
    matches!(within(SEND_TIMEOUT, sending).await, Some(Ok(())))
}

/// Calls the function only if the backend still works for the same session or transaction.
fn signal_text(function: &str, backend: Backend) -> String {
    let same_transaction = backend.transaction.map(|began_at| format!(" AND xact_start = '{}'", in_sql(began_at)));
    format!(
        "SELECT {function}(pid) FROM pg_stat_activity WHERE pid = {} AND backend_start = '{}'{}",
        backend.pid,
        in_sql(backend.started_at),
        same_transaction.unwrap_or_default(),
    )
}

/// A time as a constant in a statement, to the microsecond as PostgreSQL keeps it.
fn in_sql(at: time::OffsetDateTime) -> String {
    let at = at.to_utc();
    format!("{} {}:{}:{}.{:06} UTC", at.date(), at.hour(), at.minute(), at.second(), at.microsecond())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{future::poll_fn, task::Poll};

    use super::*;
    use crate::store::session::Setup;

    /// Each choice between two events that are there at once is made this often.
    const TIMES: usize = 20;

    const BACKEND: Backend = Backend { pid: 1, started_at: time::OffsetDateTime::UNIX_EPOCH, transaction: None };

    /// A link that nobody polls, and the signals that are requested.
    fn link() -> (Link, mpsc::Receiver<Signal>) {
        let (signals, requested) = mpsc::channel(1);
        let link = Link {
            state: watch::Sender::new(State::Up { polled_at: Instant::now(), backends: None }),
            hosts: Hosts::of_url("database-url", "postgres://someone@127.0.0.1/dnc", Setup::new(Duration::from_secs(1), false))
                .unwrap(),
            signals,
            replied_at: Mutex::new(Instant::now()),
        };
        (link, requested)
    }

    /// Polls `waiting`, and then lets its work end and the link go down before it is polled again.
    async fn end_at_once<T, F: Future<Output = T>>(link: &Link, waiting: impl FnOnce(oneshot::Receiver<()>) -> F) -> T {
        let (work, ended) = oneshot::channel();
        let end = async {
            work.send(()).unwrap();
            link.state.send_replace(State::Down);
        };
        tokio::join!(biased; waiting(ended), end).0
    }

    #[tokio::test]
    async fn what_has_ended_is_not_given_up() {
        for _ in 0..TIMES {
            let (link, _requested) = link();
            let backend = OnceLock::from(BACKEND);
            let watched = end_at_once(&link, |ended| link.watch(&backend, Duration::from_secs(60), ended, std::future::pending()));
            assert!(matches!(watched.await, Watched::Ended { is_cancelled: false, .. }));
            // When this is asked again, the time is over as well.
            let began = Instant::now();
            let late = poll_fn(|_| if began.elapsed() < Duration::from_millis(1) { Poll::Pending } else { Poll::Ready(()) });
            assert!(within(Duration::from_millis(1), late).await.is_some());
        }
    }

    #[tokio::test]
    async fn nothing_begins_on_a_link_that_is_down() {
        for _ in 0..TIMES {
            let (link, _requested) = link();
            let ready = end_at_once(&link, |ended| link.unless_down(async { ended.await.map_err(Error::internal) }));
            assert!(matches!(ready.await, Err(Error::Unavailable { .. })));
        }
    }

    #[test]
    fn a_backend_that_works_for_others_is_not_signalled() {
        let of_session = signal_text("pg_cancel_backend", BACKEND);
        assert_eq!(
            of_session,
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = 1 AND backend_start = '1970-01-01 0:0:0.000000 UTC'"
        );
        let transaction = Some(time::OffsetDateTime::UNIX_EPOCH + Duration::from_micros(1));
        assert_eq!(
            signal_text("pg_cancel_backend", Backend { transaction, ..BACKEND }),
            format!("{of_session} AND xact_start = '1970-01-01 0:0:0.000001 UTC'")
        );
    }

    #[tokio::test]
    async fn work_has_a_time_limit() {
        let (link, mut requested) = link();
        let (began, limit) = (Instant::now(), Duration::from_millis(20));
        let watched = link.watch(&OnceLock::from(BACKEND), limit, std::future::pending::<()>(), std::future::pending()).await;
        assert!(matches!(watched, Watched::GivenUp(Error::Timeout { .. })));
        assert!(began.elapsed() >= limit);
        assert!(requested.try_recv().is_err(), "nothing is cancelled whose caller waits");
    }

    #[tokio::test]
    async fn work_whose_caller_is_gone_is_cancelled_until_it_ends() {
        let (link, mut requested) = link();
        let (work, ended) = oneshot::channel();
        let backend = OnceLock::from(BACKEND);
        let watching = link.watch(&backend, Duration::from_secs(60), ended, std::future::ready(()));
        let cancelling = async {
            let mut at = Vec::new();
            for _ in 0..2 {
                let signal = requested.recv().await.unwrap();
                assert_eq!((signal.function, signal.backend), ("pg_cancel_backend", BACKEND));
                at.push(Instant::now());
                signal.done.send(()).unwrap();
            }
            work.send(()).unwrap();
            at
        };
        let (watched, at) = tokio::join!(watching, cancelling);
        assert!(matches!(watched, Watched::Ended { is_cancelled: true, .. }));
        assert!(at[1] - at[0] >= CANCEL_INTERVAL);
    }

    /// What a poll reports of a backend.
    #[derive(Clone, Copy, Debug)]
    enum Report {
        /// Idle since then.
        Idle(i64),
        Busy(i64),
        /// It is not there.
        Missing,
        /// The database did not report it.
        Unknown,
        /// Idle since then, but the poll was before the work.
        Before(i64),
        /// The database does not respond.
        Down,
    }
    use Report::{Before, Busy, Down, Idle, Missing, Unknown};

    /// Whether work is given up during these polls.
    async fn is_given_up(backend: &OnceLock<Backend>, reports: &[Report]) -> bool {
        let (link, _requested) = link();
        let long_ago = Instant::now();
        let (work, ended) = oneshot::channel();
        let watching = link.watch(backend, Duration::from_secs(60), ended, std::future::pending());
        let polling = async {
            // Later than the beginning of the work, however coarse the clock is.
            let polled_at = Instant::now() + Duration::from_secs(1);
            for report in reports {
                let up = |polled_at, is_busy, since| {
                    let since = time::OffsetDateTime::from_unix_timestamp(since).ok();
                    let activity = Activity { transaction: None, is_busy, since };
                    let backends = HashMap::from([((BACKEND.pid, BACKEND.started_at), activity)]);
                    State::Up { polled_at, backends: Some(Arc::new(backends)) }
                };
                link.state.send_replace(match *report {
                    Idle(since) => up(polled_at, false, since),
                    Busy(since) => up(polled_at, true, since),
                    Missing => State::Up { polled_at, backends: Some(Arc::default()) },
                    Unknown => State::Up { polled_at, backends: None },
                    Before(since) => up(long_ago, false, since),
                    Down => State::Down,
                });
                tokio::task::yield_now().await;
            }
            // Fails if it was given up.
            let _ = work.send(());
        };
        let (watched, ()) = tokio::join!(biased; watching, polling);
        matches!(watched, Watched::GivenUp(Error::Unavailable { .. }))
    }

    #[tokio::test]
    async fn work_is_given_up_when_its_backend_stays_idle_or_the_link_is_down() {
        let polls: [(&[Report], bool); 11] = [
            (&[Idle(1), Idle(1)], true),
            (&[Missing, Missing], true),
            (&[Down], true),
            (&[Idle(1)], false),
            (&[Idle(1), Idle(2)], false),
            (&[Idle(1), Missing], false),
            (&[Busy(1), Busy(1)], false),
            (&[Idle(1), Busy(1), Idle(1)], false),
            (&[Idle(1), Unknown, Idle(1)], false),
            (&[Before(1), Idle(1)], false),
            (&[Before(1), Before(1)], false),
        ];
        for (reports, expected) in polls {
            assert_eq!(is_given_up(&OnceLock::from(BACKEND), reports).await, expected, "{reports:?}");
        }
        assert!(!is_given_up(&OnceLock::new(), &[Idle(1), Idle(1)]).await, "its backend is not known yet");
        let pooled = Backend { transaction: Some(time::OffsetDateTime::UNIX_EPOCH), ..BACKEND };
        assert!(is_given_up(&OnceLock::from(pooled), &[Busy(1), Busy(1)]).await, "its backend works for others");
    }
}
