//! The logs of imports and deletions.
//!
//! The statements are planned with their actual values ([`Mode::Scan`]): a plan for any value would
//! have to suit a reader of all workspaces, and would read all of the log for one.

use sqlx::query;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, session::Mode, shares::Share};
use crate::domain::{Error, Filter, KeyId, Kind, WorkspaceId};

/// A row of the import log.
#[derive(Debug)]
pub struct ImportRow {
    /// Its id.
    pub id: Uuid,
    /// The workspace that the entries went to.
    pub workspace: WorkspaceId,
    /// The key that stored them; 0 when it is not known any more.
    pub key: KeyId,
    /// When the first batch was stored.
    pub started_at: OffsetDateTime,
    /// When it ended; `None` for an import that is running or that failed. The counts are then the
    /// last known ones.
    pub finished_at: Option<OffsetDateTime>,
    /// Newly stored.
    pub imported: i64,
    /// Already there, or repeated.
    pub skipped: i64,
    /// Rejected.
    pub failed: i64,
}

/// A row of the deletion log.
#[derive(Debug)]
pub struct DeletionRow {
    /// Its id.
    pub id: Uuid,
    /// The workspace whose entries were deleted.
    pub workspace: WorkspaceId,
    /// The key that deleted them.
    pub key: KeyId,
    /// When it began.
    pub started_at: OffsetDateTime,
    /// The number of deleted entries.
    pub deleted: i64,
    /// The entries that the call selected.
    pub selection: Selection,
}

/// The entries that a deletion selected.
#[derive(Debug)]
pub enum Selection {
    /// This many named addresses.
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
        let read = self.primary.run(Mode::Scan, workspace.map_or(Share::Service, Share::LookUp), move |connection| {
            Box::pin(async move {
                // The ids are UUIDs of version 7, so they sort by time.
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
        });
        Ok(read.await?)
    }

    /// The latest deletions, of one workspace or of all, latest first.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn list_deletions(&self, workspace: Option<WorkspaceId>, count: u32) -> Result<Vec<DeletionRow>, Error> {
        let read = self.primary.run(Mode::Scan, workspace.map_or(Share::Service, Share::LookUp), move |connection| {
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
                    selection: match row.named {
                        Some(count) => Selection::Named(count),
                        None => Selection::All(Filter {
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
        });
        Ok(read.await?)
    }
}
