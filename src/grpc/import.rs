//! `ImportEntries`: from a stream of messages to stored batches, in constant memory.
//!
//! While some batches are at the database, each on its own connection, the next one is filled; when too many are there, nothing
//! more is read, so the pace of the database becomes the pace of the sender through HTTP/2's own flow control.

use std::time::Duration;

use tokio::{
    task::{JoinError, JoinSet},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};
use tracing::Instrument;

use super::{
    ImportLimits,
    auth::{Authenticator, Principal},
    convert, status,
};
use crate::{
    domain::{BATCH_ENTRIES_MIN, Batch, Error, Reason, Tally, WorkspaceId},
    proto::{ImportEntriesRequest, ImportEntriesResponse},
    store::{Answered, BatchCounts, Claim, End, ImportId, ImportIds, Rehearsal, Replay, Store},
};

/// The reason of entries without one, when the call has no default of its own.
const DEFAULT_REASON: &str = "import";

/// Imports a whole stream.
///
/// # Errors
/// A status with the counts so far in its `ErrorInfo`. Batches stored until then stay.
pub(super) async fn run(
    store: &Store,
    auth: &Authenticator,
    principal: Principal,
    limits: ImportLimits,
    mut messages: Streaming<ImportEntriesRequest>,
) -> Result<ImportEntriesResponse, Status> {
    let first = match next_message(&mut messages, limits).await {
        Ok(Some(first)) => first,
        Ok(None) => return Ok(ImportEntriesResponse::default()),
        Err(error) => return Err(status::of_import(error, &Tally::default())),
    };
    let options = first.options.clone().unwrap_or_default();
    let default_reason = convert::default_reason(options.default_reason, DEFAULT_REASON).map_err(status::from_error)?;
    let request_id = convert::request_id(options.request_id).map_err(status::from_error)?.filter(|_| !options.validate_only);
    let id = ImportId::new();
    let claim = match request_id {
        Some(request_id) => {
            match Claimed::wait_for(store, principal.workspace, id, request_id).await.map_err(status::from_error)? {
                Ok(claim) => Some(claim),
                Err(replay) => return convert::replay(replay).map_err(status::from_error),
            }
        }
        None => None,
    };
    let sink = if options.validate_only {
        Sink::Rehearse { store: store.clone(), rehearsal: None }
    } else {
        Sink::Store { store: store.clone(), import: id, in_flight: JoinSet::new(), claim, batches: 0 }
    };
    let mut import =
        Import { auth, principal, limits, default_reason, sink, tally: Tally::default(), failed_logged: 0, unlogged: (0, 0) };
    match import.take_all(first, messages).await {
        Ok(()) => Ok(convert::tally(&import.tally)),
        Err(error) => {
            import.settle().await;
            Err(status::of_import(error, &import.tally))
        }
    }
}

/// A request id that is this import's own. Renewed in the background until it is dropped; then, unless the import has succeeded, given back, so that
/// the next try need not wait.
struct Claimed {
    store: Store,
    workspace: WorkspaceId,
    import: ImportId,
    request_id: String,
    _renewing: AbortOnDropHandle<()>,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let (store, workspace, import) = (self.store.clone(), self.workspace, self.import);
        let request_id = std::mem::take(&mut self.request_id);
        tokio::spawn(async move {
            if let Err(error) = store.release_claim(workspace, import, &request_id).await {
                tracing::debug!(cause = %error, "a request id stays claimed until its lease ends");
            }
        });
    }
}

impl Claimed {
    /// Claims the id, or waits until the import that has it is done and answers its outcome.
    async fn wait_for(
        store: &Store,
        workspace: WorkspaceId,
        import: ImportId,
        request_id: String,
    ) -> Result<Result<Self, Replay>, Error> {
        let mut pause = Duration::from_millis(20);
        loop {
            match store.claim_request(workspace, import, &request_id).await? {
                Claim::Mine => break,
                Claim::Done(replay) => return Ok(Err(replay)),
                Claim::Busy => {
                    tokio::time::sleep(pause).await;
                    pause = (2 * pause).min(Duration::from_secs(1));
                }
            }
        }
        let renewing = tokio::spawn({
            let (store, request_id) = (store.clone(), request_id.clone());
            async move {
                loop {
                    tokio::time::sleep(Store::LEASE / 3).await;
                    if let Err(error) = store.renew_claim(workspace, import, &request_id).await {
                        tracing::warn!(cause = %error, "a request id could not be renewed");
                    }
                }
            }
        });
        Ok(Ok(Self { store: store.clone(), workspace, import, request_id, _renewing: AbortOnDropHandle::new(renewing) }))
    }
}

async fn next_message(
    messages: &mut Streaming<ImportEntriesRequest>,
    limits: ImportLimits,
) -> Result<Option<ImportEntriesRequest>, Error> {
    match timeout(limits.idle_timeout, messages.message()).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(broken)) => Err(status::of_message(&broken)),
        Err(_) => Err(Error::Timeout {
            message: "The stream sent nothing for too long. Send all of it again; what is stored is skipped.",
            source: None,
        }),
    }
}

struct Import<'a> {
    auth: &'a Authenticator,
    principal: Principal,
    limits: ImportLimits,
    default_reason: Reason,
    sink: Sink,
    tally: Tally,
    /// How many of the refused entries were given to a batch to log.
    failed_logged: u64,
    /// Skipped and failed entries that only the end of the import can log.
    unlogged: (u64, u64),
}

/// Where batches go.
enum Sink {
    /// Into the table, several at once.
    Store { store: Store, import: ImportId, in_flight: JoinSet<Result<Stored, Error>>, claim: Option<Claimed>, batches: u64 },
    /// Nowhere: one batch after the other is only looked up. The session for it is opened when a second batch turns out to be needed.
    Rehearse { store: Store, rehearsal: Option<Rehearsal> },
}

impl Import<'_> {
    async fn take_all(&mut self, first: ImportEntriesRequest, mut messages: Streaming<ImportEntriesRequest>) -> Result<(), Error> {
        let mut batch = Batch::new(BATCH_ENTRIES_MIN);
        let mut sent = 0;
        let mut index = 0;
        let mut message = Some(first);
        while let Some(current) = message {
            for entry in current.entries {
                match convert::entry(entry, &self.default_reason) {
                    Ok(entry) => {
                        // A full batch waits for the entry after it: only then is it known not to be the last.
                        if batch.is_full() {
                            sent += 1;
                            // The first ones are small, so that every connection has something to do soon.
                            let is_first = sent < self.limits.batches_in_flight_max;
                            let entries_max = if is_first { BATCH_ENTRIES_MIN } else { self.limits.batch_entries_max };
                            let full = std::mem::replace(&mut batch, Batch::new(entries_max));
                            self.send(full, false).await?;
                        }
                        batch.push(&entry);
                    }
                    Err(failure) => self.tally.refused(index, failure),
                }
                index += 1;
            }
            message = next_message(&mut messages, self.limits).await?;
        }
        if index > 0 {
            self.send(batch, true).await?;
        }
        Ok(())
    }

    /// Brings a batch on its way, and waits while too many are. A batch that is the whole import ends it in its own transaction, so that
    /// everything of it is there or nothing; a longer import is ended after all its batches are stored.
    async fn send(&mut self, batch: Batch, is_last: bool) -> Result<(), Error> {
        // A stream can outlive its key.
        self.auth.recheck(&self.principal).await?;
        let received = batch.len() as u64;
        let Principal { workspace, key, .. } = self.principal;
        match &mut self.sink {
            Sink::Store { store, import, in_flight, claim, batches } => {
                while in_flight.len() >= self.limits.batches_in_flight_max {
                    collect_one(in_flight, &mut self.tally, &mut self.unlogged).await?;
                }
                let ids = ImportIds { workspace, key, import: *import };
                let failed = self.tally.failed - std::mem::replace(&mut self.failed_logged, self.tally.failed);
                let end = is_last.then(|| End {
                    answers: claim.as_ref().map(|claim| Answered {
                        request_id: claim.request_id.clone(),
                        errors: convert::errors_to_keep(&self.tally),
                    }),
                });
                let is_whole = is_last && *batches == 0 && !batch.is_empty();
                let number = *batches;
                *batches += 1;
                let (now, later) = if is_whole { (end, None) } else { (None, end) };
                // Of an empty batch only its refused entries are left to be logged.
                let failed_later = if batch.is_empty() { failed } else { 0 };
                if !batch.is_empty() {
                    let (store, counts) = (store.clone(), BatchCounts { batch: number, received, failed, end: now });
                    let insert = async move {
                        let imported = store.insert_batch(ids, &batch.into_sorted(), &counts).await?;
                        let is_logged = imported > 0 || counts.must_be_logged();
                        Ok(Stored { received, imported, unlogged: (!is_logged).then_some((received, failed)) })
                    };
                    in_flight.spawn(insert.in_current_span());
                }
                // Takes what is done already, so that an error ends the import early.
                while let Some(done) = in_flight.try_join_next() {
                    collect(done, &mut self.tally, &mut self.unlogged)?;
                }
                if is_last {
                    while !in_flight.is_empty() {
                        collect_one(in_flight, &mut self.tally, &mut self.unlogged).await?;
                    }
                }
                if let Some(end) = later {
                    // Taken, so that nothing is logged twice if only the answer is lost.
                    let (skipped, failed) = std::mem::take(&mut self.unlogged);
                    store.end_import(ids, skipped, failed + failed_later, Some(&end)).await?;
                }
            }
            Sink::Rehearse { store, rehearsal } => {
                let entries = &batch.into_sorted();
                let new = match rehearsal {
                    None if is_last => store.count_new(workspace, entries).await?,
                    None => rehearsal.insert(store.rehearse().await?).count_new(workspace, entries).await?,
                    Some(rehearsal) => rehearsal.count_new(workspace, entries).await?,
                };
                self.tally.stored(received, new);
            }
        }
        Ok(())
    }

    /// After an error: waits for the batches that are still on their way, so that the counts include every one that was stored.
    async fn settle(&mut self) {
        if let Sink::Store { store, import, in_flight, batches, .. } = &mut self.sink {
            while !in_flight.is_empty() {
                // The first error is the one that is reported; those of the batches beside it have the same cause.
                let _ = collect_one(in_flight, &mut self.tally, &mut self.unlogged).await;
            }
            if *batches > 1 {
                let ids = ImportIds { workspace: self.principal.workspace, key: self.principal.key, import: *import };
                let (skipped, failed) = self.unlogged;
                if let Err(error) = store.end_import(ids, skipped, failed, None).await {
                    tracing::warn!(cause = %error, "the log of a broken import stays in parts");
                }
            }
        }
    }
}

/// A batch that is in the table.
struct Stored {
    received: u64,
    imported: u64,
    /// Skipped and failed entries that are not in the log yet.
    unlogged: Option<(u64, u64)>,
}

async fn collect_one(
    in_flight: &mut JoinSet<Result<Stored, Error>>,
    tally: &mut Tally,
    unlogged: &mut (u64, u64),
) -> Result<(), Error> {
    match in_flight.join_next().await {
        Some(done) => collect(done, tally, unlogged),
        None => Ok(()),
    }
}

fn collect(done: Result<Result<Stored, Error>, JoinError>, tally: &mut Tally, unlogged: &mut (u64, u64)) -> Result<(), Error> {
    let stored = done.map_err(Error::internal)??;
    tally.stored(stored.received, stored.imported);
    if let Some((skipped, failed)) = stored.unlogged {
        unlogged.0 += skipped;
        unlogged.1 += failed;
    }
    Ok(())
}
