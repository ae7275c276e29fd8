//! Deletes entries, and writes the deletion log.

use std::sync::Arc;

use sqlx::{PgConnection, QueryBuilder, query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    ReasonCount, Store, counts,
    lists::push_filter,
    session::{Retry, Stop, Working},
    shares::Share,
};
use crate::domain::{Address, Error, Filter, KeyId, Kind, WorkspaceId};

/// The number of rows in one transaction of a large deletion. It is small, so that nobody waits
/// long for one of the locked rows.
const BATCH_ENTRIES: i64 = 10_000;

/// The entries that a deletion selects, for its log.
enum Selection<'a> {
    Named(usize),
    All(&'a Filter),
}

/// The ids of a deletion, of its workspace and of its key.
#[derive(Clone, Copy, Debug)]
struct Ids {
    workspace: WorkspaceId,
    key: KeyId,
    deletion: Uuid,
}

impl Store {
    /// Deletes the entries of these addresses in one transaction, and returns the number of deleted
    /// entries. `addresses` must be sorted and without duplicates.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]: nothing was deleted, or (if only the reply
    /// was lost) everything.
    pub async fn delete_named(&self, workspace: WorkspaceId, key: KeyId, addresses: Vec<Address>) -> Result<i64, Error> {
        let ids = Ids { workspace, key, deletion: Uuid::now_v7() };
        let addresses = Arc::new(addresses);
        let deleted = self.primary.write_again(Share::LookUp(workspace), Retry::begin(), || {
            let addresses = addresses.clone();
            move |connection: &mut PgConnection| -> Working<'_, i64> {
                Box::pin(async move { delete_named(connection, ids, &addresses).await })
            }
        });
        Ok(deleted.await?)
    }

    /// Begins a deletion of the entries that a filter selects. Entries that are stored from now on
    /// are kept.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn begin_deletion(&self, workspace: WorkspaceId, key: KeyId, filter: Filter) -> Result<Deletion, Error> {
        let began = self.primary.read(Share::LookUp(workspace), |connection| {
            Box::pin(async move { Ok(query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(connection).await?) })
        });
        let began = began.await?;
        let ids = Ids { workspace, key, deletion: Uuid::now_v7() };
        Ok(Deletion { store: self.clone(), ids, filter: Arc::new(filter), began, after: Some(String::new()) })
    }
}

async fn delete_named(connection: &mut PgConnection, ids: Ids, addresses: &[Address]) -> Result<i64, Stop> {
    let named: Vec<&str> = addresses.iter().map(Address::as_str).collect();
    // Rows are locked in the order of `named`, which is the order of the key and of inserts, so
    // there are no deadlocks. A locked row that is never updated keeps its ctid, so the ctid is the
    // cheapest way to find the row again. The `+ 0` keeps the planner from using the key for that,
    // which would read the whole workspace.
    let gone = query!(
        r#"WITH doomed AS (
               SELECT entry.ctid FROM UNNEST($2::text[]) AS wanted (address)
               CROSS JOIN LATERAL (
                   SELECT ctid FROM entries WHERE workspace_id = $1 AND entries.address = wanted.address LIMIT 1 FOR UPDATE
               ) AS entry
           ), gone AS (
               DELETE FROM entries WHERE workspace_id + 0 = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING reason, strpos(address, '@') = 0 AS is_domain
           )
           SELECT is_domain AS "is_domain!", reason, count(*) AS "count!" FROM gone GROUP BY is_domain, reason"#,
        ids.workspace.0,
        &named as &[&str],
    )
    .fetch_all(&mut *connection)
    .await?;
    let deleted = gone.iter().map(|row| row.count).sum();
    log(connection, ids, &Selection::Named(named.len()), deleted).await?;
    let changes = gone.into_iter().map(|row| ReasonCount::new(row.is_domain, row.reason, -row.count));
    counts::add(connection, ids.workspace, changes.collect()).await?;
    Ok(deleted)
}

/// A deletion by filter. Each batch is a transaction of its own.
#[derive(Debug)]
pub struct Deletion {
    store: Store,
    ids: Ids,
    filter: Arc<Filter>,
    began: OffsetDateTime,
    /// The last address that was examined; `None` when the deletion is complete.
    after: Option<String>,
}

impl Deletion {
    /// Deletes the next batch and returns the number of deleted entries; `None` when the deletion
    /// is complete.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]. Earlier batches remain deleted, and the
    /// deletion cannot be continued.
    pub async fn next_batch(&mut self) -> Result<Option<i64>, Error> {
        let Some(after) = self.after.take() else { return Ok(None) };
        let after: Arc<str> = after.into();
        let (ids, began) = (self.ids, self.began);
        let deleted = self.store.primary.write_again(Share::Scan(ids.workspace), Retry::begin(), || {
            let (filter, after) = (self.filter.clone(), after.clone());
            move |connection: &mut PgConnection| -> Working<'_, (i64, Option<String>)> {
                Box::pin(async move { delete_after(connection, ids, &filter, began, &after).await })
            }
        });
        let (deleted, last) = deleted.await?;
        self.after = last;
        if self.after.is_none() {
            self.forget_empty_counts().await;
        }
        Ok(Some(deleted))
    }

    /// What fails here is done after the next deletion.
    async fn forget_empty_counts(&self) {
        let workspace = self.ids.workspace;
        let forgotten = self.store.primary.write(Share::Scan(workspace), move |connection| {
            Box::pin(async move { counts::forget_empty(connection, workspace).await })
        });
        if let Err(failed) = forgotten.await {
            tracing::debug!(cause = %failed.error, "counts of 0 stay");
        }
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
    query.push(" AND ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING address, reason)");
    query.push(" SELECT strpos(address, '@') = 0, reason, count(*), (SELECT max(address) FROM doomed) FROM gone GROUP BY 1, 2");
    let gone: Vec<(bool, String, i64, Option<String>)> = query.build_query_as().fetch_all(&mut *connection).await?;
    let last = gone.first().and_then(|(.., last)| last.clone());
    let deleted = gone.iter().map(|(_, _, count, _)| count).sum();
    // A deletion that finds nothing is logged, too. The empty last batch of another deletion adds
    // nothing to its row.
    log(connection, ids, &Selection::All(filter), deleted).await?;
    let changes = gone.into_iter().map(|(is_domain, reason, count, _)| ReasonCount::new(is_domain, reason, -count));
    counts::add(connection, workspace, changes.collect()).await?;
    Ok((deleted, last))
}

async fn log(connection: &mut PgConnection, ids: Ids, selection: &Selection<'_>, deleted: i64) -> Result<(), sqlx::Error> {
    let nothing = Filter::default();
    let (mode, named, filter) = match selection {
        Selection::Named(count) => ("emails", Some(*count as i64), &nothing),
        Selection::All(filter) => ("all", None, *filter),
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
