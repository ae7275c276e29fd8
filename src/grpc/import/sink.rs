//! Where the batches of an import go: into the table, or, when nothing is to be stored, through a
//! rehearsal that only counts.

use tokio::task::{JoinError, JoinSet};
use tracing::Instrument;

use super::claim::Claimed;
use crate::{
    domain::{Batch, Error, Tally},
    grpc::convert,
    store::{Answered, End, FirstBatch, ImportIds, Rehearsal, Store},
};

/// Stores batches, several at once.
///
/// The first batch is stored before the second is sent: it brings the import's row of the log with it, so
/// that no entry is on a list without one.
pub(super) struct Storing {
    store: Store,
    ids: ImportIds,
    claim: Option<Claimed>,
    batches: usize,
    in_flight: JoinSet<Result<Stored, Error>>,
    in_flight_max: usize,
}

/// A batch that is in the table.
struct Stored {
    received: u64,
    imported: u64,
}

impl Storing {
    pub(super) fn new(store: Store, ids: ImportIds, claim: Option<Claimed>, in_flight_max: usize) -> Self {
        Self { store, ids, claim, batches: 0, in_flight: JoinSet::new(), in_flight_max }
    }

    /// Sends a batch to the database; waits while too many are there. Counts what is done in `tally`.
    ///
    /// # Errors
    /// That of any batch so far. Those that are at the database still go on; see [`Storing::settle`].
    pub(super) async fn send(&mut self, batch: Batch, tally: &mut Tally) -> Result<(), Error> {
        self.spawn(batch, tally, None).await?;
        // Takes what is done already, so that an error ends the import early.
        while let Some(done) = self.in_flight.try_join_next() {
            count(done, tally)?;
        }
        Ok(())
    }

    /// Sends the last batch, which may be empty, waits for all, and completes the import's row. A batch that is
    /// the whole import ends it in its own transaction, so that everything of it is there or nothing.
    ///
    /// # Errors
    /// As [`Storing::send`].
    pub(super) async fn finish(&mut self, last: Batch, tally: &mut Tally) -> Result<(), Error> {
        let end = End {
            answers: self
                .claim
                .as_ref()
                .map(|claim| Answered { request_id: claim.request_id.clone(), errors: convert::errors_to_keep(tally) }),
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

    /// After an error: waits for the batches that are at the database still, so that the counts include every one
    /// that was stored.
    pub(super) async fn settle(&mut self, tally: &mut Tally) {
        while let Some(done) = self.in_flight.join_next().await {
            // The first error is the one that is reported; those of the batches beside it have the same cause.
            let _ = count(done, tally);
        }
        // While the database is away, the row keeps what was known when it was written last.
        if self.batches > 1
            && self.store.is_reachable()
            && let Err(error) = self.store.end_import(self.ids, tally, None).await
        {
            tracing::warn!(cause = %error, "the log of a broken import has the counts of its first batch alone");
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
            let imported = store.insert_batch(ids, batch.into_sorted(), first).await?;
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

/// Counts what batches would do, one after the other. A second batch makes it remember what it has seen.
pub(super) struct Rehearsing {
    store: Store,
    ids: ImportIds,
    rehearsal: Option<Rehearsal>,
}

impl Rehearsing {
    pub(super) fn new(store: Store, ids: ImportIds) -> Self {
        Self { store, ids, rehearsal: None }
    }

    /// Looks a batch up, and remembers it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub(super) async fn send(&mut self, batch: Batch, tally: &mut Tally) -> Result<(), Error> {
        let received = batch.len() as u64;
        let rehearsal = self.rehearsal.get_or_insert_with(|| self.store.rehearse(self.ids.workspace));
        let new = rehearsal.count_new(batch.into_sorted()).await?;
        tally.stored(received, new);
        Ok(())
    }

    /// Looks the last batch up.
    ///
    /// # Errors
    /// As [`Rehearsing::send`].
    pub(super) async fn finish(&mut self, last: Batch, tally: &mut Tally) -> Result<(), Error> {
        if self.rehearsal.is_some() {
            return self.send(last, tally).await;
        }
        let received = last.len() as u64;
        let new = self.store.count_new(self.ids.workspace, last.into_sorted()).await?;
        tally.stored(received, new);
        Ok(())
    }
}
