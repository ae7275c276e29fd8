//! JSON to proto and back, all of it. Bodies are decoded straight into the proto's own messages.
//!
//! Here stand the rules about shape (what is an object, what is a string, how many entries a body may have); what an address may be is the
//! service's business.

use std::fmt;

use prost::Message;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, value::MapAccessDeserializer},
};

use super::error::Problem;
use crate::proto::{Entry, EntryType, ImportEntriesRequest, ImportEntriesResponse, ImportOptions};

/// The public reference's limit of one JSON import.
const ENTRIES_MAX: usize = 10_000;

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

/// Reads `?name=true|false`; false when it is not there.
pub(super) fn query_flag(query: Option<&str>, name: &str) -> Result<bool, Problem> {
    let mut values = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()).filter(|(key, _)| key == name);
    match (values.next().as_ref().map(|(_, value)| value.as_ref()), values.next()) {
        (None, _) | (Some("false"), None) => Ok(false),
        (Some("true"), None) => Ok(true),
        (Some(_), _) => Err(Problem::invalid(name, "expected true or false, once")),
    }
}

/// The entries of `{"entries": [{"email", "type"?, "reason"?}]}`.
pub(super) fn import_entries(bytes: &[u8]) -> Result<Vec<Entry>, Problem> {
    let ImportBody { entries } = parse(bytes)?;
    if entries.is_empty() || entries.len() > ENTRIES_MAX {
        return Err(Problem::invalid("entries", &format!("expected 1 to {ENTRIES_MAX} entries, got {}", entries.len())));
    }
    Ok(entries
        .into_iter()
        .map(|Object(JsonEntry { email, r#type, reason })| Entry {
            email: cut(email),
            r#type: r#type.0,
            reason: cut(reason.unwrap_or_default()),
            ..Entry::default()
        })
        .collect())
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
    struct Data {
        imported: u64,
        skipped: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        failed: Option<u64>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        errors: Vec<Failure>,
    }
    #[derive(Serialize)]
    struct Failure {
        index: u64,
        field: String,
        code: String,
        message: String,
    }
    let errors = answer.errors.into_iter();
    Data {
        imported: answer.imported,
        skipped: answer.skipped,
        failed: (answer.failed > 0).then_some(answer.failed),
        errors: errors
            .map(|error| Failure { index: error.index, field: error.field, code: error.code, message: error.message })
            .collect(),
    }
}

#[derive(Deserialize)]
struct ImportBody {
    entries: Vec<Object<JsonEntry>>,
}

#[derive(Deserialize)]
struct JsonEntry {
    email: String,
    #[serde(default)]
    r#type: JsonEntryType,
    #[serde(default)]
    reason: Option<String>,
}

fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    }
    text
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
                deserializer.deserialize_str(self)
            }

            fn visit_str<E>(self, text: &str) -> Result<JsonEntryType, E> {
                Ok(JsonEntryType(match text {
                    "email" => EntryType::Email.into(),
                    "domain" => EntryType::Domain.into(),
                    _ => UNKNOWN_TYPE,
                }))
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
        for body in ["", "{", r#"{"entries":[{"email":"a@b.de",}]}"#, "\u{1}", r#"{"entries":[{"email":"\ud800"}]}"#] {
            assert!(message(body).await.starts_with("body: expected valid JSON, but at line 1"), "{body}: {}", message(body).await);
        }
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
