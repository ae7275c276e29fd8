//! The import log: one row an import, written with each of its batches.

use sqlx::{PgConnection, query};
use uuid::Uuid;

use super::{Store, error::from_sqlx};
use crate::domain::{Error, KeyId, WorkspaceId};

/// Names one run of an import in the log.
#[derive(Clone, Copy, Debug)]
pub struct ImportId(Uuid);

impl ImportId {
    /// A new id; those made later sort later.
    #[expect(clippy::new_without_default, reason = "each one is different")]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

/// What one batch adds to its import's row.
#[derive(Clone, Copy, Debug, Default)]
pub struct BatchCounts {
    /// Entries in the batch, repeats included.
    pub received: u64,
    /// Entries refused since the batch before.
    pub failed: u64,
    /// True for the last batch of an import.
    pub finishes: bool,
}

/// Adds a batch to its import's row. Comes after the entries in their transaction: whoever holds the row needs nothing
/// more but to commit, so batches of one import can wait for each other here without a dead-lock.
pub(super) async fn add(
    connection: &mut PgConnection,
    (workspace, key, import): (WorkspaceId, KeyId, ImportId),
    counts: BatchCounts,
    imported: u64,
) -> Result<(), sqlx::Error> {
    query!(
        "INSERT INTO imports (workspace_id, id, key_id, finished_at, imported, skipped, failed)
         VALUES ($1, $2, $3, CASE WHEN $4 THEN now() END, $5, $6, $7)
         ON CONFLICT (workspace_id, id) DO UPDATE SET
             finished_at = excluded.finished_at,
             imported = imports.imported + excluded.imported,
             skipped = imports.skipped + excluded.skipped,
             failed = imports.failed + excluded.failed",
        workspace.0,
        import.0,
        key.0,
        counts.finishes,
        imported.cast_signed(),
        counts.received.saturating_sub(imported).cast_signed(),
        counts.failed.cast_signed(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

impl Store {
    /// Writes the end of an import whose last batch has no entries to store.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`] as every statement.
    pub async fn finish_import(&self, ids: (WorkspaceId, KeyId, ImportId), failed: u64) -> Result<(), Error> {
        let mut connection = self.pool.acquire().await.map_err(from_sqlx)?;
        let counts = BatchCounts { received: 0, failed, finishes: true };
        add(&mut connection, ids, counts, 0).await.map_err(from_sqlx)
    }
}
