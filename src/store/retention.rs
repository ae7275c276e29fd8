//! Deletes what is past its retention from the tables that only grow: the logs of imports and
//! deletions, expired idempotency keys, and what dry runs of servers that died have recorded.
//!
//! Every server does this. The servers need not agree on who does it: a row that another one is
//! deleting is skipped. Ids are UUIDs of version 7, so the old rows of a workspace are the first
//! ones of its part of the primary key, and nothing else is read.

use std::time::Duration;

use sqlx::{PgConnection, query, query_scalar};
use time::OffsetDateTime;
use tokio::time::sleep;
use uuid::Uuid;

use super::{Store, session::Working, shares::Share};
use crate::domain::Error;

/// The most rows that one statement deletes. It takes a few milliseconds.
const BATCH_ROWS: i64 = 1_000;

/// The most workspaces that one statement looks at.
const BATCH_WORKSPACES: i64 = 500;

/// The pause between two statements, so that deleting takes a small part of the database.
const PAUSE: Duration = Duration::from_millis(20);

/// How long an idempotency key is remembered after its import has ended, and how long a dry run may
/// take.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Clone, Copy)]
enum Table {
    Imports,
    Deletions,
    IdempotencyKeys,
    DryRuns,
}

/// The result of one statement.
struct Step {
    deleted: i64,
    /// The last workspace that was looked at; `None` when there are no more.
    last: Option<i64>,
}

impl Store {
    /// Deletes the rows of the logs that are older than `retention`, and the idempotency keys that
    /// have expired. Returns the number of deleted rows. Works in small transactions and may be
    /// dropped at any time.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]. What is deleted until then stays deleted.
    pub async fn clear_logs(&self, retention: Duration) -> Result<u64, Error> {
        let mut deleted = 0;
        for (table, age_max) in [
            // Before the imports, whose rows are the answers of idempotency keys.
            (Table::IdempotencyKeys, DAY),
            (Table::DryRuns, DAY),
            (Table::Imports, retention),
            (Table::Deletions, retention),
        ] {
            let before = OffsetDateTime::now_utc() - age_max;
            if self.is_distributed().await? {
                deleted += self.clear_by_workspace(table, before).await?;
                continue;
            }
            let mut after = i64::MIN;
            loop {
                let step = self.primary.write(Share::Service, move |connection| -> Working<'_, Step> {
                    Box::pin(async move { Ok(delete(connection, table, after, before).await?) })
                });
                let step = step.await?;
                deleted += step.deleted.cast_unsigned();
                match step.last {
                    // The same workspaces may have more.
                    _ if step.deleted == BATCH_ROWS => {}
                    Some(last) => after = last,
                    None => break,
                }
                sleep(PAUSE).await;
            }
        }
        Ok(deleted)
    }

    /// Deletes the old rows of each workspace in a statement of its own: with Citus, each may be on
    /// another server.
    async fn clear_by_workspace(&self, table: Table, before: OffsetDateTime) -> Result<u64, Error> {
        let workspaces = self.primary.read(Share::Service, |connection| {
            Box::pin(async move { Ok(query_scalar!("SELECT id FROM workspaces ORDER BY id").fetch_all(connection).await?) })
        });
        let mut deleted = 0;
        for workspace in workspaces.await? {
            let done = self.primary.write(Share::Service, move |connection| -> Working<'_, u64> {
                Box::pin(async move { Ok(delete_of(connection, table, workspace, before).await?) })
            });
            deleted += done.await?;
        }
        Ok(deleted)
    }
}

/// Deletes the old rows of one workspace.
async fn delete_of(
    connection: &mut PgConnection,
    table: Table,
    workspace: i64,
    before: OffsetDateTime,
) -> Result<u64, sqlx::Error> {
    let id_before = first_id(before);
    let deletion = match table {
        Table::Imports => query!(
            "DELETE FROM imports WHERE workspace_id = $1 AND id < $2 AND COALESCE(finished_at, started_at) < $3",
            workspace,
            id_before,
            before,
        ),
        Table::Deletions => {
            query!("DELETE FROM deletions WHERE workspace_id = $1 AND id < $2 AND started_at < $3", workspace, id_before, before)
        }
        Table::IdempotencyKeys => query!(
            "DELETE FROM import_requests
             WHERE workspace_id = $1 AND started_at < $2 AND COALESCE(finished_at, lease_until) < $2",
            workspace,
            before,
        ),
        Table::DryRuns => query!("DELETE FROM rehearsed WHERE workspace_id = $1 AND rehearsal < $2", workspace, id_before),
    };
    Ok(deletion.execute(connection).await?.rows_affected())
}

/// The first id of version 7 that can have been made at this time.
fn first_id(at: OffsetDateTime) -> Uuid {
    let secs = at.unix_timestamp().max(0).unsigned_abs();
    uuid::Builder::from_unix_timestamp_millis(1_000 * secs, &[0; 10]).into_uuid()
}

/// Deletes up to [`BATCH_ROWS`] rows of the next workspaces after `after`.
async fn delete(connection: &mut PgConnection, table: Table, after: i64, before: OffsetDateTime) -> Result<Step, sqlx::Error> {
    let id_before = first_id(before);
    Ok(match table {
        // By the end of an import: its idempotency key is remembered from then on.
        Table::Imports => {
            let row = query!(
                r#"WITH chosen AS (SELECT id FROM workspaces WHERE id > $1 ORDER BY id LIMIT $4),
                   doomed AS (
                       SELECT log.ctid FROM chosen CROSS JOIN LATERAL (
                           SELECT ctid FROM imports WHERE workspace_id = chosen.id AND imports.id < $2
                               AND COALESCE(finished_at, started_at) < $3
                           ORDER BY imports.id LIMIT $5 FOR UPDATE SKIP LOCKED
                       ) AS log LIMIT $5
                   ), gone AS (DELETE FROM imports WHERE ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1)
                   SELECT (SELECT count(*) FROM gone) AS "deleted!", (SELECT max(id) FROM chosen) AS last"#,
                after,
                id_before,
                before,
                BATCH_WORKSPACES,
                BATCH_ROWS,
            )
            .fetch_one(connection)
            .await?;
            Step { deleted: row.deleted, last: row.last }
        }
        Table::Deletions => {
            let row = query!(
                r#"WITH chosen AS (SELECT id FROM workspaces WHERE id > $1 ORDER BY id LIMIT $4),
                   doomed AS (
                       SELECT log.ctid FROM chosen CROSS JOIN LATERAL (
                           SELECT ctid FROM deletions WHERE workspace_id = chosen.id AND deletions.id < $2 AND started_at < $3
                           ORDER BY deletions.id LIMIT $5 FOR UPDATE SKIP LOCKED
                       ) AS log LIMIT $5
                   ), gone AS (DELETE FROM deletions WHERE ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1)
                   SELECT (SELECT count(*) FROM gone) AS "deleted!", (SELECT max(id) FROM chosen) AS last"#,
                after,
                id_before,
                before,
                BATCH_WORKSPACES,
                BATCH_ROWS,
            )
            .fetch_one(connection)
            .await?;
            Step { deleted: row.deleted, last: row.last }
        }
        Table::IdempotencyKeys => {
            let row = query!(
                r#"WITH chosen AS (SELECT id FROM workspaces WHERE id > $1 ORDER BY id LIMIT $3),
                   doomed AS (
                       SELECT log.ctid FROM chosen CROSS JOIN LATERAL (
                           SELECT ctid FROM import_requests WHERE workspace_id = chosen.id AND import_requests.started_at < $2
                               AND COALESCE(finished_at, lease_until) < $2
                           ORDER BY import_requests.started_at LIMIT $4 FOR UPDATE SKIP LOCKED
                       ) AS log LIMIT $4
                   ), gone AS (DELETE FROM import_requests WHERE ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1)
                   SELECT (SELECT count(*) FROM gone) AS "deleted!", (SELECT max(id) FROM chosen) AS last"#,
                after,
                before,
                BATCH_WORKSPACES,
                BATCH_ROWS,
            )
            .fetch_one(connection)
            .await?;
            Step { deleted: row.deleted, last: row.last }
        }
        Table::DryRuns => {
            let row = query!(
                r#"WITH chosen AS (SELECT id FROM workspaces WHERE id > $1 ORDER BY id LIMIT $3),
                   doomed AS (
                       SELECT log.ctid FROM chosen CROSS JOIN LATERAL (
                           SELECT ctid FROM rehearsed WHERE workspace_id = chosen.id AND rehearsal < $2
                           ORDER BY rehearsal LIMIT $4 FOR UPDATE SKIP LOCKED
                       ) AS log LIMIT $4
                   ), gone AS (DELETE FROM rehearsed WHERE ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1)
                   SELECT (SELECT count(*) FROM gone) AS "deleted!", (SELECT max(id) FROM chosen) AS last"#,
                after,
                id_before,
                BATCH_WORKSPACES,
                BATCH_ROWS,
            )
            .fetch_one(connection)
            .await?;
            Step { deleted: row.deleted, last: row.last }
        }
    })
}
