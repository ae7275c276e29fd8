//! Taking entries off the list, and the trace that it leaves.

use std::sync::Arc;

use sqlx::{PgConnection, QueryBuilder, query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    Store, counts,
    lists::push_filter,
    session::{Retry, Stop, Working},
    shares::Share,
};
use crate::domain::{Address, Error, Filter, KeyId, Kind, WorkspaceId};

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
    /// Deletes the entries for these addresses, in one transaction, and says how many there were. `addresses` must be sorted, each one once.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]: nothing is deleted, or (if only the answer was lost) all of it.
    pub async fn delete_named(&self, workspace: WorkspaceId, key: KeyId, addresses: Vec<Address>) -> Result<i64, Error> {
        let ids = Ids { workspace, key, deletion: Uuid::now_v7() };
        let addresses = Arc::new(addresses);
        let deleted = self.write_again(Share::LookUp(workspace), Retry::begin(), || {
            let addresses = addresses.clone();
            move |connection: &mut PgConnection| -> Working<'_, i64> {
                Box::pin(async move { delete_named(connection, ids, &addresses).await })
            }
        });
        Ok(deleted.await?)
    }

    /// Begins to delete what a filter selects. Entries that are stored from now on stay.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn begin_deletion(&self, workspace: WorkspaceId, key: KeyId, filter: Filter) -> Result<Deletion, Error> {
        let began = self.read(Share::LookUp(workspace), |connection| {
            Box::pin(async move { Ok(query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(connection).await?) })
        });
        let began = began.await?;
        let ids = Ids { workspace, key, deletion: Uuid::now_v7() };
        Ok(Deletion { store: self.clone(), ids, filter: Arc::new(filter), began, after: Some(String::new()) })
    }
}

async fn delete_named(connection: &mut PgConnection, ids: Ids, addresses: &[Address]) -> Result<i64, Stop> {
    let named: Vec<&str> = addresses.iter().map(Address::as_str).collect();
    // Rows are locked in the order of `named`, which is the key's, as inserts take them: nobody can wait in a circle. Locked rows that are never
    // updated stay where they are, so their places are the cheapest way to find them again. The planner must not take the key for it, which
    // would look at the whole workspace: so `+ 0`.
    let deleted = query_scalar!(
        r#"WITH doomed AS (
               SELECT entry.ctid FROM UNNEST($2::text[]) AS wanted (address)
               CROSS JOIN LATERAL (
                   SELECT ctid FROM entries WHERE workspace_id = $1 AND entries.address = wanted.address LIMIT 1 FOR UPDATE
               ) AS entry
           ), gone AS (
               DELETE FROM entries WHERE workspace_id + 0 = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1
           )
           SELECT count(*) AS "count!" FROM gone"#,
        ids.workspace.0,
        &named as &[&str],
    )
    .fetch_one(&mut *connection)
    .await?;
    trace(connection, ids, &Asked::Named(named.len()), deleted).await?;
    counts::add(connection, ids.workspace, -deleted).await?;
    Ok(deleted)
}

/// A deletion by filter, which is done batch by batch.
#[derive(Debug)]
pub struct Deletion {
    store: Store,
    ids: Ids,
    filter: Arc<Filter>,
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
        let after: Arc<str> = after.into();
        let (ids, began) = (self.ids, self.began);
        let deleted = self.store.write_again(Share::Scan(ids.workspace), Retry::begin(), || {
            let (filter, after) = (self.filter.clone(), after.clone());
            move |connection: &mut PgConnection| -> Working<'_, (i64, Option<String>)> {
                Box::pin(async move { delete_after(connection, ids, &filter, began, &after).await })
            }
        });
        let (deleted, last) = deleted.await?;
        self.after = last;
        Ok(Some(deleted))
    }
}

async fn delete_after(
    connection: &mut PgConnection,
    ids: Ids,
    filter: &Filter,
    began: OffsetDateTime,
    after: &str,
) -> Result<(i64, Option<String>), Stop> {
    let workspace = ids.workspace;
    let mut query = QueryBuilder::new("WITH doomed AS (SELECT ctid, address FROM entries");
    push_filter(&mut query, workspace, filter);
    query.push(" AND created_at < ").push_bind(began).push(" AND address > ").push_bind(after);
    query.push(" ORDER BY address LIMIT ").push_bind(BATCH_ENTRIES);
    query.push(" FOR UPDATE), gone AS (DELETE FROM entries WHERE workspace_id + 0 = ").push_bind(workspace.0);
    query.push(" AND ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1) SELECT (SELECT count(*) FROM gone), (SELECT max(address) FROM doomed)");
    let (deleted, last): (i64, Option<String>) = query.build_query_as().fetch_one(&mut *connection).await?;
    // A deletion that finds nothing leaves its trace, too; the empty batch at the end of another adds nothing to it.
    if deleted > 0 || after.is_empty() {
        trace(connection, ids, &Asked::All(filter), deleted).await?;
        counts::add(connection, workspace, -deleted).await?;
    }
    Ok((deleted, last))
}

async fn trace(connection: &mut PgConnection, ids: Ids, asked: &Asked<'_>, deleted: i64) -> Result<(), sqlx::Error> {
    let nothing = Filter::default();
    let (mode, named, filter) = match asked {
        Asked::Named(count) => ("emails", Some(*count as i64), &nothing),
        Asked::All(filter) => ("all", None, *filter),
    };
    let kind = filter.kind.map(Kind::name);
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
