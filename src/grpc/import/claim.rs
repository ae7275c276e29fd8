//! Idempotency keys: an import claims its key, and a repeat waits for the answer of the import that
//! has it.

use std::time::Duration;

use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::BUSY_REPEAT;
use crate::{
    domain::{Error, Fingerprint, Sent, WorkspaceId},
    grpc::messages::Messages,
    proto::ImportEntriesRequest,
    store::{Claim, ImportId, Replay, Store},
};

/// How long a repeat waits for the import that has its idempotency key.
const REPEAT_TIMEOUT: Duration = Duration::from_secs(60);

/// The pause before another attempt to release a claim.
const RELEASE_PAUSE: Duration = Duration::from_secs(1);

/// An idempotency key that this import has claimed. The claim is renewed in the background until
/// this is dropped. Unless the import has succeeded, the claim is then released, so that the next
/// try need not wait.
pub(super) struct Claimed {
    store: Store,
    workspace: WorkspaceId,
    import: ImportId,
    pub(super) idempotency_key: String,
    /// True once the import has succeeded. The key then keeps its answer.
    pub(super) is_answered: bool,
    _renewing: AbortOnDropHandle<()>,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if self.is_answered {
            return;
        }
        let (store, workspace, import) = (self.store.clone(), self.workspace, self.import);
        let idempotency_key = std::mem::take(&mut self.idempotency_key);
        tokio::spawn(async move {
            let lease_ends_at = Instant::now() + Store::LEASE;
            while let Err(error) = store.release_claim(workspace, import, &idempotency_key).await {
                if Instant::now() >= lease_ends_at {
                    tracing::debug!(cause = %error, "an idempotency key stays claimed until its lease ends");
                    return;
                }
                sleep(RELEASE_PAUSE).await;
            }
        });
    }
}

impl Claimed {
    /// Claims the key for an import whose first message contains `first`. If another import has the
    /// key, waits up to 60 seconds until that one is done, and returns its outcome. Reads the
    /// stream ahead while it waits: bytes that are sent and not read would block all other calls on
    /// the connection.
    ///
    /// # Errors
    /// [`Error::Conflict`] when the key belongs to an import of other entries.
    /// [`Error::Unavailable`] when the other import does not end in time, when too many repeats
    /// wait, or when the stream is too long to be read ahead. Those of `messages` and the store.
    pub(super) async fn wait_for(
        store: &Store,
        workspace: WorkspaceId,
        import: ImportId,
        idempotency_key: String,
        first: &[Sent<'_>],
        messages: &mut Messages<ImportEntriesRequest>,
        repeats: &Semaphore,
    ) -> Result<Result<Self, Replay>, Error> {
        let require_same = |kept: Option<Fingerprint>| match kept {
            Some(kept) if !kept.fits(first.iter().copied()) => {
                Err(Error::Conflict("This idempotency key belongs to an import of other entries. Use another one for each import."))
            }
            _ => Ok(()),
        };
        let fingerprint = Fingerprint::of(first.iter().copied());
        let give_up_at = Instant::now() + REPEAT_TIMEOUT;
        let mut waiting = None;
        let mut pause = Duration::from_millis(20);
        loop {
            match attempt(store.clone(), workspace, import, idempotency_key.clone(), fingerprint.clone()).await? {
                Attempt::Claimed(claimed) => return Ok(Ok(*claimed)),
                Attempt::Done(replay, kept) => {
                    require_same(kept)?;
                    return Ok(Err(replay));
                }
                Attempt::Busy(kept) => require_same(kept)?,
            }
            if waiting.is_none() {
                waiting = Some(repeats.try_acquire().map_err(|_| BUSY_REPEAT)?);
            }
            let next_try = Instant::now() + pause;
            if let Ok(read) = timeout_at(next_try, messages.read_ahead()).await
                && !read?
            {
                return Err(BUSY_REPEAT);
            }
            sleep_until(next_try).await;
            if give_up_at <= Instant::now() {
                return Err(BUSY_REPEAT);
            }
            pause = (2 * pause).min(Duration::from_secs(1));
        }
    }

    fn new(store: Store, workspace: WorkspaceId, import: ImportId, idempotency_key: String) -> Self {
        let renewing = tokio::spawn({
            let (store, idempotency_key) = (store.clone(), idempotency_key.clone());
            async move {
                loop {
                    sleep(Store::LEASE / 3).await;
                    if let Err(error) = store.renew_claim(workspace, import, &idempotency_key).await {
                        tracing::warn!(cause = %error, "the claim of an idempotency key could not be renewed");
                    }
                }
            }
        });
        Self { store, workspace, import, idempotency_key, is_answered: false, _renewing: AbortOnDropHandle::new(renewing) }
    }
}

/// The outcome of an attempt to claim a key.
enum Attempt {
    Claimed(Box<Claimed>),
    Busy(Option<Fingerprint>),
    Done(Replay, Option<Fingerprint>),
}

/// Tries once to claim a key. When the caller of this is gone, the task that makes the claim drops
/// it, and so releases it.
async fn attempt(
    store: Store,
    workspace: WorkspaceId,
    import: ImportId,
    idempotency_key: String,
    fingerprint: Fingerprint,
) -> Result<Attempt, Error> {
    let attempt = async move {
        Ok(match store.claim_request(workspace, import, &idempotency_key, &fingerprint).await? {
            Claim::Mine => Attempt::Claimed(Box::new(Claimed::new(store, workspace, import, idempotency_key))),
            Claim::Busy(kept) => Attempt::Busy(kept),
            Claim::Done(replay, kept) => Attempt::Done(replay, kept),
        })
    };
    tokio::spawn(attempt.in_current_span()).await.map_err(Error::internal)?
}
