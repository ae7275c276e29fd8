//! Where the batches of an import go: into the table, or, with `validate_only`, through a dry run
//! that only counts.

use std::time::Instant;

use tokio::task::{JoinError, JoinSet};
use tracing::Instrument;

use super::claim::Claimed;
use crate::{
    domain::{Batch, Error, Tally},
    grpc::convert,
    store::{Answered, DryRun, End, FirstBatch, ImportIds, Store},
    telemetry::metrics,
};

/// Stores batches, several concurrently.
///
/// The first batch is stored before the second is sent. Its transaction also writes the import's
/// row in the log, so that no entry is stored without such a row.
pub(super) struct Storing {
    store: Store,
    ids: ImportIds,
    claim: Option<Claimed>,
    batches: usize,
    in_flight: JoinSet<Result<Stored, Error>>,
    in_flight_max: usize,
}

/// The counts of a stored batch.
struct Stored {
    received: u64,
    imported: u64,
}

impl Storing {
    pub(super) fn new(store: Store, ids: ImportIds, claim: Option<Claimed>, in_flight_max: usize) -> Self {
        Self { store, ids, claim, batches: 0, in_flight: JoinSet::new(), in_flight_max }
    }

    /// Sends a batch to the database. Waits while too many are in flight. Adds the batches that are
    /// done to `tally`.
    ///
    /// # Errors
    /// That of any batch so far. Batches in flight continue; see [`Storing::settle`].
    pub(super) async fn send(&mut self, batch: Batch, tally: &mut Tally) -> Result<(), Error> {
        self.spawn(batch, tally, None).await?;
        // Batches that are done are collected now, so that an error ends the import early.
        while let Some(done) = self.in_flight.try_join_next() {
            count(done, tally)?;
        }
        Ok(())
    }

    /// Sends the last batch, which may be empty, waits for all batches, and completes the import's
    /// row in the log. If this batch is the whole import, its transaction does that as well, so
    /// that either all of the import is stored or nothing.
    ///
    /// # Errors
    /// As [`Storing::send`].
    pub(super) async fn finish(&mut self, last: Batch, tally: &mut Tally) -> Result<(), Error> {
        let end = End {
            answers: self
                .claim
                .as_ref()
                .map(|claim| Answered { idempotency_key: claim.idempotency_key.clone(), errors: convert::errors_to_keep(tally) }),
        };
        let is_whole = self.batches == 0 && !last.is_empty();
        if is_whole {
            self.spawn(last, tally, Some(end)).await?;
            self.wait_for_all(tally).await?;
        } else {
            if !last.is_empty() {
                self.spawn(last, tally, None).await?;
            }
            self.wait_for_all(tally).await?;
            self.store.end_import(self.ids, tally, Some(end)).await?;
        }
        if let Some(claim) = &mut self.claim {
            claim.is_answered = true;
        }
        Ok(())
    }

    /// After an error: waits for the batches in flight, so that the counts include every batch that
    /// was stored.
    pub(super) async fn settle(&mut self, tally: &mut Tally) {
        while let Some(done) = self.in_flight.join_next().await {
            // Only the first error is reported. Those of the other batches have the same cause.
            let _ = count(done, tally);
        }
        // While the database is away, the row keeps the counts that were written last.
        if self.batches > 1
            && self.store.is_reachable()
            && let Err(error) = self.store.end_import(self.ids, tally, None).await
        {
            tracing::warn!(cause = %error, "the log of an aborted import has only the counts of its first batch");
        }
    }

    async fn spawn(&mut self, batch: Batch, tally: &mut Tally, end: Option<End>) -> Result<(), Error> {
        let in_flight_max = if self.batches == 1 { 1 } else { self.in_flight_max };
        while self.in_flight.len() >= in_flight_max {
            self.wait_for_one(tally).await?;
        }
        let received = batch.len() as u64;
        let first = (self.batches == 0).then_some(FirstBatch { received, failed: tally.failed, end });
        self.batches += 1;
        let (store, ids) = (self.store.clone(), self.ids);
        let insert = async move {
            let started = Instant::now();
            let imported = store.insert_batch(ids, batch.into_sorted(), first).await?;
            metrics::batch_stored(received, imported, started);
            Ok(Stored { received, imported })
        };
        self.in_flight.spawn(insert.in_current_span());
        Ok(())
    }

    async fn wait_for_one(&mut self, tally: &mut Tally) -> Result<(), Error> {
        match self.in_flight.join_next().await {
            Some(done) => count(done, tally),
            None => Ok(()),
        }
    }

    async fn wait_for_all(&mut self, tally: &mut Tally) -> Result<(), Error> {
        while !self.in_flight.is_empty() {
            self.wait_for_one(tally).await?;
        }
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
    pub(super) async fn send(&mut self, batch: Batch, tally: &mut Tally) -> Result<(), Error> {
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
    pub(super) async fn finish(&mut self, last: Batch, tally: &mut Tally) -> Result<(), Error> {
        if self.dry_run.is_some() {
            return self.send(last, tally).await;
        }
        let received = last.len() as u64;
        let new = self.store.count_new(self.ids.workspace, last.into_sorted()).await?;
        tally.stored(received, new);
        Ok(())
    }
}
