//! Converts the service's answers to the JSON of the public reference. The types and their
//! comments are also the schemas of the OpenAPI document.

use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};

use super::files::Seen;
use crate::{
    files::{Kind, Preview, PreviewRow, time::text as time_text, type_name},
    proto::{
        CheckEntriesResponse, DeleteEntriesResponse, Entry, EntryError, ImportEntriesResponse, ListEntriesResponse,
        SummarizeEntriesResponse,
    },
};

/// The form of every successful answer but a page.
#[derive(Serialize, ToSchema)]
pub(super) struct Success<T> {
    pub(super) success: bool,
    pub(super) data: T,
}

/// The `data` of an import's answer.
pub(super) fn import_answer(answer: ImportEntriesResponse, seen: Seen) -> Imported {
    Imported { imported: answer.imported, rest: Rest::of(answer.skipped, answer.failed, answer.errors, seen) }
}

/// The outcome of an import. The counts add up to the entries received.
#[derive(Serialize, ToSchema)]
pub(super) struct Imported {
    /// Entries that were stored.
    imported: u64,
    #[serde(flatten)]
    rest: Rest,
}

/// The `data` of the answer when entries are added.
pub(super) fn add_answer(answer: ImportEntriesResponse, seen: Seen) -> Added {
    Added { added: answer.imported, rest: Rest::of(answer.skipped, answer.failed, answer.errors, seen) }
}

/// The outcome of adding entries. The counts add up to the entries received.
#[derive(Serialize, ToSchema)]
pub(super) struct Added {
    /// Entries that were stored.
    added: u64,
    #[serde(flatten)]
    rest: Rest,
}

/// The entries that were not stored, or not as they were sent. As the public reference says, what
/// has nothing to say is not there; only `skipped` always is.
#[derive(Serialize, ToSchema)]
struct Rest {
    /// Entries that were on the list already, or repeated in the request.
    skipped: u64,
    /// Entries that were rejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    failed: Option<u64>,
    /// Rows of a file that name people who may be written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    excluded: Option<u64>,
    /// Rows of a file whose reason was cut at 64 characters.
    #[serde(rename = "reasonsCut", skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reasons_cut: Option<u64>,
    /// Rows of a provider's file whose time was left out: it cannot be read, or is in the future.
    #[serde(rename = "timesDropped", skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    times_dropped: Option<u64>,
    /// What is wrong with the rejected entries; with the first 10,000 of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    errors: Vec<JsonError>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    preview: Option<JsonPreview>,
}

impl Rest {
    fn of(skipped: u64, failed: u64, errors: Vec<EntryError>, Seen { counts, preview }: Seen) -> Self {
        let some = |count: u64| (count > 0).then_some(count);
        Self {
            skipped,
            failed: some(failed),
            excluded: some(counts.excluded),
            reasons_cut: some(counts.reasons_cut),
            times_dropped: some(counts.times_dropped),
            errors: errors.into_iter().map(JsonError::from).collect(),
            preview: JsonPreview::of(preview),
        }
    }
}

/// What is wrong with one entry or address.
#[derive(Serialize, ToSchema)]
#[schema(as = EntryError)]
struct JsonError {
    /// The position in the request, from 0.
    index: u64,
    /// The field that is wrong.
    field: String,
    /// `INVALID_EMAIL`, `INVALID_DOMAIN`, `PUBLIC_SUFFIX`, `INVALID_TYPE`, `INVALID_REASON` or
    /// `INVALID_TIME`; of a line that no entry can be made of, also `INVALID_LINE` or
    /// `LINE_TOO_LONG`.
    #[schema(pattern = "^[A-Z_]+$")]
    code: String,
    /// What is wrong, for people. It never repeats the address.
    message: String,
    /// The line of the file, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
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

/// What the first rows of a file were taken for. Only if `preview` asked for it.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Preview)]
struct JsonPreview {
    /// What the file was taken for, for people.
    read_as: &'static str,
    /// The first rows; less than asked for if they are very long.
    rows: Vec<JsonPreviewRow>,
}

/// What a row of a file was taken for. What is wrong with it is in the error of the same line.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PreviewRow)]
struct JsonPreviewRow {
    /// The line of the file, from 1.
    line: u64,
    /// The address or domain in canonical form; as it stands in the file if it is none.
    email: String,
    /// Its type, `email` if the row does not say; as it stands in the file if it is none.
    r#type: String,
    /// Why it goes on the list; empty if the row does not say.
    reason: String,
    /// When the person opted out; empty if the row does not say, and as it stands in the file if it
    /// is no time.
    unsubscribed_at: String,
    /// Whether the row is left out, since the file says that this person may be written to.
    excluded: bool,
}

impl JsonPreview {
    /// None if no rows were asked for, or the file has none.
    fn of(preview: Preview) -> Option<Self> {
        let rows = preview.rows.into_iter().map(|PreviewRow { line, email, kind, reason, unsubscribed_at, is_excluded }| {
            JsonPreviewRow { line, email, r#type: kind, reason, unsubscribed_at, excluded: is_excluded }
        });
        let rows: Vec<_> = rows.collect();
        (!rows.is_empty()).then_some(Self { read_as: preview.layout, rows })
    }
}

/// The name of an entry's type.
#[derive(Serialize)]
pub(super) struct EntryType(pub(super) &'static str);

impl PartialSchema for EntryType {
    fn schema() -> RefOr<Schema> {
        let names = [Kind::Email, Kind::Domain].map(Kind::name);
        ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)).into()
    }
}

impl ToSchema for EntryType {}

/// An entry as it is listed.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Entry)]
pub(super) struct JsonListed {
    /// The same for an entry as long as it is on the list.
    #[serde(rename = "_id")]
    #[schema(pattern = "^[0-9a-f]{24}$")]
    id: String,
    /// The address or domain, in canonical form.
    email: String,
    entry_type: EntryType,
    /// The workspace whose list the entry is on.
    #[schema(pattern = "^ws_[1-9][0-9]*$")]
    workspace_id: String,
    /// Why the address is on the list.
    reason: String,
    /// When the person opted out, as far as that is known; otherwise when the entry was stored.
    #[schema(format = DateTime)]
    unsubscribed_at: String,
    /// When the entry was stored.
    #[schema(format = DateTime)]
    created_at: String,
    /// Equal to `createdAt`: an entry is never changed.
    #[schema(format = DateTime)]
    updated_at: String,
    /// The id of the key that stored the entry.
    #[schema(pattern = "^key_[1-9][0-9]*$")]
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
            entry_type: EntryType(type_name(entry.r#type)),
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
pub(super) fn list_answer(answer: ListEntriesResponse, limit: i32) -> Page {
    let next_cursor = Some(answer.next_page_token).filter(|token| !token.is_empty());
    let is_omitted = answer.total_omitted;
    let pagination = Pagination {
        limit,
        total: (!is_omitted).then_some(answer.total_size),
        total_omitted: is_omitted.then_some(true),
        examined: Some(answer.examined_size).filter(|examined| *examined > 0),
        has_more: next_cursor.is_some(),
        next_cursor,
    };
    Page { success: true, data: answer.entries.into_iter().map(JsonListed::from).collect(), pagination }
}

/// A page of entries, in the order of the addresses' bytes.
#[derive(Serialize, ToSchema)]
pub(super) struct Page {
    success: bool,
    data: Vec<JsonListed>,
    pagination: Pagination,
}

/// Where a page is in the list.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Pagination {
    /// The most entries in the page.
    #[schema(minimum = 1, maximum = 100)]
    limit: i32,
    /// The entries that the filters selected when the first page was read; null if they were not
    /// counted.
    #[schema(minimum = 0, required = true)]
    total: Option<i64>,
    /// True if `total` is null. In a list of more than 100,000 entries, those that a text or a time
    /// selects are counted only if that takes at most 50 ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    total_omitted: Option<bool>,
    /// How many entries of the list were examined up to the end of this page, if there is another
    /// one and it was not found without that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, nullable = false)]
    examined: Option<i64>,
    /// Whether there is another page. A page of a filtered list may then have fewer entries than
    /// `limit`, or none: the time for it was over.
    has_more: bool,
    /// The `cursor` of the next page; null with the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
}

/// The `data` of a check: one object per address.
pub(super) fn check_answer(answer: CheckEntriesResponse) -> Vec<Checked> {
    let results = answer.results.into_iter().map(|result| Checked {
        email: result.email,
        suppressed: result.suppressed,
        entry: result.entry.map(JsonListed::from),
        error: result.error.map(JsonError::from),
    });
    results.collect()
}

/// Whether an address may be written to.
#[derive(Serialize, ToSchema)]
#[schema(as = CheckResult)]
pub(super) struct Checked {
    /// The address as it was sent.
    email: String,
    /// Whether the address must not be written to. True also for a text that is no address.
    suppressed: bool,
    /// The entry that decided: the address itself before a domain, a longer domain before a
    /// shorter one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    entry: Option<JsonListed>,
    /// Why the text is no address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    error: Option<JsonError>,
}

/// The `data` of a deletion.
pub(super) fn delete_answer(answer: DeleteEntriesResponse) -> Deleted {
    Deleted { deleted: answer.deleted }
}

/// The outcome of a deletion.
#[derive(Serialize, ToSchema)]
pub(super) struct Deleted {
    /// Entries that were deleted, or that would be with `validateOnly`.
    #[schema(minimum = 0)]
    deleted: i64,
}

/// The `data` of a summary.
pub(super) fn summary_answer(answer: SummarizeEntriesResponse) -> Summary {
    let reasons = answer.reasons.into_iter();
    let reasons = reasons.map(|row| ReasonCount { r#type: EntryType(type_name(row.r#type)), reason: row.reason, count: row.count });
    let other = |count: i64| (answer.other_reasons > 0).then_some(count);
    Summary {
        total: answer.total,
        other_reasons: other(answer.other_reasons),
        other_entries: other(answer.other_entries),
        reasons: reasons.collect(),
    }
}

/// What is on the list.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Summary {
    /// All entries.
    #[schema(minimum = 0)]
    total: i64,
    /// Entries by type and reason, the largest counts first; at most 1,000 of them.
    #[schema(max_items = 1_000)]
    reasons: Vec<ReasonCount>,
    /// How many pairs of a type and a reason are not listed in `reasons`, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    other_reasons: Option<i64>,
    /// The entries of those.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    other_entries: Option<i64>,
}

/// The entries of one type with one reason.
#[derive(Serialize, ToSchema)]
struct ReasonCount {
    r#type: EntryType,
    reason: String,
    #[schema(minimum = 1)]
    count: i64,
}
