//! The storage of entries, tenants and keys in PostgreSQL. No other module contains SQL.
//!
//! Every statement on the table `entries` names exactly one workspace. A statement that names
//! addresses is one lookup by key for each of them, and a page is a scan along the key. The shape
//! of the statements and the settings of the session (`PLANNER`) leave the planner no other plan,
//! whatever its statistics say about a table that has just been filled. Queries are checked against
//! the migrations at compile time. The results of that check are in `.sqlx`, so a build needs no
//! database.

mod counts;
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
mod retention;
mod session;
mod shares;
mod sockets;
mod tenants;

use std::{sync::Arc, time::Duration};

use deadpool::managed::Pool;
use sqlx::{
    ConnectOptions, Connection, PgConnection,
    migrate::{Migrate, Migrator},
    postgres::PgPoolOptions,
};
use tokio::{sync::OnceCell, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use self::{
    hosts::Hosts,
    link::Link,
    session::{Sessions, Stop},
    shares::{Share, Shares},
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

static MIGRATOR: Migrator = sqlx::migrate!();

/// How to reach the database.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// A `postgres://` URL. It may name several servers, of which one takes writes.
    pub url: String,
    /// The largest number of connections; at least 4.
    pub connections_max: u32,
    /// How long a call waits for a connection before the database is reported as unavailable.
    pub connect_timeout: Duration,
    /// The time limit of one statement.
    pub statement_timeout: Duration,
}

/// A handle to the database. Cheap to clone; all clones share the connections.
#[derive(Clone, Debug)]
pub struct Store {
    pool: Pool<Sessions>,
    link: Arc<Link>,
    shares: Arc<Shares>,
    hosts: Hosts,
    /// How long work waits for a connection before the database is reported as unavailable.
    connect_timeout: Duration,
    /// The time limit of work on its connection.
    work_timeout: Duration,
    page_token_secret: Arc<OnceCell<Vec<u8>>>,
    is_distributed: Arc<OnceCell<bool>>,
    _watching: Arc<AbortOnDropHandle<()>>,
}

impl Store {
    /// Prepares the connections without opening one, so that a server can start before its
    /// database. Must be called on a tokio runtime, where it starts a task that watches the link to
    /// the database.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the URL is malformed.
    pub fn new(options: &StoreOptions) -> Result<Self, Error> {
        let hosts = Hosts::of_url(&options.url)?.with(|options| {
            // The text of a statement belongs into no log. And asking whether it would be logged,
            // as sqlx does, confuses filters that belong to one layer (`telemetry`).
            options.application_name("dnc").disable_statement_logging()
        });
        let statement_timeout_millis = options.statement_timeout.as_millis().to_string();
        let limited = hosts.with(|options| {
            options.options(PLANNER).options([
                ("statement_timeout", statement_timeout_millis.as_str()),
                // These release the locks of a server that is gone: the database ends a session
                // whose link is dead.
                ("idle_in_transaction_session_timeout", "10s"),
                ("tcp_keepalives_idle", "5"),
                ("tcp_keepalives_interval", "2"),
                ("tcp_keepalives_count", "3"),
                ("tcp_user_timeout", "10s"),
            ])
        });
        let connections_max = options.connections_max.max(4) as usize;
        let (link, watching) = Link::start(limited.clone());
        // One connection is for the link.
        let pool = session::pool(Sessions { hosts: limited, link: link.clone() }, connections_max - 1)?;
        Ok(Self {
            pool,
            link,
            shares: Arc::new(Shares::of(connections_max)),
            hosts,
            connect_timeout: options.connect_timeout,
            work_timeout: session::work_timeout(options.statement_timeout),
            page_token_secret: Arc::default(),
            is_distributed: Arc::default(),
            _watching: Arc::new(watching),
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
        let writable = timeout(self.connect_timeout, self.hosts.writable());
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
        self.read(Share::Service, |connection| {
            Box::pin(async move {
                let exists: bool =
                    sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL").fetch_one(&mut *connection).await?;
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

    /// The use of the connections, and whether the database answers.
    pub fn levels(&self) -> DatabaseLevels {
        let pool = self.pool.status();
        let idle = pool.available.min(pool.size);
        DatabaseLevels { busy: pool.size - idle, idle, max: pool.max_size, is_up: self.link.is_up() }
    }

    /// False while the database is known not to respond.
    pub fn is_reachable(&self) -> bool {
        self.link.is_up()
    }

    /// Opens and closes one connection, so that a database which cannot be reached is reported with
    /// its cause and not as a time-out.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn ping(&self) -> Result<(), Error> {
        self.connect_once().await?.close().await.map_err(error::from_sqlx)
    }

    async fn connect_once(&self) -> Result<PgConnection, Error> {
        let opening = timeout(self.connect_timeout, async { self.hosts.writable().await?.connect().await });
        opening.await.map_err(|_| error::away("no connection in time"))?.map_err(error::from_sqlx)
    }

    /// Closes the idle connections now, and the others when their work is done. Takes at most a
    /// second, even if the database does not respond.
    pub async fn close(&self) {
        session::close(&self.pool).await;
    }
}
