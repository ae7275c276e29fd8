//! Taking entries off the list, and the trace that it leaves.

use sqlx::{PgConnection, QueryBuilder, query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, counts, error::from_sqlx, lists::push_filter};
use crate::domain::{Error, Filter, KeyId, Kind, WorkspaceId};

/// Rows in one transaction of a large deletion: few enough that nobody waits long for one of them.
const BATCH_ENTRIES: i64 = 10_000;

/// What a deletion was asked to do, for its trace.
enum Asked<'a> {
    Named(usize),
    All(&'a Filter),
}

/// Whose deletion it is, and which.
#[derive(Clone, Copy, Debug)]
struct Ids {
    workspace: WorkspaceId,
    key: KeyId,
    deletion: Uuid,
}

impl Store {
    /// Deletes the entries for these addresses, in one transaction, and says how many there were.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]; nothing is deleted then.
    pub async fn delete_named(&self, workspace: WorkspaceId, key: KeyId, addresses: &[&str]) -> Result<i64, Error> {
        let ids = Ids { workspace, key, deletion: Uuid::now_v7() };
        let mut transaction = self.begin().await.map_err(from_sqlx)?;
        // Rows are locked in the key's order, as inserts take them: nobody can wait in a circle. Locked rows that are never updated
        // stay where they are, so their places are the cheapest way to find them again.
        let deleted = query_scalar!(
            r#"WITH doomed AS (
                   SELECT ctid FROM entries
                   WHERE workspace_id = $1 AND address = ANY (ARRAY(SELECT UNNEST($2::text[]))) ORDER BY address FOR UPDATE
               ), gone AS (
                   DELETE FROM entries WHERE workspace_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1
               )
               SELECT count(*) AS "count!" FROM gone"#,
            workspace.0,
            addresses as &[&str],
        )
        .fetch_one(&mut *transaction)
        .await
        .map_err(from_sqlx)?;
        trace(&mut transaction, ids, &Asked::Named(addresses.len()), deleted).await.map_err(from_sqlx)?;
        counts::add(&mut transaction, workspace, -deleted).await.map_err(from_sqlx)?;
        transaction.commit().await.map_err(from_sqlx)?;
        Ok(deleted)
    }

    /// Begins to delete what a filter selects. Entries that are stored from now on stay.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn begin_deletion(&self, workspace: WorkspaceId, key: KeyId, filter: Filter) -> Result<Deletion, Error> {
        let began = query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(&self.pool).await.map_err(from_sqlx)?;
        let ids = Ids { workspace, key, deletion: Uuid::now_v7() };
        Ok(Deletion { store: self.clone(), ids, filter, began, after: Some(String::new()) })
    }
}

/// A deletion by filter, which is done batch by batch.
#[derive(Debug)]
pub struct Deletion {
    store: Store,
    ids: Ids,
    filter: Filter,
    began: OffsetDateTime,
    /// The last address that was looked at; none when all were.
    after: Option<String>,
}

impl Deletion {
    /// Deletes the next batch, and says how many entries it had; none when there is nothing left.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]; the batches before are gone all the same.
    pub async fn next_batch(&mut self) -> Result<Option<i64>, Error> {
        let Some(after) = self.after.take() else { return Ok(None) };
        let _slot = self.store.scan_slots.acquire().await.map_err(Error::internal)?;
        let (deleted, last) = self.delete_after(&after).await.map_err(from_sqlx)?;
        self.after = last;
        Ok(Some(deleted))
    }

    async fn delete_after(&self, after: &str) -> Result<(i64, Option<String>), sqlx::Error> {
        let workspace = self.ids.workspace;
        let mut query = QueryBuilder::new("WITH doomed AS (SELECT ctid, address FROM entries");
        push_filter(&mut query, workspace, &self.filter);
        query.push(" AND created_at < ").push_bind(self.began).push(" AND address > ").push_bind(after);
        query.push(" ORDER BY address LIMIT ").push_bind(BATCH_ENTRIES);
        query.push(" FOR UPDATE), gone AS (DELETE FROM entries WHERE workspace_id = ").push_bind(workspace.0);
        query.push(" AND ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1) SELECT (SELECT count(*) FROM gone), (SELECT max(address) FROM doomed)");
        let mut transaction = self.store.begin().await?;
        let (deleted, last): (i64, Option<String>) = query.build_query_as().fetch_one(&mut *transaction).await?;
        // A deletion that finds nothing leaves its trace, too; the empty batch at the end of another adds nothing to it.
        if deleted > 0 || after.is_empty() {
            trace(&mut transaction, self.ids, &Asked::All(&self.filter), deleted).await?;
            counts::add(&mut transaction, workspace, -deleted).await?;
        }
        transaction.commit().await?;
        Ok((deleted, last))
    }
}

async fn trace(connection: &mut PgConnection, ids: Ids, asked: &Asked<'_>, deleted: i64) -> Result<(), sqlx::Error> {
    let nothing = Filter::default();
    let (mode, named, filter) = match asked {
        Asked::Named(count) => ("emails", Some(*count as i64), &nothing),
        Asked::All(filter) => ("all", None, *filter),
    };
    let kind = filter.kind.map(|kind| match kind {
        Kind::Email => "email",
        Kind::Domain => "domain",
    });
    query!(
        "INSERT INTO deletions (workspace_id, id, key_id, deleted, mode, named,
             filter_type, filter_reason, filter_search, filter_created_from, filter_created_to)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
         ON CONFLICT (workspace_id, id) DO UPDATE SET deleted = deletions.deleted + excluded.deleted",
        ids.workspace.0,
        ids.deletion,
        ids.key.0,
        deleted,
        mode,
        named,
        kind,
        filter.reason,
        filter.search,
        filter.created_from,
        filter.created_to,
    )
    .execute(connection)
    .await?;
    Ok(())
}
