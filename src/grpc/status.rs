//! The one place where a domain error becomes a gRPC status, and is logged if somebody has to look at it.
//!
//! Every status carries `google.rpc.ErrorInfo`; see the proto's header for the reasons.

use std::{collections::HashMap, error::Error as _, time::Duration};

use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt};

use crate::domain::{Error, Tally};

const DOMAIN: &str = "dnc";

/// How long a caller should wait before it tries again when nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Turns an error into a status.
pub(super) fn from_error(error: Error) -> Status {
    with_metadata(error, HashMap::new())
}

/// Turns an error that ended an import into a status which says how far the import came.
pub(super) fn of_import(error: Error, tally: &Tally) -> Status {
    let counts = [("imported", tally.imported), ("skipped", tally.skipped), ("failed", tally.failed)];
    with_metadata(error, counts.map(|(name, count)| (name.to_owned(), count.to_string())).into())
}

/// Turns a status that tonic made while it read a call's messages into an error of ours.
pub(super) fn of_message(status: &Status) -> Error {
    match status.code() {
        Code::OutOfRange | Code::ResourceExhausted => {
            Error::invalid("message", "A message is larger than 4 MiB. Send the entries in several messages of one stream.")
        }
        Code::Internal | Code::InvalidArgument | Code::DataLoss => Error::invalid(
            "message",
            "A message is not valid protobuf of the method's request type, or uses a compression that is not offered.",
        ),
        Code::Unimplemented => Error::invalid("message", "Messages must not be compressed."),
        _ => Error::Cancelled,
    }
}

fn with_metadata(error: Error, metadata: HashMap<String, String>) -> Status {
    let message = error.to_string();
    let (code, reason) = match &error {
        Error::Invalid { .. } => (Code::InvalidArgument, "INVALID"),
        Error::Unauthenticated(_) => (Code::Unauthenticated, "UNAUTHENTICATED"),
        Error::Forbidden(_) => (Code::PermissionDenied, "FORBIDDEN"),
        Error::NotFound(_) => (Code::NotFound, "NOT_FOUND"),
        Error::Conflict(_) => (Code::FailedPrecondition, "CONFLICT"),
        Error::Exhausted { .. } => (Code::ResourceExhausted, "EXHAUSTED"),
        Error::Unavailable { .. } => (Code::Unavailable, "UNAVAILABLE"),
        Error::Timeout { .. } => (Code::DeadlineExceeded, "TIMEOUT"),
        Error::Cancelled => (Code::Cancelled, "CANCELLED"),
        Error::Unimplemented => (Code::Unimplemented, "UNIMPLEMENTED"),
        Error::Internal { .. } => (Code::Internal, "INTERNAL"),
    };
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    let mut headers = MetadataMap::new();
    match &error {
        Error::Invalid { field, message } => {
            details.add_bad_request_violation(field, message);
        }
        Error::Exhausted { retry_after, .. } => {
            details.set_retry_info(Some(*retry_after));
        }
        Error::Unavailable { .. } | Error::Timeout { .. } => {
            details.set_retry_info(Some(RETRY_AFTER));
        }
        Error::Unauthenticated(_) => {
            headers.insert("www-authenticate", tonic::metadata::MetadataValue::from_static("Bearer"));
        }
        Error::Forbidden(_)
        | Error::NotFound(_)
        | Error::Conflict(_)
        | Error::Cancelled
        | Error::Unimplemented
        | Error::Internal { .. } => {}
    }
    match error.source() {
        Some(source) if code == Code::Internal => tracing::error!(cause = %chain(source), "internal error"),
        Some(source) => tracing::warn!(%reason, cause = %chain(source), "call failed"),
        None => {}
    }
    Status::with_error_details_and_metadata(code, message, details, headers)
}

/// What the source and its own sources say. A message of PostgreSQL may quote a value in its detail, which `Display` leaves out.
fn chain(source: &dyn std::error::Error) -> String {
    let mut text = source.to_string();
    let mut next = source.source();
    while let Some(inner) = next {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        next = inner.source();
    }
    text
}
