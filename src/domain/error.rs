//! The errors of a call, classified by what the caller should do. Knows no transport and no
//! database.

use std::{error::Error as StdError, time::Duration};

type Source = Box<dyn StdError + Send + Sync>;

/// Why a call failed. The display text is sent to the caller; a `source` goes to the log only.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is invalid; `field` names the part to change.
    #[error("{message}")]
    Invalid {
        /// The field at fault, by the name that callers use.
        field: String,
        /// What to change.
        message: String,
    },
    /// The call has no valid key.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The key is valid, but does not permit this call.
    #[error("{0}")]
    Forbidden(&'static str),
    /// The named resource does not exist.
    #[error("{0}")]
    NotFound(&'static str),
    /// The request is valid, but conflicts with an earlier one.
    #[error("{0}")]
    Conflict(&'static str),
    /// A limit was exceeded; a later attempt may succeed.
    #[error("{message}")]
    Exhausted {
        /// Which limit.
        message: &'static str,
        /// The delay before another attempt.
        retry_after: Duration,
    },
    /// The service or its database is unavailable. The request itself is valid.
    #[error("{message}")]
    Unavailable {
        /// What is unavailable.
        message: &'static str,
        /// The cause, for the log.
        #[source]
        source: Option<Source>,
    },
    /// Something took too long.
    #[error("{message}")]
    Timeout {
        /// What took too long.
        message: &'static str,
        /// The cause, for the log.
        #[source]
        source: Option<Source>,
    },
    /// The caller cancelled the call.
    #[error("The caller broke the call off.")]
    Cancelled,
    /// The method does not exist.
    #[error("There is no such method. Ask server reflection for those that exist.")]
    Unimplemented,
    /// An internal error of the service.
    #[error("Something went wrong inside the service. Report it with the x-request-id of this answer.")]
    Internal {
        /// The cause, for the log.
        #[source]
        source: Source,
    },
}

impl Error {
    /// An invalid request; `field` is the part to change.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), message: message.into() }
    }

    /// The same error for another call that shared the work. The source stays with the first one.
    pub fn shared(&self) -> Self {
        match self {
            Self::Invalid { field, message } => Self::Invalid { field: field.clone(), message: message.clone() },
            Self::Unauthenticated(message) => Self::Unauthenticated(message),
            Self::Forbidden(message) => Self::Forbidden(message),
            Self::NotFound(message) => Self::NotFound(message),
            Self::Conflict(message) => Self::Conflict(message),
            Self::Exhausted { message, retry_after } => Self::Exhausted { message, retry_after: *retry_after },
            Self::Unavailable { message, .. } => Self::Unavailable { message, source: None },
            Self::Timeout { message, .. } => Self::Timeout { message, source: None },
            Self::Cancelled => Self::Cancelled,
            Self::Unimplemented => Self::Unimplemented,
            Self::Internal { source } => Self::internal(source.to_string()),
        }
    }

    /// An internal error of the service, with its cause for the log.
    pub fn internal(source: impl Into<Source>) -> Self {
        Self::Internal { source: source.into() }
    }
}
