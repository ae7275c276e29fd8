//! How many entries a workspace has, kept with each batch so that nobody has to count them.

use sqlx::{PgConnection, query_scalar};

use super::{Store, shares::Share};
use crate::domain::{Error, WorkspaceId};

/// Parts of a workspace's count: so many transactions can change it side by side, as a rule.
const PARTS: i32 = 16;

/// Changes a workspace's count, and returns the id of its transaction; none if there is nothing to change. Comes last in its transaction:
/// whoever holds a part's row needs nothing more but to commit.
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
    /// How many entries a workspace has.
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
