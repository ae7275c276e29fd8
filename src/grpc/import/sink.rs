//! Where the batches of an import go: into the table, or, with `validate_only`, through a dry run
//! that only counts.

use std::time::Instant;

use tokio::task::{JoinError, JoinSet};
use tracing::Instrument;

use super::{
    claim::Claimed,
    memory::{Held, Memory},
    runs::Merged,
    sorting::{Sorters, Sorting},
};
use crate::{
    domain::{Error, Filter, Tally},
    grpc::{StreamLimits, convert, messages::Messages},
    proto::ImportEntriesRequest,
    store::{Answered, DryRun, End, FirstBatch, ImportIds, Store},
    telemetry::metrics,
};

/// Stores batches, several concurrently. A long import into a large list is sorted first.
pub(super) struct Storing {
    inserts: Inserts,
    claim: Option<Claimed>,
    batch_entries_max: usize,
    order: Order,
}

/// The order in which entries are stored.
enum Order {
    /// That of their arrival, while the import is short.
    Short(Sorters),
    /// That of their arrival, until the end of the import.
    Arrival,
    /// That of the key.
    Sorted(Sorting),
}

impl Storing {
    pub(super) fn new(
        store: Store,
        ids: ImportIds,
        claim: Option<Claimed>,
        limits: StreamLimits,
        memory: Memory,
        sorters: Sorters,
    ) -> Self {
        let in_flight_max = limits.batches_in_flight_max;
        let inserts = Inserts { store, ids, memory, batches: 0, in_flight: JoinSet::new(), in_flight_max };
        Self { inserts, claim, batch_entries_max: limits.batch_entries_max, order: Order::Short(sorters) }
    }

    /// Sends a batch to the database, or sets it aside to be sorted. Waits while too many are in
    /// flight. Adds the batches that are done to `tally`.
    ///
    /// # Errors
    /// That of any batch so far, and when the key of `messages` is no longer valid. Batches in
    /// flight continue; see [`Storing::settle`].
    pub(super) async fn send(
        &mut self,
        batch: Held,
        messages: &Messages<ImportEntriesRequest>,
        tally: &mut Tally,
    ) -> Result<(), Error> {
        if let Order::Short(sorters) = &self.order
            && self.inserts.batches >= self.inserts.in_flight_max
        {
            // The import does not depend on this count.
            let rows = self.inserts.store.count_entries(self.inserts.ids.workspace, &Filter::default()).await.unwrap_or_default();
            self.order = sorters.begin(rows.unsigned_abs(), self.batch_entries_max).map_or(Order::Arrival, Order::Sorted);
        }
        match &mut self.order {
            Order::Short(_) | Order::Arrival => self.inserts.send(batch, 0, tally, None).await?,
            Order::Sorted(sorting) => {
                if !sorting.take(batch, messages, &mut self.inserts, tally).await? {
                    self.order = Order::Arrival;
                }
            }
        }
        // Batches that are done are collected now, so that an error ends the import early.
        while let Some(done) = self.inserts.in_flight.try_join_next() {
            count(done, tally)?;
        }
        Ok(())
    }

    /// Sends the last batch, which may be empty, and what is still to be sorted; waits for all
    /// batches, and completes the import's row in the log. If this batch is the whole import, its
    /// transaction does that as well, so that either all of the import is stored or nothing.
    ///
    /// # Errors
    /// As [`Storing::send`].
    pub(super) async fn finish(
        &mut self,
        last: Held,
        messages: &Messages<ImportEntriesRequest>,
        tally: &mut Tally,
    ) -> Result<(), Error> {
        let end = End {
            answers: self
                .claim
                .as_ref()
                .map(|claim| Answered { idempotency_key: claim.idempotency_key.clone(), errors: convert::errors_to_keep(tally) }),
        };
        let inserts = &mut self.inserts;
        let is_whole = inserts.batches == 0 && !last.batch.is_empty();
        if is_whole {
            inserts.send(last, 0, tally, Some(end)).await?;
            inserts.wait_for_all(tally).await?;
        } else {
            match &mut self.order {
                Order::Sorted(sorting) => sorting.finish(last, messages, inserts, tally).await?,
                Order::Short(_) | Order::Arrival if last.batch.is_empty() => {}
                Order::Short(_) | Order::Arrival => inserts.send(last, 0, tally, None).await?,
            }
            inserts.wait_for_all(tally).await?;
            inserts.store.end_import(inserts.ids, tally, Some(end)).await?;
        }
        if let Some(claim) = &mut self.claim {
            claim.is_answered = true;
        }
        Ok(())
    }

    /// The time until now was not the sender's.
    pub(super) fn resume(&mut self) {
        if let Order::Sorted(sorting) = &mut self.order {
            sorting.resume();
        }
    }

    /// Waits for one of the batches in flight. False when there is none.
    ///
    /// # Errors
    /// As [`Storing::send`].
    pub(super) async fn wait_for_one(&mut self, tally: &mut Tally) -> Result<bool, Error> {
        self.inserts.wait_for_one(tally).await
    }

    /// After an error: waits for the batches in flight, so that the counts include every batch that
    /// was stored. What was still to be sorted is not stored.
    pub(super) async fn settle(&mut self, tally: &mut Tally) {
        let inserts = &mut self.inserts;
        while let Some(done) = inserts.in_flight.join_next().await {
            // Only the first error is reported. Those of the other batches have the same cause.
            let _ = count(done, tally);
        }
        // While the database is away, the row keeps the counts that were written last.
        if (inserts.batches > 1 || matches!(self.order, Order::Sorted(_)))
            && inserts.store.is_reachable()
            && let Err(error) = inserts.store.end_import(inserts.ids, tally, None).await
        {
            tracing::warn!(cause = %error, "the log of an aborted import has only the counts of its first batch");
        }
    }
}

/// The batches of an import that are at the database.
///
/// The first batch is stored before the second is sent. Its transaction also writes the import's
/// row in the log, so that no entry is stored without such a row.
pub(super) struct Inserts {
    store: Store,
    ids: ImportIds,
    memory: Memory,
    batches: usize,
    in_flight: JoinSet<Result<Stored, Error>>,
    in_flight_max: usize,
}

/// The counts of a stored batch.
struct Stored {
    received: u64,
    imported: u64,
}

impl Inserts {
    /// Sends a part of the sorted entries to the database, as [`Inserts::send`] does.
    ///
    /// # Errors
    /// That of any batch so far, and when other imports take all the memory.
    pub(super) async fn send_merged(&mut self, merged: Merged, tally: &mut Tally) -> Result<(), Error> {
        let mut held = self.memory.begin(self.ids.workspace, 0).await?;
        held.batch = merged.batch;
        while !held.fits() {
            if !self.wait_for_one(tally).await? {
                held.fit().await?;
            }
        }
        self.send(held, merged.repeats, tally, None).await
    }

    /// Sends a batch to the database. Waits while too many are in flight. `repeats` is the number
    /// of entries that were left out of it, since their addresses came before.
    ///
    /// # Errors
    /// That of any batch so far.
    pub(super) async fn send(&mut self, mut held: Held, repeats: u64, tally: &mut Tally, end: Option<End>) -> Result<(), Error> {
        // More than it takes is released.
        held.fits();
        let in_flight_max = if self.batches == 1 { 1 } else { self.in_flight_max };
        while self.in_flight.len() >= in_flight_max {
            self.wait_for_one(tally).await?;
        }
        let received = held.batch.len() as u64 + repeats;
        let first = (self.batches == 0).then_some(FirstBatch { received, failed: tally.failed, end });
        let expects_new = self.batches > 0 && tally.skipped == 0;
        self.batches += 1;
        let (store, ids) = (self.store.clone(), self.ids);
        let insert = async move {
            let started = Instant::now();
            let Held { batch, memory: _memory } = held;
            let imported = store.insert_batch(ids, batch.into_sorted(), first, expects_new).await?;
            metrics::batch_stored(received, imported, started);
            Ok(Stored { received, imported })
        };
        self.in_flight.spawn(insert.in_current_span());
        Ok(())
    }

    /// Waits for one batch. False when there is none.
    async fn wait_for_one(&mut self, tally: &mut Tally) -> Result<bool, Error> {
        match self.in_flight.join_next().await {
            Some(done) => count(done, tally).map(|()| true),
            None => Ok(false),
        }
    }

    async fn wait_for_all(&mut self, tally: &mut Tally) -> Result<(), Error> {
        while self.wait_for_one(tally).await? {}
        Ok(())
    }
}

fn count(done: Result<Result<Stored, Error>, JoinError>, tally: &mut Tally) -> Result<(), Error> {
    let stored = done.map_err(Error::internal)??;
    tally.stored(stored.received, stored.imported);
    Ok(())
}

/// Counts what batches would do, one after the other. With the first of several batches it begins
/// to remember the addresses it has seen.
pub(super) struct Counting {
    store: Store,
    ids: ImportIds,
    dry_run: Option<DryRun>,
}

impl Counting {
    pub(super) fn new(store: Store, ids: ImportIds) -> Self {
        Self { store, ids, dry_run: None }
    }

    /// Looks a batch up, and remembers its addresses.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub(super) async fn send(&mut self, held: Held, tally: &mut Tally) -> Result<(), Error> {
        let Held { batch, memory: _memory } = held;
        let received = batch.len() as u64;
        let dry_run = self.dry_run.get_or_insert_with(|| self.store.begin_dry_run(self.ids.workspace));
        let new = dry_run.count_new(batch.into_sorted()).await?;
        tally.stored(received, new);
        Ok(())
    }

    /// Looks the last batch up.
    ///
    /// # Errors
    /// As [`Counting::send`].
    pub(super) async fn finish(&mut self, last: Held, tally: &mut Tally) -> Result<(), Error> {
        if self.dry_run.is_some() {
            return self.send(last, tally).await;
        }
        let Held { batch, memory: _memory } = last;
        let received = batch.len() as u64;
        let new = self.store.count_new(self.ids.workspace, batch.into_sorted()).await?;
        tally.stored(received, new);
        Ok(())
    }
}
