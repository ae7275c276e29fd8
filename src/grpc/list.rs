//! `ListEntries`, `ExportEntries` and `SummarizeEntries`. A page continues after the last address
//! of the page before, so a late page costs what an early one does.

use std::sync::Arc;

use futures_util::{Stream, stream};
use tonic::Status;

use super::{
    auth::{Authenticator, Principal},
    convert, status,
};
use crate::{
    domain::{Error, Filter, Position},
    proto::{
        ExportEntriesRequest, ExportEntriesResponse, ListEntriesRequest, ListEntriesResponse, ReasonCount, SummarizeEntriesResponse,
    },
    store::{Page, Store},
};

/// Entries in one message of an export, and in its statement. They are hardly ever larger than 200
/// KiB, and reading them costs many times a round trip.
const EXPORT_ENTRIES: u32 = 2_000;

/// Pairs of a type and a reason that a summary lists; the others are only counted. A list may have
/// as many reasons as entries.
const SUMMARY_REASONS_MAX: u32 = 1_000;

/// One page of the list. The total is counted for the first page, and then carried in the page
/// token. It is omitted if counting takes too long.
///
/// # Errors
/// [`Error::Invalid`] for an invalid filter, page size or page token; those of the store.
pub(super) async fn page(store: &Store, principal: &Principal, request: ListEntriesRequest) -> Result<ListEntriesResponse, Error> {
    let workspace = principal.workspace;
    let filter = convert::filter(request.filter)?;
    let count = convert::page_size(request.page_size)?;
    let secret = store.page_token_secret().await?;
    let position = if request.page_token.is_empty() {
        Position { after: String::new(), total: store.count_in_time(workspace, &filter).await?, examined: 0 }
    } else {
        Position::from_token(&request.page_token, secret, workspace, &filter)?
    };
    let page = store.page(workspace, &filter, &position.after, count, position.total).await?;
    let next =
        page.next.map(|next| Position { after: next.after, total: position.total, examined: position.examined + next.examined });
    let next_page_token = next.as_ref().map(|next| next.to_token(secret, workspace, &filter)).transpose()?;
    let id = workspace.to_string();
    Ok(ListEntriesResponse {
        entries: page.entries.into_iter().map(|row| convert::stored(&id, row)).collect(),
        next_page_token: next_page_token.unwrap_or_default(),
        total_size: position.total.unwrap_or_default(),
        total_omitted: position.total.is_none(),
        examined_size: next.map_or(0, |next| next.examined),
    })
}

/// The messages of an export. No connection is held between two messages, so a slow reader blocks
/// nobody. The key is checked again before each message. A message may be empty: it shows that the
/// export goes on, where few entries match.
///
/// # Errors
/// [`Error::Invalid`] for an invalid filter; those of a check of the key, and of the store.
pub(super) async fn export(
    store: Store,
    auth: Arc<Authenticator>,
    principal: Principal,
    request: ExportEntriesRequest,
) -> Result<impl Stream<Item = Result<ExportEntriesResponse, Status>>, Error> {
    let filter = convert::filter(request.filter)?;
    let workspace = principal.workspace.to_string();
    // The first page is read before the stream begins, so that an early error is the call's status
    // and not a broken stream.
    let first = export_page(&store, &auth, &principal, &filter, "").await?;
    let next = move |page: Option<Page>| {
        let (store, auth, principal, filter, workspace) =
            (store.clone(), auth.clone(), principal.clone(), filter.clone(), workspace.clone());
        async move {
            let Some(page) = page else { return Ok(None) };
            let rest = match page.next {
                Some(next) => Some(export_page(&store, &auth, &principal, &filter, &next.after).await.map_err(status::from_error)?),
                None => None,
            };
            let entries = page.entries.into_iter().map(|row| convert::stored(&workspace, row)).collect();
            Ok(Some((ExportEntriesResponse { entries }, rest)))
        }
    };
    Ok(stream::try_unfold(Some(first).filter(|page| !page.entries.is_empty() || page.next.is_some()), next))
}

async fn export_page(
    store: &Store,
    auth: &Authenticator,
    principal: &Principal,
    filter: &Filter,
    after: &str,
) -> Result<Page, Error> {
    auth.recheck(principal).await?;
    store.export_page(principal.workspace, filter, after, EXPORT_ENTRIES).await
}

/// Counts the entries by type and reason, the largest counts first.
pub(super) async fn summarize(store: &Store, principal: &Principal) -> Result<SummarizeEntriesResponse, Error> {
    let summary = store.summarize(principal.workspace, SUMMARY_REASONS_MAX).await?;
    let listed: i64 = summary.counts.iter().map(|row| row.count).sum();
    Ok(SummarizeEntriesResponse {
        total: summary.total,
        other_reasons: summary.reasons - summary.counts.len() as i64,
        other_entries: summary.total - listed,
        reasons: summary
            .counts
            .into_iter()
            .map(|row| ReasonCount { r#type: row.kind.number(), reason: row.reason, count: row.count })
            .collect(),
    })
}
