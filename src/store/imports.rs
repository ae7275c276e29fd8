//! The import log: one row an import, which the first batch makes and the end completes. And the request ids, by which a repeat of an import is
//! answered from that log.

use std::time::Duration;

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

/// Whose import it is, and which.
#[derive(Clone, Copy, Debug)]
pub struct ImportIds {
    /// The workspace that the entries go to.
    pub workspace: WorkspaceId,
    /// The key that stores them.
    pub key: KeyId,
    /// The import.
    pub import: ImportId,
}

/// What one batch adds to its import's counts.
#[derive(Clone, Debug)]
pub struct BatchCounts {
    /// The batch's number in its import, from 0.
    pub batch: u64,
    /// Entries in the batch, repeats included.
    pub received: u64,
    /// Entries refused since the batch before.
    pub failed: u64,
    /// With a batch that is the whole import.
    pub end: Option<End>,
}

impl BatchCounts {
    /// True for a batch that is logged even when nothing of it is new. A later one of which nothing is new writes nothing at all, so that its
    /// transaction need not wait for the disk; what it counts is logged with the end of the import.
    pub fn must_be_logged(&self) -> bool {
        self.batch == 0
    }
}

/// The end of an import that succeeded.
#[derive(Clone, Debug)]
pub struct End {
    /// The request id that this import answers from now on.
    pub answers: Option<Answered>,
}

/// A request id whose import succeeds, and the part of the answer that the import log does not have.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The caller's name for the import.
    pub request_id: String,
    /// The causes of refused entries, encoded as the caller gets them.
    pub errors: Vec<u8>,
}

/// Writes a batch into the log. The first makes its import's row; a later one makes a row of its own, which waits for nobody and is added to
/// the import's by [`Store::end_import`].
pub(super) async fn add(connection: &mut PgConnection, ids: ImportIds, counts: &BatchCounts, imported: u64) -> Result<(), Error> {
    let skipped = counts.received.saturating_sub(imported);
    if counts.batch > 0 {
        query!(
            "INSERT INTO import_batches (workspace_id, import_id, batch, imported, skipped, failed) VALUES ($1, $2, $3, $4, $5, $6)",
            ids.workspace.0,
            ids.import.0,
            counts.batch.cast_signed(),
            imported.cast_signed(),
            skipped.cast_signed(),
            counts.failed.cast_signed(),
        )
        .execute(&mut *connection)
        .await
        .map_err(from_sqlx)?;
        return Ok(());
    }
    query!(
        "INSERT INTO imports (workspace_id, id, key_id, finished_at, imported, skipped, failed)
         VALUES ($1, $2, $3, CASE WHEN $4 THEN now() END, $5, $6, $7)",
        ids.workspace.0,
        ids.import.0,
        ids.key.0,
        counts.end.is_some(),
        imported.cast_signed(),
        skipped.cast_signed(),
        counts.failed.cast_signed(),
    )
    .execute(&mut *connection)
    .await
    .map_err(from_sqlx)?;
    match &counts.end {
        Some(end) => answer(connection, ids, end).await,
        None => Ok(()),
    }
}

/// Marks the request id of an import that succeeds.
async fn answer(connection: &mut PgConnection, ids: ImportIds, end: &End) -> Result<(), Error> {
    let Some(answered) = &end.answers else { return Ok(()) };
    let finished = query!(
        "UPDATE import_requests SET finished_at = now(), errors = $4
         WHERE workspace_id = $1 AND request_id = $2 AND import_id = $3",
        ids.workspace.0,
        answered.request_id,
        ids.import.0,
        answered.errors,
    )
    .execute(connection)
    .await
    .map_err(from_sqlx)?;
    if finished.rows_affected() == 0 {
        return Err(Error::Unavailable {
            message: "Another call with the same request id has taken this import over. Send it again to get its answer.",
            source: None,
        });
    }
    Ok(())
}

/// What is known of a request id.
#[derive(Debug)]
pub enum Claim {
    /// Nobody has used it: the caller runs the import, and renews the lease meanwhile.
    Mine,
    /// Another call runs it now.
    Busy,
    /// It was run, with this outcome.
    Done(Replay),
}

/// The outcome of an import that was run before.
#[derive(Debug)]
pub struct Replay {
    /// Newly stored.
    pub imported: u64,
    /// Already there, or repeated.
    pub skipped: u64,
    /// Refused.
    pub failed: u64,
    /// The causes of refused entries, as [`Answered`] had them.
    pub errors: Option<Vec<u8>>,
}

impl Store {
    /// How long a claim stands without being renewed.
    pub const LEASE: Duration = Duration::from_secs(15);

    /// Claims a request id for an import, unless another one has it. A request id is forgotten 24 hours after its import succeeded; one
    /// whose import died is free again when the lease is over.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`], as everywhere below.
    pub async fn claim_request(&self, workspace: WorkspaceId, import: ImportId, request_id: &str) -> Result<Claim, Error> {
        let claimed = query!(
            "INSERT INTO import_requests AS known (workspace_id, request_id, import_id, lease_until)
             VALUES ($1, $2, $3, now() + make_interval(secs => $4))
             ON CONFLICT (workspace_id, request_id) DO UPDATE SET
                 import_id = excluded.import_id, started_at = now(), lease_until = excluded.lease_until, finished_at = NULL, errors = NULL
             WHERE CASE WHEN known.finished_at IS NULL THEN known.lease_until < now()
                        ELSE known.finished_at < now() - interval '24 hours' END",
            workspace.0,
            request_id,
            import.0,
            Self::LEASE.as_secs_f64(),
        )
        .execute(&self.pool)
        .await
        .map_err(from_sqlx)?;
        if claimed.rows_affected() == 1 {
            let forgotten = query!(
                "DELETE FROM import_requests WHERE workspace_id = $1 AND started_at < now() - interval '24 hours'
                    AND COALESCE(finished_at, lease_until) < now() - interval '24 hours'",
                workspace.0
            );
            if let Err(error) = forgotten.execute(&self.pool).await {
                // The claim stands; the next one cleans up.
                tracing::warn!(cause = %error, "old request ids could not be forgotten");
            }
            return Ok(Claim::Mine);
        }
        let replay = query!(
            "SELECT imported, skipped, failed, errors FROM import_requests
             JOIN imports ON imports.workspace_id = $1 AND imports.id = import_requests.import_id
             WHERE import_requests.workspace_id = $1 AND request_id = $2 AND import_requests.finished_at IS NOT NULL",
            workspace.0,
            request_id,
        )
        .fetch_optional(&self.pool)
        .await
        .map_err(from_sqlx)?;
        Ok(replay.map_or(Claim::Busy, |row| {
            Claim::Done(Replay {
                imported: row.imported.cast_unsigned(),
                skipped: row.skipped.cast_unsigned(),
                failed: row.failed.cast_unsigned(),
                errors: row.errors,
            })
        }))
    }

    /// Makes a claim stand for another [`Store::LEASE`].
    ///
    /// # Errors
    /// As [`Store::claim_request`].
    pub async fn renew_claim(&self, workspace: WorkspaceId, import: ImportId, request_id: &str) -> Result<(), Error> {
        query!(
            "UPDATE import_requests SET lease_until = now() + make_interval(secs => $4)
             WHERE workspace_id = $1 AND request_id = $2 AND import_id = $3",
            workspace.0,
            request_id,
            import.0,
            Self::LEASE.as_secs_f64(),
        )
        .execute(&self.pool)
        .await
        .map_err(from_sqlx)?;
        Ok(())
    }

    /// Gives a claim back after an import that failed, so that the next try need not wait for the lease to end. One that
    /// succeeded keeps its claim, also when the answer to its commit was lost: the row itself says so, and is waited for.
    ///
    /// # Errors
    /// As [`Store::claim_request`].
    pub async fn release_claim(&self, workspace: WorkspaceId, import: ImportId, request_id: &str) -> Result<(), Error> {
        query!(
            "DELETE FROM import_requests WHERE workspace_id = $1 AND request_id = $2 AND import_id = $3 AND finished_at IS NULL",
            workspace.0,
            request_id,
            import.0,
        )
        .execute(&self.pool)
        .await
        .map_err(from_sqlx)?;
        Ok(())
    }

    /// Writes the end of an import of several batches, or of none, after all that are stored: adds its later batches to its row, and the `skipped` and
    /// `failed` entries that no batch has logged. `end` is none for an import that broke; its row has no time of an end then.
    ///
    /// # Errors
    /// As [`Store::insert_batch`]. The entries stay all the same.
    pub async fn end_import(&self, ids: ImportIds, skipped: u64, failed: u64, end: Option<&End>) -> Result<(), Error> {
        let mut transaction = self.begin().await.map_err(from_sqlx)?;
        query!(
            "WITH later AS (
                 DELETE FROM import_batches WHERE workspace_id = $1 AND import_id = $2 RETURNING imported, skipped, failed
             )
             INSERT INTO imports (workspace_id, id, key_id, finished_at, imported, skipped, failed)
             SELECT $1, $2, $3, CASE WHEN $4 THEN now() END,
                 COALESCE(sum(imported), 0), COALESCE(sum(skipped), 0) + $5::bigint, COALESCE(sum(failed), 0) + $6::bigint FROM later
             ON CONFLICT (workspace_id, id) DO UPDATE SET
                 finished_at = COALESCE(excluded.finished_at, imports.finished_at),
                 imported = imports.imported + excluded.imported,
                 skipped = imports.skipped + excluded.skipped,
                 failed = imports.failed + excluded.failed",
            ids.workspace.0,
            ids.import.0,
            ids.key.0,
            end.is_some(),
            skipped.cast_signed(),
            failed.cast_signed(),
        )
        .execute(&mut *transaction)
        .await
        .map_err(from_sqlx)?;
        if let Some(end) = end {
            answer(&mut transaction, ids, end).await?;
        }
        transaction.commit().await.map_err(from_sqlx)
    }
}
