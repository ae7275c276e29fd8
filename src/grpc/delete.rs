//! `DeleteEntries`: deletes the addresses named, or all entries that a filter selects; never both.

use super::{
    auth::{Authenticator, Principal},
    convert,
};
use crate::{
    domain::Error,
    proto::{DeleteEntriesRequest, DeleteEntriesResponse},
    store::Store,
};

/// Deletes entries, or only counts them with `validate_only`.
///
/// # Errors
/// [`Error::Invalid`] unless exactly one of `emails` and `all` is set; those of a look-up of the
/// key, and of the store. Batches deleted until then stay deleted.
pub(super) async fn run(
    store: &Store,
    auth: &Authenticator,
    principal: &Principal,
    request: DeleteEntriesRequest,
) -> Result<DeleteEntriesResponse, Error> {
    let workspace = principal.workspace;
    let deleted = match (request.emails.is_empty(), request.all) {
        (true, true) => {
            let filter = convert::filter(request.filter)?;
            if request.validate_only {
                store.count_entries(workspace, &filter).await?
            } else {
                let mut deletion = store.begin_deletion(workspace, principal.key, filter).await?;
                let mut total = 0;
                while let Some(deleted) = deletion.next_batch().await? {
                    total += deleted;
                    // The key may be revoked during a long deletion.
                    auth.recheck(principal).await?;
                }
                total
            }
        }
        (false, false) => {
            if request.filter.is_some() {
                return Err(Error::invalid("filter", "A filter goes with `all`, not with `emails`."));
            }
            let mut named = convert::stored_addresses(request.emails)?;
            named.sort_unstable();
            named.dedup();
            if request.validate_only {
                store.count_named(workspace, named).await?
            } else {
                store.delete_named(workspace, principal.key, named).await?
            }
        }
        (false, true) => return Err(Error::invalid("emails", "Set either `emails` or `all`, not both.")),
        (true, false) => return Err(Error::invalid("emails", "Set `emails` to 1 to 10,000 addresses, or set `all`.")),
    };
    Ok(DeleteEntriesResponse { deleted })
}
