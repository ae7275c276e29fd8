//! `GET /v1/dnc/imports` and `GET /v1/dnc/deletions`: who put entries on the list or took them off,
//! and when.

use std::sync::Arc;

use axum::{
    extract::{RawQuery, State},
    http::HeaderMap,
    response::Response,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Gateway,
    answers::EntryType,
    call::pass_back,
    error::Problem,
    handlers::{ok, once},
    query::Query,
};
use crate::{
    files::{time::text as time_text, type_name},
    proto::{
        Deletion, EntryFilter, Import, ListDeletionsRequest, ListDeletionsResponse, ListImportsRequest, ListImportsResponse,
        deletion::Selection,
    },
};

/// An import as it was logged.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Import)]
pub(super) struct JsonImport {
    /// The id of the import.
    #[serde(rename = "_id")]
    #[schema(format = "uuid")]
    id: String,
    /// The id of the key that stored the entries.
    #[schema(pattern = "^key_[0-9]+$")]
    added_by: String,
    /// When the first entries were stored.
    #[schema(format = DateTime)]
    started_at: String,
    /// When the import ended; null for one that is running or was broken off. Its counts are then
    /// the last known ones.
    #[schema(required = true, format = DateTime)]
    finished_at: Option<String>,
    /// Entries that were stored.
    #[schema(minimum = 0)]
    imported: i64,
    /// Entries that were on the list already, or repeated in the import.
    #[schema(minimum = 0)]
    skipped: i64,
    /// Entries that were rejected.
    #[schema(minimum = 0)]
    failed: i64,
}

/// A deletion as it was logged. It has either `named` or `filter`.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Deletion)]
pub(super) struct JsonDeletion {
    /// The id of the deletion.
    #[serde(rename = "_id")]
    #[schema(format = "uuid")]
    id: String,
    /// The id of the key that deleted the entries.
    #[schema(pattern = "^key_[0-9]+$")]
    deleted_by: String,
    /// When the deletion began.
    #[schema(format = DateTime)]
    started_at: String,
    /// Entries that were deleted.
    #[schema(minimum = 0)]
    deleted: i64,
    /// How many different addresses the call named.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, minimum = 0)]
    named: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    filter: Option<JsonFilter>,
}

/// What a deletion selected: every entry if the filter is empty.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = DeletionFilter)]
struct JsonFilter {
    /// Entries of this type.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    r#type: Option<EntryType>,
    /// Entries with exactly this reason.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    reason: String,
    /// Entries with this text in their address.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    search: String,
    /// Entries that were stored at this time or later.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, format = DateTime)]
    created_from: Option<String>,
    /// Entries that were stored before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, format = DateTime)]
    created_to: Option<String>,
}

impl From<Import> for JsonImport {
    fn from(import: Import) -> Self {
        Self {
            id: import.id,
            added_by: import.key_id,
            started_at: time_text(import.start_time.unwrap_or_default()),
            finished_at: import.end_time.map(time_text),
            imported: import.imported,
            skipped: import.skipped,
            failed: import.failed,
        }
    }
}

impl From<Deletion> for JsonDeletion {
    fn from(deletion: Deletion) -> Self {
        let (named, filter) = match deletion.selection {
            Some(Selection::Named(count)) => (Some(count), None),
            Some(Selection::Filter(filter)) => (None, Some(filter.into())),
            None => (None, None),
        };
        Self {
            id: deletion.id,
            deleted_by: deletion.key_id,
            started_at: time_text(deletion.start_time.unwrap_or_default()),
            deleted: deletion.deleted,
            named,
            filter,
        }
    }
}

impl From<EntryFilter> for JsonFilter {
    fn from(filter: EntryFilter) -> Self {
        Self {
            r#type: (filter.r#type != 0).then(|| EntryType(type_name(filter.r#type))),
            reason: filter.reason,
            search: filter.search,
            created_from: filter.create_time_from.map(time_text),
            created_to: filter.create_time_to.map(time_text),
        }
    }
}

pub(super) async fn list_imports(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request = once(async move { Ok(ListImportsRequest { page_size: Query::parse(query.as_deref(), &["limit"])?.limit()? }) });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/ListImports", &headers, request).await?;
    let ListImportsResponse { imports } = answer;
    Ok(pass_back(&metadata, ok(imports.into_iter().map(JsonImport::from).collect::<Vec<_>>())))
}

pub(super) async fn list_deletions(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request = once(async move { Ok(ListDeletionsRequest { page_size: Query::parse(query.as_deref(), &["limit"])?.limit()? }) });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/ListDeletions", &headers, request).await?;
    let ListDeletionsResponse { deletions } = answer;
    Ok(pass_back(&metadata, ok(deletions.into_iter().map(JsonDeletion::from).collect::<Vec<_>>())))
}
