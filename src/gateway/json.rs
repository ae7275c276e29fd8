//! JSON to proto and back, all of it. Bodies are decoded straight into the proto's own messages.
//!
//! Here stand the rules about shape (what is an object, what is a string, how many entries a body may have); what an address may be is the
//! service's business.

use std::fmt;

use axum::http::HeaderValue;
use percent_encoding::percent_decode_str;
use prost::Message;
use prost_types::Timestamp;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, value::MapAccessDeserializer},
};
use sha2::{Digest, Sha256};
use time::{OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

use super::error::Problem;
use crate::proto::{
    CheckEntriesRequest, CheckEntriesResponse, DeleteEntriesRequest, DeleteEntriesResponse, Entry, EntryError, EntryFilter,
    EntryType, ImportEntriesRequest, ImportEntriesResponse, ImportOptions, ListEntriesRequest, ListEntriesResponse,
    SummarizeEntriesResponse,
};

/// The public reference's limit of one JSON import.
const ENTRIES_MAX: usize = 10_000;

/// Entries a page, as the public reference has it.
const LIMIT: i32 = 25;
const LIMIT_MAX: i32 = 100;

/// Room for one message below the service's limit of 4 MiB.
const MESSAGE_BYTES_MAX: usize = 3 << 20;

/// No text this long can be valid, and cut to this length it is refused all the same; so one absurd entry fails alone and not
/// together with the message that it would not fit into.
const TEXT_BYTES_MAX: usize = 64 << 10;

/// A number that the enum does not have: the service refuses the entry that carries it, as it should.
const UNKNOWN_TYPE: i32 = -1;

/// What every answer looks like.
#[derive(Serialize)]
pub(super) struct Success<T> {
    pub(super) success: bool,
    pub(super) data: T,
}

/// The part of a URL behind the question mark. Names that nobody asks for are ignored.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Splits the raw text; values are decoded when they are asked for.
    pub(super) fn parse(query: Option<&str>) -> Self {
        let pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        Self(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// A value. A plus sign stays one, although forms write a space so: most who put `bob+news@example.com` into a URL mean that address,
    /// and asking about another one would give a wrong answer.
    pub(super) fn get(&self, name: &str) -> Result<Option<String>, Problem> {
        let mut values = self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str());
        match (values.next(), values.next()) {
            (None, _) => Ok(None),
            (Some(value), None) => match percent_decode_str(value).decode_utf8() {
                Ok(text) => Ok(Some(text.into_owned())),
                Err(_) => Err(Problem::invalid(name, "expected percent-encoded UTF-8")),
            },
            (Some(_), Some(_)) => Err(Problem::invalid(name, "expected once")),
        }
    }

    fn flag(&self, name: &str) -> Result<bool, Problem> {
        match self.get(name)?.as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Problem::invalid(name, "expected true or false")),
        }
    }

    /// Entries a page: 1 to 100.
    pub(super) fn limit(&self) -> Result<i32, Problem> {
        let Some(text) = self.get("limit")? else { return Ok(LIMIT) };
        text.parse()
            .ok()
            .filter(|limit| (1..=LIMIT_MAX).contains(limit))
            .ok_or_else(|| Problem::invalid("limit", &format!("expected a number from 1 to {LIMIT_MAX}")))
    }

    fn time(&self, name: &str) -> Result<Option<Timestamp>, Problem> {
        let Some(text) = self.get(name)? else { return Ok(None) };
        timestamp(name, &text).map(Some)
    }

    /// The filters of a list.
    pub(super) fn filter(&self) -> Result<EntryFilter, Problem> {
        Ok(EntryFilter {
            r#type: entry_type(self.get("type")?.as_deref())?.into(),
            reason: self.get("reason")?.map(|reason| reason.replace('+', " ")).unwrap_or_default(),
            search: self.get("search")?.unwrap_or_default(),
            create_time_from: self.time("createdFrom")?,
            create_time_to: self.time("createdTo")?,
        })
    }
}

fn timestamp(field: &str, text: &str) -> Result<Timestamp, Problem> {
    let time = OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| Problem::invalid(field, "expected a time such as 2024-06-01T10:00:00.000Z"))?;
    Ok(Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() })
}

fn entry_type(name: Option<&str>) -> Result<EntryType, Problem> {
    match name {
        None => Ok(EntryType::Unspecified),
        Some("email") => Ok(EntryType::Email),
        Some("domain") => Ok(EntryType::Domain),
        Some(_) => Err(Problem::invalid("type", "expected email or domain")),
    }
}

/// The options of an import.
pub(super) fn import_options(
    query: &Query,
    idempotency_key: Option<HeaderValue>,
    default_reason: &str,
) -> Result<ImportOptions, Problem> {
    let request_id = match &idempotency_key {
        Some(value) => value.to_str().map_err(|_| Problem::invalid("Idempotency-Key", "expected at most 128 ASCII characters"))?,
        None => "",
    };
    Ok(ImportOptions {
        validate_only: query.flag("validateOnly")?,
        default_reason: default_reason.to_owned(),
        request_id: request_id.to_owned(),
    })
}

/// The page that `GET /v1/dnc` asks for.
pub(super) fn list_request(query: &Query) -> Result<ListEntriesRequest, Problem> {
    Ok(ListEntriesRequest {
        filter: Some(query.filter()?),
        page_size: query.limit()?,
        page_token: query.get("cursor")?.unwrap_or_default(),
    })
}

/// `{"emails": […]}` of a check.
pub(super) fn check_request(bytes: &[u8]) -> Result<CheckEntriesRequest, Problem> {
    #[derive(Deserialize)]
    struct CheckBody {
        emails: Vec<Text>,
    }
    let CheckBody { emails } = parse(bytes)?;
    Ok(CheckEntriesRequest { emails: addresses(emails)? })
}

/// `?email=` of a check.
pub(super) fn check_one_request(query: &Query) -> Result<CheckEntriesRequest, Problem> {
    let email = query.get("email")?.ok_or_else(|| Problem::invalid("email", "is missing"))?;
    Ok(CheckEntriesRequest { emails: vec![cut(email)] })
}

/// `{"emails": […]}` or `{"selectAll": true, …}` of a deletion. That it is exactly one of the two is the service's rule.
pub(super) fn delete_request(bytes: &[u8]) -> Result<DeleteEntriesRequest, Problem> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct DeleteBody {
        emails: Option<Vec<Text>>,
        #[serde(default)]
        select_all: bool,
        search: Option<String>,
        r#type: Option<String>,
        reason: Option<String>,
        created_from: Option<String>,
        created_to: Option<String>,
        #[serde(default)]
        validate_only: bool,
    }
    let body: DeleteBody = parse(bytes)?;
    // A filter that says nothing would delete everything, which is what nobody means by it.
    for (field, text) in [("search", &body.search), ("reason", &body.reason)] {
        if text.as_deref() == Some("") {
            return Err(Problem::invalid(field, "expected a text, or to be left out"));
        }
    }
    let time = |field: &str, text: Option<String>| text.map(|text| timestamp(field, &text)).transpose();
    let (created_from, created_to) = (time("createdFrom", body.created_from)?, time("createdTo", body.created_to)?);
    let is_filtered =
        [body.search.is_some(), body.r#type.is_some(), body.reason.is_some(), created_from.is_some(), created_to.is_some()]
            .contains(&true);
    let filter = EntryFilter {
        r#type: entry_type(body.r#type.as_deref())?.into(),
        reason: body.reason.unwrap_or_default(),
        search: body.search.unwrap_or_default(),
        create_time_from: created_from,
        create_time_to: created_to,
    };
    Ok(DeleteEntriesRequest {
        emails: body.emails.map(addresses).transpose()?.unwrap_or_default(),
        filter: is_filtered.then_some(filter),
        all: body.select_all,
        validate_only: body.validate_only,
    })
}

/// Addresses named in a body: as many as are allowed, and not too long for a message together.
fn addresses(emails: Vec<Text>) -> Result<Vec<String>, Problem> {
    if emails.is_empty() || emails.len() > ENTRIES_MAX {
        return Err(Problem::invalid("emails", &format!("expected 1 to {ENTRIES_MAX} addresses, got {}", emails.len())));
    }
    let emails: Vec<String> = emails.into_iter().map(|Text(email)| email).collect();
    if emails.iter().map(|email| email.len() + 5).sum::<usize>() > MESSAGE_BYTES_MAX {
        return Err(Problem::too_large(MESSAGE_BYTES_MAX));
    }
    Ok(emails)
}

/// The entries of `{"entries": [{"email", "type"?, "reason"?}]}`.
pub(super) fn import_entries(bytes: &[u8]) -> Result<Vec<Entry>, Problem> {
    let ImportBody { entries } = parse(bytes)?;
    if entries.is_empty() || entries.len() > ENTRIES_MAX {
        return Err(Problem::invalid("entries", &format!("expected 1 to {ENTRIES_MAX} entries, got {}", entries.len())));
    }
    Ok(entries.into_iter().map(|Object(entry)| entry.into()).collect())
}

/// The entry on one line, or what is wrong with the line.
pub(super) fn entry(line: &[u8]) -> Result<Entry, String> {
    parse(line).map(|entry: JsonEntry| entry.into()).map_err(Problem::into_message)
}

/// The messages of one import: as few as the service's limit on a message allows.
pub(super) fn import_requests(entries: Vec<Entry>, options: ImportOptions) -> Vec<ImportEntriesRequest> {
    let mut requests = vec![ImportEntriesRequest { entries: Vec::new(), options: Some(options) }];
    let mut octets = 0;
    // Almost always everything fits into one message, and then nothing is moved or measured again.
    if entries.iter().map(entry_octets).sum::<usize>() <= MESSAGE_BYTES_MAX {
        requests[0].entries = entries;
        return requests;
    }
    for entry in entries {
        octets += entry_octets(&entry);
        if octets > MESSAGE_BYTES_MAX {
            octets = entry_octets(&entry);
            requests.push(ImportEntriesRequest::default());
        }
        if let Some(request) = requests.last_mut() {
            request.entries.push(entry);
        }
    }
    requests
}

fn entry_octets(entry: &Entry) -> usize {
    const TAG_AND_LENGTH: usize = 5;
    entry.encoded_len() + TAG_AND_LENGTH
}

/// The `data` of an import's answer. As documented, failures are mentioned only if there are any.
pub(super) fn import_answer(answer: ImportEntriesResponse) -> impl Serialize {
    #[derive(Serialize)]
    struct Imported {
        imported: u64,
        skipped: u64,
        #[serde(flatten)]
        failures: Failures,
    }
    Imported { imported: answer.imported, skipped: answer.skipped, failures: Failures::of(answer.failed, answer.errors) }
}

/// The `data` of the answer when entries are added.
pub(super) fn add_answer(answer: ImportEntriesResponse) -> impl Serialize {
    #[derive(Serialize)]
    struct Added {
        added: u64,
        skipped: u64,
        #[serde(flatten)]
        failures: Failures,
    }
    Added { added: answer.imported, skipped: answer.skipped, failures: Failures::of(answer.failed, answer.errors) }
}

#[derive(Serialize)]
struct Failures {
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<JsonError>,
}

impl Failures {
    fn of(failed: u64, errors: Vec<EntryError>) -> Self {
        Self { failed: (failed > 0).then_some(failed), errors: errors.into_iter().map(JsonError::from).collect() }
    }
}

#[derive(Serialize)]
struct JsonError {
    index: u64,
    field: String,
    code: String,
    message: String,
}

impl From<EntryError> for JsonError {
    fn from(error: EntryError) -> Self {
        Self { index: error.index, field: error.field, code: error.code, message: error.message }
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
        // An entry is never changed, and an address is on a workspace's list at most once.
        let identity = Sha256::digest(format!("{}\0{}", entry.workspace_id, entry.email));
        let created_at = time_text(entry.create_time.unwrap_or_default());
        Self {
            id: identity[..12].iter().map(|byte| format!("{byte:02x}")).collect(),
            entry_type: type_name(entry.r#type()),
            email: entry.email,
            workspace_id: entry.workspace_id,
            reason: entry.reason,
            unsubscribed_at: created_at.clone(),
            updated_at: created_at.clone(),
            created_at,
            added_by: entry.added_by,
        }
    }
}

/// An entry type's name in JSON and CSV.
pub(super) fn type_name(entry_type: EntryType) -> &'static str {
    match entry_type {
        EntryType::Unspecified | EntryType::Email => "email",
        EntryType::Domain => "domain",
    }
}

/// RFC 3339 in UTC with milliseconds.
pub(super) fn time_text(time: Timestamp) -> String {
    let nanos = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    time.format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z")).unwrap_or_default()
}

/// The whole body of a page.
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

/// The `data` of a check: an object for each address.
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
    struct Summary {
        total: i64,
        reasons: Vec<Reason>,
    }
    #[derive(Serialize)]
    struct Reason {
        r#type: &'static str,
        reason: String,
        count: i64,
    }
    let reasons = answer.reasons.into_iter();
    let reasons = reasons.map(|row| Reason { r#type: type_name(row.r#type()), reason: row.reason, count: row.count });
    Summary { total: answer.total, reasons: reasons.collect() }
}

#[derive(Deserialize)]
struct ImportBody {
    entries: Vec<Object<JsonEntry>>,
}

#[derive(Deserialize)]
struct JsonEntry {
    email: Text,
    #[serde(default)]
    r#type: JsonEntryType,
    #[serde(default)]
    reason: Option<Text>,
}

impl From<JsonEntry> for Entry {
    fn from(entry: JsonEntry) -> Self {
        let JsonEntry { email, r#type, reason } = entry;
        Self { email: email.0, r#type: r#type.0, reason: reason.unwrap_or_default().0, ..Self::default() }
    }
}

/// The number of an entry type's name; empty means that none was given.
pub fn type_number(name: &str) -> i32 {
    match name {
        "" => EntryType::Unspecified.into(),
        "email" => EntryType::Email.into(),
        "domain" => EntryType::Domain.into(),
        _ => UNKNOWN_TYPE,
    }
}

/// See [`TEXT_BYTES_MAX`].
fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    }
    text
}

/// A text of any octets, cut to [`TEXT_BYTES_MAX`]. Half a surrogate pair (what cutting a text in the middle of an emoji leaves) or octets
/// that are not UTF-8 become a NUL, which the service refuses in every field: so they fail their own entry and not the whole body.
#[derive(Default)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Text, E> {
                let text =
                    str::from_utf8(bytes).map_or_else(|_| String::from_utf8_lossy(bytes).replace('\u{fffd}', "\0"), str::to_owned);
                Ok(Text(cut(text)))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

/// The number of an entry type's name, without making a text of it.
#[derive(Default)]
struct JsonEntryType(i32);

impl<'de> Deserialize<'de> for JsonEntryType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = JsonEntryType;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_none<E>(self) -> Result<JsonEntryType, E> {
                Ok(JsonEntryType::default())
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<JsonEntryType, D::Error> {
                deserializer.deserialize_bytes(self)
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<JsonEntryType, E> {
                // An empty text is a text, and no type's name.
                let name = str::from_utf8(bytes).ok().filter(|name| !name.is_empty());
                Ok(JsonEntryType(name.map_or(UNKNOWN_TYPE, type_number)))
            }
        }
        deserializer.deserialize_option(Visitor)
    }
}

/// A JSON object and nothing else: what serde derives for a struct would take an array of its fields as well.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Visitor(std::marker::PhantomData))
    }
}

/// Decodes a whole body; a fault is told with its place, and without the text that stands there.
fn parse<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, Problem> {
    if let Ok(Object(value)) = serde_json::from_slice(bytes) {
        return Ok(value);
    }
    // Keeping track of the place costs time, so only a body with a fault is read this way.
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    match serde_path_to_error::deserialize::<_, Object<T>>(&mut deserializer) {
        Ok(_) => Err(Problem::invalid("body", "expected nothing after the JSON object")),
        Err(error) => {
            let path = error.path().to_string();
            let place = if path == "." { "body".to_owned() } else { path };
            Err(describe(&place, error.inner()))
        }
    }
}

fn describe(place: &str, error: &serde_json::Error) -> Problem {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let text = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
    if !error.is_data() {
        return Problem::invalid("body", &format!("expected valid JSON, but at line {line}, column {column}: {text}"));
    }
    if let Some((_, expected)) = text.split_once(", expected ") {
        let expected = if expected == "a sequence" { "an array" } else { expected };
        return Problem::invalid(place, &format!("expected {expected}"));
    }
    let quoted = text.split('`').nth(1).unwrap_or_default();
    let inner = if place == "body" { quoted.to_owned() } else { format!("{place}.{quoted}") };
    if text.starts_with("missing field") {
        Problem::invalid(&inner, "is missing")
    } else if text.starts_with("duplicate field") {
        // The path already ends with the field that is there twice.
        let place = if place.ends_with(quoted) { place } else { &inner };
        Problem::invalid(place, "is there twice")
    } else {
        Problem::invalid(place, "cannot be read")
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use http_body_util::BodyExt;

    use super::*;

    async fn message(body: &str) -> String {
        let response = import_entries(body.as_bytes()).expect_err(body).into_response();
        assert_eq!(response.status(), 400);
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        let json: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        json["message"].as_str().expect("a text").to_owned()
    }

    #[tokio::test]
    async fn a_fault_is_told_with_its_place_and_without_the_text_there() {
        for (body, expected) in [
            (r#"{"entries":[{"email":"a@b.de"},{"email":5}]}"#, "entries[1].email: expected a string"),
            (r#"{"entries":[{"email":null}]}"#, "entries[0].email: expected a string"),
            (r#"{"entries":[{"email":"a@b.de","type":7}]}"#, "entries[0].type: expected a string"),
            (r#"{"entries":[{"email":"a@b.de","reason":["secret@example.com"]}]}"#, "entries[0].reason: expected a string"),
            (r#"{"entries":[{}]}"#, "entries[0].email: is missing"),
            (r#"{"entries":[{"email":"a@b.de","email":"c@d.de"}]}"#, "entries[0].email: is there twice"),
            (r#"{"entries":["secret@example.com"]}"#, "entries[0]: expected an object"),
            (r#"{"entries":[["a@b.de"]]}"#, "entries[0]: expected an object"),
            (r#"{"entries":{"email":"a@b.de"}}"#, "entries: expected an array"),
            (r#"{"entries":null}"#, "entries: expected an array"),
            (r#"{}"#, "entries: is missing"),
            (r#"[]"#, "body: expected an object"),
            (r#"{"entries":[]}"#, "entries: expected 1 to 10000 entries, got 0"),
            (r#"{"entries":[{"email":"a@b.de"}]} x"#, "body: expected nothing after the JSON object"),
        ] {
            assert_eq!(message(body).await, expected, "{body}");
        }
        for body in ["", "{", r#"{"entries":[{"email":"a@b.de",}]}"#, "\u{1}", r#"{"entries":[{"email":"\u12"}]}"#] {
            assert!(message(body).await.starts_with("body: expected valid JSON, but at line 1"), "{body}: {}", message(body).await);
        }
    }

    #[test]
    fn half_a_surrogate_pair_fails_its_own_entry_alone() {
        let body = [
            br#"{"entries":[{"email":"a@b.de","reason":"\ud83d"},{"email":"\ud83d\ude00"},{"email":""#.as_slice(),
            &[0xff],
            br#""}]}"#,
        ]
        .concat();
        let entries = import_entries(&body).expect("the shape is right");
        assert!(entries[0].reason.contains('\0'));
        assert_eq!(entries[1].email, "\u{1f600}");
        assert!(entries[2].email.contains('\0'));
    }

    #[test]
    fn unknown_fields_are_ignored_and_null_means_the_default() {
        let body = r#"{"x":1,"entries":[{"email":"a@b.de","type":null,"reason":null,"y":[]},{"email":"c.de","type":"domain"},{"email":"d","type":"Domain"}]}"#;
        let entries = import_entries(body.as_bytes()).expect("valid");
        assert_eq!(entries.iter().map(|entry| entry.r#type).collect::<Vec<_>>(), [0, 2, UNKNOWN_TYPE]);
        assert_eq!(entries[0].reason, "");
    }

    #[test]
    fn messages_stay_below_the_limit_and_keep_the_order() {
        let entries: Vec<_> = (0..10_000).map(|i| Entry { email: format!("{i}{}", "x".repeat(800)), ..Entry::default() }).collect();
        let requests = import_requests(entries.clone(), ImportOptions { validate_only: true, ..ImportOptions::default() });
        assert!(requests.len() > 1);
        assert!(requests.iter().all(|request| request.encoded_len() < 4 << 20));
        assert_eq!(requests.iter().filter(|request| request.options.is_some()).count(), 1);
        assert_eq!(requests.into_iter().flat_map(|request| request.entries).collect::<Vec<_>>(), entries);
    }
}
