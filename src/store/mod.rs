//! Where entries, tenants and keys are kept: PostgreSQL, and nothing else says so. SQL lives here alone.
//!
//! Every statement on the hot table names exactly one workspace. Queries are checked against the migrations when the crate is
//! compiled; the results of that check are kept in `.sqlx`, so that a build needs no database.

mod counts;
mod deletions;
mod entries;
mod error;
mod imports;
mod keys;
mod lists;
mod tenants;

use std::{str::FromStr, sync::Arc, time::Duration};

use sqlx::{
    ConnectOptions, Connection, Executor, PgPool, Postgres, Transaction,
    migrate::{Migrate, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::sync::{OnceCell, Semaphore};

pub use deletions::Deletion;
pub use entries::Rehearsal;
pub use imports::{Answered, BatchCounts, Claim, End, ImportId, ImportIds, Replay};
pub use keys::{Caller, KeyOwner, KeyRow};
pub use lists::{EntryRow, ReasonCount};
pub use tenants::{UserRow, WorkspaceRow};

use crate::domain::Error;

static MIGRATOR: Migrator = sqlx::migrate!();

/// How to reach the database.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// A `postgres://` URL.
    pub url: String,
    /// Connections held at most (4 at least).
    pub connections_max: u32,
    /// How long a call waits for a connection before the database counts as away.
    pub connect_timeout: Duration,
    /// How long one statement may take.
    pub statement_timeout: Duration,
}

/// The database. Cheap to clone; all clones share the connections.
#[derive(Clone, Debug)]
pub struct Store {
    pool: PgPool,
    /// Imports wait here and not at the pool. Imports may use half of the connections, rehearsals and scans an eighth each; the rest stays free for key
    /// look-ups and questions. So a wait at the pool means that the database is away, not that it is busy.
    import_slots: Arc<Semaphore>,
    /// Long rehearsals hold a connection each, so there may be few.
    rehearsal_slots: Arc<Semaphore>,
    /// Whatever may have to look at a whole list: counts, filtered pages, deletions.
    scan_slots: Arc<Semaphore>,
    page_token_secret: Arc<OnceCell<Vec<u8>>>,
}

impl Store {
    /// Prepares the connections without opening one, so that a server can start before its database.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the URL is not one.
    pub fn new(options: &StoreOptions) -> Result<Self, Error> {
        let connect = PgConnectOptions::from_str(&options.url)
            .map_err(|_| {
                Error::invalid("database-url", "The database URL cannot be read; give postgres://USER:PASSWORD@HOST:PORT/DATABASE.")
            })?
            .application_name("dnc")
            .options([("statement_timeout", options.statement_timeout.as_millis().to_string())]);
        let connections_max = options.connections_max.max(4);
        let pool = PgPoolOptions::new()
            .max_connections(connections_max)
            .acquire_timeout(options.connect_timeout)
            .test_before_acquire(false)
            .before_acquire(|connection, meta| {
                Box::pin(async move {
                    // A connection used a moment ago is alive; asking each time would double the cost of a small statement.
                    Ok(meta.idle_for < Duration::from_secs(1) || connection.ping().await.is_ok())
                })
            })
            .after_connect(|connection, _| {
                Box::pin(async move {
                    // An answer promises that the data is durable, whatever the server's own default is.
                    connection
                        .execute("SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'")
                        .await?;
                    Ok(())
                })
            })
            .connect_lazy_with(connect);
        let slots = |part: u32| Arc::new(Semaphore::new((connections_max / part).max(1) as usize));
        Ok(Self {
            pool,
            import_slots: slots(2),
            rehearsal_slots: slots(8),
            scan_slots: slots(8),
            page_token_secret: Arc::default(),
        })
    }

    /// Brings the schema up to date. Safe to run from several processes at once.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the database is away, [`Error::Internal`] when a migration fails.
    pub async fn migrate(&self) -> Result<(), Error> {
        MIGRATOR.run(&self.pool).await.map_err(error::from_migrate)
    }

    /// The number of migrations that this build has and the database lacks. A database that is ahead of this build counts as up to
    /// date, so that servers can be replaced one after the other.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the database is away.
    pub async fn pending_migrations(&self) -> Result<usize, Error> {
        let mut connection = self.pool.acquire().await.map_err(error::from_sqlx)?;
        let exists: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
            .fetch_one(&mut *connection)
            .await
            .map_err(error::from_sqlx)?;
        if !exists {
            return Ok(MIGRATOR.iter().count());
        }
        let applied = connection.list_applied_migrations(&MIGRATOR.table_name).await.map_err(error::from_migrate)?;
        Ok(MIGRATOR.iter().filter(|known| !applied.iter().any(|done| done.version == known.version)).count())
    }

    /// Opens a connection once, so that a database that is not there is told by its cause and not by a time-out.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn ping(&self) -> Result<(), Error> {
        let connection = self.pool.connect_options().connect().await.map_err(error::from_sqlx)?;
        connection.close().await.map_err(error::from_sqlx)
    }

    /// Begins a transaction on a connection that is alive. After the database was away for less than a second the pool still holds connections
    /// that look fresh and are dead; whoever gets one tries the next.
    async fn begin(&self) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        for _ in 0..self.pool.options().get_max_connections() {
            match self.pool.begin().await {
                Err(dead) if error::is_dead_connection(&dead) => {}
                begun => return begun,
            }
        }
        self.pool.begin().await
    }

    /// Closes every connection, after the statements that run.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
