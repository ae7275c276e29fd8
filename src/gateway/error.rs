//! Turns every error into an HTTP answer: `{"error", "message", "code"}`, with `details` when there
//! is more to say. No other module makes error responses. The text of a status is passed on only if
//! the status comes from the service itself. Other statuses are described by their code, since
//! their text may contain anything.

use std::collections::HashMap;

use axum::{
    Json,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::StatusExt;
use utoipa::ToSchema;

use super::call::pass_back;
use crate::{telemetry, wire::budget::Exhausted};

/// The supported content encodings, for `Accept-Encoding`.
const ENCODINGS: &str = "gzip, zstd";

/// The domain in the details of a status that the service itself made.
const DOMAIN: &str = "dnc";

/// The HTTP name of each field that the service names in an error, and the message to send instead
/// of the service's where that speaks of fields of the gRPC API.
const FIELDS: [(&str, &str, Option<&str>); 13] = [
    ("emails", "emails", Some("Send either emails with 1 to 10,000 addresses, or selectAll with true.")),
    (
        "filter",
        "emails",
        Some("The fields search, type, reason, createdFrom and createdTo go with selectAll, not with emails. Leave them out."),
    ),
    ("filter.type", "type", None),
    ("filter.reason", "reason", None),
    ("filter.search", "search", None),
    ("filter.create_time_from", "createdFrom", None),
    ("filter.create_time_to", "createdTo", None),
    ("page_token", "cursor", Some("The cursor is damaged, or was made for another filter or workspace. Begin again without one.")),
    ("page_size", "limit", None),
    ("options.default_reason", "reason", None),
    (
        "options.request_id",
        "Idempotency-Key",
        Some("The key has at most 128 characters, and no control characters. Send a shorter one."),
    ),
    ("x-workspace-id", "X-Workspace-Id", None),
    ("message", "body", Some("The body is too large for one call, or cannot be read. Send it in several requests.")),
];

/// The longest name of a field or parameter that is quoted in an answer.
const NAME_CHARS_MAX: usize = 40;

/// An error response.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    message: String,
    details: Option<Box<Details>>,
    /// The headers of the service's answer; some of them are passed back to the caller.
    metadata: Option<Box<MetadataMap>>,
    retry_after_secs: Option<u64>,
}

/// The body of every error.
#[derive(Serialize, ToSchema)]
#[schema(as = Error)]
pub(super) struct ErrorBody {
    /// The status in words.
    error: &'static str,
    /// What is wrong and what to do, for people. It never repeats an address or a key.
    message: String,
    /// The status.
    #[schema(minimum = 400, maximum = 599)]
    code: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    details: Option<Box<Details>>,
}

/// What a program can use of an error. Each field is there only if it has something to say.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
#[schema(as = ErrorDetails)]
struct Details {
    /// Why the service rejects the call, such as `UNAUTHENTICATED`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, pattern = "^[A-Z_]+$")]
    reason: Option<String>,
    /// The fields, parameters or headers that are wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    fields: Vec<WrongField>,
    #[serde(flatten)]
    stored: Stored,
}

/// A field, parameter or header that is wrong.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
struct WrongField {
    /// Its name or path, such as `entries[17].email`.
    field: String,
    /// What is wrong with it.
    message: String,
}

/// What an import has done until it failed. The import can be sent again.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
struct Stored {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    imported: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    skipped: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    failed: Option<u64>,
}

impl Stored {
    /// Reads the counts that the service sends with the status of an import.
    fn of(metadata: &HashMap<String, String>) -> Self {
        let count = |name: &str| metadata.get(name)?.parse().ok();
        Self { imported: count("imported"), skipped: count("skipped"), failed: count("failed") }
    }
}

impl Problem {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), details: None, metadata: None, retry_after_secs: None }
    }

    /// 400: the request must be changed at `place`, as `what` says.
    pub(super) fn invalid(place: &str, what: &str) -> Self {
        let mut problem = Self::new(StatusCode::BAD_REQUEST, format!("{place}: {what}"));
        problem.details = Some(Box::new(Details {
            reason: Some("INVALID".to_owned()),
            fields: vec![WrongField { field: place.to_owned(), message: what.to_owned() }],
            ..Details::default()
        }));
        problem
    }

    /// 400: the request has a field or parameter that is not `known`. Its name is quoted only if it
    /// can be neither an address nor a key; otherwise `place` is named.
    pub(super) fn unknown(what: &str, place: &str, name: &str, known: &[&str]) -> Self {
        let is_harmless = (1..=NAME_CHARS_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
            && !name.contains("sk_");
        let place = if is_harmless { name } else { place };
        // `created_from` and `Created-From` mean createdFrom. Long texts are cut, since comparing
        // them takes long.
        let plain = |name: &str| -> String {
            name.chars().filter(|c| c.is_alphanumeric()).take(NAME_CHARS_MAX).flat_map(char::to_lowercase).collect()
        };
        let meant = plain(name);
        let Some(nearest) = known.iter().min_by_key(|known| strsim::osa_distance(&meant, &plain(known))) else {
            return Self::invalid(place, &format!("unknown {what}; this call takes no {what}s"));
        };
        Self::invalid(place, &format!("unknown {what}; did you mean {nearest}? Known are {}.", known.join(", ")))
    }

    /// Adds what the service reported when the call was cancelled because of this problem: the rest
    /// of the caller's rate limit, and what was stored until then.
    pub(super) fn with_outcome_of(mut self, cancelled: &Status) -> Self {
        if let Some(info) = cancelled.get_error_details().error_info().filter(|info| info.domain == DOMAIN) {
            let stored = Stored::of(&info.metadata);
            if [stored.imported, stored.skipped, stored.failed].iter().any(|count| count.is_some_and(|count| count > 0)) {
                self.details.get_or_insert_default().stored = stored;
            }
        }
        self.with_metadata(cancelled.metadata().clone())
    }

    /// Sets the service's headers; some of them are passed back to the caller.
    pub(super) fn with_metadata(self, metadata: MetadataMap) -> Self {
        Self { metadata: Some(Box::new(metadata)), ..self }
    }

    /// The message, without the JSON around it.
    pub(super) fn into_message(self) -> String {
        self.message
    }

    pub(super) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "There is no such path. The calls are under /v1/dnc.")
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "This path does not take that method; the Allow header names those that it takes.",
        )
    }

    pub(super) fn media_type() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "Send the body as Content-Type: application/json; imports and checks also take application/x-ndjson and text/csv.",
        )
    }

    pub(super) fn encoding() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("Send the body as it is, or with one Content-Encoding of these: {ENCODINGS}."),
        )
    }

    pub(super) fn not_decompressed() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "The body is not what its Content-Encoding says, or breaks off. Pack it again, and send the whole request again.",
        )
    }

    pub(super) fn window() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "The window of the body's zstd frame is larger than 8 MiB. Pack it with a smaller one (zstd --long=23, or no --long at all).",
        )
    }

    pub(super) fn expands_too_much(times_max: u64) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The body decompresses to more than {times_max} times its size. Send it as it is, without a Content-Encoding."),
        )
    }

    pub(super) fn too_large(bytes_max: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The body is larger than {bytes_max} bytes. Send the entries in several requests."),
        )
    }

    pub(super) fn timed_out() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "The body stopped coming. Send the whole request again.")
    }

    pub(super) fn broken_body() -> Self {
        Self::new(StatusCode::BAD_REQUEST, "The body broke off before its end. Send the whole request again.")
    }

    pub(super) fn not_ready() -> Self {
        Self::unavailable("The service is not ready: its database is away or not migrated.")
    }

    pub(super) fn busy() -> Self {
        Self::unavailable("Too much is in work at the moment. Send the whole request again a little later.")
    }

    pub(super) fn silent() -> Self {
        Self::unavailable("The service did not answer in time. Send the request again; what is stored is skipped.")
    }

    pub(super) fn draining() -> Self {
        Self::unavailable("This server is shutting down. Send the request again.")
    }

    fn unavailable(message: &str) -> Self {
        Self { retry_after_secs: Some(2), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    pub(super) fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "Something went wrong inside the service. Report it with the X-Request-Id of this answer.",
        )
    }
}

impl From<Exhausted> for Problem {
    fn from(_: Exhausted) -> Self {
        Self::busy()
    }
}

/// Whether the service refused to admit the caller.
pub(super) fn is_refusal(status: &Status) -> bool {
    let named = |field: &str| {
        let details = status.get_error_details();
        details.bad_request().is_some_and(|request| request.field_violations.iter().any(|violation| violation.field == field))
    };
    matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied | Code::ResourceExhausted) || named("x-workspace-id")
}

/// The HTTP name and message for a field and message of the service. See [`FIELDS`].
fn in_http_terms<'a>(field: &'a str, message: &'a str) -> (&'a str, &'a str) {
    match FIELDS.iter().find(|(name, ..)| *name == field) {
        Some((_, field, words)) => (field, words.unwrap_or(message)),
        None => (field, message),
    }
}

/// The answer to a request whose head cannot be read or is too large (400, 414, 431). For the HTTP
/// server, since such a request never reaches the router.
pub fn unreadable(status: StatusCode) -> Response {
    let message = match status {
        StatusCode::URI_TOO_LONG => "The request's target is too long. Send a long list of addresses in the body of a POST.",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "The request has too many headers, or they are too large. Send fewer.",
        _ => "The request cannot be read as HTTP. Send a well-formed request.",
    };
    let mut response = Problem::new(status, message).into_response();
    response.headers_mut().insert(telemetry::REQUEST_ID, telemetry::request_id(&HeaderMap::new()));
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

impl From<Status> for Problem {
    fn from(cause: Status) -> Self {
        let (status, fallback) = match cause.code() {
            Code::InvalidArgument | Code::OutOfRange => (StatusCode::BAD_REQUEST, "The request is not valid."),
            Code::FailedPrecondition => (StatusCode::UNPROCESSABLE_ENTITY, "The request does not fit what is there."),
            Code::Unauthenticated => (StatusCode::UNAUTHORIZED, "The call needs a valid API key in X-Api-Key."),
            Code::PermissionDenied => (StatusCode::FORBIDDEN, "This API key may not do that."),
            Code::NotFound => (StatusCode::NOT_FOUND, "There is no such thing."),
            Code::AlreadyExists | Code::Aborted => (StatusCode::CONFLICT, "The request conflicts with another one. Send it again."),
            Code::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "Too many requests. Send the request again later."),
            // REST callers see no difference between a database that is slow and one that is
            // unreachable: they must do the same.
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                (StatusCode::SERVICE_UNAVAILABLE, "The service cannot be reached at the moment. Send the request again later.")
            }
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss | Code::Unimplemented => {
                if cause.code() != Code::Internal {
                    tracing::error!(code = ?cause.code(), text = cause.message(), "unforeseen status");
                }
                return Self::internal();
            }
        };
        let details = cause.get_error_details();
        let Some(info) = details.error_info().filter(|info| info.domain == DOMAIN) else {
            tracing::warn!(code = ?cause.code(), text = cause.message(), "a status that is not the service's own");
            let retry_after_secs = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(2);
            return Self { retry_after_secs, ..Self::new(status, fallback) };
        };
        let mut shown = Details { reason: Some(info.reason.clone()), stored: Stored::of(&info.metadata), ..Details::default() };
        let mut message = cause.message().to_owned();
        if let Some(bad_request) = details.bad_request() {
            let violations = bad_request.field_violations.iter();
            let fields: Vec<_> = violations.map(|violation| in_http_terms(&violation.field, &violation.description)).collect();
            if let [(field, words)] = fields.as_slice() {
                message = format!("{field}: {words}");
            }
            let fields = fields.into_iter();
            shown.fields = fields.map(|(field, words)| WrongField { field: field.to_owned(), message: words.to_owned() }).collect();
        }
        let retry_after = details.retry_info().and_then(|retry| retry.retry_delay);
        Self {
            status,
            message,
            details: Some(Box::new(shown)),
            retry_after_secs: retry_after.map(|delay| delay.as_secs().max(1)),
            metadata: Some(Box::new(cause.metadata().clone())),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: self.status.canonical_reason().unwrap_or("Error"),
            message: self.message,
            code: self.status.as_u16(),
            details: self.details,
        };
        let mut response = (self.status, Json(body)).into_response();
        if let Some(metadata) = &self.metadata {
            response = pass_back(metadata, response);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            // RFC 9110, section 15.5.16.
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static(ENCODINGS));
        }
        if let Some(secs) = self.retry_after_secs {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(secs));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use serde_json::{Value, json};

    use super::*;

    /// The text of a string literal at the start of `code`.
    fn literal(code: &str) -> Option<&str> {
        code.trim_start().strip_prefix('"')?.split('"').next()
    }

    fn is_proto_word(word: &str) -> bool {
        let word = word.trim_matches(|c: char| !c.is_alphanumeric());
        (word.contains('_') || word.contains('.'))
            && word.bytes().all(|byte| byte.is_ascii_lowercase() || matches!(byte, b'_' | b'.'))
    }

    /// The HTTP status of each code. A new code does not compile until it is added here.
    fn expected(code: Code) -> u16 {
        match code {
            Code::InvalidArgument | Code::OutOfRange => 400,
            Code::Unauthenticated => 401,
            Code::PermissionDenied => 403,
            Code::NotFound => 404,
            Code::AlreadyExists | Code::Aborted => 409,
            Code::FailedPrecondition => 422,
            Code::ResourceExhausted => 429,
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss | Code::Unimplemented => 500,
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => 503,
        }
    }

    fn json_of(body: axum::body::Body) -> Value {
        let bytes = http_body_util::BodyExt::collect(body);
        let bytes = futures_util::FutureExt::now_or_never(bytes).expect("whole").expect("whole").to_bytes();
        serde_json::from_slice(&bytes).expect("JSON")
    }

    #[test]
    fn every_code_has_its_http_status_and_foreign_messages_are_not_quoted() {
        for code in (0..=16).map(Code::from) {
            let foreign = Problem::from(Status::new(code, "secret"));
            assert_eq!(foreign.status.as_u16(), expected(code), "{code:?}");
            assert!(!foreign.message.contains("secret") && foreign.details.is_none());
            assert_eq!(foreign.retry_after_secs, (expected(code) == 503).then_some(2));

            let mut details =
                tonic_types::ErrorDetails::with_error_info("REASON", DOMAIN, [("imported".to_owned(), "3".to_owned())]);
            details.set_retry_info(Some(std::time::Duration::from_millis(1)));
            let ours = Problem::from(Status::with_error_details(code, "Do this.", details));
            assert_eq!(ours.status.as_u16(), expected(code), "{code:?}");
            if expected(code) == 500 {
                assert!(ours.message.starts_with("Something went wrong") && ours.details.is_none());
                continue;
            }
            assert_eq!(ours.message, "Do this.");
            assert_eq!(json!(ours.details), json!({ "reason": "REASON", "imported": 3 }));
            assert_eq!(ours.retry_after_secs, Some(1), "never at once");
        }
    }

    #[test]
    fn a_status_that_nobody_foresaw_is_logged() {
        for code in (0..=16).map(Code::from) {
            let expected = match code {
                // The service has logged its cause.
                Code::Internal => String::new(),
                _ if expected(code) == 500 => format!("ERROR unforeseen status code={code:?} text=\"secret\"\n"),
                _ => format!(" WARN a status that is not the service's own code={code:?} text=\"secret\"\n"),
            };
            assert_eq!(telemetry::logged(|| drop(Problem::from(Status::new(code, "secret")))), expected);
        }
    }

    #[test]
    fn a_wrong_field_is_named_for_programs_too() {
        let details = json!(Problem::invalid("email", "is missing").details);
        assert_eq!(details, json!({ "reason": "INVALID", "fields": [{ "field": "email", "message": "is missing" }] }));
    }

    #[test]
    fn a_problem_tells_what_was_stored_until_then() {
        for (domain, count, stored) in [(DOMAIN, 3, Some(3)), (DOMAIN, 0, None), ("other", 3, None)] {
            let counts = [("imported".to_owned(), count.to_string())];
            let details = tonic_types::ErrorDetails::with_error_info("CANCELLED", domain, counts);
            let mut cancelled = Status::with_error_details(Code::Cancelled, "", details);
            cancelled.metadata_mut().insert("x-ratelimit-limit", "7".parse().expect("a value"));
            let problem = Problem::busy().with_outcome_of(&cancelled);
            assert_eq!(problem.details.as_ref().and_then(|details| details.stored.imported), stored, "{domain} {count}");
            assert_eq!(problem.details.is_some(), stored.is_some(), "{domain} {count}");
            assert_eq!(problem.into_response().headers()["x-ratelimit-limit"], "7");
        }
    }

    #[test]
    fn only_a_caller_who_is_not_admitted_is_refused() {
        let invalid = |field: &str| {
            let mut details = tonic_types::ErrorDetails::with_error_info("INVALID", DOMAIN, []);
            details.add_bad_request_violation(field, "Mend it.");
            Status::with_error_details(Code::InvalidArgument, "Mend it.", details)
        };
        assert!(is_refusal(&invalid("x-workspace-id")));
        assert!(!is_refusal(&invalid("emails")));
        for code in (0..=16).map(Code::from) {
            assert_eq!(is_refusal(&Status::new(code, "")), matches!(expected(code), 401 | 403 | 429), "{code:?}");
        }
    }

    #[test]
    fn a_request_that_cannot_be_read_is_answered_with_what_to_do() {
        for (status, words) in [
            (StatusCode::BAD_REQUEST, "Send a well-formed request."),
            (StatusCode::URI_TOO_LONG, "Send a long list of addresses in the body of a POST."),
            (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "Send fewer."),
        ] {
            let response = unreadable(status);
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
            assert!(response.headers().contains_key(telemetry::REQUEST_ID));
            let message = json_of(response.into_body())["message"].take();
            assert!(message.as_str().is_some_and(|message| message.ends_with(words)), "{message}");
        }
    }

    #[test]
    fn an_error_response_repeats_its_status_in_head_and_body() {
        for (problem, header) in [
            (Problem::invalid("email", "is missing"), None),
            (Problem::from(Status::unauthenticated("")), Some(("www-authenticate", "Bearer"))),
            (Problem::encoding(), Some(("accept-encoding", ENCODINGS))),
            (Problem::draining(), Some(("retry-after", "2"))),
        ] {
            let (status, has_details) = (problem.status, problem.details.is_some());
            let message = problem.message.clone();
            let (parts, body) = problem.into_response().into_parts();
            assert_eq!(parts.status, status);
            if let Some((name, value)) = header {
                assert_eq!(parts.headers[name], value);
            }
            assert_eq!(parts.headers.contains_key("www-authenticate"), status == StatusCode::UNAUTHORIZED);
            assert_eq!(parts.headers.contains_key("accept-encoding"), status == StatusCode::UNSUPPORTED_MEDIA_TYPE);
            let json = json_of(body);
            assert_eq!((&json["error"], &json["message"]), (&json!(status.canonical_reason()), &json!(message)));
            assert_eq!(json["code"], status.as_u16());
            assert_eq!(json.get("details").is_some(), has_details);
        }
    }

    #[test]
    fn every_field_that_the_service_names_has_a_name_in_http() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut named = Vec::new();
        for room in ["grpc", "domain"] {
            for file in fs::read_dir(src.join(room)).into_iter().flatten().flatten() {
                let text = fs::read_to_string(file.path()).unwrap_or_default();
                let code = text.split("#[cfg(test)]").next().unwrap_or_default();
                for call in ["invalid(", "time_of("] {
                    named.extend(code.split(call).skip(1).filter_map(literal).map(str::to_owned));
                }
                for start in ["\"filter.", "\"options."] {
                    named.extend(
                        code.split(start)
                            .skip(1)
                            .map(|rest| format!("{}{}", &start[1..], rest.split('"').next().unwrap_or_default())),
                    );
                }
            }
        }
        assert!(named.iter().any(|field| field == "page_token") && named.iter().any(|field| field == "filter.create_time_to"));
        for field in named {
            let (http, words) = in_http_terms(&field, "…");
            assert!(FIELDS.iter().any(|(known, ..)| *known == field), "{field} has no name in HTTP");
            assert!(!http.contains('_') && !http.contains('.'), "{http}");
            assert!(!words.split_whitespace().any(is_proto_word), "{words}");
        }
    }

    #[test]
    fn field_names_and_messages_of_grpc_become_those_of_http() {
        let details = tonic_types::ErrorDetails::with_error_info("INVALID", "dnc", []);
        let mut details = details;
        details.add_bad_request_violation("page_token", "The page token is damaged.");
        let problem = Problem::from(Status::with_error_details(Code::InvalidArgument, "The page token is damaged.", details));
        assert!(problem.message.starts_with("cursor: The cursor is damaged"), "{}", problem.message);
        assert!(!format!("{:?}", problem.details).contains("page"), "{:?}", problem.details);
    }
}
