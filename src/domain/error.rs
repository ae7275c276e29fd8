//! What can go wrong with a call, said so that the caller knows what to do. Knows no transport and no database.

use std::{error::Error as StdError, time::Duration};

type Source = Box<dyn StdError + Send + Sync>;

/// A call that cannot be answered. The text of each goes to the caller; a `source` goes to the log alone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request must be changed; `field` names the place.
    #[error("{message}")]
    Invalid {
        /// The field at fault, as the caller knows it.
        field: String,
        /// What to change.
        message: String,
    },
    /// No valid key came with the call.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The key is good, but not for this.
    #[error("{0}")]
    Forbidden(&'static str),
    /// The thing named does not exist.
    #[error("{0}")]
    NotFound(&'static str),
    /// The request is in order, but not after what was done before.
    #[error("{0}")]
    Conflict(&'static str),
    /// Too much at once; a later try may pass.
    #[error("{message}")]
    Exhausted {
        /// What was too much.
        message: &'static str,
        /// When to try again.
        retry_after: Duration,
    },
    /// The service or its database is away for now; nothing is wrong with the request.
    #[error("{message}")]
    Unavailable {
        /// What is away.
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
    /// The caller went away.
    #[error("The caller broke the call off.")]
    Cancelled,
    /// There is no such method.
    #[error("There is no such method. Ask server reflection for those that exist.")]
    Unimplemented,
    /// A fault of this service.
    #[error("Something went wrong inside the service. Report it with the request id.")]
    Internal {
        /// The cause, for the log.
        #[source]
        source: Source,
    },
}

impl Error {
    /// A request that must be changed at `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), message: message.into() }
    }

    /// The same error for another call that shared the work; the cause stays with the first.
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

    /// A fault of this service, with its cause for the log.
    pub fn internal(source: impl Into<Source>) -> Self {
        Self::Internal { source: source.into() }
    }
}
