//! The hot table, and the one way in which domain entries become rows.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::{PgConnection, query, query_scalar};
use time::OffsetDateTime;
use uuid::{NoContext, Timestamp, Uuid};

use super::{
    FirstBatch, ImportIds, Store, counts, imports,
    lists::count_present,
    session::{Repeat, Retry, Stop},
    shares::Share,
};
use crate::domain::{Error, Sorted, WorkspaceId};

impl Store {
    /// Stores one batch in one transaction, together with the import's row in the log if it is the first, and says how many entries were
    /// new. When it returns, they are durable. Rows that exist stay as they are. Waits while too many other imports are at the database, and tries again
    /// when the connection is lost or the transaction comes into conflict with another.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`]: nothing of the batch is stored, or (if only the answer was lost) all of it.
    /// [`Error::Unavailable`] also when the request id that it answers belongs to another import by now; nothing of the batch is stored then.
    pub async fn insert_batch(&self, ids: ImportIds, entries: Sorted, first: Option<FirstBatch>) -> Result<u64, Error> {
        let (entries, first) = (Arc::new(entries), Arc::new(first));
        let mut retry = Retry::begin();
        loop {
            // What the transaction did, known before it is committed.
            let done = Arc::new(Mutex::new(None));
            let (its_entries, its_first, its_done) = (entries.clone(), first.clone(), done.clone());
            let written = self.write(Share::Import(ids.workspace), move |connection| {
                Box::pin(async move {
                    let inserted = insert(connection, ids, &its_entries, its_first.as_ref().as_ref()).await?;
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
                (Repeat::OutcomeUnknown, Some(Inserted { imported, transaction: Some(transaction) })) => {
                    match self.was_committed(ids.workspace, &entries, transaction, &mut retry).await {
                        Some(true) => return Ok(imported),
                        Some(false) => true,
                        None => false,
                    }
                }
                // Without a transaction's id nothing was new, and what a repeat writes into the log is the same.
                (Repeat::OutcomeUnknown | Repeat::Safe, _) => true,
            };
            if !may_repeat || !retry.pause().await {
                return Err(failed.error);
            }
        }
    }

    /// Whether a transaction whose COMMIT had no answer was committed; none when nobody can say.
    async fn was_committed(
        &self,
        workspace: WorkspaceId,
        entries: &Arc<Sorted>,
        transaction: String,
        retry: &mut Retry,
    ) -> Option<bool> {
        loop {
            let (transaction, its_entries) = (transaction.clone(), entries.clone());
            let asked = self.read(Share::Import(workspace), move |connection| {
                Box::pin(async move {
                    let status =
                        query_scalar!("SELECT pg_xact_status($1::text::xid8)", transaction).fetch_one(&mut *connection).await?;
                    // After a fail-over the number may be that of another transaction. That the entries are there is what was promised.
                    let addresses = its_entries.addresses();
                    let present = match status.as_deref() {
                        Some("committed") => count_present(connection, workspace, &addresses).await?,
                        _ => 0,
                    };
                    Ok((status, present == addresses.len() as i64))
                })
            });
            match asked.await {
                Ok((Some(status), is_present)) if status == "committed" => return is_present.then_some(true),
                Ok((Some(status), _)) if status == "aborted" => return Some(false),
                // The backend may be at it still, or the database may be away for a moment.
                _ if retry.pause().await => {}
                _ => return None,
            }
        }
    }

    /// Says how many of a batch's entries would be new, and stores nothing. For an import that is a single batch.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn count_new(&self, workspace: WorkspaceId, entries: Sorted) -> Result<u64, Error> {
        self.read(Share::Import(workspace), move |connection| {
            Box::pin(async move {
                let addresses = entries.addresses();
                let present = count_present(connection, workspace, &addresses).await?;
                Ok(addresses.len() as u64 - present.cast_unsigned())
            })
        })
        .await
    }

    /// Begins to rehearse an import of several batches.
    pub fn rehearse(&self, workspace: WorkspaceId) -> Rehearsal {
        Rehearsal { store: self.clone(), workspace, id: Uuid::now_v7() }
    }
}

/// A long import that stores nothing: remembers in a table which addresses it has seen, so that repeats far apart are
/// counted as they would be, in constant memory of this process. Holds nothing of the database between two batches; what it remembers goes
/// when it is dropped.
#[derive(Debug)]
pub struct Rehearsal {
    store: Store,
    workspace: WorkspaceId,
    id: Uuid,
}

/// A dry run older than this is over: its server died before it could forget what it had seen.
const LONGEST_REHEARSAL: Duration = Duration::from_secs(24 * 60 * 60);

/// When a dry run is forgotten for the second time.
const FORGET_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Rows that one statement forgets.
const FORGOTTEN_ENTRIES: i64 = 50_000;

impl Rehearsal {
    /// Says how many of the next batch's entries would be new.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn count_new(&mut self, entries: Sorted) -> Result<u64, Error> {
        let (workspace, id) = (self.workspace, self.id);
        let count = self.store.write(Share::Import(workspace), move |connection| {
            Box::pin(async move {
                let addresses = entries.addresses();
                // Not NOT EXISTS, which the planner may turn into a join with the whole list.
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
        Ok(count.await?)
    }
}

impl Drop for Rehearsal {
    fn drop(&mut self) {
        let (store, workspace, id) = (self.store.clone(), self.workspace, self.id);
        tokio::spawn(async move {
            // Twice: a batch whose caller has gone may be at the database still, and the database may be away.
            for wait in [Duration::ZERO, FORGET_AGAIN_AFTER] {
                tokio::time::sleep(wait).await;
                if let Err(error) = forget(&store, workspace, id).await {
                    tracing::debug!(cause = %error, "what a dry run has seen stays for a day");
                }
            }
        });
    }
}

/// Forgets what a rehearsal has seen, and what those left behind whose server died.
async fn forget(store: &Store, workspace: WorkspaceId, id: Uuid) -> Result<(), Error> {
    let dead_before = OffsetDateTime::now_utc() - LONGEST_REHEARSAL;
    let dead_before = Timestamp::from_unix(NoContext, dead_before.unix_timestamp().unsigned_abs(), 0);
    for (first, last) in [(id, id), (Uuid::nil(), Uuid::new_v7(dead_before))] {
        // From the last one on that was forgotten: the index still has those before, and to look for the rest from its
        // beginning would take longer each time.
        let mut after = Some((first, String::new()));
        while let Some((rehearsal, address)) = after {
            let forgotten = store.write(Share::Scan(workspace), move |connection| {
                Box::pin(async move {
                    let forgotten = query!(
                        "WITH forgotten AS (
                             SELECT ctid, rehearsal, address FROM rehearsed
                             WHERE workspace_id = $1 AND (rehearsal, address) > ($2, $3) AND rehearsal <= $4
                             ORDER BY rehearsal, address LIMIT $5
                         ), gone AS (
                             DELETE FROM rehearsed WHERE workspace_id + 0 = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM forgotten))
                         )
                         SELECT rehearsal, address FROM forgotten ORDER BY rehearsal DESC, address DESC LIMIT 1",
                        workspace.0,
                        rehearsal,
                        address,
                        last,
                        FORGOTTEN_ENTRIES,
                    );
                    Ok(forgotten.fetch_optional(connection).await?.map(|row| (row.rehearsal, row.address)))
                })
            });
            after = forgotten.await?;
        }
    }
    Ok(())
}

/// What a transaction inserted.
struct Inserted {
    imported: u64,
    /// None if nothing was new.
    transaction: Option<String>,
}

async fn insert(
    connection: &mut PgConnection,
    ids: ImportIds,
    entries: &Sorted,
    first: Option<&FirstBatch>,
) -> Result<Inserted, Stop> {
    let (addresses, reasons) = (entries.addresses(), entries.reasons());
    // The order of the arrays is the order of the inserts; see Batch::into_sorted for what hangs on it.
    let inserted = match entries.unsubscribed_at() {
        // Most imports know no opt-outs, and need not send an array of nothing.
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
            .execute(&mut *connection)
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
            .execute(&mut *connection)
            .await?
        }
    };
    let imported = inserted.rows_affected();
    if let Some(first) = first {
        imports::begin(connection, ids, first, imported).await?;
    }
    let transaction = counts::add(connection, ids.workspace, imported.cast_signed()).await?;
    Ok(Inserted { imported, transaction })
}
