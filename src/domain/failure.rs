//! The ways in which an entry can be refused.

/// The longest reason, in characters after trimming.
pub(super) const REASON_CHARS_MAX: usize = 64;

/// Why an entry was refused. Stops nothing but the entry itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not an e-mail address, with the cause.
    InvalidEmail(&'static str),
    /// Not a domain, with the cause.
    InvalidDomain(&'static str),
    /// A domain entry that would block every domain under a public suffix.
    PublicSuffix,
    /// Neither `email` nor `domain`.
    InvalidType,
    /// Too long, or with a control character.
    InvalidReason,
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
        }
    }

    /// The field at fault.
    pub fn field(self) -> &'static str {
        match self {
            Self::InvalidEmail(_) | Self::InvalidDomain(_) | Self::PublicSuffix => "email",
            Self::InvalidType => "type",
            Self::InvalidReason => "reason",
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_says_its_field_and_cause() {
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
        ] {
            assert_eq!((failure.code(), failure.field(), failure.message()), (code, field, message.to_owned()));
        }
    }
}
