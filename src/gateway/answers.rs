//! Converts the service's answers to the JSON of the public reference.

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    files::{time::text as time_text, type_name},
    proto::{
        CheckEntriesResponse, DeleteEntriesResponse, Entry, EntryError, ImportEntriesResponse, ListEntriesResponse,
        SummarizeEntriesResponse,
    },
};

/// The form of every successful answer but a page.
#[derive(Serialize)]
pub(super) struct Success<T> {
    pub(super) success: bool,
    pub(super) data: T,
}

/// The `data` of an import's answer. As the public reference says, failures are present only if
/// there are any.
pub(super) fn import_answer(answer: ImportEntriesResponse, excluded: u64) -> impl Serialize {
    #[derive(Serialize)]
    struct Imported {
        imported: u64,
        skipped: u64,
        #[serde(flatten)]
        failures: Failures,
    }
    Imported { imported: answer.imported, skipped: answer.skipped, failures: Failures::of(answer.failed, answer.errors, excluded) }
}

/// The `data` of the answer when entries are added.
pub(super) fn add_answer(answer: ImportEntriesResponse, excluded: u64) -> impl Serialize {
    #[derive(Serialize)]
    struct Added {
        added: u64,
        skipped: u64,
        #[serde(flatten)]
        failures: Failures,
    }
    Added { added: answer.imported, skipped: answer.skipped, failures: Failures::of(answer.failed, answer.errors, excluded) }
}

#[derive(Serialize)]
struct Failures {
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<u64>,
    /// Rows of a file that name people who may be written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    excluded: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<JsonError>,
}

impl Failures {
    fn of(failed: u64, errors: Vec<EntryError>, excluded: u64) -> Self {
        let some = |count: u64| (count > 0).then_some(count);
        Self { failed: some(failed), excluded: some(excluded), errors: errors.into_iter().map(JsonError::from).collect() }
    }
}

#[derive(Serialize)]
struct JsonError {
    index: u64,
    field: String,
    code: String,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
}

impl From<EntryError> for JsonError {
    fn from(error: EntryError) -> Self {
        // The service names this field by its gRPC name.
        let field = if error.field == "unsubscribe_time" { "unsubscribedAt".to_owned() } else { error.field };
        let line = Some(error.line).filter(|line| *line > 0);
        Self { index: error.index, field, code: error.code, message: error.message, line }
    }
}

/// An entry as it is listed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JsonListed {
    #[serde(rename = "_id")]
    id: String,
    email: String,
    entry_type: &'static str,
    workspace_id: String,
    reason: String,
    unsubscribed_at: String,
    created_at: String,
    updated_at: String,
    added_by: String,
}

impl From<Entry> for JsonListed {
    fn from(entry: Entry) -> Self {
        // Entries are never changed, and an address is on a workspace's list at most once. So the
        // hash identifies the entry.
        let identity = Sha256::digest(format!("{}\0{}", entry.workspace_id, entry.email));
        let created_at = time_text(entry.create_time.unwrap_or_default());
        Self {
            id: identity[..12].iter().map(|byte| format!("{byte:02x}")).collect(),
            entry_type: type_name(entry.r#type),
            email: entry.email,
            workspace_id: entry.workspace_id,
            reason: entry.reason,
            unsubscribed_at: entry.unsubscribe_time.map_or_else(|| created_at.clone(), time_text),
            updated_at: created_at.clone(),
            created_at,
            added_by: entry.added_by,
        }
    }
}

/// The whole body of a page of entries.
pub(super) fn list_answer(answer: ListEntriesResponse, limit: i32) -> impl Serialize {
    #[derive(Serialize)]
    struct Page {
        success: bool,
        data: Vec<JsonListed>,
        pagination: Pagination,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Pagination {
        limit: i32,
        total: i64,
        has_more: bool,
        next_cursor: Option<String>,
    }
    let next_cursor = Some(answer.next_page_token).filter(|token| !token.is_empty());
    let pagination = Pagination { limit, total: answer.total_size, has_more: next_cursor.is_some(), next_cursor };
    Page { success: true, data: answer.entries.into_iter().map(JsonListed::from).collect(), pagination }
}

/// The `data` of a check: one object per address.
pub(super) fn check_answer(answer: CheckEntriesResponse) -> Vec<impl Serialize> {
    #[derive(Serialize)]
    struct Checked {
        email: String,
        suppressed: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        entry: Option<JsonListed>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<JsonError>,
    }
    let results = answer.results.into_iter().map(|result| Checked {
        email: result.email,
        suppressed: result.suppressed,
        entry: result.entry.map(JsonListed::from),
        error: result.error.map(JsonError::from),
    });
    results.collect()
}

/// The `data` of a deletion.
pub(super) fn delete_answer(answer: DeleteEntriesResponse) -> impl Serialize {
    #[derive(Serialize)]
    struct Deleted {
        deleted: i64,
    }
    Deleted { deleted: answer.deleted }
}

/// The `data` of a summary.
pub(super) fn summary_answer(answer: SummarizeEntriesResponse) -> impl Serialize {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Summary {
        total: i64,
        reasons: Vec<Reason>,
        #[serde(skip_serializing_if = "Option::is_none")]
        other_reasons: Option<i64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        other_entries: Option<i64>,
    }
    #[derive(Serialize)]
    struct Reason {
        r#type: &'static str,
        reason: String,
        count: i64,
    }
    let reasons = answer.reasons.into_iter();
    let reasons = reasons.map(|row| Reason { r#type: type_name(row.r#type), reason: row.reason, count: row.count });
    let other = |count: i64| (answer.other_reasons > 0).then_some(count);
    Summary {
        total: answer.total,
        other_reasons: other(answer.other_reasons),
        other_entries: other(answer.other_entries),
        reasons: reasons.collect(),
    }
}
