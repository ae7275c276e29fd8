//! Tables that Citus distributes over several servers, by workspace.
//!
//! The tables of tenants stay on the coordinator. No statement of a call joins tables of the two
//! kinds, and each statement on a distributed table names one workspace.

use sqlx::{Connection, query_scalar};

use super::{Store, error, shares::Share};
use crate::domain::Error;

/// The tables that are distributed. The others are small.
const DISTRIBUTED: [&str; 7] = ["entries", "entry_counts", "reason_counts", "imports", "import_requests", "deletions", "rehearsed"];

/// The parts of each table. A part is on one server, and servers that are added later take some of
/// them.
const SHARDS: i32 = 128;

impl Store {
    /// True when Citus may distribute the tables over several servers.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub(super) async fn is_distributed(&self) -> Result<bool, Error> {
        let is_distributed = self.is_distributed.get_or_try_init(|| {
            self.primary.read(Share::Service, |connection| {
                Box::pin(async move {
                    let found = query_scalar!(r#"SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') AS "found!""#);
                    Ok(found.fetch_one(connection).await?)
                })
            })
        });
        is_distributed.await.copied()
    }

    /// Distributes the tables that are not distributed yet, and returns their names. Moves the rows
    /// that they have, however long that takes. May be repeated, also after an error.
    ///
    /// # Errors
    /// [`Error::Invalid`] when Citus is not installed in the database, [`Error::Unavailable`] when
    /// it cannot be reached; [`Error::Internal`] when Citus reports an error.
    pub async fn distribute(&self) -> Result<Vec<&'static str>, Error> {
        if !self.is_distributed().await? {
            return Err(Error::invalid(
                "distribute",
                "Citus is not installed in this database. Run CREATE EXTENSION citus there, and add its workers.",
            ));
        }
        // A connection without a time limit for statements.
        let mut connection = self.connect_once(&self.direct).await?;
        let mut distributed = Vec::new();
        for table in DISTRIBUTED {
            let known = "SELECT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = $1::regclass)";
            if sqlx::query_scalar(known).bind(table).fetch_one(&mut connection).await.map_err(error::from_sqlx)? {
                continue;
            }
            let distribute = if table == DISTRIBUTED[0] {
                sqlx::query("SELECT create_distributed_table($1::regclass, 'workspace_id', shard_count => $2)")
                    .bind(table)
                    .bind(SHARDS)
            } else {
                sqlx::query("SELECT create_distributed_table($1::regclass, 'workspace_id', colocate_with => $2)")
                    .bind(table)
                    .bind(DISTRIBUTED[0])
            };
            distribute.execute(&mut connection).await.map_err(error::from_sqlx)?;
            distributed.push(table);
        }
        connection.close().await.map_err(error::from_sqlx)?;
        Ok(distributed)
    }
}
