//! The number of entries of each workspace, updated with each batch so that nothing has to count
//! them.

use sqlx::{PgConnection, query_scalar};

use super::{Store, shares::Share};
use crate::domain::{Error, WorkspaceId};

/// The number of rows that a workspace's count is divided into, so that as many transactions can
/// usually change it concurrently.
const PARTS: i32 = 16;

/// Changes a workspace's count and returns the id of the transaction; `None` if there is nothing to
/// change. Must be the last statement of its transaction, so that the row is locked only until the
/// commit.
pub(super) async fn add(connection: &mut PgConnection, workspace: WorkspaceId, change: i64) -> Result<Option<String>, sqlx::Error> {
    if change == 0 {
        return Ok(None);
    }
    query_scalar!(
        r#"INSERT INTO entry_counts AS known (workspace_id, part, entries) VALUES ($1, pg_backend_pid() % $2, $3)
           ON CONFLICT (workspace_id, part) DO UPDATE SET entries = known.entries + excluded.entries
           RETURNING pg_current_xact_id()::text AS "transaction!""#,
        workspace.0,
        PARTS,
        change,
    )
    .fetch_one(connection)
    .await
    .map(Some)
}

impl Store {
    /// The number of entries of a workspace.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub(super) async fn count_all(&self, workspace: WorkspaceId) -> Result<i64, Error> {
        self.read(Share::LookUp(workspace), move |connection| {
            Box::pin(async move {
                Ok(query_scalar!(
                    r#"SELECT COALESCE(sum(entries), 0)::bigint AS "count!" FROM entry_counts WHERE workspace_id = $1"#,
                    workspace.0
                )
                .fetch_one(connection)
                .await?)
            })
        })
        .await
    }
}
