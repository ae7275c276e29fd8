//! The logs of imports and deletions, for operators: who, when, what, how many.

use sqlx::query;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, shares::Share};
use crate::domain::{Error, Filter, KeyId, Kind, WorkspaceId};

/// An import as it was logged.
#[derive(Debug)]
pub struct ImportRow {
    /// Its id.
    pub id: Uuid,
    /// Where it stored.
    pub workspace: WorkspaceId,
    /// Who imported. 0 when nobody knows any more.
    pub key: KeyId,
    /// When the first batch was stored.
    pub started_at: OffsetDateTime,
    /// When it ended; none for one that runs, or that was broken off. The counts are then those known last.
    pub finished_at: Option<OffsetDateTime>,
    /// Newly stored.
    pub imported: i64,
    /// Already there, or repeated.
    pub skipped: i64,
    /// Rejected.
    pub failed: i64,
}

/// A deletion as it was logged.
#[derive(Debug)]
pub struct DeletionRow {
    /// Its id.
    pub id: Uuid,
    /// Where it deleted.
    pub workspace: WorkspaceId,
    /// Who deleted.
    pub key: KeyId,
    /// When.
    pub started_at: OffsetDateTime,
    /// How many entries.
    pub deleted: i64,
    /// What was asked for.
    pub asked: Asked,
}

/// What a deletion was asked to delete.
#[derive(Debug)]
pub enum Asked {
    /// This many addresses by name.
    Named(i64),
    /// Everything that the filter selects.
    All(Filter),
}

impl Store {
    /// The latest imports, of one workspace or of all, latest first.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn list_imports(&self, workspace: Option<WorkspaceId>, count: u32) -> Result<Vec<ImportRow>, Error> {
        self.read(Share::Service, move |connection| {
            Box::pin(async move {
                // The ids are UUIDs of version 7: their order is that of the imports.
                Ok(query!(
                    "SELECT workspace_id, id, key_id, started_at, finished_at, imported, skipped, failed FROM imports
                     WHERE workspace_id = $1 OR $1 IS NULL ORDER BY id DESC LIMIT $2",
                    workspace.map(|id| id.0),
                    i64::from(count),
                )
                .map(|row| ImportRow {
                    id: row.id,
                    workspace: WorkspaceId(row.workspace_id),
                    key: KeyId(row.key_id),
                    started_at: row.started_at,
                    finished_at: row.finished_at,
                    imported: row.imported,
                    skipped: row.skipped,
                    failed: row.failed,
                })
                .fetch_all(connection)
                .await?)
            })
        })
        .await
    }

    /// The latest deletions, of one workspace or of all, latest first.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn list_deletions(&self, workspace: Option<WorkspaceId>, count: u32) -> Result<Vec<DeletionRow>, Error> {
        self.read(Share::Service, move |connection| {
            Box::pin(async move {
                Ok(query!(
                    "SELECT workspace_id, id, key_id, started_at, deleted, named, filter_type, filter_reason, filter_search,
                         filter_created_from, filter_created_to
                     FROM deletions WHERE workspace_id = $1 OR $1 IS NULL ORDER BY id DESC LIMIT $2",
                    workspace.map(|id| id.0),
                    i64::from(count),
                )
                .map(|row| DeletionRow {
                    id: row.id,
                    workspace: WorkspaceId(row.workspace_id),
                    key: KeyId(row.key_id),
                    started_at: row.started_at,
                    deleted: row.deleted,
                    asked: match row.named {
                        Some(count) => Asked::Named(count),
                        None => Asked::All(Filter {
                            kind: row.filter_type.as_deref().and_then(Kind::of_name),
                            reason: row.filter_reason,
                            search: row.filter_search,
                            created_from: row.filter_created_from,
                            created_to: row.filter_created_to,
                        }),
                    },
                })
                .fetch_all(connection)
                .await?)
            })
        })
        .await
    }
}
