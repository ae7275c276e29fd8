//! The memory of the batches of all imports.
//!
//! A stream of up to 10,000 entries is one transaction, so its entries wait in memory until the
//! last one has come, however slowly. Many such streams would take any amount. So a batch takes
//! what it needs from a budget, and holds it until it is stored.
//!
//! Streams of which each holds a part and waits for the rest would all wait. So a batch that grows
//! takes at once what the whole of it is expected to need, and streams take turns. A stream that
//! then sends slowly gives the excess back, and from there on takes only what it needs. What a
//! batch needs at first comes from a budget of its own: small imports do not wait for large ones.

use std::time::{Duration, Instant};

use crate::{
    domain::{Batch, Entry, Error, WorkspaceId},
    wire::budget::{Budget, Exhausted, Permit},
};

/// How long an import waits for memory. Streams at the pace of the database free it within seconds.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// What an import takes before its first entry. Many imports need no more.
const FIRST_BYTES: usize = 8 << 10;

/// The part of the memory from which the first bytes come: enough for hundreds of slow streams of
/// each workspace.
const FIRST_PART: usize = 4;

/// A batch that is not sent this long after it took memory is slow.
pub(super) const SLOW_AFTER: Duration = Duration::from_secs(5);

const BUSY: Error = Error::Unavailable {
    message: "Other imports take all the memory at the moment. Send the import again later; a repeat is safe.",
    source: None,
};

/// The budgets of all imports.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    first: Budget,
    more: Budget,
    batch_bytes_max: usize,
}

/// A batch with the memory it takes.
pub(super) struct Held {
    pub(super) batch: Batch,
    pub(super) memory: BatchMemory,
}

/// The memory of a batch. It is free again when this is dropped.
pub(super) struct BatchMemory {
    _first: Permit,
    more: Option<Permit>,
    budget: Memory,
    workspace: WorkspaceId,
    grown_at: Option<Instant>,
    is_slow: bool,
}

impl Memory {
    /// `bytes_max` bytes for all imports, of which a workspace may take a quarter.
    pub(super) fn new(bytes_max: usize) -> Self {
        let first = bytes_max / FIRST_PART;
        let more = bytes_max - first;
        Self {
            first: Budget::with_wait(first, WAIT_MAX),
            more: Budget::with_wait(more, WAIT_MAX),
            // Half of a workspace's part, so that some small batches fit beside a large one. A
            // larger batch counts as that.
            batch_bytes_max: more / 8,
        }
    }

    /// An empty batch of `workspace`, which is full at `entries_max`.
    ///
    /// # Errors
    /// When other imports take all the memory.
    pub(super) async fn begin(&self, workspace: WorkspaceId, entries_max: usize) -> Result<Held, Error> {
        let first = self.first.acquire(workspace.0.unsigned_abs(), FIRST_BYTES).await.map_err(|Exhausted| BUSY)?;
        let memory = BatchMemory { _first: first, more: None, budget: self.clone(), workspace, grown_at: None, is_slow: false };
        Ok(Held { batch: Batch::new(entries_max), memory })
    }
}

impl BatchMemory {
    fn bytes(&self) -> usize {
        FIRST_BYTES + self.more.as_ref().map_or(0, Permit::bytes)
    }

    /// The bytes of the second budget, for a batch of `bytes` in all.
    fn more_of(&self, bytes: usize) -> usize {
        bytes.min(self.budget.batch_bytes_max).saturating_sub(FIRST_BYTES)
    }

    fn try_hold(&mut self, bytes: usize) -> bool {
        let more = self.more_of(bytes);
        match &mut self.more {
            _ if more == 0 => true,
            Some(permit) => permit.try_grow(more),
            None => {
                self.more = self.budget.more.try_acquire(self.workspace.0.unsigned_abs(), more);
                self.more.is_some()
            }
        }
    }

    async fn hold(&mut self, bytes: usize) -> Result<(), Error> {
        let more = self.more_of(bytes);
        match &mut self.more {
            Some(permit) => permit.resize(more).await.map_err(|Exhausted| BUSY),
            None => {
                let permit = self.budget.more.acquire(self.workspace.0.unsigned_abs(), more).await;
                self.more = Some(permit.map_err(|Exhausted| BUSY)?);
                Ok(())
            }
        }
    }

    fn shrink(&mut self, bytes: usize) {
        match self.more_of(bytes) {
            0 => self.more = None,
            more => self.more.iter_mut().for_each(|permit| permit.shrink(more)),
        }
    }
}

impl Held {
    /// True when there is memory for `entry`. Takes more if it is free.
    pub(super) fn has_room_for(&mut self, entry: &Entry) -> bool {
        let bytes = self.batch.bytes_with(entry);
        if bytes <= self.memory.bytes() {
            return true;
        }
        let has_grown = self.memory.try_hold(self.wanted(bytes));
        if has_grown {
            self.memory.grown_at.get_or_insert_with(Instant::now);
        }
        has_grown
    }

    /// Waits for the memory that `entry` needs.
    ///
    /// # Errors
    /// When other imports take all the memory.
    pub(super) async fn make_room_for(&mut self, entry: &Entry) -> Result<(), Error> {
        let bytes = self.wanted(self.batch.bytes_with(entry));
        self.memory.hold(bytes).await?;
        self.memory.grown_at = Some(Instant::now());
        Ok(())
    }

    /// Gives back what the batch does not take, if its sender is slow.
    pub(super) fn give_back(&mut self) {
        if self.memory.grown_at.is_some_and(|at| at.elapsed() >= SLOW_AFTER) {
            self.memory.is_slow = true;
            self.memory.shrink(self.batch.bytes());
        }
    }

    /// True when there is memory for the batch as it is. Takes more if it is free, and gives back
    /// what the batch does not take.
    pub(super) fn fits(&mut self) -> bool {
        let bytes = self.batch.bytes();
        self.memory.shrink(bytes);
        self.memory.try_hold(bytes)
    }

    /// Waits for the memory that the batch takes.
    ///
    /// # Errors
    /// When other imports take all the memory.
    pub(super) async fn fit(&mut self) -> Result<(), Error> {
        self.memory.hold(self.batch.bytes()).await
    }

    /// What to take for a batch that needs `bytes`.
    fn wanted(&self, bytes: usize) -> usize {
        if self.memory.is_slow { bytes } else { bytes.max(self.batch.bytes_expected()) }
    }
}
