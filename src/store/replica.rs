//! A replica that answers reads of the list while its lag is known and within a bound.
//!
//! The lag is measured on this side, without any clock of a server: this server notes from time to
//! time how far the log of the primary has come. Once the replica has replayed that much, it has
//! everything that was acknowledged before that time. What a replica itself reports of its lag is
//! 0 while it has lost its primary.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::{PgConnection, query};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Store,
    database::Database,
    error::away,
    session::{Failed, Mode, Stop, Working},
    shares::Share,
};
use crate::{domain::Error, telemetry::metrics};

/// The pause between two measurements.
const MEASURE_INTERVAL: Duration = Duration::from_millis(500);

/// The most positions of the primary that are kept. A replica that lags behind for longer than they
/// reach has to catch up before its lag is known again.
const POSITIONS_MAX: usize = 1_200;

/// A replica, and how recent its data are.
#[derive(Debug)]
pub(super) struct Replica {
    database: Database,
    recency: Arc<Recency>,
    _measuring: AbortOnDropHandle<()>,
}

/// Which database may answer a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Only the one that takes writes.
    Primary,
    /// The replica too, if there is one and it is recent.
    Any,
}

/// How recent the data of a replica are.
#[derive(Debug)]
struct Recency {
    /// The replica has everything that was acknowledged before this time.
    complete_until: Mutex<Option<Instant>>,
    lag_max: Duration,
}

impl Recency {
    /// `None` if it is not known.
    fn lag(&self) -> Option<Duration> {
        self.complete_until.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed())
    }

    fn is_sufficient(&self) -> bool {
        self.lag().is_some_and(|lag| lag <= self.lag_max)
    }

    fn set(&self, complete_until: Option<Instant>) {
        *self.complete_until.lock().unwrap_or_else(PoisonError::into_inner) = complete_until;
    }
}

/// A position in the write-ahead log. Positions of different systems or timelines say nothing about
/// each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    /// The system and its timeline.
    history: (i64, i32),
    byte: i64,
    is_replica: bool,
}

impl Replica {
    /// Measures the lag of `database` behind `primary` until this is dropped. Must be called on a
    /// tokio runtime.
    pub(super) fn of(database: Database, primary: Database, lag_max: Duration) -> Self {
        let recency = Arc::new(Recency { complete_until: Mutex::default(), lag_max });
        let measuring = tokio::spawn(keep_measuring(database.clone(), primary, recency.clone()));
        Self { database, recency, _measuring: AbortOnDropHandle::new(measuring) }
    }

    /// How far it lags behind at most; `None` if that is not known.
    pub(super) fn lag(&self) -> Option<Duration> {
        self.recency.lag()
    }

    /// Closes its connections.
    pub(super) async fn close(&self) {
        self.database.close().await;
    }

    /// Runs `work`, or returns it if the replica is not recent enough or fails.
    async fn try_read<T, W>(&self, mode: Mode, share: Share, work: W) -> Result<Result<T, Error>, W>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Clone + Send + 'static,
    {
        if !self.recency.is_sufficient() || !self.database.is_up() {
            return Err(work);
        }
        let (its_work, recency) = (work.clone(), self.recency.clone());
        let read = self.database.run(mode, share, move |connection: &mut PgConnection| -> Working<'_, T> {
            // Work may have waited for its connection.
            if !recency.is_sufficient() {
                return Box::pin(async { Err(Stop::Refused(away("the replica lags behind"))) });
            }
            its_work(connection)
        });
        match read.await {
            Err(Failed { error: error @ Error::Unavailable { .. }, .. }) => {
                tracing::debug!(cause = %error, "the replica failed");
                Err(work)
            }
            ended => Ok(ended.map_err(Error::from)),
        }
    }
}

impl Store {
    /// Runs `work`, which reads, on one of these databases. A failure of the replica is one of the
    /// primary's to answer.
    pub(super) async fn read_from<T, W>(&self, source: Source, mode: Mode, share: Share, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Clone + Send + 'static,
    {
        let work = match &self.replica {
            Some(replica) if source == Source::Any => match replica.try_read(mode, share, work).await {
                Ok(done) => {
                    metrics::read_from_replica(true);
                    return done;
                }
                Err(work) => {
                    metrics::read_from_replica(false);
                    work
                }
            },
            _ => work,
        };
        Ok(self.primary.run(mode, share, work).await?)
    }
}

async fn keep_measuring(replica: Database, primary: Database, recency: Arc<Recency>) {
    let mut positions = VecDeque::new();
    let mut was_sufficient = None;
    let mut ticks = interval(MEASURE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let asked_at = Instant::now();
        let (of_primary, of_replica) = tokio::join!(primary.read(Share::Service, position), replica.read(Share::Service, position));
        if let Ok(position) = of_primary {
            positions.push_back((asked_at, position));
            if positions.len() > POSITIONS_MAX {
                positions.pop_front();
            }
        }
        let cause = match of_replica.map(|replayed| complete_until(&mut positions, replayed)) {
            Ok(Ok(reached)) => {
                if reached.is_some() {
                    recency.set(reached);
                }
                "it lags behind".to_owned()
            }
            Ok(Err(cause)) => {
                recency.set(None);
                cause.to_owned()
            }
            Err(error) => format!("{:#}", anyhow::Error::from(error)),
        };
        let is_sufficient = recency.is_sufficient();
        if was_sufficient.replace(is_sufficient) != Some(is_sufficient) {
            if is_sufficient {
                tracing::info!("reads go to the replica");
            } else {
                tracing::warn!(cause, "reads go to the primary and not to the replica");
            }
        }
    }
}

/// The time until which a replica that has replayed this much is complete. `None` if it has
/// replayed less than any of the positions says. Forgets the positions before.
///
/// # Errors
/// The reason if the replica and the primary cannot be compared.
fn complete_until(positions: &mut VecDeque<(Instant, Position)>, replayed: Position) -> Result<Option<Instant>, &'static str> {
    // After a fail-over the positions of the former primary say nothing about this one.
    let Some(&(_, now)) = positions.back() else { return Ok(None) };
    if !replayed.is_replica {
        return Err("the read database is no replica");
    }
    if replayed.history != now.history {
        return Err("the replica follows another primary, or has no checkpoint yet since a fail-over");
    }
    positions.retain(|(_, position)| position.history == now.history);
    let mut reached = None;
    while let Some((at, _)) = positions.front().filter(|(_, position)| position.byte <= replayed.byte) {
        reached = Some(*at);
        positions.pop_front();
    }
    Ok(reached)
}

/// How far the database has come in the log that it writes or replays.
fn position(connection: &mut PgConnection) -> Working<'_, Position> {
    Box::pin(async move {
        // A replica knows its timeline for certain only from its last checkpoint. After a
        // fail-over that is too old for a while, and the primary is asked meanwhile.
        let row = query!(
            r#"SELECT pg_is_in_recovery() AS "is_replica!", system_identifier AS "system!",
                   CASE WHEN pg_is_in_recovery() THEN timeline_id
                        ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END AS "timeline!",
                   (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END - '0/0')::bigint AS "byte!"
               FROM pg_control_system(), pg_control_checkpoint()"#
        );
        let row = row.fetch_one(connection).await?;
        Ok(Position { history: (row.system, row.timeline), byte: row.byte, is_replica: row.is_replica })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(byte: i64) -> Position {
        Position { history: (1, 1), byte, is_replica: false }
    }

    #[test]
    fn a_replica_is_complete_until_the_last_position_that_it_has_reached() {
        let start = Instant::now();
        let times = [0, 1, 2].map(|secs| start + Duration::from_secs(secs));
        let mut positions: VecDeque<_> = times.into_iter().zip([10, 20, 30].map(at)).collect();
        let replica = |byte| Position { is_replica: true, ..at(byte) };
        assert_eq!(complete_until(&mut positions, replica(9)), Ok(None));
        assert_eq!(complete_until(&mut positions, replica(20)), Ok(Some(times[1])));
        assert_eq!(complete_until(&mut positions, replica(29)), Ok(None));
        assert_eq!(complete_until(&mut positions, replica(99)), Ok(Some(times[2])));
    }

    #[test]
    fn a_server_with_another_history_is_not_compared() {
        let now = Instant::now();
        let position = |history, is_replica| Position { history, byte: 10, is_replica };
        let mut positions = VecDeque::from([(now, position((1, 1), false)), (now, position((1, 2), false))]);
        assert!(complete_until(&mut positions, position((1, 1), true)).is_err());
        assert!(complete_until(&mut positions, position((2, 2), true)).is_err());
        assert!(complete_until(&mut positions, position((1, 2), false)).is_err());
        assert_eq!(complete_until(&mut positions, position((1, 2), true)), Ok(Some(now)));
        assert!(positions.is_empty());
    }
}
