//! The memory of the batches of all imports.
//!
//! A stream of up to 10,000 entries is one transaction, so its entries wait in memory until the
//! last one has come, however slowly. Many such streams would take any amount. So a batch takes
//! what it needs from one budget as it grows, and holds it until it is stored.

use std::time::Duration;

use crate::{
    domain::{Batch, Entry, Error, WorkspaceId},
    wire::budget::{Budget, Exhausted, Permit},
};

/// How long an import waits for memory. Streams at the pace of the database free it within seconds.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// What an import takes before its first entry. Many imports need no more.
const FIRST_BYTES: usize = 16 << 10;

/// What a batch takes more at a time. One step is enough for 10,000 ordinary entries: streams that
/// take turns are stored, while streams of which each has a part would all wait.
const STEP_BYTES: usize = 2 << 20;

const BUSY: Error = Error::Unavailable {
    message: "Other imports take all the memory at the moment. Send the import again later; a repeat is safe.",
    source: None,
};

/// The budget of all imports.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    budget: Budget,
    permit_bytes_max: usize,
}

/// A batch with the memory it takes.
pub(super) struct Held {
    pub(super) batch: Batch,
    pub(super) permit: Permit,
    pub(super) permit_bytes_max: usize,
}

impl Memory {
    pub(super) fn new(bytes_max: usize) -> Self {
        // Half of a workspace's part, so that a batch and many that have just begun fit beside each
        // other. A larger batch counts as that.
        Self { budget: Budget::with_wait(bytes_max, WAIT_MAX), permit_bytes_max: bytes_max / 8 }
    }

    /// An empty batch of `workspace`, which is full at `entries_max`.
    ///
    /// # Errors
    /// When other imports take all the memory.
    pub(super) async fn begin(&self, workspace: WorkspaceId, entries_max: usize) -> Result<Held, Error> {
        let permit = self.budget.acquire(workspace.0.unsigned_abs(), FIRST_BYTES).await.map_err(|Exhausted| BUSY)?;
        Ok(Held { batch: Batch::new(entries_max), permit, permit_bytes_max: self.permit_bytes_max })
    }
}

impl Held {
    /// True when there is memory for `entry`. Takes more if it is free.
    pub(super) fn has_room_for(&mut self, entry: &Entry) -> bool {
        let bytes = self.batch.bytes_with(entry);
        bytes <= self.permit.bytes() || self.permit.try_grow(self.next_step(bytes))
    }

    /// Waits for the memory that `entry` needs.
    ///
    /// # Errors
    /// When other imports take all the memory.
    pub(super) async fn make_room_for(&mut self, entry: &Entry) -> Result<(), Error> {
        let bytes = self.next_step(self.batch.bytes_with(entry));
        self.permit.resize(bytes).await.map_err(|Exhausted| BUSY)
    }

    fn next_step(&self, bytes: usize) -> usize {
        bytes.max(self.permit.bytes() + STEP_BYTES).min(self.permit_bytes_max)
    }

    /// True when there is memory for the batch as it is. Takes more if it is free, and releases
    /// what the batch does not take.
    pub(super) fn fits(&mut self) -> bool {
        let bytes = self.batch.bytes().min(self.permit_bytes_max);
        self.permit.shrink(bytes);
        self.permit.try_grow(bytes)
    }

    /// Waits for the memory that the batch takes.
    ///
    /// # Errors
    /// When other imports take all the memory.
    pub(super) async fn fit(&mut self) -> Result<(), Error> {
        self.permit.resize(self.batch.bytes().min(self.permit_bytes_max)).await.map_err(|Exhausted| BUSY)
    }
}
