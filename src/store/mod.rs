//! Where entries, tenants and keys are kept: PostgreSQL, and nothing else says so. SQL lives here alone.
//!
//! Every statement on the hot table names exactly one workspace. One that names addresses is a look by key for each of them,
//! and a page is a walk along the key, whatever the planner believes of a table that was filled a moment ago: the shape of
//! the statement and the settings of the session (`PLANNER`) leave it no other way. Queries are checked against the migrations when the crate is
//! compiled; the results of that check are kept in `.sqlx`, so that a build needs no database.

mod counts;
mod deletions;
mod entries;
mod error;
mod imports;
mod keys;
mod link;
mod lists;
mod logs;
mod session;
mod shares;
mod sockets;
mod tenants;

use std::{str::FromStr, sync::Arc, time::Duration};

use deadpool::managed::Pool;
use sqlx::{
    ConnectOptions, Connection, PgConnection,
    migrate::{Migrate, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{sync::OnceCell, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use self::{
    link::Link,
    session::{Sessions, Stop},
    shares::{Share, Shares},
};

pub use deletions::Deletion;
pub use entries::Rehearsal;
pub use imports::{Answered, Claim, End, FirstBatch, ImportId, ImportIds, Replay};
pub use keys::{Caller, KeyRow};
pub use lists::{EntryRow, ReasonCount, Summary};
pub use logs::{Asked, DeletionRow, ImportRow};
pub use tenants::{UserRow, WorkspaceRow};

use crate::domain::Error;

/// What the planner may do in a session of ours. Statistics are late: a workspace that was just imported looks like one row,
/// and a table that was just filled looks empty, so a scan or a sort of all of it looks cheap.
const PLANNER: [(&str, &str); 4] = [
    ("enable_seqscan", "off"),
    ("enable_sort", "off"),
    // There is one way to run these statements, so nothing is gained by planning them for every call.
    ("plan_cache_mode", "force_generic_plan"),
    // A way that is off counts as so dear that compiling the statement would seem to pay.
    ("jit", "off"),
];

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
    pool: Pool<Sessions>,
    link: Arc<Link>,
    shares: Arc<Shares>,
    connect: PgConnectOptions,
    /// How long work waits for a connection before the database counts as away.
    connect_timeout: Duration,
    /// How long work may take on its connection.
    work_timeout: Duration,
    page_token_secret: Arc<OnceCell<Vec<u8>>>,
    _watching: Arc<AbortOnDropHandle<()>>,
}

impl Store {
    /// Prepares the connections without opening one, so that a server can start before its database. Must be called on a tokio runtime, where it
    /// begins to watch the link to the database.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the URL is not one.
    pub fn new(options: &StoreOptions) -> Result<Self, Error> {
        let connect = PgConnectOptions::from_str(&options.url)
            .map_err(|_| {
                Error::invalid("database-url", "The database URL cannot be read; give postgres://USER:PASSWORD@HOST:PORT/DATABASE.")
            })?
            .application_name("dnc");
        let millis = |duration: Duration| duration.as_millis().to_string();
        let limited = connect.clone().options(PLANNER).options([
            ("statement_timeout", millis(options.statement_timeout)),
            // For the database's end of a link that went silent: it must not hold locks for a server that is gone.
            ("idle_in_transaction_session_timeout", "10s".to_owned()),
            ("tcp_keepalives_idle", "5".to_owned()),
            ("tcp_keepalives_interval", "2".to_owned()),
            ("tcp_keepalives_count", "3".to_owned()),
            ("tcp_user_timeout", "10s".to_owned()),
        ]);
        let connections_max = options.connections_max.max(4) as usize;
        let (link, watching) = Link::start(limited.clone());
        // One is for the link.
        let pool = session::pool(Sessions { connect: limited, link: link.clone() }, connections_max - 1)?;
        Ok(Self {
            pool,
            link,
            shares: Arc::new(Shares::of(connections_max)),
            connect,
            connect_timeout: options.connect_timeout,
            work_timeout: session::work_timeout(options.statement_timeout),
            page_token_secret: Arc::default(),
            _watching: Arc::new(watching),
        })
    }

    /// Brings the schema up to date. Safe to run from several processes at once.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the database is away, [`Error::Internal`] when a migration fails.
    pub async fn migrate(&self) -> Result<(), Error> {
        // Connections of their own: a migration of a large table may take longer than a statement of a call.
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(self.connect_timeout);
        let pool = pool.connect_with(self.connect.clone()).await.map_err(error::from_sqlx)?;
        MIGRATOR.run(&pool).await.map_err(error::from_migrate)?;
        pool.close().await;
        Ok(())
    }

    /// The number of migrations that this build has and the database lacks. A database that is ahead of this build counts as up to
    /// date, so that servers can be replaced one after the other.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the database is away or takes no writes.
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

    /// False while the database is known not to answer.
    pub fn is_reachable(&self) -> bool {
        self.link.is_up()
    }

    /// Opens a connection once, so that a database that is not there is reported by its cause and not as a time-out.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn ping(&self) -> Result<(), Error> {
        self.connect_once().await?.close().await.map_err(error::from_sqlx)
    }

    async fn connect_once(&self) -> Result<PgConnection, Error> {
        let opening = timeout(self.connect_timeout, self.connect.connect());
        opening.await.map_err(|_| error::away("no connection in time"))?.map_err(error::from_sqlx)
    }

    /// Closes the connections that rest, and each other one when its work is done. Takes a second at most, whatever the database does.
    pub async fn close(&self) {
        session::close(&self.pool).await;
    }
}
