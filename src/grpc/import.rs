//! `ImportEntries`: from a stream of messages to stored batches, in constant memory.
//!
//! While some batches are at the database, each on its own connection, the next one is filled; when too many are there, nothing
//! more is read, so the pace of the database becomes the pace of the sender through HTTP/2's own flow control.
//!
//! The first batch is stored before the second is sent: it brings the import's row of the log with it, so that no entry is on a list without one.

use std::{collections::VecDeque, time::Duration};

use prost::Message;
use tokio::{
    sync::Semaphore,
    task::{JoinError, JoinSet},
    time::{Instant, sleep, sleep_until, timeout_at},
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
    domain::{BATCH_ENTRIES_MIN, Batch, Error, Fingerprint, Reason, Tally, WorkspaceId},
    proto::{Entry, ImportEntriesRequest, ImportEntriesResponse},
    store::{Answered, Claim, End, FirstBatch, ImportId, ImportIds, Rehearsal, Replay, Store},
};

/// The reason of entries without one, when the call has no default of its own.
const DEFAULT_REASON: &str = "import";

/// How often the key of a stream is looked at again, so that a revoked one is refused in time however slowly the stream comes.
const RECHECK_INTERVAL: Duration = Duration::from_millis(1_500);

/// How long a repeat waits for the import that has its request id.
const REPEAT_TIMEOUT: Duration = Duration::from_secs(60);

/// How much of a repeat is read and kept while it waits, beside its first message.
const AHEAD_BYTES_MAX: usize = 2 << 20;

/// Repeats that may wait at once.
pub(super) const REPEATS_MAX: usize = 16;

/// Imports a whole stream.
///
/// # Errors
/// A status with the counts so far in its `ErrorInfo`. Batches stored until then stay.
pub(super) async fn run(
    store: &Store,
    auth: &Authenticator,
    principal: Principal,
    limits: ImportLimits,
    repeats: &Semaphore,
    messages: Streaming<ImportEntriesRequest>,
) -> Result<ImportEntriesResponse, Status> {
    let mut messages = Messages::new(messages, auth, &principal, limits);
    let first = match messages.next().await {
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
            let waited = Claimed::wait_for(store, principal.workspace, id, request_id, &first.entries, &mut messages, repeats);
            match waited.await.map_err(status::from_error)? {
                Ok(claim) => Some(claim),
                Err(replay) => return convert::replay(replay).map_err(status::from_error),
            }
        }
        None => None,
    };
    let sink = if options.validate_only {
        Sink::Rehearse { rehearsal: None }
    } else {
        Sink::Store { import: id, in_flight: JoinSet::new(), claim, batches: 0 }
    };
    let mut import = Import { store, principal: &principal, limits, default_reason, sink, tally: Tally::default() };
    match import.take_all(first, messages).await {
        Ok(()) => {
            if let Sink::Store { claim: Some(claim), .. } = &mut import.sink {
                claim.is_answered = true;
            }
            Ok(convert::tally(&import.tally))
        }
        Err(error) => {
            import.settle().await;
            Err(status::of_import(error, &import.tally))
        }
    }
}

/// The messages of a stream, as long as its key is good and it does not stand still.
struct Messages<'a> {
    stream: Streaming<ImportEntriesRequest>,
    /// What was read before its turn, encoded: so it takes a fraction of the memory.
    ahead: VecDeque<Vec<u8>>,
    ahead_bytes: usize,
    has_ended: bool,
    auth: &'a Authenticator,
    principal: &'a Principal,
    limits: ImportLimits,
    checked_at: Instant,
}

impl<'a> Messages<'a> {
    fn new(
        stream: Streaming<ImportEntriesRequest>,
        auth: &'a Authenticator,
        principal: &'a Principal,
        limits: ImportLimits,
    ) -> Self {
        let checked_at = Instant::now();
        Self { stream, ahead: VecDeque::new(), ahead_bytes: 0, has_ended: false, auth, principal, limits, checked_at }
    }

    async fn next(&mut self) -> Result<Option<ImportEntriesRequest>, Error> {
        match self.ahead.pop_front() {
            Some(message) => ImportEntriesRequest::decode(message.as_slice()).map(Some).map_err(Error::internal),
            None if self.has_ended => Ok(None),
            None => self.receive().await,
        }
    }

    async fn receive(&mut self) -> Result<Option<ImportEntriesRequest>, Error> {
        let idle_at = Instant::now() + self.limits.idle_timeout;
        loop {
            let check_at = self.checked_at + RECHECK_INTERVAL;
            if check_at <= Instant::now() {
                self.auth.recheck(self.principal).await?;
                self.checked_at = Instant::now();
                continue;
            }
            tokio::select! {
                message = self.stream.message() => return message.map_err(|broken| status::of_message(&broken)),
                () = sleep_until(check_at.min(idle_at)) => {}
            }
            if idle_at <= Instant::now() {
                return Err(Error::Timeout {
                    message: "The stream sent nothing for too long. Send all of it again; what is stored is skipped.",
                    source: None,
                });
            }
        }
    }

    /// Reads the stream to its end.
    ///
    /// # Errors
    /// [`BUSY_REPEAT`] when it is longer than what may be kept.
    async fn read_ahead(&mut self) -> Result<(), Error> {
        while !self.has_ended {
            match self.receive().await? {
                Some(message) => {
                    self.ahead_bytes += message.encoded_len();
                    self.ahead.push_back(message.encode_to_vec());
                    if self.ahead_bytes > AHEAD_BYTES_MAX {
                        return Err(BUSY_REPEAT);
                    }
                }
                None => self.has_ended = true,
            }
        }
        Ok(())
    }
}

/// A request id that is this import's own. Renewed in the background until it is dropped; then, unless the import has succeeded, given back, so that
/// the next try need not wait.
struct Claimed {
    store: Store,
    workspace: WorkspaceId,
    import: ImportId,
    request_id: String,
    /// True once the import has succeeded, and the id with it.
    is_answered: bool,
    _renewing: AbortOnDropHandle<()>,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if self.is_answered {
            return;
        }
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
    /// Claims the id, or waits until the import that has it is done and answers its outcome. Reads on meanwhile: what is sent and not read would
    /// stand in the way of all other calls on its connection. A stream that is too long for that does not wait.
    async fn wait_for(
        store: &Store,
        workspace: WorkspaceId,
        import: ImportId,
        request_id: String,
        first: &[Entry],
        messages: &mut Messages<'_>,
        repeats: &Semaphore,
    ) -> Result<Result<Self, Replay>, Error> {
        let sent = || first.iter().map(|entry| (entry.email.as_str(), entry.r#type, entry.reason.as_str()));
        let require_same = |kept: Option<Fingerprint>| match kept {
            Some(kept) if !kept.fits(sent()) => {
                Err(Error::Conflict("This request id belongs to an import of other entries. Use another one for each import."))
            }
            _ => Ok(()),
        };
        let fingerprint = Fingerprint::of(sent());
        let give_up_at = Instant::now() + REPEAT_TIMEOUT;
        let mut waiting = None;
        let mut pause = Duration::from_millis(20);
        loop {
            match store.claim_request(workspace, import, &request_id, &fingerprint).await? {
                Claim::Mine => break,
                Claim::Done(replay, kept) => {
                    require_same(kept)?;
                    return Ok(Err(replay));
                }
                Claim::Busy(kept) => require_same(kept)?,
            }
            if waiting.is_none() {
                waiting = Some(repeats.try_acquire().map_err(|_| BUSY_REPEAT)?);
            }
            let next_try = Instant::now() + pause;
            if let Ok(read) = timeout_at(next_try, messages.read_ahead()).await {
                read?;
            }
            sleep_until(next_try).await;
            if give_up_at <= Instant::now() {
                return Err(BUSY_REPEAT);
            }
            pause = (2 * pause).min(Duration::from_secs(1));
        }
        let renewing = tokio::spawn({
            let (store, request_id) = (store.clone(), request_id.clone());
            async move {
                loop {
                    sleep(Store::LEASE / 3).await;
                    if let Err(error) = store.renew_claim(workspace, import, &request_id).await {
                        tracing::warn!(cause = %error, "a request id could not be renewed");
                    }
                }
            }
        });
        Ok(Ok(Self {
            store: store.clone(),
            workspace,
            import,
            request_id,
            is_answered: false,
            _renewing: AbortOnDropHandle::new(renewing),
        }))
    }
}

const BUSY_REPEAT: Error = Error::Unavailable {
    message: "Another call with the same request id runs now. Send this one again when it has ended, to get its answer.",
    source: None,
};

struct Import<'a> {
    store: &'a Store,
    principal: &'a Principal,
    limits: ImportLimits,
    default_reason: Reason,
    sink: Sink,
    tally: Tally,
}

/// Where batches go.
enum Sink {
    /// Into the table, several at once.
    Store { import: ImportId, in_flight: JoinSet<Result<Stored, Error>>, claim: Option<Claimed>, batches: usize },
    /// Nowhere: one batch after the other is only looked up, and remembered once a second one turns out to be needed.
    Rehearse { rehearsal: Option<Rehearsal> },
}

impl Import<'_> {
    async fn take_all(&mut self, first: ImportEntriesRequest, mut messages: Messages<'_>) -> Result<(), Error> {
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
                            self.send(full, false, messages.auth).await?;
                        }
                        batch.push(&entry);
                    }
                    Err(failure) => self.tally.refused(index, failure),
                }
                index += 1;
            }
            message = messages.next().await?;
        }
        self.send(batch, true, messages.auth).await
    }

    /// Brings a batch on its way, and waits while too many are. A batch that is the whole import ends it in its own transaction, so that
    /// everything of it is there or nothing; a longer import is ended after all its batches are stored.
    async fn send(&mut self, batch: Batch, is_last: bool, auth: &Authenticator) -> Result<(), Error> {
        // A stream can outlive its key.
        auth.recheck(self.principal).await?;
        let received = batch.len() as u64;
        let Principal { workspace, key, .. } = *self.principal;
        match &mut self.sink {
            Sink::Store { import, in_flight, claim, batches } => {
                let in_flight_max = if *batches == 1 { 1 } else { self.limits.batches_in_flight_max };
                while in_flight.len() >= in_flight_max {
                    collect_one(in_flight, &mut self.tally).await?;
                }
                let ids = ImportIds { workspace, key, import: *import };
                let end = is_last.then(|| End {
                    answers: claim.as_ref().map(|claim| Answered {
                        request_id: claim.request_id.clone(),
                        errors: convert::errors_to_keep(&self.tally),
                    }),
                });
                let is_first = *batches == 0;
                let mut later = end;
                if !batch.is_empty() {
                    *batches += 1;
                    let first = is_first.then(|| FirstBatch { received, failed: self.tally.failed, end: later.take() });
                    let store = self.store.clone();
                    let insert = async move {
                        let imported = store.insert_batch(ids, batch.into_sorted(), first).await?;
                        Ok(Stored { received, imported })
                    };
                    in_flight.spawn(insert.in_current_span());
                }
                // Takes what is done already, so that an error ends the import early.
                while let Some(done) = in_flight.try_join_next() {
                    collect(done, &mut self.tally)?;
                }
                if is_last {
                    while !in_flight.is_empty() {
                        collect_one(in_flight, &mut self.tally).await?;
                    }
                }
                if let Some(end) = later {
                    self.store.end_import(ids, &self.tally, Some(end)).await?;
                }
            }
            Sink::Rehearse { rehearsal } => {
                let entries = batch.into_sorted();
                let new = match rehearsal {
                    None if is_last => self.store.count_new(workspace, entries).await?,
                    _ => rehearsal.get_or_insert_with(|| self.store.rehearse(workspace)).count_new(entries).await?,
                };
                self.tally.stored(received, new);
            }
        }
        Ok(())
    }

    /// After an error: waits for the batches that are still on their way, so that the counts include every one that was stored.
    async fn settle(&mut self) {
        if let Sink::Store { import, in_flight, batches, .. } = &mut self.sink {
            while !in_flight.is_empty() {
                // The first error is the one that is reported; those of the batches beside it have the same cause.
                let _ = collect_one(in_flight, &mut self.tally).await;
            }
            // While the database is away, the row keeps what was known when it was written last.
            if *batches > 1 && self.store.is_reachable() {
                let ids = ImportIds { workspace: self.principal.workspace, key: self.principal.key, import: *import };
                if let Err(error) = self.store.end_import(ids, &self.tally, None).await {
                    tracing::warn!(cause = %error, "the log of a broken import has the counts of its first batch alone");
                }
            }
        }
    }
}

/// A batch that is in the table.
struct Stored {
    received: u64,
    imported: u64,
}

async fn collect_one(in_flight: &mut JoinSet<Result<Stored, Error>>, tally: &mut Tally) -> Result<(), Error> {
    match in_flight.join_next().await {
        Some(done) => collect(done, tally),
        None => Ok(()),
    }
}

fn collect(done: Result<Result<Stored, Error>, JoinError>, tally: &mut Tally) -> Result<(), Error> {
    let stored = done.map_err(Error::internal)??;
    tally.stored(stored.received, stored.imported);
    Ok(())
}
