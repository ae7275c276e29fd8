//! Decodes JSON request bodies straight into the messages of the API.
//!
//! The rules about shape are here: which value is an object or a string, and how many entries a
//! body may have. The service decides what a valid address is. Imports and checks ignore unknown
//! fields. A deletion refuses them, since a misspelled filter would delete everything.

use std::fmt;

use axum::http::HeaderValue;
use serde::{
    Deserialize, Deserializer,
    de::{self, value::MapAccessDeserializer},
};
use utoipa::ToSchema;

use super::{
    answers::EntryType,
    error::Problem,
    query::{Query, timestamp},
};
use crate::{
    files::{Kind, Pack, Packer, time},
    proto::{
        CheckEntriesRequest, DeleteEntriesRequest, Entry, EntryFilter, ImportEntriesRequest, ImportOptions, ListEntriesRequest,
    },
};

/// The public reference's limit of one JSON import. It holds for the addresses of a check or
/// deletion, too.
pub(super) const ENTRIES_MAX: usize = 10_000;

/// The size of one message, with a margin below the service's limit of 4 MiB.
const MESSAGE_BYTES_MAX: usize = 3 << 20;

/// No text of this length can be valid, and the service rejects it all the same when it is cut to
/// this length. So an oversized entry fails alone, and not together with the message that it would
/// not fit into.
const TEXT_BYTES_MAX: usize = 64 << 10;

/// A number that the enum does not have. The service rejects the entry that carries it.
const UNKNOWN_TYPE: i32 = -1;

/// The fields of a deletion.
const DELETE_FIELDS: [&str; 9] =
    ["emails", "selectAll", "search", "type", "entryType", "reason", "createdFrom", "createdTo", "validateOnly"];

/// The error text that marks a list with too many members.
const TOO_MANY: &str = "too many";

/// The values that the visitors here and in serde may expect, with their names in JSON. The rest of
/// an error's text is never passed on, since it may quote the caller.
const EXPECTED: [(&str, &str); 4] =
    [("a string", "a string"), ("a boolean", "true or false"), ("a sequence", "an array"), ("an object", "an object")];

/// The parameters of an import. The last two apply to files only.
pub(super) const IMPORT_PARAMETERS: [&str; 4] = ["validateOnly", "from", "column", "preview"];

/// The options of an import, from its parameters and its idempotency key.
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

/// Decodes the body of a check, `{"emails": […]}`.
pub(super) fn check_request(bytes: &[u8]) -> Result<CheckEntriesRequest, Problem> {
    let CheckBody { emails } = parse(bytes)?;
    Ok(CheckEntriesRequest { emails: addresses(emails)? })
}

/// The addresses to check.
#[derive(Deserialize, ToSchema)]
#[schema(as = CheckRequest)]
pub(super) struct CheckBody {
    /// Addresses, or domains: a text without an `@` is one.
    #[schema(value_type = Vec<String>, min_items = 1, max_items = 10_000)]
    emails: Limited<Text>,
}

/// Decodes the query of a check of one address, `?email=`.
pub(super) fn check_one_request(query: Option<&str>) -> Result<CheckEntriesRequest, Problem> {
    let email = Query::parse(query, &["email"])?.get("email").ok_or_else(|| Problem::invalid("email", "is missing"))?;
    Ok(CheckEntriesRequest { emails: vec![cut(email)] })
}

/// Decodes the body of a deletion, `{"emails": […]}` or `{"selectAll": true, …}`. The service
/// checks that it is exactly one of the two.
pub(super) fn delete_request(bytes: &[u8]) -> Result<DeleteEntriesRequest, Problem> {
    let body: DeleteBody = parse(bytes)?;
    // An empty text filters nothing, so the call would delete everything, which nobody means by it.
    for (field, text) in [("search", &body.search), ("reason", &body.reason)] {
        if text.as_deref() == Some("") {
            return Err(Problem::invalid(field, "expected a text, or to be left out"));
        }
    }
    let time = |field: &str, text: Option<String>| text.map(|text| timestamp(field, &text)).transpose();
    let (created_from, created_to) = (time("createdFrom", body.created_from)?, time("createdTo", body.created_to)?);
    let named_type = match (body.r#type, body.entry_type) {
        (Some(_), Some(_)) => return Err(Problem::invalid("entryType", "expected type or entryType, not both")),
        (Some(name), None) => Some(entry_type("type", &name)?),
        (None, Some(name)) => Some(entry_type("entryType", &name)?),
        (None, None) => None,
    };
    let is_filtered =
        [body.search.is_some(), named_type.is_some(), body.reason.is_some(), created_from.is_some(), created_to.is_some()]
            .contains(&true);
    let filter = EntryFilter {
        r#type: named_type.unwrap_or_default(),
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

/// All fields that a deletion may have. `openapi` makes the two kinds of deletions of them.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct DeleteBody {
    /// The addresses or domains to delete. What is not on the list counts nothing.
    #[serde(default, deserialize_with = "set")]
    #[schema(value_type = Vec<String>, required = true, min_items = 1, max_items = 10_000)]
    emails: Option<Limited<Text>>,
    /// Deletes everything that the filters select; without a filter the whole list.
    #[serde(default)]
    #[schema(required = true)]
    select_all: bool,
    /// Only entries with this text in their address, in any case.
    #[serde(default, deserialize_with = "set")]
    #[schema(nullable = false)]
    search: Option<String>,
    /// Only entries of this type.
    #[serde(default, deserialize_with = "set")]
    #[schema(value_type = EntryType, required = false)]
    r#type: Option<String>,
    /// Another name of `type`, which a list answers.
    #[serde(default, deserialize_with = "set")]
    #[schema(value_type = EntryType, required = false)]
    entry_type: Option<String>,
    /// Only entries with exactly this reason.
    #[serde(default, deserialize_with = "set")]
    #[schema(nullable = false)]
    reason: Option<String>,
    /// Only entries that were stored at this time or later.
    #[serde(default, deserialize_with = "set")]
    #[schema(nullable = false, format = DateTime)]
    created_from: Option<String>,
    /// Only entries that were stored before this time.
    #[serde(default, deserialize_with = "set")]
    #[schema(nullable = false, format = DateTime)]
    created_to: Option<String>,
    /// Counts, and deletes nothing.
    #[serde(default)]
    validate_only: bool,
}

/// Refuses null: a client that sends `"search": null` meant to set it.
fn set<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// The request for one page of `GET /v1/dnc`.
pub(super) fn list_request(query: &Query) -> Result<ListEntriesRequest, Problem> {
    Ok(ListEntriesRequest {
        filter: Some(query.filter()?),
        page_size: query.limit()?,
        page_token: query.get("cursor").unwrap_or_default(),
    })
}

/// The addresses of a body: at least one, and together they fit into a message.
fn addresses(Limited(emails): Limited<Text>) -> Result<Vec<String>, Problem> {
    if emails.is_empty() {
        return Err(wrong_count("emails", "0"));
    }
    let emails: Vec<String> = emails.into_iter().map(|Text(email)| email).collect();
    if emails.iter().map(|email| email.len() + 5).sum::<usize>() > MESSAGE_BYTES_MAX {
        return Err(Problem::too_large(MESSAGE_BYTES_MAX));
    }
    Ok(emails)
}

fn wrong_count(path: &str, got: &str) -> Problem {
    let members = if path == "emails" { "addresses" } else { "entries" };
    Problem::invalid(path, &format!("expected 1 to {ENTRIES_MAX} {members}, got {got}"))
}

/// Decodes the entries of `{"entries": [{"email", "type"?, "reason"?, "unsubscribedAt"?}]}`. The
/// outer error refuses the whole body; an inner one rejects one entry.
pub(super) fn import_entries(bytes: &[u8]) -> Result<Vec<Result<Entry, InvalidTime>>, Problem> {
    let ImportBody { entries: Limited(entries) } = parse(bytes)?;
    if entries.is_empty() {
        return Err(wrong_count("entries", "0"));
    }
    Ok(entries.into_iter().map(|Object(entry)| entry.into_proto()).collect())
}

/// An entry whose `unsubscribedAt` is not a valid time.
#[derive(Debug)]
pub(super) struct InvalidTime;

/// Packs the entries of one import into as few messages as the service's limit on a message allows.
pub(super) fn import_requests(entries: Vec<Result<Entry, InvalidTime>>, options: ImportOptions) -> Vec<ImportEntriesRequest> {
    let mut packer = Packer::new(Some(options), None, ENTRIES_MAX, MESSAGE_BYTES_MAX);
    for entry in entries {
        match entry {
            Ok(entry) => packer.entry(entry),
            Err(InvalidTime) => {
                let message = "The time of the opt-out is none; write it as 2024-06-01T10:00:00Z.";
                packer.invalid("unsubscribe_time", "INVALID_TIME", message);
            }
        }
    }
    std::iter::from_fn(|| packer.flush()).collect()
}

/// The entries to store.
#[derive(Deserialize, ToSchema)]
#[schema(as = ImportRequest)]
pub(super) struct ImportBody {
    #[schema(value_type = Vec<JsonEntry>, min_items = 1, max_items = 10_000)]
    entries: Limited<Object<JsonEntry>>,
}

/// An entry to store. One that breaks a rule is rejected alone, and reported in the answer.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = NewEntry)]
struct JsonEntry {
    /// An address; or a domain, if `type` says so.
    #[schema(value_type = String)]
    email: Text,
    /// `email` (the default) or `domain`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    r#type: JsonEntryType,
    /// Why the address must not be written to: 1 to 64 characters. Well known are `bounce`,
    /// `complaint`, `unsubscribe_link`, `manual` and `import`. The default is that of the call.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    reason: Option<Text>,
    /// When the person opted out, in RFC 3339; not in the future.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    unsubscribed_at: Option<Text>,
}

impl JsonEntry {
    fn into_proto(self) -> Result<Entry, InvalidTime> {
        let Self { email, r#type, reason, unsubscribed_at } = self;
        let unsubscribe_time = unsubscribed_at.map(|Text(text)| time::rfc3339(&text).ok_or(InvalidTime)).transpose()?;
        let reason = reason.unwrap_or_default().0;
        Ok(Entry { email: email.0, r#type: r#type.0, reason, unsubscribe_time, ..Entry::default() })
    }
}

/// Cuts a text to [`TEXT_BYTES_MAX`].
fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    }
    text
}

/// A text of any bytes, cut to [`TEXT_BYTES_MAX`]. Half a surrogate pair (left when a text is cut
/// in the middle of an emoji) and bytes that are not UTF-8 become NUL. The service rejects NUL in
/// every field, so such a text fails its own entry and not the whole body.
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

/// The enum number of an entry type's name, read without allocating a string.
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
                let kind = str::from_utf8(bytes).ok().and_then(Kind::of_name);
                Ok(JsonEntryType(kind.map_or(UNKNOWN_TYPE, Kind::number)))
            }
        }
        deserializer.deserialize_option(Visitor)
    }
}

/// A JSON object and nothing else. The code that serde derives for a struct would also accept an
/// array of its fields.
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

/// An array of at most [`ENTRIES_MAX`] members. Reading stops at the first one beyond that.
struct Limited<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Limited<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Limited<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut members: A) -> Result<Limited<T>, A::Error> {
                let mut kept = Vec::new();
                while let Some(member) = members.next_element()? {
                    if kept.len() == ENTRIES_MAX {
                        return Err(de::Error::custom(TOO_MANY));
                    }
                    kept.push(member);
                }
                Ok(Limited(kept))
            }
        }
        deserializer.deserialize_seq(Visitor(std::marker::PhantomData))
    }
}

/// Decodes a whole body. An error names the path of the fault, and never quotes the text there.
fn parse<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, Problem> {
    if let Ok(Object(value)) = serde_json::from_slice(bytes) {
        return Ok(value);
    }
    // Keeping track of the path costs time, so only a body with a fault is read this way.
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    match serde_path_to_error::deserialize::<_, Object<T>>(&mut deserializer) {
        Ok(_) => Err(Problem::invalid("body", "expected nothing after the JSON object")),
        Err(error) => {
            let path = error.path().to_string();
            let path = if path == "." { "body".to_owned() } else { path };
            Err(describe(&path, error.inner()))
        }
    }
}

fn describe(path: &str, error: &serde_json::Error) -> Problem {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let text = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
    if !error.is_data() {
        // These texts are fixed and quote nothing.
        return Problem::invalid("body", &format!("expected valid JSON, but at line {line}, column {column}: {text}"));
    }
    if text == TOO_MANY {
        return wrong_count(path, "more");
    }
    if let Some((_, expected)) = EXPECTED.iter().find(|(expected, _)| text.ends_with(&format!(", expected {expected}"))) {
        return Problem::invalid(path, &format!("expected {expected}"));
    }
    let quoted = text.split('`').nth(1).unwrap_or_default();
    if text.starts_with("unknown field") {
        return Problem::unknown("field", "body", quoted, &DELETE_FIELDS);
    }
    // In these two errors, the quoted field is one of ours, never the caller's text.
    let inner = if path == "body" { quoted.to_owned() } else { format!("{path}.{quoted}") };
    if text.starts_with("missing field") {
        Problem::invalid(&inner, "is missing")
    } else if text.starts_with("duplicate field") {
        // The path already ends with the duplicate field.
        let path = if path.ends_with(quoted) { path } else { &inner };
        Problem::invalid(path, "is there twice")
    } else {
        Problem::invalid("body", "cannot be read")
    }
}

/// The number of the type of this name, as a filter has it. An error names `field`.
pub(super) fn entry_type(field: &str, name: &str) -> Result<i32, Problem> {
    Kind::of_name(name).map(Kind::number).ok_or_else(|| Problem::invalid(field, "expected email or domain"))
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use http_body_util::BodyExt;

    use super::*;
    use crate::fuzz::spelled;
    use crate::proto::EntryType;

    #[test]
    fn any_bytes_get_an_answer_that_repeats_nothing_of_them() {
        const ALPHABET: [&str; 40] = [
            "{",
            "}",
            "[",
            "]",
            ":",
            ",",
            "{\"",
            "\"}",
            "\":",
            ",\"",
            "\"",
            "\"secret@example.com\"",
            "\"secret@`email`\"",
            "\"email\":",
            "\"emails\":[",
            "\"entries\":[{",
            "\"type\":",
            "\"reason\":",
            "\"selectAll\":",
            "\"search\":",
            "\"createdFrom\":",
            "\"secret@\":",
            "\"domain\"",
            "true",
            "null",
            "7",
            "-1e9",
            "1e999",
            "\\",
            "\\u00",
            "\\ud800",
            "\n",
            " ",
            "x",
            "ü",
            "\0",
            "\"secret@, expected a string\"",
            "\"secret@ at line 1 column 1\"",
            "}]}",
            "\u{feff}",
        ];
        let hold = |bytes: &[u8]| {
            let answers = [
                import_entries(bytes).err().map(Problem::into_message),
                check_request(bytes).err().map(Problem::into_message),
                delete_request(bytes).err().map(Problem::into_message),
            ];
            for message in answers.into_iter().flatten() {
                assert!(!message.contains('@') && !message.contains("secret"), "{message}");
                assert!(message.len() < 300, "{message}");
            }
        };
        bolero::check!(name = "requests").for_each(|bytes| {
            hold(bytes);
            hold(spelled(&bytes[..bytes.len().min(24)], &ALPHABET).as_bytes());
        });
    }

    async fn message(body: &str) -> String {
        let response = import_entries(body.as_bytes()).expect_err(body).into_response();
        assert_eq!(response.status(), 400);
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        let json: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        json["message"].as_str().expect("a text").to_owned()
    }

    #[tokio::test]
    async fn an_error_names_the_path_and_quotes_nothing() {
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

    fn refused_deletion(body: &str) -> String {
        delete_request(body.as_bytes()).expect_err(body).into_message()
    }

    #[test]
    fn a_deletion_refuses_unknown_fields_and_suggests_the_nearest() {
        for (body, expected) in [
            (r#"{"selectAll":true,"serach":"x"}"#, "serach: unknown field; did you mean search? "),
            (r#"{"selectAll":true,"Search":"x"}"#, "Search: unknown field; did you mean search? "),
            (r#"{"selectAll":true,"entry_type":"email"}"#, "entry_type: unknown field; did you mean entryType? "),
            (r#"{"select_all":true}"#, "select_all: unknown field; did you mean selectAll? "),
            (r#"{"selectAll":true,"excludeIds":["1"]}"#, "excludeIds: unknown field; did you mean "),
            (r#"{"selectAll":true,"x@example.com":1}"#, "body: unknown field; did you mean "),
            (r#"{"selectAll":true,"search":null}"#, "search: expected a string"),
            (r#"{"selectAll":null}"#, "selectAll: expected true or false"),
            (r#"{"emails":null}"#, "emails: expected an array"),
            (r#"{"emails":[null]}"#, "emails[0]: expected a string"),
            (r#"{"selectAll":true,"validateOnly":null}"#, "validateOnly: expected true or false"),
            (r#"{"selectAll":true,"search":"a","search":"b"}"#, "search: is there twice"),
            (r#"{"selectAll":true,"type":"email","entryType":"email"}"#, "entryType: expected type or entryType, not both"),
            (r#"{"selectAll":true,"type":"Email"}"#, "type: expected email or domain"),
            (r#"{"selectAll":true,"entryType":""}"#, "entryType: expected email or domain"),
            (r#"{"selectAll":true,"search":""}"#, "search: expected a text"),
            (r#"{"selectAll":1}"#, "selectAll: expected true or false"),
            (r#"{"selectAll":"a, expected bob@example.com"}"#, "selectAll: expected true or false"),
            (r#"[{"selectAll":true}]"#, "body: expected an object"),
            ("null", "body: expected an object"),
            (r#"{"emails":[]}"#, "emails: expected 1 to 10000 addresses, got 0"),
        ] {
            let message = refused_deletion(body);
            assert!(message.starts_with(expected), "{body}: {message}");
        }
        for field in ["type", "entryType"] {
            let request = delete_request(format!(r#"{{"selectAll":true,"{field}":"domain"}}"#).as_bytes()).expect("known");
            assert_eq!(request.filter.expect("a filter").r#type(), EntryType::Domain);
        }
        let bare = delete_request(br#"{"selectAll":true}"#).expect("the documented request");
        assert!(bare.all && bare.filter.is_none());
    }

    #[test]
    fn reading_stops_at_the_first_member_too_many() {
        for (field, member, parse) in [
            ("entries", r#"{"email":"a@b.de"}"#, (|body| import_entries(body).map(|_| ())) as fn(&[u8]) -> Result<(), Problem>),
            ("emails", r#""a@b.de""#, |body| check_request(body).map(|_| ())),
            ("emails", r#""a@b.de""#, |body| delete_request(body).map(|_| ())),
        ] {
            let body = |count: usize, end: &str| format!("{{\"{field}\":[{}{end}", vec![member; count].join(","));
            assert!(parse(body(10_000, "]}").as_bytes()).is_ok());
            // Nothing after the first member too many is read.
            for end in ["]}", ",[[[["] {
                let message = parse(body(10_001, end).as_bytes()).expect_err("too many").into_message();
                assert!(
                    message.starts_with(&format!("{field}: expected 1 to 10000 ")) && message.ends_with("got more"),
                    "{message}"
                );
            }
        }
    }

    #[test]
    fn no_error_quotes_the_caller() {
        const SECRET: &str = "secret";
        let texts = [
            format!("{SECRET}.de"),
            format!("{SECRET}@example.com"),
            format!("a, expected {SECRET}@example.com"),
            format!("`{SECRET}@x.de`"),
            format!("unknown field `{SECRET}.de`"),
            format!("x, expected `{SECRET}.de`, a string"),
            format!("missing field `{SECRET}.de` at line 1 column 5"),
        ];
        let mut values: Vec<String> = vec!["null".into(), "1".into(), "-1.5e9".into(), "true".into(), "[]".into(), "{}".into()];
        for text in &texts {
            let text = serde_json::to_string(text).expect("a text");
            values.extend([
                text.clone(),
                format!("[{text}]"),
                format!("[[{text}]]"),
                format!("{{{text}:{text}}}"),
                format!("{{\"email\":{text},\"email\":{text}}}"),
                format!("[{{\"email\":[{text}]}}]"),
                format!("[{{{text}:1}}]"),
                format!("{{\"{SECRET}@x.de\":1,\"{SECRET}@x.de\":2}}"),
                format!("{text}{text}"),
            ]);
        }
        let mut keys: Vec<String> = DELETE_FIELDS.iter().map(|field| format!("\"{field}\"")).collect();
        keys.push("\"entries\"".into());
        keys.extend(texts.iter().map(|text| serde_json::to_string(text).expect("a text")));
        let mut bodies = values.clone();
        for key in &keys {
            for value in &values {
                bodies.extend([
                    format!("{{{key}:{value}}}"),
                    format!("{{\"selectAll\":true,{key}:{value}}}"),
                    format!("{{{key}:{value},{key}:{value}}}"),
                    format!("{{{key}:[{value},{value}]}}"),
                    format!("{{{key}:{value}"),
                    format!("{{{key} {value}}}"),
                ]);
            }
        }
        for body in bodies {
            let bytes = body.as_bytes();
            let faults = [
                import_entries(bytes).err().map(Problem::into_message),
                check_request(bytes).err().map(Problem::into_message),
                delete_request(bytes).err().map(Problem::into_message),
            ];
            for fault in faults.into_iter().flatten() {
                assert!(!fault.contains(SECRET), "{body}: {fault}");
            }
        }
    }

    fn entries(body: &[u8]) -> Vec<Entry> {
        let entries = import_entries(body).expect("the shape is right");
        entries.into_iter().map(|entry| entry.expect("a time")).collect()
    }

    #[test]
    fn half_a_surrogate_pair_fails_its_own_entry_alone() {
        let body = [
            br#"{"entries":[{"email":"a@b.de","reason":"\ud83d"},{"email":"\ud83d\ude00"},{"email":""#.as_slice(),
            &[0xff],
            br#""}]}"#,
        ]
        .concat();
        let entries = entries(&body);
        assert!(entries[0].reason.contains('\0'));
        assert_eq!(entries[1].email, "\u{1f600}");
        assert!(entries[2].email.contains('\0'));
    }

    #[test]
    fn unknown_fields_are_ignored_and_null_means_the_default() {
        let body = r#"{"x":1,"entries":[{"email":"a@b.de","type":null,"reason":null,"y":[]},{"email":"c.de","type":"domain"},{"email":"d","type":"Domain"}]}"#;
        let entries = entries(body.as_bytes());
        assert_eq!(entries.iter().map(|entry| entry.r#type).collect::<Vec<_>>(), [0, 2, UNKNOWN_TYPE]);
        assert_eq!(entries[0].reason, "");
    }

    #[test]
    fn an_invalid_time_fails_its_own_entry_with_its_position() {
        let body = r#"{"entries":[{"email":"a@b.de","unsubscribedAt":"2024-06-01T12:00:00+02:00"},{"email":"c@d.de","unsubscribedAt":"2024-06-01"},{"email":"e@f.de","unsubscribedAt":null}]}"#;
        let requests = import_requests(import_entries(body.as_bytes()).expect("valid"), ImportOptions::default());
        let [request] = requests.as_slice() else { panic!("one message") };
        let times: Vec<_> = request.entries.iter().map(|entry| entry.unsubscribe_time.map(|time| time.seconds)).collect();
        assert_eq!(times, [Some(1_717_236_000), None]);
        let unreadable = &request.unreadable[0];
        assert_eq!(
            (unreadable.position, unreadable.field.as_str(), unreadable.code.as_str()),
            (1, "unsubscribe_time", "INVALID_TIME")
        );
    }
}
