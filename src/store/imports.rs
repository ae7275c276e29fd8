//! The import log and the idempotency keys. The log has one row for each import, which is written
//! with its first batch and completed at its end. A repeat of an import under the same idempotency
//! key is answered from that row.

use std::{sync::Arc, time::Duration};

use sqlx::{PgConnection, query};
use uuid::Uuid;

use super::{
    Store,
    session::{Retry, Stop, Working},
    shares::Share,
};
use crate::domain::{Error, Fingerprint, KeyId, Tally, WorkspaceId};

/// The id of one run of an import in the log.
#[derive(Clone, Copy, Debug)]
pub struct ImportId(Uuid);

impl ImportId {
    /// Creates an id. Ids sort by time of creation.
    #[expect(clippy::new_without_default, reason = "each one is different")]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

/// The ids of an import, of its workspace and of its key.
#[derive(Clone, Copy, Debug)]
pub struct ImportIds {
    /// The workspace that the entries go to.
    pub workspace: WorkspaceId,
    /// The key that stores them.
    pub key: KeyId,
    /// The import.
    pub import: ImportId,
}

/// What is written into the log with the first batch of an import.
#[derive(Clone, Debug)]
pub struct FirstBatch {
    /// The number of entries in the batch, duplicates included.
    pub received: u64,
    /// The number of entries rejected before the batch was full.
    pub failed: u64,
    /// Set when the batch is the whole import.
    pub end: Option<End>,
}

/// The end of an import that succeeded.
#[derive(Clone, Debug)]
pub struct End {
    /// The idempotency key whose repeats are answered with this import's outcome.
    pub answers: Option<Answered>,
}

/// The idempotency key of an import that succeeds, and the part of its answer that the import log
/// does not contain.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The idempotency key.
    pub idempotency_key: String,
    /// The causes of rejected entries, encoded as in the answer.
    pub errors: Vec<u8>,
}

/// The counts of an import's row.
struct Counts {
    imported: u64,
    skipped: u64,
    failed: u64,
}

/// Writes the row of an import with its first batch.
pub(super) async fn begin(connection: &mut PgConnection, ids: ImportIds, first: &FirstBatch, imported: u64) -> Result<(), Stop> {
    let counts = Counts { imported, skipped: first.received.saturating_sub(imported), failed: first.failed };
    write(connection, ids, &counts, first.end.as_ref()).await
}

/// Writes the counts of an import. `end` is `None` for an import that is not finished.
async fn write(connection: &mut PgConnection, ids: ImportIds, counts: &Counts, end: Option<&End>) -> Result<(), Stop> {
    query!(
        "INSERT INTO imports (workspace_id, id, key_id, finished_at, imported, skipped, failed)
         VALUES ($1, $2, $3, CASE WHEN $4 THEN now() END, $5, $6, $7)
         ON CONFLICT (workspace_id, id) DO UPDATE SET
             finished_at = excluded.finished_at, imported = excluded.imported, skipped = excluded.skipped, failed = excluded.failed
         WHERE imports.finished_at IS NULL",
        ids.workspace.0,
        ids.import.0,
        ids.key.0,
        end.is_some(),
        counts.imported.cast_signed(),
        counts.skipped.cast_signed(),
        counts.failed.cast_signed(),
    )
    .execute(&mut *connection)
    .await?;
    match end {
        Some(end) => answer(connection, ids, end).await,
        None => Ok(()),
    }
}

/// Marks the idempotency key of an import that succeeds as answered.
async fn answer(connection: &mut PgConnection, ids: ImportIds, end: &End) -> Result<(), Stop> {
    let Some(answered) = &end.answers else { return Ok(()) };
    let finished = query!(
        "UPDATE import_requests SET finished_at = now(), errors = $4
         WHERE workspace_id = $1 AND request_id = $2 AND import_id = $3",
        ids.workspace.0,
        answered.idempotency_key,
        ids.import.0,
        answered.errors,
    )
    .execute(connection)
    .await?;
    if finished.rows_affected() == 0 {
        return Err(Stop::Refused(Error::Unavailable {
            message: "Another call with the same idempotency key has taken over this import. Send it again to get its answer.",
            source: None,
        }));
    }
    Ok(())
}

/// The state of an idempotency key. The fingerprint is that of the import that holds the key;
/// `None` if it was not stored.
#[derive(Debug)]
pub enum Claim {
    /// The key is free: the caller runs the import, and renews the lease until it ends.
    Mine,
    /// Another call is running the import.
    Busy(Option<Fingerprint>),
    /// The import has ended, with this outcome.
    Done(Replay, Option<Fingerprint>),
}

/// The outcome of an earlier import.
#[derive(Debug)]
pub struct Replay {
    /// Newly stored.
    pub imported: u64,
    /// Already there, or repeated.
    pub skipped: u64,
    /// Refused.
    pub failed: u64,
    /// The causes of rejected entries, as in [`Answered`].
    pub errors: Option<Vec<u8>>,
}

impl Store {
    /// How long a claim is valid without being renewed.
    pub const LEASE: Duration = Duration::from_secs(15);

    /// Claims an idempotency key for an import, unless another import holds it. A key expires 24
    /// hours after its import succeeded. The key of an import that died is free again when its
    /// lease has run out.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`], as everywhere below.
    pub async fn claim_request(
        &self,
        workspace: WorkspaceId,
        import: ImportId,
        idempotency_key: &str,
        fingerprint: &Fingerprint,
    ) -> Result<Claim, Error> {
        let request: Arc<(String, Vec<u8>)> = Arc::new((idempotency_key.to_owned(), fingerprint.to_bytes()));
        let claim = self.primary.write_again(Share::LookUp(workspace), Retry::begin().idempotent(), || {
            let request = request.clone();
            move |connection: &mut PgConnection| -> Working<'_, Claim> {
                Box::pin(async move { claim(connection, workspace, import, &request.0, &request.1).await })
            }
        });
        Ok(claim.await?)
    }

    /// Makes a claim valid for another [`Store::LEASE`].
    ///
    /// # Errors
    /// As [`Store::claim_request`].
    pub async fn renew_claim(&self, workspace: WorkspaceId, import: ImportId, idempotency_key: &str) -> Result<(), Error> {
        let idempotency_key = idempotency_key.to_owned();
        let renewed = self.primary.write(Share::Service, move |connection| {
            Box::pin(async move {
                query!(
                    "UPDATE import_requests SET lease_until = now() + make_interval(secs => $4)
                     WHERE workspace_id = $1 AND request_id = $2 AND import_id = $3",
                    workspace.0,
                    idempotency_key,
                    import.0,
                    Self::LEASE.as_secs_f64(),
                )
                .execute(connection)
                .await?;
                Ok(())
            })
        });
        Ok(renewed.await?)
    }

    /// Releases a claim after an import that failed, so that the next attempt need not wait for the
    /// end of the lease. An import that succeeded keeps its claim, even when the reply to its
    /// COMMIT was lost: the statement deletes no key whose row is finished, and waits for a
    /// transaction that is finishing it.
    ///
    /// # Errors
    /// As [`Store::claim_request`].
    pub async fn release_claim(&self, workspace: WorkspaceId, import: ImportId, idempotency_key: &str) -> Result<(), Error> {
        let idempotency_key = idempotency_key.to_owned();
        let released = self.primary.write(Share::LookUp(workspace), move |connection| {
            Box::pin(async move {
                query!(
                    "DELETE FROM import_requests
                     WHERE workspace_id = $1 AND request_id = $2 AND import_id = $3 AND finished_at IS NULL",
                    workspace.0,
                    idempotency_key,
                    import.0,
                )
                .execute(connection)
                .await?;
                Ok(())
            })
        });
        Ok(released.await?)
    }

    /// Completes the row of an import of several batches, or of none, after all of them are stored.
    /// `end` is `None` for an import that failed; its row then has no end time.
    ///
    /// # Errors
    /// As [`Store::insert_batch`]. The entries stay stored.
    pub async fn end_import(&self, ids: ImportIds, tally: &Tally, end: Option<End>) -> Result<(), Error> {
        // The caller of a failed import is waiting for its error, and must not wait long.
        let retry = if end.is_some() { Retry::begin().idempotent() } else { Retry::never() };
        let counts = Arc::new((Counts { imported: tally.imported, skipped: tally.skipped, failed: tally.failed }, end));
        let ended = self.primary.write_again(Share::Import(ids.workspace), retry, || {
            let counts = counts.clone();
            move |connection: &mut PgConnection| -> Working<'_, ()> {
                Box::pin(async move { write(connection, ids, &counts.0, counts.1.as_ref()).await })
            }
        });
        Ok(ended.await?)
    }
}

async fn claim(
    connection: &mut PgConnection,
    workspace: WorkspaceId,
    import: ImportId,
    idempotency_key: &str,
    fingerprint: &[u8],
) -> Result<Claim, Stop> {
    // The time comes with the new row: Citus accepts no function in ON CONFLICT whose result
    // depends on the moment or on settings.
    let claimed = query!(
        "INSERT INTO import_requests AS known (workspace_id, request_id, import_id, started_at, lease_until, fingerprint)
         VALUES ($1, $2, $3, now(), now() + make_interval(secs => $4), $5)
         ON CONFLICT (workspace_id, request_id) DO UPDATE SET
             import_id = excluded.import_id, started_at = excluded.started_at, lease_until = excluded.lease_until,
             finished_at = NULL, errors = NULL, fingerprint = excluded.fingerprint
         WHERE CASE WHEN known.finished_at IS NULL
                    THEN known.lease_until < excluded.started_at OR known.import_id = excluded.import_id
                    ELSE excluded.started_at - known.finished_at > interval '24 hours' END",
        workspace.0,
        idempotency_key,
        import.0,
        Store::LEASE.as_secs_f64(),
        fingerprint,
    )
    .execute(&mut *connection)
    .await?;
    if claimed.rows_affected() == 1 {
        query!(
            "DELETE FROM import_requests WHERE workspace_id = $1 AND started_at < now() - interval '24 hours'
                AND COALESCE(finished_at, lease_until) < now() - interval '24 hours'",
            workspace.0
        )
        .execute(connection)
        .await?;
        return Ok(Claim::Mine);
    }
    let known = query!(
        r#"SELECT fingerprint, errors, imports.imported AS "imported?", imports.skipped AS "skipped?", imports.failed AS "failed?"
           FROM import_requests
           LEFT JOIN imports ON imports.workspace_id = $1 AND imports.id = import_id AND import_requests.finished_at IS NOT NULL
           WHERE import_requests.workspace_id = $1 AND request_id = $2"#,
        workspace.0,
        idempotency_key,
    )
    .fetch_optional(connection)
    .await?;
    // Released a moment ago: the next attempt claims it.
    let Some(known) = known else { return Ok(Claim::Busy(None)) };
    let fingerprint = known.fingerprint.as_deref().and_then(Fingerprint::from_bytes);
    Ok(match (known.imported, known.skipped, known.failed) {
        (Some(imported), Some(skipped), Some(failed)) => {
            let (imported, skipped, failed) = (imported.cast_unsigned(), skipped.cast_unsigned(), failed.cast_unsigned());
            Claim::Done(Replay { imported, skipped, failed, errors: known.errors }, fingerprint)
        }
        _ => Claim::Busy(fingerprint),
    })
}
