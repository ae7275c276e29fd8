//! `ImportEntries`: stores a stream of messages in batches, in constant memory.
//!
//! Several batches are stored concurrently, each on its own connection, while the next one is
//! filled. When too many are in flight, nothing more is read, and HTTP/2's flow control slows the
//! sender down to the pace of the database.

mod claim;
mod memory;
mod runs;
mod sink;
mod sorting;

use std::sync::Arc;

use time::OffsetDateTime;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Status, Streaming};

use self::{
    claim::Claimed,
    memory::{Held, Memory, SLOW_AFTER},
    sink::{Counting, Storing},
    sorting::Sorters,
};
use super::{
    StreamLimits,
    auth::{Authenticator, Principal},
    convert::{self, Received},
    messages::Messages,
    status,
};
use crate::{
    domain::{BATCH_ENTRIES_MIN, Cause, Entry, Error, Reason, Tally, WorkspaceId},
    proto::{ImportEntriesRequest, ImportEntriesResponse},
    store::{ImportId, ImportIds, Store},
    telemetry::metrics,
};

/// The reason of entries without one, when the call has no default reason.
const DEFAULT_REASON: &str = "import";

/// Entries that are processed in one go, so that streams of bad entries, which cost the most, keep
/// no other call from the processor.
const TURN_ENTRIES: u64 = 256;

/// A batch of fewer entries is not worth a transaction of its own when memory is short.
const SHORT_BATCH_ENTRIES_MIN: usize = 1_000;

/// Repeats that may wait at the same time.
const REPEATS_MAX: usize = 16;

/// What all imports of a server share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Slots for repeats that wait for an import with the same idempotency key.
    repeats: Semaphore,
    sorters: Sorters,
    memory: Memory,
}

impl Shared {
    pub(super) fn new(limits: StreamLimits) -> Self {
        let sorters = Sorters::new(limits.sort_bytes_max, limits.sort_rows_min);
        Self { repeats: Semaphore::new(REPEATS_MAX), sorters, memory: Memory::new(limits.batch_bytes_max) }
    }
}

const BUSY_REPEAT: Error = Error::Unavailable {
    message: "Another call with the same idempotency key is running. Send this one again when that has ended, to get its answer.",
    source: None,
};

/// Imports a whole stream.
///
/// # Errors
/// A status with the counts so far in its `ErrorInfo`, unless the import never began. Batches
/// stored until then stay.
pub(super) async fn run(
    store: &Store,
    auth: Arc<Authenticator>,
    principal: Principal,
    limits: StreamLimits,
    Shared { repeats, sorters, memory }: &Shared,
    stream: Streaming<ImportEntriesRequest>,
) -> Result<ImportEntriesResponse, Status> {
    let mut messages = Messages::new(stream, auth, principal.clone(), limits.idle_timeout);
    let first = match messages.next().await {
        Ok(Some(first)) => first,
        Ok(None) => return Ok(ImportEntriesResponse::default()),
        Err(error) => return Err(status::of_import(error, &Tally::default())),
    };
    let options = first.options.clone().unwrap_or_default();
    let default_reason = convert::default_reason(options.default_reason, DEFAULT_REASON).map_err(status::from_error)?;
    let idempotency_key = convert::idempotency_key(options.request_id).map_err(status::from_error)?;
    let ids = ImportIds { workspace: principal.workspace, key: principal.key, import: ImportId::new() };
    let sink = if options.validate_only {
        Sink::Count(Counting::new(store.clone(), ids))
    } else {
        let claim = match idempotency_key {
            Some(idempotency_key) => {
                let sent = convert::sent(&first);
                let claimed = Claimed::wait_for(store, ids.workspace, ids.import, idempotency_key, &sent, &mut messages, repeats);
                match claimed.await.map_err(status::from_error)? {
                    Ok(claim) => Some(claim),
                    Err(replay) => return convert::replay(replay).map_err(status::from_error),
                }
            }
            None => None,
        };
        Sink::Store(Storing::new(store.clone(), ids, claim, limits, memory.clone(), sorters.clone()))
    };
    let (memory, workspace) = (memory.clone(), ids.workspace);
    let mut import = Import { limits, default_reason, memory, workspace, sink, sent: 0, tally: Tally::default() };
    let outcome = import.take_all(first, messages).await;
    if let Sink::Store(_) = import.sink {
        metrics::entries_rejected(import.tally.failed);
    }
    match outcome {
        Ok(()) => Ok(convert::tally(&import.tally)),
        Err(error) => {
            if let Sink::Store(storing) = &mut import.sink {
                storing.settle(&mut import.tally).await;
            }
            Err(status::of_import(error, &import.tally))
        }
    }
}

struct Import {
    limits: StreamLimits,
    default_reason: Reason,
    memory: Memory,
    workspace: WorkspaceId,
    sink: Sink,
    /// Batches that were sent.
    sent: usize,
    tally: Tally,
}

#[expect(clippy::large_enum_variant, reason = "there is one for each stream")]
enum Sink {
    Store(Storing),
    Count(Counting),
}

impl Import {
    async fn take_all(&mut self, first: ImportEntriesRequest, mut messages: Messages<ImportEntriesRequest>) -> Result<(), Error> {
        let mut filling = self.memory.begin(self.workspace, BATCH_ENTRIES_MIN).await?;
        let mut index = 0;
        let mut message = Some(first);
        while let Some(current) = message {
            let now = OffsetDateTime::now_utc();
            for received in convert::received(current)? {
                match received {
                    Received::Entry(entry) => {
                        let line = entry.line;
                        match convert::entry(entry, &self.default_reason, now) {
                            Ok(entry) => {
                                if filling.batch.is_full() || !filling.has_room_for(&entry) {
                                    filling = self.make_room(filling, &entry, &messages).await?;
                                }
                                filling.batch.push(&entry);
                            }
                            Err(failure) => self.tally.rejected(index, line, Cause::Failure(failure)),
                        }
                    }
                    Received::Unreadable { line, cause } => self.tally.rejected(index, line, cause),
                }
                index += 1;
                if index % TURN_ENTRIES == 0 {
                    tokio::task::yield_now().await;
                }
            }
            message = next(&mut messages, &mut filling).await?;
        }
        messages.recheck().await?;
        match &mut self.sink {
            Sink::Store(storing) => storing.finish(filling, &messages, &mut self.tally).await,
            Sink::Count(counting) => counting.finish(filling, &mut self.tally).await,
        }
    }

    /// Makes room for `entry` in the batch that is filled, or in the next one. A full batch is sent
    /// only now, when it is known not to be the last.
    async fn make_room(
        &mut self,
        mut filling: Held,
        entry: &Entry,
        messages: &Messages<ImportEntriesRequest>,
    ) -> Result<Held, Error> {
        if filling.batch.is_full() {
            filling = self.send(filling, messages).await?;
        }
        while !filling.has_room_for(entry) {
            let count = filling.batch.len();
            // Memory is short. What this import holds is stored first.
            if count >= BATCH_ENTRIES_MIN || (self.sent > 0 && count >= SHORT_BATCH_ENTRIES_MIN) {
                filling = self.send(filling, messages).await?;
                continue;
            }
            let waited = match &mut self.sink {
                Sink::Store(storing) => storing.wait_for_one(&mut self.tally).await?,
                Sink::Count(_) => false,
            };
            if !waited {
                filling.make_room_for(entry).await?;
                self.resume();
            }
        }
        Ok(filling)
    }

    /// Sends a batch, and begins the next one.
    async fn send(&mut self, full: Held, messages: &Messages<ImportEntriesRequest>) -> Result<Held, Error> {
        self.sent += 1;
        // The first batches are small, so that every connection has work soon.
        let is_small = self.sent < self.limits.batches_in_flight_max;
        let entries_max = if is_small { BATCH_ENTRIES_MIN } else { self.limits.batch_entries_max };
        messages.recheck().await?;
        match &mut self.sink {
            Sink::Store(storing) => storing.send(full, messages, &mut self.tally).await?,
            Sink::Count(counting) => counting.send(full, &mut self.tally).await?,
        }
        let next = self.memory.begin(self.workspace, entries_max).await?;
        self.resume();
        Ok(next)
    }

    /// Time that was spent waiting for memory is not the sender's.
    fn resume(&mut self) {
        if let Sink::Store(storing) = &mut self.sink {
            storing.resume();
        }
    }
}

/// The next message. While it does not come, the batch gives back memory that it does not take.
async fn next(messages: &mut Messages<ImportEntriesRequest>, filling: &mut Held) -> Result<Option<ImportEntriesRequest>, Error> {
    let next = messages.next();
    tokio::pin!(next);
    let message = match timeout(SLOW_AFTER, &mut next).await {
        Ok(message) => message,
        Err(_) => {
            filling.give_back();
            next.await
        }
    };
    filling.give_back();
    message
}
