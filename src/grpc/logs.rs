//! `ListImports` and `ListDeletions`: who put entries on the list or took them off, and when.

use super::{auth::Principal, convert};
use crate::{
    domain::Error,
    proto::{ListDeletionsRequest, ListDeletionsResponse, ListImportsRequest, ListImportsResponse},
    store::Store,
};

/// The latest imports.
///
/// # Errors
/// [`Error::Invalid`] for a negative page size; those of the store.
pub(super) async fn imports(
    store: &Store,
    principal: &Principal,
    request: ListImportsRequest,
) -> Result<ListImportsResponse, Error> {
    let rows = store.list_imports(Some(principal.workspace), convert::page_size(request.page_size)?).await?;
    Ok(ListImportsResponse { imports: rows.into_iter().map(convert::import).collect() })
}

/// The latest deletions.
///
/// # Errors
/// [`Error::Invalid`] for a negative page size; those of the store.
pub(super) async fn deletions(
    store: &Store,
    principal: &Principal,
    request: ListDeletionsRequest,
) -> Result<ListDeletionsResponse, Error> {
    let rows = store.list_deletions(Some(principal.workspace), convert::page_size(request.page_size)?).await?;
    Ok(ListDeletionsResponse { deletions: rows.into_iter().map(convert::deletion).collect() })
}
