//! Brings a long import into the order of the table's key before it is stored.
//!
//! Two sets of sorted runs take turns: one is filled with what arrives, while the entries of the
//! other go to the database in order, at the same pace. So the sender is seldom kept
//! waiting for longer than a few batches take, and the database is kept busy. At the end, and when
//! the sender becomes slow, a whole set is stored at once.
//!
//! A set is small enough to be stored within half a minute: whoever waits for the answer, and each
//! proxy between, has a time limit.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};

use super::{
    memory::Held,
    runs::{Merge, Merged, Runs},
    sink::Inserts,
};
use crate::{
    domain::{Error, Tally},
    grpc::messages::Messages,
    proto::ImportEntriesRequest,
};

/// Imports that may be sorted at the same time. Others are stored in the order of arrival.
const IMPORTS_MAX: u64 = 4;

/// Runs of a set. The set of an ordinary import has a third of them.
const RUNS_MAX: usize = 256;

/// A sender that takes longer than this for a run is slower than the database, which then gains
/// nothing from the order.
const RUN_TIMEOUT: Duration = Duration::from_secs(1);

/// The temporary files that a server may use, shared by its imports.
#[derive(Clone, Debug)]
pub(super) struct Sorters {
    free: Arc<Semaphore>,
    set_bytes_max: u64,
    rows_min: u64,
}

impl Sorters {
    /// Temporary files of `bytes_max` bytes in all, for imports into lists of at least `rows_min`
    /// entries.
    pub(super) fn new(bytes_max: u64, rows_min: u64) -> Self {
        let set_bytes_max = bytes_max / (2 * IMPORTS_MAX);
        let free = if set_bytes_max == 0 { 0 } else { IMPORTS_MAX as usize };
        Self { free: Arc::new(Semaphore::new(free)), set_bytes_max, rows_min }
    }

    /// Begins to sort an import into a list of `rows` entries. None when that gains nothing, or
    /// when too many other imports are being sorted. Sorted batches have up to
    /// `batch_entries_max` entries.
    pub(super) fn begin(&self, rows: u64, batch_entries_max: usize) -> Option<Sorting> {
        if rows < self.rows_min {
            return None;
        }
        let slot = self.free.clone().try_acquire_owned().ok()?;
        Some(Sorting {
            _slot: slot,
            set_bytes_max: self.set_bytes_max,
            batch_entries_max,
            filling: None,
            emptying: None,
            asked_at: Instant::now(),
        })
    }
}

/// The entries of an import that are not at the database yet.
pub(super) struct Sorting {
    _slot: OwnedSemaphorePermit,
    set_bytes_max: u64,
    batch_entries_max: usize,
    filling: Option<Runs>,
    emptying: Option<Merge>,
    /// When the sender was last asked for more.
    asked_at: Instant,
}

impl Sorting {
    /// Adds a batch to the set that is filled, and sends about as many entries of the other one.
    /// Returns false when sorting has ended and all entries are sent: the sender is slow, or the
    /// temporary file cannot be written.
    ///
    /// # Errors
    /// When a file cannot be read, when the key of `messages` is no longer valid, and those of
    /// `inserts`.
    pub(super) async fn take(
        &mut self,
        held: Held,
        messages: &Messages<ImportEntriesRequest>,
        inserts: &mut Inserts,
        tally: &mut Tally,
    ) -> Result<bool, Error> {
        let received = held.batch.len() as u64;
        let is_slow = self.asked_at.elapsed() > RUN_TIMEOUT;
        let rest = if is_slow { Some((held, 0)) } else { self.add(held).await? };
        if rest.is_some() {
            self.send_all(rest, messages, inserts, tally).await?;
            return Ok(false);
        }
        let mut sent = 0;
        while (sent < received || self.is_full())
            && let Some(sorted) = self.next_of_emptied().await?
        {
            messages.recheck().await?;
            sent += sorted.batch.len() as u64 + sorted.repeats;
            inserts.send_merged(sorted, tally).await?;
        }
        if self.is_full() {
            self.turn().await?;
        }
        self.asked_at = Instant::now();
        Ok(true)
    }

    /// The sender is asked for more only now.
    pub(super) fn resume(&mut self) {
        self.asked_at = Instant::now();
    }

    /// Sends all entries, `last` included.
    ///
    /// # Errors
    /// As [`Sorting::take`].
    pub(super) async fn finish(
        &mut self,
        last: Held,
        messages: &Messages<ImportEntriesRequest>,
        inserts: &mut Inserts,
        tally: &mut Tally,
    ) -> Result<(), Error> {
        let rest = self.add(last).await?;
        self.send_all(rest, messages, inserts, tally).await
    }

    /// Sends the entries of both sets, and then `rest`.
    async fn send_all(
        &mut self,
        rest: Option<(Held, u64)>,
        messages: &Messages<ImportEntriesRequest>,
        inserts: &mut Inserts,
        tally: &mut Tally,
    ) -> Result<(), Error> {
        while let Some(sorted) = self.next().await? {
            messages.recheck().await?;
            inserts.send_merged(sorted, tally).await?;
        }
        match rest {
            Some((rest, repeats)) => inserts.send(rest, repeats, tally, None).await,
            None => Ok(()),
        }
    }

    /// Adds a run to the set that is filled. Returns its entries when the file cannot be written;
    /// what was added before can still be read.
    async fn add(&mut self, held: Held) -> Result<Option<(Held, u64)>, Error> {
        let filling = self.filling.take();
        let add = move || {
            let Held { batch, memory } = held;
            let received = batch.len() as u64;
            let run = batch.into_sorted();
            let repeats = received - run.len() as u64;
            let (filling, added) = match filling.map_or_else(Runs::new, Ok) {
                Ok(mut runs) => {
                    let added = runs.add(&run, repeats);
                    (Some(runs), added)
                }
                Err(error) => (None, Err(error)),
            };
            let rest = added.err().map(|cause| {
                tracing::warn!(%cause, "a temporary file cannot be written; an import is stored in the order of arrival");
                (Held { batch: run.into_batch(), memory }, repeats)
            });
            (filling, rest)
        };
        let (filling, rest) = spawn_blocking(add).await.map_err(Error::internal)?;
        self.filling = filling;
        Ok(rest)
    }

    /// True when the set that is filled is full. Each run takes memory when it is merged, so their
    /// number is limited, too.
    fn is_full(&self) -> bool {
        self.filling.as_ref().is_some_and(|runs| runs.bytes() >= self.set_bytes_max || runs.count() >= RUNS_MAX)
    }

    /// Begins to empty the set that was filled. The other one must be empty.
    async fn turn(&mut self) -> Result<(), Error> {
        if let Some(runs) = self.filling.take() {
            let entries_max = self.batch_entries_max;
            let merge = spawn_blocking(move || runs.merge(entries_max)).await.map_err(Error::internal)?;
            self.emptying = Some(merge.map_err(unreadable)?);
        }
        Ok(())
    }

    /// The next sorted entries of both sets; none when both are empty.
    async fn next(&mut self) -> Result<Option<Merged>, Error> {
        if let Some(next) = self.next_of_emptied().await? {
            return Ok(Some(next));
        }
        self.turn().await?;
        self.next_of_emptied().await
    }

    /// The next entries of the set that is emptied; none when it is empty.
    async fn next_of_emptied(&mut self) -> Result<Option<Merged>, Error> {
        let Some(mut merge) = self.emptying.take() else { return Ok(None) };
        let next = move || {
            let next = merge.next();
            (merge, next)
        };
        let (merge, next) = spawn_blocking(next).await.map_err(Error::internal)?;
        let next = next.map_err(unreadable)?;
        self.emptying = next.is_some().then_some(merge);
        Ok(next)
    }
}

fn unreadable(error: io::Error) -> Error {
    Error::Unavailable {
        message: "The server cannot read its temporary files. Send the import again; a repeat is safe.",
        source: Some(Box::new(error)),
    }
}
