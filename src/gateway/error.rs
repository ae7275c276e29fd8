//! The one place where something that went wrong becomes an HTTP answer: `{"error", "message", "code"}`, with `details` when there
//! is more to say. What a status says is passed on only if the status is the service's own; others are described by their code.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{body::ENCODINGS, pass_back};

/// A request that was not answered.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    message: String,
    details: Option<Value>,
    /// Carries headers that go back to the caller.
    cause: Option<Status>,
    retry_after_secs: Option<u64>,
}

impl Problem {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), details: None, cause: None, retry_after_secs: None }
    }

    /// The request must be changed at `place`.
    pub(super) fn invalid(place: &str, what: &str) -> Self {
        let mut problem = Self::new(StatusCode::BAD_REQUEST, format!("{place}: {what}"));
        problem.details = Some(json!({ "reason": "INVALID", "fields": [{ "field": place, "message": what }] }));
        problem
    }

    /// What it says, without the form around it.
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
            "Send the body as Content-Type: application/json; an import also takes application/x-ndjson and text/csv.",
        )
    }

    pub(super) fn encoding() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("Send the body as it is, or with one Content-Encoding of these: {ENCODINGS}."),
        )
    }

    pub(super) fn not_unpacked() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "The body is not what its Content-Encoding says, or breaks off. Pack it again, and send the whole request again.",
        )
    }

    pub(super) fn expands_too_much(times_max: u64) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The body unpacks to more than {times_max} times its size. Send it as it is, without a Content-Encoding."),
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

impl From<Status> for Problem {
    fn from(cause: Status) -> Self {
        let (status, fallback) = match cause.code() {
            Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
                (StatusCode::BAD_REQUEST, "The request is not valid.")
            }
            Code::Unauthenticated => (StatusCode::UNAUTHORIZED, "The call needs a valid API key in X-Api-Key."),
            Code::PermissionDenied => (StatusCode::FORBIDDEN, "This API key may not do that."),
            Code::NotFound => (StatusCode::NOT_FOUND, "There is no such thing."),
            Code::AlreadyExists | Code::Aborted => (StatusCode::CONFLICT, "The request conflicts with another one. Send it again."),
            Code::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "Too many requests. Send the request again later."),
            // A database that is too slow is away as far as a REST caller is concerned: what helps is the same.
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                (StatusCode::SERVICE_UNAVAILABLE, "The service cannot be reached at the moment. Send the request again later.")
            }
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss | Code::Unimplemented => {
                if cause.code() != Code::Internal {
                    tracing::error!(code = ?cause.code(), message = cause.message(), "unforeseen status");
                }
                return Self::internal();
            }
        };
        let details = cause.get_error_details();
        let Some(info) = details.error_info().filter(|info| info.domain == "dnc") else {
            tracing::warn!(code = ?cause.code(), message = cause.message(), "a status that is not the service's own");
            let retry_after_secs = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(2);
            return Self { retry_after_secs, ..Self::new(status, fallback) };
        };
        let mut shown = Map::from_iter([("reason".to_owned(), json!(info.reason))]);
        for (name, value) in &info.metadata {
            let number = value.parse::<u64>().map_or_else(|_| json!(value), |number| json!(number));
            shown.insert(name.clone(), number);
        }
        let mut message = cause.message().to_owned();
        if let Some(bad_request) = details.bad_request() {
            let fields = bad_request.field_violations.iter();
            let fields: Vec<_> = fields.map(|field| json!({ "field": field.field, "message": field.description })).collect();
            if let [only] = bad_request.field_violations.as_slice() {
                message = format!("{}: {}", only.field, message);
            }
            shown.insert("fields".to_owned(), fields.into());
        }
        let retry_after = details.retry_info().and_then(|retry| retry.retry_delay);
        Self {
            status,
            message,
            details: Some(shown.into()),
            retry_after_secs: retry_after.map(|delay| delay.as_secs().max(1)),
            cause: Some(cause),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Body<'a> {
            error: &'a str,
            message: &'a str,
            code: u16,
            #[serde(skip_serializing_if = "Option::is_none")]
            details: Option<Value>,
        }
        let body = Body {
            error: self.status.canonical_reason().unwrap_or("Error"),
            message: &self.message,
            code: self.status.as_u16(),
            details: self.details,
        };
        let mut response = (self.status, Json(body)).into_response();
        if let Some(cause) = &self.cause {
            response = pass_back(cause.metadata(), response);
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
