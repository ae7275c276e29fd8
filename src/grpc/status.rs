//! The only module where a domain error becomes a gRPC status. Errors with a cause are logged here.
//!
//! Every status carries `google.rpc.ErrorInfo`; the reasons are listed at the head of `dnc.proto`.

use std::{collections::HashMap, error::Error as _, time::Duration};

use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt};

use super::metered;
use crate::domain::{Error, Tally};

const DOMAIN: &str = "dnc";

/// How long a caller should wait before it tries again, when the error does not say.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Turns an error into a status.
pub(super) fn from_error(error: Error) -> Status {
    with_metadata(error, HashMap::new())
}

/// Turns an error that ended an import into a status that carries the counts so far.
pub(super) fn of_import(error: Error, tally: &Tally) -> Status {
    let counts = [("imported", tally.imported), ("skipped", tally.skipped), ("failed", tally.failed)];
    with_metadata(error, counts.map(|(name, count)| (name.to_owned(), count.to_string())).into())
}

/// Turns a status that came in place of a call's next message, most often from tonic, into a domain
/// error.
pub(super) fn of_message(status: &Status) -> Error {
    if let Some(error) = metered::error_of(status) {
        return error;
    }
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

/// The messages of `source` and of its own sources. The detail of a PostgreSQL error may quote a
/// value, but `Display` omits it.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry;

    /// One error of each kind.
    fn every_error() -> Vec<Error> {
        vec![
            Error::invalid("field", "Mend it."),
            Error::Unauthenticated("Send a key."),
            Error::Forbidden("Not yours."),
            Error::NotFound("Not there."),
            Error::Conflict("Not now."),
            Error::Exhausted { message: "Too much.", retry_after: Duration::from_secs(7) },
            Error::Unavailable { message: "Away.", source: Some("cause".into()) },
            Error::Timeout { message: "Too slow.", source: None },
            Error::Cancelled,
            Error::Unimplemented,
            Error::internal("cause"),
        ]
    }

    /// The status of each. A new kind does not compile until it is added here; add it above as
    /// well.
    fn expected(error: &Error) -> (Code, &'static str, Option<u64>) {
        match error {
            Error::Invalid { .. } => (Code::InvalidArgument, "INVALID", None),
            Error::Unauthenticated(_) => (Code::Unauthenticated, "UNAUTHENTICATED", None),
            Error::Forbidden(_) => (Code::PermissionDenied, "FORBIDDEN", None),
            Error::NotFound(_) => (Code::NotFound, "NOT_FOUND", None),
            Error::Conflict(_) => (Code::FailedPrecondition, "CONFLICT", None),
            Error::Exhausted { .. } => (Code::ResourceExhausted, "EXHAUSTED", Some(7)),
            Error::Unavailable { .. } => (Code::Unavailable, "UNAVAILABLE", Some(2)),
            Error::Timeout { .. } => (Code::DeadlineExceeded, "TIMEOUT", Some(2)),
            Error::Cancelled => (Code::Cancelled, "CANCELLED", None),
            Error::Unimplemented => (Code::Unimplemented, "UNIMPLEMENTED", None),
            Error::Internal { .. } => (Code::Internal, "INTERNAL", None),
        }
    }

    #[test]
    fn every_error_has_its_status() {
        for error in every_error() {
            let (code, reason, retry_secs) = expected(&error);
            let message = error.to_string();
            let is_invalid = matches!(error, Error::Invalid { .. });
            let status = from_error(error);
            assert_eq!((status.code(), status.message()), (code, message.as_str()));
            let details = status.get_error_details();
            let info = details.error_info().expect("every status has one");
            assert_eq!((info.reason.as_str(), info.domain.as_str(), info.metadata.len()), (reason, "dnc", 0));
            let retry = details.retry_info().and_then(|retry| retry.retry_delay);
            assert_eq!(retry, retry_secs.map(Duration::from_secs), "{reason}");
            let fields = details.bad_request().map(|request| &request.field_violations);
            assert_eq!(fields.is_some_and(|fields| fields[0].field == "field" && fields[0].description == "Mend it."), is_invalid);
            let bearer = status.metadata().get("www-authenticate").is_some_and(|value| value == "Bearer");
            assert_eq!(bearer, code == Code::Unauthenticated);
            assert!(!format!("{status:?}").contains("cause"), "a cause goes to the log only");
        }
    }

    #[test]
    fn a_cause_is_logged_as_an_error_only_if_the_fault_is_ours() {
        for error in every_error() {
            let expected = match expected(&error) {
                (Code::Internal, ..) => "ERROR internal error cause=cause\n",
                (Code::Unavailable, ..) => " WARN call failed reason=UNAVAILABLE cause=cause\n",
                _ => "",
            };
            assert_eq!(telemetry::logged(|| drop(from_error(error))), expected);
        }
    }

    #[test]
    fn the_status_of_an_import_carries_its_counts() {
        let tally = Tally { imported: 3, skipped: 2, failed: 1, ..Tally::default() };
        let status = of_import(Error::Cancelled, &tally);
        let details = status.get_error_details();
        let metadata = &details.error_info().expect("every status has one").metadata;
        let count = |name: &str| metadata.get(name).map(String::as_str);
        assert_eq!((count("imported"), count("skipped"), count("failed")), (Some("3"), Some("2"), Some("1")));
    }

    #[test]
    fn a_message_that_cannot_be_decoded_is_invalid() {
        for (code, expected) in [
            (Code::OutOfRange, "larger than 4 MiB"),
            (Code::ResourceExhausted, "larger than 4 MiB"),
            (Code::Internal, "not valid protobuf"),
            (Code::InvalidArgument, "not valid protobuf"),
            (Code::DataLoss, "not valid protobuf"),
            (Code::Unimplemented, "must not be compressed"),
            (Code::Cancelled, "broke the call off"),
            (Code::Unknown, "broke the call off"),
        ] {
            let error = of_message(&Status::new(code, ""));
            assert!(error.to_string().contains(expected), "{code:?}: {error}");
            assert_eq!(matches!(error, Error::Invalid { .. }), expected != "broke the call off");
        }
    }

    #[test]
    fn causes_are_reported_in_order() {
        let inner = Error::Unavailable { message: "Away.", source: Some("refused".into()) };
        let outer = Error::internal(inner);
        assert_eq!(chain(&outer), format!("{outer}: Away.: refused"));
    }
}
