//! The storage of entries, tenants and keys in PostgreSQL. No other module contains SQL.
//!
//! Every statement on the table `entries` names exactly one workspace. A statement that names
//! addresses is one lookup by key for each of them, and a page is a scan along the key. The shape
//! of the statements and the settings of the session (`session`) leave the planner no other plan,
//! whatever its statistics say about a table that has just been filled. Queries are checked against
//! the migrations at compile time. The results of that check are in `.sqlx`, so a build needs no
//! database.

mod counts;
mod database;
mod deletions;
mod distribution;
mod entries;
mod error;
mod hosts;
mod imports;
mod keys;
mod link;
mod lists;
mod logs;
mod replica;
mod retention;
mod session;
mod shares;
mod sockets;
mod tenants;

use std::{sync::Arc, time::Duration};

use sqlx::{
    ConnectOptions, Connection, PgConnection,
    migrate::{Migrate, Migrator},
    postgres::PgPoolOptions,
};
use tokio::{sync::OnceCell, time::timeout};

use self::{
    database::Database,
    hosts::Hosts,
    replica::Replica,
    session::{Setup, Stop},
    shares::Share,
};

pub use counts::{ReasonCount, Summary};
pub use deletions::Deletion;
pub use entries::DryRun;
pub use imports::{Answered, Claim, End, FirstBatch, ImportId, ImportIds, Replay};
pub use keys::{Caller, KeyRow};
pub use lists::{EntryRow, Page};
pub use logs::{DeletionRow, ImportRow, Selection};
pub use tenants::{UserRow, WorkspaceRow};

use crate::{domain::Error, telemetry::metrics::DatabaseLevels};

static MIGRATOR: Migrator = sqlx::migrate!();

/// How to reach the database.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// A `postgres://` URL. It may name several servers, of which one takes writes.
    pub url: String,
    /// The URL at which migrations are applied and tables distributed, if that is another one.
    pub migrate_url: Option<String>,
    /// True if `url`, and that of the replica, lead to a pooler that assigns a connection of its
    /// own to each transaction.
    pub is_pooled: bool,
    /// A replica that answers reads of the list.
    pub replica: Option<ReplicaOptions>,
    /// The largest number of connections to the database, and as many again to the replica; at
    /// least 4.
    pub connections_max: u32,
    /// How long a call waits for a connection before the database is reported as unavailable.
    pub connect_timeout: Duration,
    /// The time limit of one statement.
    pub statement_timeout: Duration,
}

/// How to reach a replica.
#[derive(Clone, Debug)]
pub struct ReplicaOptions {
    /// A `postgres://` URL of one server.
    pub url: String,
    /// While it lags behind by more than this, the primary answers.
    pub lag_max: Duration,
}

/// A handle to the database. Cheap to clone; all clones share the connections.
#[derive(Clone, Debug)]
pub struct Store {
    primary: Database,
    replica: Option<Arc<Replica>>,
    hosts: Hosts,
    /// Where migrations are applied and tables distributed.
    direct: Hosts,
    connect_timeout: Duration,
    page_token_secret: Arc<OnceCell<Vec<u8>>>,
    is_distributed: Arc<OnceCell<bool>>,
}

impl Store {
    /// Prepares the connections without opening one, so that a server can start before its
    /// database. Must be called on a tokio runtime, where it starts tasks that watch the database.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a URL is malformed.
    pub fn new(options: &StoreOptions) -> Result<Self, Error> {
        let setup = |is_pooled| Setup::new(options.statement_timeout, is_pooled);
        let database = |hosts| Database::of(hosts, options.connections_max, options.connect_timeout, options.statement_timeout);
        let hosts = Hosts::of_url("database-url", &options.url, setup(options.is_pooled))?;
        let direct = match &options.migrate_url {
            Some(url) => Hosts::of_url("migrate-database-url", url, setup(false))?,
            None => hosts.clone(),
        };
        let primary = database(hosts.clone())?;
        let replica = match &options.replica {
            Some(replica) => {
                let hosts = Hosts::of_url("read-database-url", &replica.url, setup(options.is_pooled).for_replica())?;
                if hosts.count() > 1 {
                    // Its lag is measured on one connection, and must be that of all.
                    return Err(Error::invalid("read-database-url", "The URL of the replica must name one server."));
                }
                Some(Arc::new(Replica::of(database(hosts)?, primary.clone(), replica.lag_max)))
            }
            None => None,
        };
        Ok(Self {
            primary,
            replica,
            hosts,
            direct,
            connect_timeout: options.connect_timeout,
            page_token_secret: Arc::default(),
            is_distributed: Arc::default(),
        })
    }

    /// Applies the missing migrations. Several processes may do so at once.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the database cannot be reached, [`Error::Internal`] when a
    /// migration fails.
    pub async fn migrate(&self) -> Result<(), Error> {
        // A separate connection, because a migration of a large table may take longer than the time
        // limit of a statement.
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(self.connect_timeout);
        let writable = timeout(self.connect_timeout, self.direct.writable());
        let writable = writable.await.map_err(|_| error::away("no connection in time"))?.map_err(error::from_sqlx)?;
        let pool = pool.connect_with(writable).await.map_err(error::from_sqlx)?;
        MIGRATOR.run(&pool).await.map_err(error::from_migrate)?;
        pool.close().await;
        Ok(())
    }

    /// The number of migrations that this build has and the database lacks. A database that is
    /// newer than this build counts as up to date, so that servers can be replaced one after the
    /// other.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the database cannot be reached or accepts no writes.
    pub async fn pending_migrations(&self) -> Result<usize, Error> {
        self.primary
            .read(Share::Service, |connection| {
                Box::pin(async move {
                    let exists: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
                        .fetch_one(&mut *connection)
                        .await?;
                    if !exists {
                        return Ok(MIGRATOR.iter().count());
                    }
                    let applied = connection
                        .list_applied_migrations(&MIGRATOR.table_name)
                        .await
                        .map_err(|error| Stop::Refused(error::from_migrate(error)))?;
                    Ok(MIGRATOR.iter().filter(|known| !applied.iter().any(|done| done.version == known.version)).count())
                })
            })
            .await
    }

    /// The use of the connections, whether the database answers, and the lag of the replica.
    pub fn levels(&self) -> DatabaseLevels {
        let (busy, idle, max) = self.primary.connections();
        let replica_lag = self.replica.as_ref().map(|replica| replica.lag());
        let replica_lag_secs = replica_lag.map(|lag| lag.map_or(f64::INFINITY, |lag| lag.as_secs_f64()));
        DatabaseLevels { busy, idle, max, is_up: self.primary.is_up(), replica_lag_secs }
    }

    /// False while the database is known not to respond.
    pub fn is_reachable(&self) -> bool {
        self.primary.is_up()
    }

    /// Opens and closes one connection, so that a database which cannot be reached is reported with
    /// its cause and not as a time-out.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn ping(&self) -> Result<(), Error> {
        self.connect_once(&self.hosts).await?.close().await.map_err(error::from_sqlx)
    }

    async fn connect_once(&self, hosts: &Hosts) -> Result<PgConnection, Error> {
        let opening = timeout(self.connect_timeout, async { hosts.writable().await?.connect().await });
        opening.await.map_err(|_| error::away("no connection in time"))?.map_err(error::from_sqlx)
    }

    /// Closes the idle connections now, and the others when their work is done. Takes at most a
    /// second, even if the database does not respond.
    pub async fn close(&self) {
        let closing_replica = async {
            if let Some(replica) = &self.replica {
                replica.close().await;
            }
        };
        tokio::join!(self.primary.close(), closing_replica);
    }
}
