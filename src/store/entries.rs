//! The table `entries`, and the only conversion of domain entries to its rows.

use std::sync::{Arc, Mutex, PoisonError};

use sqlx::{PgConnection, query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    FirstBatch, ImportIds, ReasonCount, Store, counts, imports,
    lists::count_present,
    session::{Repeat, Retry, Running, Stop},
    shares::Share,
};
use crate::domain::{Error, Sorted, WorkspaceId};

impl Store {
    /// Stores one batch in one transaction, and with the first batch the import's row in the log.
    /// Returns the number of new entries, which are durable then. Existing rows are not changed.
    /// Waits while too many other imports use the database. Tries again when the connection is lost
    /// or the transaction conflicts with another. `expects_new` says that all entries are probably
    /// new, which changes only how they are counted.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]: nothing of the batch is stored, or (if only
    /// the reply was lost) all of it. [`Error::Unavailable`] also when the idempotency key belongs
    /// to another import by now; then nothing of the batch is stored.
    pub async fn insert_batch(
        &self,
        ids: ImportIds,
        entries: Sorted,
        first: Option<FirstBatch>,
        expects_new: bool,
    ) -> Result<u64, Error> {
        let (entries, first) = (Arc::new(entries), Arc::new(first));
        let mut retry = Retry::begin();
        loop {
            let is_distributed = match self.is_distributed().await {
                Ok(is_distributed) => is_distributed,
                Err(_) if retry.pause().await => continue,
                Err(error) => return Err(error),
            };
            // The result of the statements, known before the commit.
            let done = Arc::new(Mutex::new(None));
            let (its_entries, its_first, its_done) = (entries.clone(), first.clone(), done.clone());
            let written = self.primary.write(Share::Import(ids.workspace), move |connection| {
                Box::pin(async move {
                    let hints = Hints { is_distributed, expects_new };
                    let inserted = insert(connection, ids, &its_entries, its_first.as_ref().as_ref(), hints).await?;
                    let imported = inserted.imported;
                    *its_done.lock().unwrap_or_else(PoisonError::into_inner) = Some(inserted);
                    Ok(imported)
                })
            });
            let failed = match written.await {
                Ok(imported) => return Ok(imported),
                Err(failed) => failed,
            };
            let done = done.lock().unwrap_or_else(PoisonError::into_inner).take();
            let may_repeat = match (failed.repeat, done) {
                (Repeat::Pointless, _) => false,
                // Each server of Citus has transaction ids of its own, so nobody can be asked.
                (Repeat::OutcomeUnknown, Some(Inserted { imported: 1.., .. })) if is_distributed => false,
                (Repeat::OutcomeUnknown, Some(Inserted { imported, transaction: Some(transaction) })) => {
                    match self.was_committed(ids.workspace, &entries, transaction, &mut retry).await {
                        Some(true) => return Ok(imported),
                        Some(false) => true,
                        None => false,
                    }
                }
                // Without a transaction id no entry was new, and another attempt writes the same
                // row into the log.
                (Repeat::OutcomeUnknown | Repeat::Safe, _) => true,
            };
            if !may_repeat || !retry.pause().await {
                return Err(failed.error);
            }
        }
    }

    /// Finds out whether a transaction was committed whose COMMIT had no reply; `None` when that
    /// cannot be determined.
    async fn was_committed(
        &self,
        workspace: WorkspaceId,
        entries: &Arc<Sorted>,
        transaction: String,
        retry: &mut Retry,
    ) -> Option<bool> {
        loop {
            let (transaction, its_entries) = (transaction.clone(), entries.clone());
            let status = self.primary.read(Share::Import(workspace), move |connection| {
                Box::pin(async move {
                    let status =
                        query_scalar!("SELECT pg_xact_status($1::text::xid8)", transaction).fetch_one(&mut *connection).await?;
                    // After a fail-over the id may be that of another transaction, so the entries
                    // are looked up as well: that they are stored is what was promised.
                    let addresses = its_entries.addresses();
                    let present = match status.as_deref() {
                        Some("committed") => count_present(connection, workspace, &addresses).await?,
                        _ => 0,
                    };
                    Ok((status, present == addresses.len() as i64))
                })
            });
            match status.await {
                Ok((Some(status), is_present)) if status == "committed" => return is_present.then_some(true),
                Ok((Some(status), _)) if status == "aborted" => return Some(false),
                // The backend may still be running it, or the database may be unavailable for a
                // moment.
                _ if retry.pause().await => {}
                _ => return None,
            }
        }
    }

    /// Counts the entries of a batch that would be new, and stores nothing. For a dry run of a
    /// single batch.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn count_new(&self, workspace: WorkspaceId, entries: Sorted) -> Result<u64, Error> {
        self.primary
            .read(Share::Import(workspace), move |connection| {
                Box::pin(async move {
                    let addresses = entries.addresses();
                    let present = count_present(connection, workspace, &addresses).await?;
                    Ok(addresses.len() as u64 - present.cast_unsigned())
                })
            })
            .await
    }

    /// Begins a dry run of several batches.
    pub fn begin_dry_run(&self, workspace: WorkspaceId) -> DryRun {
        DryRun { store: self.clone(), workspace, id: Uuid::now_v7(), running: None }
    }
}

/// A dry run of several batches. It records the addresses that it has seen in a table of its own,
/// so that duplicates in different batches are counted as the import would count them, in constant
/// memory of this process. Between two batches it holds no connection. The recorded addresses are
/// deleted when it is dropped.
#[derive(Debug)]
pub struct DryRun {
    store: Store,
    workspace: WorkspaceId,
    id: Uuid,
    /// The batch that is being counted.
    running: Option<Running<u64>>,
}

/// The number of recorded addresses that one statement deletes.
const DELETION_ENTRIES: i64 = 50_000;

impl DryRun {
    /// Counts the entries of the next batch that would be new.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn count_new(&mut self, entries: Sorted) -> Result<u64, Error> {
        let (workspace, id) = (self.workspace, self.id);
        let running = self.store.primary.write(Share::Import(workspace), move |connection| {
            Box::pin(async move {
                let addresses = entries.addresses();
                // NOT EXISTS would let the planner join the whole list.
                let count = query_scalar!(
                    r#"WITH unseen AS (
                           INSERT INTO rehearsed (workspace_id, rehearsal, address)
                           SELECT $1, $2, address FROM UNNEST($3::text[]) AS new (address) ON CONFLICT DO NOTHING RETURNING address
                       )
                       SELECT count(*) AS "count!" FROM unseen
                       WHERE (SELECT true FROM entries WHERE workspace_id = $1 AND entries.address = unseen.address) IS NULL"#,
                    workspace.0,
                    id,
                    &addresses as &[&str],
                )
                .fetch_one(connection)
                .await?;
                Ok(count.cast_unsigned())
            })
        });
        let counted = self.running.insert(running).await;
        self.running = None;
        Ok(counted?)
    }
}

impl Drop for DryRun {
    fn drop(&mut self) {
        let (store, workspace, id, running) = (self.store.clone(), self.workspace, self.id, self.running.take());
        tokio::spawn(async move {
            // A batch whose caller is gone may still be recording addresses.
            if let Some(running) = running {
                running.abandon().await;
            }
            if let Err(error) = delete_recorded(&store, workspace, id).await {
                tracing::debug!(cause = %error, "the recorded addresses of a dry run stay for a day");
            }
        });
    }
}

/// Deletes the recorded addresses of a dry run. What stays, because the database is away or the
/// server dies, is deleted by `retention`.
async fn delete_recorded(store: &Store, workspace: WorkspaceId, id: Uuid) -> Result<(), Error> {
    // Continues after the last deleted row: the index still contains the deleted rows, and a search
    // from its beginning would take longer each time.
    let mut after = Some(String::new());
    while let Some(address) = after {
        let deleted = store.primary.write(Share::Scan(workspace), move |connection| {
            Box::pin(async move {
                let last = query_scalar!(
                    "WITH forgotten AS (
                         SELECT ctid, address FROM rehearsed
                         WHERE workspace_id = $1 AND rehearsal = $2 AND address > $3
                         ORDER BY address LIMIT $4
                     ), gone AS (
                         DELETE FROM rehearsed WHERE workspace_id + 0 = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM forgotten))
                     )
                     SELECT max(address) FROM forgotten",
                    workspace.0,
                    id,
                    address,
                    DELETION_ENTRIES,
                );
                Ok(last.fetch_one(connection).await?)
            })
        });
        after = deleted.await?;
    }
    Ok(())
}

/// What decides how the new entries of a batch are counted.
#[derive(Clone, Copy, Debug)]
struct Hints {
    is_distributed: bool,
    expects_new: bool,
}

/// The result of the statements of an insert.
struct Inserted {
    imported: u64,
    /// The id of the transaction; `None` if no entry was new.
    transaction: Option<String>,
}

async fn insert(
    connection: &mut PgConnection,
    ids: ImportIds,
    entries: &Sorted,
    first: Option<&FirstBatch>,
    hints: Hints,
) -> Result<Inserted, Stop> {
    let new = insert_rows(connection, ids, entries, hints).await?;
    let imported = new.iter().map(|new| new.count.unsigned_abs()).sum();
    if let Some(first) = first {
        imports::begin(connection, ids, first, imported).await?;
    }
    let transaction = counts::add(connection, ids.workspace, new).await?;
    Ok(Inserted { imported, transaction })
}

/// Stores the entries that are not there yet, and returns their numbers.
async fn insert_rows(
    connection: &mut PgConnection,
    ids: ImportIds,
    entries: &Sorted,
    hints: Hints,
) -> Result<Vec<ReasonCount>, sqlx::Error> {
    let mut all = counts::of(entries);
    // To return what was inserted takes a tenth of an insert's time, so it is not done if all have
    // the same reason or are probably new. Without it, Citus reports how many rows it selected, and
    // not how many it inserted.
    if hints.is_distributed || (all.len() > 1 && !hints.expects_new) {
        return insert_returning(connection, ids, entries).await;
    }
    let inserted = insert_counting(connection, ids, entries).await?;
    if inserted == entries.len() as u64 {
        return Ok(all);
    }
    if let [only] = all.as_mut_slice() {
        only.count = inserted.cast_signed();
        return Ok(all);
    }
    count_inserted(connection, ids.workspace, entries).await
}

/// Stores the entries that are not there yet. Returns how many there were.
///
/// Rows are inserted in the order of the arrays.
/// [`Batch::into_sorted`](crate::domain::Batch::into_sorted) explains why that matters.
async fn insert_counting(connection: &mut PgConnection, ids: ImportIds, entries: &Sorted) -> Result<u64, sqlx::Error> {
    let (addresses, reasons) = (entries.addresses(), entries.reasons());
    let inserted = match entries.unsubscribed_at() {
        // Most imports have no opt-outs, and do not send an empty array for them.
        None => {
            query!(
                "INSERT INTO entries (workspace_id, added_by, address, reason)
                 SELECT $1, $2, address, reason FROM UNNEST($3::text[], $4::text[]) AS new (address, reason)
                 ON CONFLICT DO NOTHING",
                ids.workspace.0,
                ids.key.0,
                &addresses as &[&str],
                &reasons as &[&str],
            )
            .execute(connection)
            .await?
        }
        Some(unsubscribed_at) => {
            query!(
                "INSERT INTO entries (workspace_id, added_by, address, reason, unsubscribed_at)
                 SELECT $1, $2, address, reason, unsubscribed_at
                 FROM UNNEST($3::text[], $4::text[], $5::timestamptz[]) AS new (address, reason, unsubscribed_at)
                 ON CONFLICT DO NOTHING",
                ids.workspace.0,
                ids.key.0,
                &addresses as &[&str],
                &reasons as &[&str],
                &unsubscribed_at as &[Option<OffsetDateTime>],
            )
            .execute(connection)
            .await?
        }
    };
    Ok(inserted.rows_affected())
}

/// As [`insert_counting`], but returns the numbers by kind and reason.
async fn insert_returning(
    connection: &mut PgConnection,
    ids: ImportIds,
    entries: &Sorted,
) -> Result<Vec<ReasonCount>, sqlx::Error> {
    let (addresses, reasons) = (entries.addresses(), entries.reasons());
    let unsubscribed_at = entries.unsubscribed_at().unwrap_or_else(|| vec![None; addresses.len()]);
    let new = query!(
        r#"WITH new AS (
               INSERT INTO entries (workspace_id, added_by, address, reason, unsubscribed_at)
               SELECT $1, $2, address, reason, unsubscribed_at
               FROM UNNEST($3::text[], $4::text[], $5::timestamptz[]) AS new (address, reason, unsubscribed_at)
               ON CONFLICT DO NOTHING RETURNING address, reason
           )
           SELECT strpos(address, '@') = 0 AS "is_domain!", reason, count(*) AS "count!" FROM new GROUP BY 1, 2"#,
        ids.workspace.0,
        ids.key.0,
        &addresses as &[&str],
        &reasons as &[&str],
        &unsubscribed_at as &[Option<OffsetDateTime>],
    );
    let new = new.fetch_all(connection).await?;
    Ok(new.into_iter().map(|row| ReasonCount::new(row.is_domain, row.reason, row.count)).collect())
}

/// Counts those of the entries that this transaction inserted. That takes half of an insert's time.
async fn count_inserted(
    connection: &mut PgConnection,
    workspace: WorkspaceId,
    entries: &Sorted,
) -> Result<Vec<ReasonCount>, sqlx::Error> {
    // The id of a transaction is used again after four billion others, but not at the same time.
    let new = query!(
        r#"SELECT strpos(entry.address, '@') = 0 AS "is_domain!", entry.reason, count(*) AS "count!"
           FROM UNNEST($2::text[]) AS wanted (address)
           CROSS JOIN LATERAL (
               SELECT address, reason FROM entries WHERE workspace_id = $1 AND entries.address = wanted.address
                   AND entries.xmin = pg_current_xact_id()::xid AND created_at = now() LIMIT 1
           ) AS entry GROUP BY 1, 2"#,
        workspace.0,
        &entries.addresses() as &[&str],
    );
    let new = new.fetch_all(connection).await?;
    Ok(new.into_iter().map(|row| ReasonCount::new(row.is_domain, row.reason, row.count)).collect())
}
