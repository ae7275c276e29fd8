//! A database, and the work on its connections. After work, a connection is idle and outside of a
//! transaction, or it is closed.
//!
//! A call may be cancelled at every `await`, and a future that is dropped in the middle of a
//! statement leaves its connection in an unknown state. So work on a connection runs in a task of
//! its own ([`Database::run`]), which the caller awaits but does not own. The task ends in one of
//! two ways: the database has replied to everything that was sent, or the connection is closed.
//! `link` decides when a reply is no longer expected.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use deadpool::managed::{Object, Pool};
use sqlx::PgConnection;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::{
    error,
    hosts::Hosts,
    link::{Backend, Link, Watched, within},
    session::{self, Failed, Mode, Repeat, Retry, Running, Sessions, WorkError, Working, work_on},
    shares::{Share, Shares, Slot},
};
use crate::{domain::Error, telemetry::metrics};

/// How long a statement continues after its caller is gone. Most end by themselves in this time,
/// and cancelling one costs a connection.
const CANCEL_AFTER: Duration = Duration::from_millis(200);

/// A database. Cheap to clone; all clones share the connections.
#[derive(Clone, Debug)]
pub(super) struct Database {
    hosts: Hosts,
    pool: Pool<Sessions>,
    link: Arc<Link>,
    shares: Arc<Shares>,
    /// How long work waits for a connection before the database is reported as unavailable.
    connect_timeout: Duration,
    /// The time limit of work on its connection.
    work_timeout: Duration,
    _watching: Arc<AbortOnDropHandle<()>>,
}

impl Database {
    /// Prepares at most `connections_max` connections to these servers, at least 4, and opens none.
    pub(super) fn of(
        hosts: Hosts,
        connections_max: u32,
        connect_timeout: Duration,
        statement_timeout: Duration,
    ) -> Result<Self, Error> {
        let connections_max = connections_max.max(4) as usize;
        let (link, watching) = Link::start(hosts.clone());
        // One connection is for the link.
        let pool = session::pool(Sessions { hosts: hosts.clone(), link: link.clone() }, connections_max - 1)?;
        Ok(Self {
            hosts,
            pool,
            link,
            shares: Arc::new(Shares::of(connections_max)),
            connect_timeout,
            work_timeout: session::work_timeout(statement_timeout),
            _watching: Arc::new(watching),
        })
    }

    /// False while the database is known not to respond, or to accept no writes if it must.
    pub(super) fn is_up(&self) -> bool {
        self.link.is_up()
    }

    /// The busy connections, the idle ones, and how many there may be.
    pub(super) fn connections(&self) -> (usize, usize, usize) {
        let pool = self.pool.status();
        let idle = pool.available.min(pool.size);
        (pool.size - idle, idle, pool.max_size)
    }

    /// Closes the idle connections now, and the others when their work is done. Takes at most a
    /// second, even if the database does not respond.
    pub(super) async fn close(&self) {
        session::close(&self.pool).await;
    }

    /// Runs `work` outside of a transaction.
    pub(super) fn read<T, W>(&self, share: Share, work: W) -> impl Future<Output = Result<T, Error>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Send + 'static,
    {
        let running = self.run(Mode::Read, share, work);
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

    /// As [`Database::write`], with further attempts while `retry` allows them. `make` creates the
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
        let database = self.clone();
        let task = tokio::spawn(async move { database.run_in_task(mode, share, work, reply).await }.in_current_span());
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
        let backend: OnceLock<Backend> = session.backend.map(OnceLock::from).unwrap_or_default();
        let is_committing = AtomicBool::new(false);
        let span = tracing::debug_span!("statement", ?mode);
        let running = work_on(&mut session.connection, self.hosts.setup(), mode, work, &backend, &is_committing).instrument(span);
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
        let watched = self.link.watch(&backend, self.work_timeout, running, gone).await;
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
                    self.link.terminate(&backend).await;
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
                self.link.terminate(&backend).await;
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
