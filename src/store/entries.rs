//! The hot table, and the one way in which domain entries become rows.

use sqlx::{pool::PoolConnection, postgres::Postgres, query, query_scalar};
use tokio::sync::OwnedSemaphorePermit;

use super::{BatchCounts, ImportIds, Store, counts, error::from_sqlx, imports};
use crate::domain::{Error, Sorted, WorkspaceId};

impl Store {
    /// Stores one batch in one transaction, together with its line in the import log ([`BatchCounts::must_be_logged`] says when it has none), and says
    /// how many entries were new. When it returns, they are durable. Rows that exist stay as they are. Waits while too many other imports are at the database.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]: nothing of the batch is stored, or (if only the answer was lost) all of it.
    /// [`Error::Unavailable`] also when the request id that it answers belongs to another import by now; nothing of the batch is stored then.
    pub async fn insert_batch(&self, ids: ImportIds, entries: &Sorted, counts: &BatchCounts) -> Result<u64, Error> {
        let _slot = self.import_slots.acquire().await.map_err(Error::internal)?;
        insert_batch(self, ids, &entries.addresses(), &entries.reasons(), counts).await
    }

    /// Says how many of a batch's entries would be new, and stores nothing. For an import that is a single batch.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn count_new(&self, workspace: WorkspaceId, entries: &Sorted) -> Result<u64, Error> {
        let addresses = entries.addresses();
        let present = query_scalar!(
            r#"SELECT count(*) AS "count!" FROM UNNEST($2::text[]) AS new (address)
               JOIN entries ON entries.workspace_id = $1 AND entries.address = new.address COLLATE "C""#,
            workspace.0,
            &addresses as &[&str],
        )
        .fetch_one(&self.pool)
        .await
        .map_err(from_sqlx)?;
        Ok(addresses.len() as u64 - present.cast_unsigned())
    }

    /// Begins to rehearse an import of several batches. Waits while too many others do.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn rehearse(&self) -> Result<Rehearsal, Error> {
        let slot = self.rehearsal_slots.clone().acquire_owned().await.map_err(Error::internal)?;
        let mut connection = self.pool.acquire().await.map_err(from_sqlx)?;
        // The table goes when its session ends, so the session must not go back to the pool.
        connection.close_on_drop();
        sqlx::raw_sql(r#"CREATE TEMPORARY TABLE rehearsed (address text COLLATE "C" PRIMARY KEY)"#)
            .execute(&mut *connection)
            .await
            .map_err(from_sqlx)?;
        Ok(Rehearsal { connection, _slot: slot })
    }
}

/// A long import that stores nothing: remembers in a temporary table which addresses it has seen, so that repeats far apart are
/// counted as they would be, in constant memory of this process. Holds no transaction open.
pub struct Rehearsal {
    connection: PoolConnection<Postgres>,
    _slot: OwnedSemaphorePermit,
}

impl Rehearsal {
    /// Says how many of the next batch's entries would be new.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn count_new(&mut self, workspace: WorkspaceId, entries: &Sorted) -> Result<u64, Error> {
        let addresses = entries.addresses();
        // Not a checked query: the table exists in this session alone.
        let count: i64 = sqlx::query_scalar(
            "WITH unseen AS (
                 INSERT INTO rehearsed SELECT * FROM UNNEST($2::text[]) ON CONFLICT DO NOTHING RETURNING address
             )
             SELECT count(*) FROM unseen
             WHERE NOT EXISTS (SELECT FROM entries WHERE workspace_id = $1 AND entries.address = unseen.address)",
        )
        .bind(workspace.0)
        .bind(&addresses)
        .fetch_one(&mut *self.connection)
        .await
        .map_err(from_sqlx)?;
        Ok(count.cast_unsigned())
    }
}

async fn insert_batch(
    store: &Store,
    ids: ImportIds,
    addresses: &[&str],
    reasons: &[&str],
    batch: &BatchCounts,
) -> Result<u64, Error> {
    let mut transaction = store.begin().await.map_err(from_sqlx)?;
    // The order of the arrays is the order of the inserts; see Batch::into_sorted for what hangs on it.
    let imported = query!(
        "INSERT INTO entries (workspace_id, added_by, address, reason)
         SELECT $1, $2, address, reason FROM UNNEST($3::text[], $4::text[]) AS new (address, reason)
         ON CONFLICT DO NOTHING",
        ids.workspace.0,
        ids.key.0,
        addresses as &[&str],
        reasons as &[&str],
    )
    .execute(&mut *transaction)
    .await
    .map_err(from_sqlx)?
    .rows_affected();
    if imported > 0 || batch.must_be_logged() {
        imports::add(&mut transaction, ids, batch, imported).await?;
    }
    counts::add(&mut transaction, ids.workspace, imported.cast_signed()).await.map_err(from_sqlx)?;
    transaction.commit().await.map_err(from_sqlx)?;
    Ok(imported)
}
