//! Request ids: an import claims its id, and a repeat waits for the answer of the import that has it.

use std::time::Duration;

use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use super::BUSY_REPEAT;
use crate::{
    domain::{Error, Fingerprint, Sent, WorkspaceId},
    grpc::messages::Messages,
    proto::ImportEntriesRequest,
    store::{Claim, ImportId, Replay, Store},
};

/// How long a repeat waits for the import that has its request id.
const REPEAT_TIMEOUT: Duration = Duration::from_secs(60);

/// A request id that this import has claimed. Renewed in the background until it is dropped. Unless the
/// import has succeeded, the id is then given back, so that the next try need not wait.
pub(super) struct Claimed {
    store: Store,
    workspace: WorkspaceId,
    import: ImportId,
    pub(super) request_id: String,
    /// True once the import has succeeded, and the id with it.
    pub(super) is_answered: bool,
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
    /// Claims the id for an import whose first message holds `first`, or waits until the import that has it is done
    /// and returns its outcome. Reads on while it waits: what is sent and not read would block all other calls on
    /// its connection. A stream that is too long for that does not wait.
    pub(super) async fn wait_for(
        store: &Store,
        workspace: WorkspaceId,
        import: ImportId,
        request_id: String,
        first: &[Sent<'_>],
        messages: &mut Messages<ImportEntriesRequest>,
        repeats: &Semaphore,
    ) -> Result<Result<Self, Replay>, Error> {
        let require_same = |kept: Option<Fingerprint>| match kept {
            Some(kept) if !kept.fits(first.iter().copied()) => {
                Err(Error::Conflict("This request id belongs to an import of other entries. Use another one for each import."))
            }
            _ => Ok(()),
        };
        let fingerprint = Fingerprint::of(first.iter().copied());
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
