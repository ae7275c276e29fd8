//! Why an entry is rejected: the causes, with their codes and messages.

use time::Duration;

/// The longest reason, in characters after trimming.
pub const REASON_CHARS_MAX: usize = 64;

/// How far a time may be ahead of this server's clock. Clocks differ, and an entry is not rejected
/// for that.
pub(super) const CLOCK_SKEW: Duration = Duration::seconds(10);

/// The rule that an entry breaks. Other entries of the import are not affected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not an e-mail address, with the cause.
    InvalidEmail(&'static str),
    /// Not a domain, with the cause.
    InvalidDomain(&'static str),
    /// A domain entry for a public suffix, which would block every domain under it.
    PublicSuffix,
    /// The type is neither `email` nor `domain`.
    InvalidType,
    /// The reason is too long, or has a control character.
    InvalidReason,
    /// The time of the opt-out is not a time, or is in the future.
    InvalidTime,
}

/// An entry that was rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its index in the import, counted from 0.
    pub index: u64,
    /// The line of the file that it came from; 0 when the sender gave none.
    pub line: u64,
    /// Why.
    pub cause: Cause,
}

/// Why an entry was rejected: by a rule, or because its sender could not read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The entry breaks a rule.
    Failure(Failure),
    /// The sender reported that it could not read the entry. The texts are the sender's.
    Unreadable {
        /// The field at fault; empty when it is the whole line.
        field: String,
        /// The code that callers branch on.
        code: String,
        /// A sentence for people.
        message: String,
    },
}

impl Failure {
    /// The code that callers branch on.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidEmail(_) => "INVALID_EMAIL",
            Self::InvalidDomain(_) => "INVALID_DOMAIN",
            Self::PublicSuffix => "PUBLIC_SUFFIX",
            Self::InvalidType => "INVALID_TYPE",
            Self::InvalidReason => "INVALID_REASON",
            Self::InvalidTime => "INVALID_TIME",
        }
    }

    /// The field at fault.
    pub fn field(self) -> &'static str {
        match self {
            Self::InvalidEmail(_) | Self::InvalidDomain(_) | Self::PublicSuffix => "email",
            Self::InvalidType => "type",
            Self::InvalidReason => "reason",
            Self::InvalidTime => "unsubscribe_time",
        }
    }

    /// A sentence for people, without the address.
    pub fn message(self) -> String {
        match self {
            Self::InvalidEmail(why) => format!("The e-mail address {why}."),
            Self::InvalidDomain(why) => format!("The domain entry {why}."),
            Self::PublicSuffix => {
                "The domain entry is a public suffix and would block every domain under it; name the domains themselves.".to_owned()
            }
            Self::InvalidType => "The type is neither email nor domain.".to_owned(),
            Self::InvalidReason => format!("The reason must have 1 to {REASON_CHARS_MAX} characters and no control characters."),
            Self::InvalidTime => "The time of the opt-out is not a time, or is in the future.".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_a_code_a_field_and_a_message() {
        let suffix = "The domain entry is a public suffix and would block every domain under it; name the domains themselves.";
        for (failure, code, field, message) in [
            (Failure::InvalidEmail("is empty"), "INVALID_EMAIL", "email", "The e-mail address is empty."),
            (Failure::InvalidDomain("is empty"), "INVALID_DOMAIN", "email", "The domain entry is empty."),
            (Failure::PublicSuffix, "PUBLIC_SUFFIX", "email", suffix),
            (Failure::InvalidType, "INVALID_TYPE", "type", "The type is neither email nor domain."),
            (
                Failure::InvalidReason,
                "INVALID_REASON",
                "reason",
                "The reason must have 1 to 64 characters and no control characters.",
            ),
            (
                Failure::InvalidTime,
                "INVALID_TIME",
                "unsubscribe_time",
                "The time of the opt-out is not a time, or is in the future.",
            ),
        ] {
            assert_eq!((failure.code(), failure.field(), failure.message()), (code, field, message.to_owned()));
        }
    }
}
